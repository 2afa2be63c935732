"""MeanFlow B/4 (131M) on ImageNet 256x256, 80 epochs: the network of the paper's ablations.

  python main.py --config=configs/imagenet_b4.py --workdir=runs/imagenet_b4

Published FID-50K, 1-NFE (Table 1 of arXiv 2505.13447): 61.06 as it stands, without guidance;
15.53 with --config.method.guidance.omega=3. The authors' JAX code: 60.75 without guidance, 18.70
with omega 1 and kappa 0.5. Forward pass: 11 GFLOP per image.
"""

from ml_collections import ConfigDict

from configs import base, imagenet


def get_config() -> ConfigDict:
  """The preset."""
  config = imagenet.get_config()
  config.model.update(base.DIT["B"], patch_size=4)
  config.train.steps = imagenet.epochs(config, 80)
  return config
