"""Improved MeanFlow M/2 (174M when sampling) on ImageNet 256x256, 640 epochs.

  python main.py --config=configs/imagenet_imf_m2.py --workdir=runs/imagenet_imf_m2

Published FID-50K, 1-NFE (arXiv 2512.02012): 2.27, inception score 258, with guidance 10.5 for t in
[0.4, 0.6].
"""

from ml_collections import ConfigDict

from configs import imagenet_imf


def get_config() -> ConfigDict:
  """The preset."""
  config = imagenet_imf.get_config()
  config.model.update(imagenet_imf.SIZES["M"])
  config.sample.guidance.update(omega=10.5, t_min=0.4, t_max=0.6)
  return config
