"""Improved MeanFlow XL/2 (610M when sampling) on ImageNet 256x256, 640 epochs.

  python main.py --config=configs/imagenet_imf_xl2.py --workdir=runs/imagenet_imf_xl2

Published FID-50K (arXiv 2512.02012): 1.72 with 1-NFE, inception score 282, with guidance 8 for t in
[0.42, 0.62]; 1.54 with 2-NFE, with guidance 4 for t in [0.36, 0.64]:

  --config.evaluate.nfe=2, --config.sample.guidance.omega=4
  --config.sample.guidance.t_min=0.36 --config.sample.guidance.t_max=0.64
"""

from ml_collections import ConfigDict

from configs import imagenet_imf


def get_config() -> ConfigDict:
  """The preset."""
  config = imagenet_imf.get_config()
  config.model.update(imagenet_imf.SIZES["XL"])
  config.sample.guidance.update(omega=8.0, t_min=0.42, t_max=0.62)
  return config
