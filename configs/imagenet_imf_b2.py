"""Improved MeanFlow B/2 (89M when sampling) on ImageNet 256x256, 640 epochs.

  python main.py --config=configs/imagenet_imf_b2.py --workdir=runs/imagenet_imf_b2

Published FID-50K, 1-NFE (arXiv 2512.02012): 3.39, inception score 255, with guidance 8 for t in
[0.4, 0.65].
"""

from ml_collections import ConfigDict

from configs import imagenet_imf


def get_config() -> ConfigDict:
  """The preset."""
  config = imagenet_imf.get_config()
  config.model.update(imagenet_imf.SIZES["B"])
  config.sample.guidance.update(omega=8.0, t_min=0.4, t_max=0.65)
  return config
