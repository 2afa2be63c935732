"""What the presets of improved MeanFlow on ImageNet 256x256 share (arXiv 2512.02012).

Batch 1024, 640 epochs, Adam (0.9, 0.95) at 1e-4 after 10 epochs of warm-up, EMA 0.9999, r = t on
50 % of the rows, guidance scales on [1, 8] with density 1 / omega. That exponent is published for
B/2 alone, and taken for all sizes.
"""

from ml_collections import ConfigDict

from configs import imagenet

# Depth counts the shared blocks and those of one head.
SIZES = {
  "B": {"depth": 12, "width": 768, "num_heads": 12},
  "M": {"depth": 24, "width": 768, "num_heads": 12},
  "L": {"depth": 32, "width": 1024, "num_heads": 16},
  "XL": {"depth": 48, "width": 1024, "num_heads": 16},
}


def get_config() -> ConfigDict:
  """The shared part, with a B/2 and no guidance when sampling."""
  config = imagenet.get_config()
  config.model.update(SIZES["B"], name="in_context_dit", patch_size=2)
  config.model.update(conditioning=("h",), positions="none")
  config.method.name = "improved_meanflow"
  config.method.times.equal_fraction = 0.5
  config.train.batch_size = 1024
  config.train.steps = imagenet.epochs(config, 640)
  config.optimizer.warmup_steps = imagenet.epochs(config, 10)
  return config
