"""Your own folder of images, 64x64: a DiT-S/4 (33M) in pixel space, unconditional.

  python main.py --config=configs/folder.py --workdir=runs/mine --config.data.folder.path=PATH

With one sub-folder per class, here for 5 classes, it learns them too, with guidance:

  ... --config.data.num_classes=5 --config.method.label_dropout.rate=0.1
      --config.method.guidance.omega=2

Needs a GPU or TPU for more than a try: about 9 GFLOP per image and forward pass, some ten
thousand images, 100,000 steps.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """The preset."""
  config = base.get_config()
  config.data.update(source="folder", image_size=64, channels=3, num_classes=0, flip=True)
  config.model.update(base.DIT["S"], patch_size=4)
  config.method.label_dropout.rate = 0.0
  config.optimizer.warmup_steps = 1_000
  config.train.update(batch_size=128, log_every=50, checkpoint_every=2_000, sample_every=2_000)
  config.ema.update(decays=(0.9995,), ramp=True)
  config.sample.update(count=64, ema=0.9995)
  return config
