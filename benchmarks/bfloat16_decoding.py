"""What decoding in bfloat16 changes: levels of 8-bit images, and a Frechet distance.

  python benchmarks/bfloat16_decoding.py [--count=64] [--side=16] [--batch=4]
    [--autoencoder=FOLDER] [--inception=FILE]

The same latents are decoded in float32 and in bfloat16. The yardstick is the distance between two
sets of the same size decoded in float32 from latents of different seeds. Without the published
weights (a folder, and a converted file) networks of full size have random ones, and the figures
say how rounding spreads in them but not what it does to natural images. Latents are normal with the
standard deviation that scaled latents have.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from meanflow_jax.generate import ROUNDING
from meanflow_jax.metrics.moments import Moments, frechet_distance
from meanflow_jax.models import autoencoder, inception
from meanflow_jax.runtime import pretrained
from tests.fill import filled

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden"
COUNT = flags.DEFINE_integer("count", 64, "Images of each set.", lower_bound=2)
SIDE = flags.DEFINE_integer("side", 16, "Side of the latents, an eighth of the images'.")
BATCH = flags.DEFINE_integer("batch", 4, "Images per call.", lower_bound=1)
AUTOENCODER = flags.DEFINE_string("autoencoder", None, "Folder of the published autoencoder.")
INCEPTION = flags.DEFINE_string("inception", None, "Converted file of the published Inception.")
ROUND = flags.DEFINE_enum("rounding", "meanflow", sorted(ROUNDING), "From images to 8 bits.")

Stage = Callable[[np.ndarray], np.ndarray]


def main(_: list[str]) -> None:
  config, tensors = autoencoder_weights()
  exact, rounded = (decoder(config, tensors, dtype) for dtype in autoencoder.DTYPES)
  features = extractor()
  moments = {"float32": [], "bfloat16": [], "another seed": []}
  levels = Levels()
  for latents, others in zip(batches(seed=0), batches(seed=1), strict=True):
    images = {
      "float32": exact(latents),
      "bfloat16": rounded(latents),
      "another seed": exact(others),
    }
    levels.add(images["float32"], images["bfloat16"])
    for name, images_ in images.items():
      moments[name].append(features(images_))
  levels.report()
  sets = {name: Moments.of(np.concatenate(parts)) for name, parts in moments.items()}
  print(f"Frechet distances of {COUNT.value} and {COUNT.value} images, from float32 to")
  for name in ("bfloat16", "another seed"):
    print(f"  {name:14}{frechet_distance(sets['float32'], sets[name]):.4g}")


class Levels:
  """Differences between two sets of 8-bit images, added up."""

  def __init__(self):
    self.differences = np.zeros(256, np.int64)  # how many there are of each size
    self.values = np.zeros(256, np.int64)

  def add(self, a: np.ndarray, b: np.ndarray) -> None:
    difference = np.abs(a.astype(np.int16) - b)
    self.differences += np.bincount(difference.ravel(), minlength=256)
    self.values += np.bincount(a.ravel(), minlength=256)

  def report(self) -> None:
    shares = self.differences / self.differences.sum()
    values = self.values / self.values.sum()
    mean = values @ np.arange(256)
    spread = np.sqrt(values @ (np.arange(256) - mean) ** 2)
    print(f"levels in float32: mean {mean:.1f}, standard deviation {spread:.1f}, ", end="")
    print(f"{values[0] + values[255]:.2%} at 0 or 255")
    print(f"levels that differ in bfloat16: {1 - shares[0]:.2%}; by more than 1: ", end="")
    print(f"{shares[2:].sum():.3%}; on average by {shares @ np.arange(256):.4f}, ", end="")
    print(f"at most by {np.flatnonzero(shares).max()}")


def batches(seed: int) -> Iterator[np.ndarray]:
  """Scaled latents."""
  rng = np.random.default_rng(seed)
  for first in range(0, COUNT.value, BATCH.value):
    size = min(BATCH.value, COUNT.value - first)
    yield rng.standard_normal((size, SIDE.value, SIDE.value, 4), np.float32)


def autoencoder_weights() -> tuple[dict, dict[str, np.ndarray]]:
  if AUTOENCODER.value:
    return pretrained.load(AUTOENCODER.value, pretrained.AUTOENCODER)
  print("the autoencoder's weights are random, not the published ones")
  with np.load(GOLDEN / "autoencoder_sd.npz") as golden:
    return json.loads(str(golden["meta"]))["config"], filled(json.loads(str(golden["tensors"])))


def decoder(config: dict, tensors: dict[str, np.ndarray], dtype: str) -> Stage:
  """From scaled latents to 8-bit images."""
  network = autoencoder.from_config(config, dtype)
  params = jax.device_put(autoencoder.params_from_torch(network, tensors))

  @jax.jit
  def decode(params: autoencoder.Params, latents: jax.Array) -> jax.Array:
    latents = autoencoder.unscale_latents(latents)
    images = network.apply({"params": params}, latents, method="decode")
    return ROUNDING[ROUND.value](images).astype(jnp.uint8)

  return lambda latents: np.asarray(decode(params, latents))


def extractor() -> Stage:
  if INCEPTION.value:
    tensors, origin = pretrained.load_inception(INCEPTION.value)
    print(f"Inception: {origin}")
  else:
    print("Inception's weights are random, not the published ones")
    with np.load(GOLDEN / "inception_fid.npz") as golden:
      tensors = filled(json.loads(str(golden["tensors"])))
  params = jax.device_put(inception.params_from_torch(tensors))

  @jax.jit
  def pool3(params: inception.Params, images: jax.Array) -> jax.Array:
    inputs = inception.tensorflow_inputs(images)
    return inception.Inception().apply({"params": params}, inputs).pool3

  return lambda images: np.asarray(pool3(params, images))


if __name__ == "__main__":
  app.run(main)
