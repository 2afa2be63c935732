"""MeanFlow XL/2+ (676M) on ImageNet 256x256, 1000 epochs, for two steps.

  python main.py --config=configs/imagenet_xl2_plus.py --workdir=runs/imagenet_xl2_plus

Published FID-50K, 2-NFE (arXiv 2505.13447, Table 2): 2.20.
"""

from ml_collections import ConfigDict

from configs import base, imagenet


def get_config() -> ConfigDict:
  """The preset."""
  config = imagenet.get_config()
  config.model.update(base.DIT["XL"], patch_size=2)
  config.method.guidance.update(omega=1.0, kappa=0.5, t_start=0.3, t_end=0.8)
  config.sample.nfe = 2
  config.evaluate.nfe = (2,)
  config.train.steps = imagenet.epochs(config, 1000)
  return config
