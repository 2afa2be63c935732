"""How fast prepared latents are read: ArrayRecord against one .npy file per sample.

  python benchmarks/latents.py [--count=20000] [--threads=4] [--batch=256] [--rounds=3] [--dir=DIR]

Both hold the same arrays, 32x32x8 in float16 (mean and standard deviation of the latents of a
256x256 image), and are read by the same loader, shuffled, with all checks. Before each round the
system is asked to forget the files (posix_fadvise), so that they come from the disk; a round of
warm files follows. What it extrapolates is arithmetic: as many times faster as there are more
cores, but never faster than one thread reads warm files, for threads share Python's lock; with a
disk that keeps up.
"""

import itertools
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable

import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from meanflow_jax.data import manifest, shards
from meanflow_jax.data.latents import Latents
from meanflow_jax.data.loader import batches
from meanflow_jax.data.sources import Source
from meanflow_jax.data.transforms import Example

COUNT = flags.DEFINE_integer("count", 20_000, "Samples.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 4, "Threads of the loader.", lower_bound=0)
BATCH = flags.DEFINE_integer("batch", 256, "Rows of a batch.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds with cold files.", lower_bound=1)
DIR = flags.DEFINE_string("dir", None, "Where to write for the time being.")

SHAPE = (32, 32, 8)
CLASSES = 1000
WANTED = 5_000  # images per second that a fast device takes
HOST = 16  # cores


class Files:
  """One .npy file per sample, in a folder per class."""

  num_classes = CLASSES

  def __init__(self, paths: list[pathlib.Path]):
    self._paths = paths

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> Example:
    path = self._paths[index]
    return {"image": np.load(path, allow_pickle=False), "label": np.int32(path.parent.name)}


def main(_: list[str]) -> None:
  with tempfile.TemporaryDirectory(dir=DIR.value) as folder:
    paths = write(pathlib.Path(folder))
    sources = {"ArrayRecord": Latents(path=f"{folder}/records"), "one .npy each": Files(paths)}
    agree(sources)
    files = {name: stored_in(pathlib.Path(folder), name) for name in sources}
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(ROUNDS.value):
      for name, source in sources.items():
        forget(files[name])
        rates[name].append(rate(source))
    warm = {name: rate(source) for name, source in sources.items()}
    limit = rate(sources["ArrayRecord"], threads=0)
  report(rates, warm, limit)


def write(folder: pathlib.Path) -> list[pathlib.Path]:
  """Makes both; the paths of the single files."""
  recipe = manifest.Recipe(
    kind="latents",
    shape=SHAPE,
    image_size=256,
    autoencoder="noise",
    autoencoder_sha256="",
    autoencoder_dtype="float32",
    scale_factor=0.18215,
    splits=(manifest.PLAIN,),
    records_per_shard=10_000,
    images=COUNT.value,
    class_names=tuple(map(str, range(CLASSES))),
    fingerprint="",
  )
  records = folder / "records"
  claimed = manifest.begin(records, manifest.Manifest(recipe, "noise"))
  paths = []
  for shard in range(recipe.shards):
    with shards.ShardWriter(records, recipe, manifest.PLAIN, shard) as writer:
      for item in recipe.items(shard):
        rng = np.random.default_rng(item)
        array, label = rng.standard_normal(SHAPE).astype(np.float16), item % CLASSES
        writer.add(item, array, label)
        paths.append(folder / "files" / str(label) / f"{item}.npy")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        np.save(paths[-1], array)
  names = [recipe.shard_name(manifest.PLAIN, shard) for shard in range(recipe.shards)]
  found = tuple(shards.describe(records, name) for name in names)
  whole = manifest.Manifest(recipe, claimed.source, {manifest.PLAIN: found}, (0,) * CLASSES)
  manifest.write(records, whole)
  return paths


def agree(sources: dict[str, Source]) -> None:
  """Checks that both hold the same."""
  for index in range(0, COUNT.value, max(1, COUNT.value // 10)):
    one, other = (source[index] for source in sources.values())
    np.testing.assert_array_equal(one["image"], other["image"])
    assert one["label"] == other["label"]


def stored_in(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
  below = folder / ("records" if name == "ArrayRecord" else "files")
  return [path for path in below.rglob("*") if path.is_file()]


def forget(files: Iterable[pathlib.Path]) -> None:
  """Drops what the system remembers of files; they must be on the disk before."""
  os.sync()
  for path in files:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def rate(source: Source, threads: int | None = None) -> float:
  """Samples per second, of one pass."""
  threads = THREADS.value if threads is None else threads
  steps = COUNT.value // BATCH.value
  read = batches(
    source,
    batch_size=BATCH.value,
    rows=range(BATCH.value),
    seed=0,
    flip=False,
    first_step=0,
    num_threads=threads,
    prefetch=2 * max(1, threads),
  )
  start = time.perf_counter()
  for batch in itertools.islice(read, steps):
    assert batch["image"].shape == (BATCH.value, *SHAPE)
  return steps * BATCH.value / (time.perf_counter() - start)


def report(rates: dict[str, list[float]], warm: dict[str, float], limit: float) -> None:
  print(f"{COUNT.value} samples, batches of {BATCH.value}, {THREADS.value} threads, records/s")
  for name, found in rates.items():
    rounds = ", ".join(f"{value:,.0f}" for value in found)
    print(f"{name:14} cold {np.median(found):7,.0f} (rounds {rounds}), warm {warm[name]:7,.0f}")
  (ours, other), (ours_warm, other_warm) = map(np.median, rates.values()), warm.values()
  print(f"ratio          cold {ours / other:.2f}, warm {ours_warm / other_warm:.2f}")
  cores = len(os.sched_getaffinity(0))
  scaled = ours * HOST / cores
  print(
    f"{ours:,.0f} records/s on {cores} cores x {HOST} / {cores} = {scaled:,.0f}; one thread reads "
    f"{limit:,.0f} warm, the limit by Python's lock: {HOST} cores read {min(scaled, limit):,.0f}, "
    f"{min(scaled, limit) / WANTED:.1f} times the {WANTED:,} images/s of the device"
  )
  print(f"{WANTED:,} records/s read {WANTED * np.prod(SHAPE) * 2 / 1e6:.0f} MB/s from the disk")


if __name__ == "__main__":
  app.run(main)
