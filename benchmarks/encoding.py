"""How fast images become latents: Stable Diffusion's autoencoder, whole, with random weights.

  python benchmarks/encoding.py [--count=10] [--batch=2] [--size=256] [--dtypes=float32,bfloat16]

Photographs of noise (500 x 375, JPEG) are decoded, cropped, encoded plain and mirrored, and stored
with their checksums, as meanflow_jax.prepare does it: its own code, after a shard of one image that
pays for compilation. Beside it, what reading and encoding take alone.
"""

import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import safetensors.numpy
from absl import app, flags
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from configs import imagenet_b4
from meanflow_jax import prepare
from meanflow_jax.data import manifest
from meanflow_jax.data.loader import ordered_batches
from meanflow_jax.encoding import Preparation
from meanflow_jax.runtime.pretrained import AUTOENCODER, CONFIG
from tests.fill import filled

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden" / "autoencoder_sd.npz"
COUNT = flags.DEFINE_integer("count", 10, "Images to time, beside one.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 2, "Images per call.", lower_bound=1)
SIZE = flags.DEFINE_integer("size", 256, "Side of the cropped images.", lower_bound=64)
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of the computation.")


def main(_: list[str]) -> None:
  with tempfile.TemporaryDirectory() as folder:
    write_weights(pathlib.Path(folder, "weights"))
    write_photographs(pathlib.Path(folder, "photographs"))
    for dtype in DTYPES.value:
      report(dtype, planned(pathlib.Path(folder), dtype))


def write_weights(folder: pathlib.Path) -> None:
  """The published architecture; its encoder and decoder are read, with random numbers."""
  folder.mkdir()
  with np.load(GOLDEN) as golden:
    config, tensors = (json.loads(str(golden[key])) for key in ("meta", "tensors"))
  (folder / CONFIG).write_text(json.dumps(config["config"]))
  safetensors.numpy.save_file(filled(tensors), folder / AUTOENCODER.weights)


def write_photographs(folder: pathlib.Path) -> None:
  folder.mkdir()
  rng = np.random.default_rng(0)
  for index in range(COUNT.value + 1):
    blobs = Image.fromarray(rng.integers(256, size=(60, 80, 3), dtype=np.uint8))
    photograph = blobs.resize((500, 375), Image.Resampling.BICUBIC)
    photograph.save(folder / f"{index:05}.jpg", quality=90)


def planned(folder: pathlib.Path, dtype: str) -> Preparation:
  """A preparation in two shards, the second of one image."""
  config = imagenet_b4.get_config()
  changes = {
    "data.source": "folder",
    "data.folder.path": str(folder / "photographs"),
    "data.image_size": SIZE.value // 8,
    "data.num_classes": 0,
    "autoencoder.path": str(folder / "weights"),
    "autoencoder.dtype": dtype,
    "prepare.records_per_shard": COUNT.value,
    "prepare.batch_size": BATCH.value,
  }
  config.update_from_flattened_dict(changes)
  preparation, ours = prepare.plan(config, folder / dtype)
  manifest.begin(preparation.folder, ours)
  return preparation


def report(dtype: str, preparation: Preparation) -> None:
  first = timed(lambda: preparation.write([1]))
  whole = timed(lambda: preparation.write([0]))
  images = np.zeros((BATCH.value, SIZE.value, SIZE.value, 3), np.uint8)
  encode = timed(lambda: jax.block_until_ready(preparation.made(images)))
  read = timed(lambda: reading(preparation))
  count, batches = COUNT.value, -(-COUNT.value // BATCH.value)
  print(f"{dtype}: {whole.wall / count:.2f} s per image, {count / whole.wall:.3f} images/s")
  print(f"  seconds of cores per image: {whole.cores / count:.2f}, encoding alone", end=" ")
  print(f"{encode.cores * batches / count:.2f}, reading alone {read.cores / count:.3f}")
  print(f"  the first batch, with compilation: {first.wall:.0f} s", flush=True)


def reading(preparation: Preparation) -> None:
  """Decodes the images of the first shard, and no more."""
  settings = {"batch_size": BATCH.value, "rows": range(BATCH.value)}
  settings |= {"num_threads": preparation.num_threads, "prefetch": preparation.prefetch}
  read = ordered_batches(preparation.source, **settings)
  for _ in range(0, COUNT.value, BATCH.value):
    next(read)


class Seconds(NamedTuple):
  """What something took; where other jobs run beside it, cores tell more than the clock."""

  wall: float
  cores: float


def timed(run: Callable[[], object]) -> Seconds:
  wall, cores = time.perf_counter(), time.process_time()
  run()
  return Seconds(time.perf_counter() - wall, time.process_time() - cores)


if __name__ == "__main__":
  app.run(main)
