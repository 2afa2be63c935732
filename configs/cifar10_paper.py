"""MeanFlow on CIFAR-10 as in the paper (arXiv 2505.13447, Table 3 and appendix A).

  python main.py --config=configs/cifar10_paper.py --workdir=runs/cifar10_paper

Published FID-50K, 1-NFE: 2.92, after 800,000 steps. All else is said in `configs/cifar10.py`, which
draws the times otherwise and does better.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
  """The preset."""
  config = cifar10.get_config()
  config.method.times.update(mean=-2.0, std=2.0, r_mean=-2.0, r_std=2.0, pairing="sorted")
  return config
