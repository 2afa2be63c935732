"""What the ImageNet 256x256 presets share: latents of SD-VAE ft-mse and the paper's recipe.

Batch 256, Adam (0.9, 0.95) at a constant 1e-4, EMA 0.9999, r = t on 75 % of the rows, no flips:
the defaults of configs/base.py (arXiv 2505.13447, Table 4).
"""

from ml_collections import ConfigDict

from configs import base

IMAGES = 1_281_167


def get_config() -> ConfigDict:
  """The shared part, with a B/2."""
  config = base.get_config()
  config.data.update(source="latents", image_size=32, channels=4, num_classes=1000)
  config.data.latents.path = "data/imagenet256_latents"
  config.checkpoint.keep_every = 100_000
  config.autoencoder.path = "weights/sd-vae-ft-mse"
  config.sample.count = 64
  config.evaluate.update(count=50_000, nfe=(1,), extractors=("inception",))
  config.evaluate.figures = ("frechet", "inception_score")
  config.evaluate.statistics.inception = "weights/imagenet256_statistics.npz"
  return config


def epochs(config: ConfigDict, count: int) -> int:
  """The steps of so many passes over the training images."""
  return count * IMAGES // config.train.batch_size
