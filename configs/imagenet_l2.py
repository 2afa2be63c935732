"""MeanFlow L/2 (459M) on ImageNet 256x256, 240 epochs.

  python main.py --config=configs/imagenet_l2.py --workdir=runs/imagenet_l2

Published FID-50K, 1-NFE (arXiv 2505.13447, Table 2): 3.84.
"""

from ml_collections import ConfigDict

from configs import base, imagenet


def get_config() -> ConfigDict:
  """The preset."""
  config = imagenet.get_config()
  config.model.update(base.DIT["L"], patch_size=2)
  config.method.guidance.update(omega=0.2, kappa=0.92, t_end=0.8)
  config.train.steps = imagenet.epochs(config, 240)
  return config
