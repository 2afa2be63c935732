"""MeanFlow on CIFAR-10, unconditional, 32x32: the DDPM++ U-Net (56M) with the better times.

  python main.py --config=configs/cifar10.py --workdir=runs/cifar10

Expected FID-50K, 1-NFE, after 800,000 steps: about 2.80 (the authors' later code). What to expect
of earlier steps (100k, 400k) is not published; the run measures itself every 100,000 steps.
`configs/cifar10_paper.py` has the times of the paper, and 2.92 (arXiv 2505.13447, Table 3).

The data, once, where TensorFlow is installed (reading it takes none):

  python -c "import tensorflow_datasets as tfds; \\
    tfds.builder('cifar10', file_format='array_record').download_and_prepare()"

and Inception's weights as the README says (or --config.evaluate.count=0). Statistics of the real
images are made of the 50,000 training images. Images are rounded as by the authors,
floor(255 (x + 1) / 2), and FID has TensorFlow's convention of its inputs.

With classes: --config.data.num_classes=10. A forward pass takes 42 GFLOP per image, and a step 3.75
forward passes.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """The preset."""
  config = base.get_config()
  config.data.update(source="tfds", image_size=32, channels=3, num_classes=0, flip=True)
  config.augmentation.update(probability=0.12, flip=True)
  config.model.name = "unet"
  config.method.times.update(mean=-0.6, std=1.6, r_mean=-4.0, r_std=1.6, pairing="clipped")
  config.method.times.equal_fraction = 0.25
  config.method.label_dropout.rate = 0.0
  config.method.weight.update(p=0.75, c=1e-3)
  config.optimizer.update(learning_rate=6e-4, warmup_steps=10_000, b1=0.9, b2=0.999)
  config.ema.decays = (0.9999, 0.99995, 0.9996)
  config.train.update(batch_size=1024, steps=800_000, checkpoint_every=10_000)
  config.train.update(sample_every=10_000, evaluate_every=100_000)
  config.sample.update(count=100, batch_size=1024, ema=0.9999, rounding="adm")
  config.evaluate.update(count=50_000, nfe=(1,), ema=config.ema.decays)
  config.evaluate.update(extractors=("inception",), figures=("frechet",))
  config.evaluate.inception.inputs = "tensorflow"
  return config
