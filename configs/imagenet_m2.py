"""MeanFlow M/2 (308M) on ImageNet 256x256, 240 epochs.

  python main.py --config=configs/imagenet_m2.py --workdir=runs/imagenet_m2

Published FID-50K, 1-NFE (arXiv 2505.13447, Table 2): 5.01.
"""

from ml_collections import ConfigDict

from configs import base, imagenet


def get_config() -> ConfigDict:
  """The preset."""
  config = imagenet.get_config()
  config.model.update(base.DIT["M"], patch_size=2)
  config.method.guidance.update(omega=1.0, kappa=0.5)
  config.train.steps = imagenet.epochs(config, 240)
  return config
