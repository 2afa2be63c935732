"""From a source of images to shards of prepared examples, encoded on all devices of a process.

Each process makes whole shards, without a word to the others. The batches begin anew with every
shard, so that its bytes do not depend on what was interrupted where.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh
from jaxtyping import Array, Float16, Num, PyTree

from meanflow_jax.data import shards
from meanflow_jax.data.latents import Latents
from meanflow_jax.data.loader import Batch, ordered_batches
from meanflow_jax.data.manifest import FLIPPED, PLAIN, Manifest, Recipe, checksums_path
from meanflow_jax.data.shards import Checksums, ShardWriter
from meanflow_jax.data.sources import Source, UnreadableImageError
from meanflow_jax.data.transforms import Example
from meanflow_jax.generate import one_ahead
from meanflow_jax.models.autoencoder import Autoencoder
from meanflow_jax.runtime.mesh import rows_sharding
from meanflow_jax.train_step import model_image

# How many items of a source stand for all of it.
PROBES = 64
# Relative error (RMS) of what is encoded anew: float16, other devices, sums in another order.
AGREEMENT = 0.05

Moments = Float16[Array, "B h w c"]
# A batch of a source, and what is made of it for each split.
Encoded = tuple[Batch, Sequence[Array | np.ndarray]]


class Encoder(flax.struct.PyTreeNode):
  """An autoencoder's way from images to the moments of their latents: a pytree.

  Attributes:
    params: its weights.
    network: the autoencoder.
  """

  params: PyTree
  network: Autoencoder = flax.struct.field(pytree_node=False)

  def __call__(self, images: Num[Array, "B H W C"]) -> Moments:
    """Mean and standard deviation, side by side in the last axis."""
    apply = self.network.apply
    parts = apply({"params": self.params}, model_image(images), method="encode")
    return jnp.concatenate(parts, axis=-1).astype(jnp.float16)


def fingerprint(source: Source) -> str:
  """Tells one source from another: their length and classes, and some of their items."""
  digest = hashlib.sha256(f"{len(source)} {source.num_classes}".encode())
  for item in np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int)).tolist():
    try:
      example = source[item]
    except UnreadableImageError:
      digest.update(b"unreadable")
      continue
    digest.update(np.ascontiguousarray(example["image"]).data)
    digest.update(str(int(example["label"])).encode())
  return digest.hexdigest()[:16]


class _Picked:
  """Some items of a source, in a given order; broken ones are blank, or an error."""

  def __init__(self, source: Source, items: np.ndarray, *, skip_unreadable: bool):
    self.num_classes = source.num_classes
    self._source, self._items, self._skip = source, items, skip_unreadable

  def __len__(self) -> int:
    return len(self._items)

  def __getitem__(self, index: int) -> Example:
    item = int(self._items[index])
    try:
      return {**self._source[item], "readable": np.bool_(True)}
    except UnreadableImageError:
      if not self._skip:
        raise
    return {"image": self._blank, "label": np.int32(0), "readable": np.bool_(False)}

  @functools.cached_property
  def _blank(self) -> np.ndarray:
    return np.zeros_like(first_readable(self._source)["image"])


def first_readable(source: Source) -> Example:
  """The first item of a source that is not broken.

  Raises:
    UnreadableImageError: all are.
  """
  for item in range(len(source)):
    try:
      return source[item]
    except UnreadableImageError as error:
      last = error
  raise UnreadableImageError(f"none of the {len(source)} images can be read: {last}")


@dataclasses.dataclass(frozen=True)
class Preparation:
  """Makes a folder of shards.

  Attributes:
    folder: where they go; claimed for the recipe (`data.manifest.begin`).
    recipe: what they hold.
    source: of the images.
    encoder: of the images; None keeps their pixels.
    mesh: this process's devices.
    skip_unreadable: leave broken images out, instead of stopping.
    batch_size: images at a time.
    num_threads, prefetch, workers: see `data.loader.ordered_batches`.
  """

  folder: pathlib.Path
  recipe: Recipe
  source: Source
  encoder: Encoder | None
  mesh: Mesh
  skip_unreadable: bool
  batch_size: int
  num_threads: int
  prefetch: int
  workers: int

  def __post_init__(self):
    if self.batch_size < 1 or self.batch_size % self.mesh.size:
      raise ValueError(
        f"prepare.batch_size {self.batch_size} is not divisible by {self.mesh.size} devices"
      )

  def unfinished(self, process: int, processes: int) -> list[int]:
    """The shards of a process that are not there or not whole, after reading all that are."""
    mine = range(process, self.recipe.shards, processes)
    begun = [i for i in mine if all(shards.is_begun(self.folder, name) for name in self._names(i))]
    damaged = set()
    for i in tqdm.tqdm(begun, "verifying", unit="shard", leave=False, disable=None):
      if found := [
        reason for name in self._names(i) for reason in shards.damage(self.folder, name)
      ]:
        print(f"shard {i} is made again: {found[0]}", flush=True)
        shards.disown(self.folder, self._names(i))
        damaged.add(i)
    return sorted((set(mine) - set(begun)) | damaged)

  def _names(self, shard: int) -> list[str]:
    return [self.recipe.shard_name(split, shard) for split in self.recipe.splits]

  def write(self, numbers: Sequence[int]) -> int:
    """Makes shards; returns how many images they hold.

    Raises:
      UnreadableImageError: an image is broken, and such are not to be left out.
      OSError: the disk is full.
      ShardError: what was written does not read back.
      ValueError: a latent is not finite; a source's labels are wrong.
    """
    if not numbers:
      return 0
    ranges = [self.recipe.items(number) for number in numbers]
    batches = self._batches(np.concatenate([self._padded(items) for items in ranges]))
    bar = {"desc": "preparing", "unit": "image", "disable": None}
    with tqdm.tqdm(total=sum(map(len, ranges)), **bar) as progress:
      return sum(
        self._write(number, itertools.islice(batches, -(-len(items) // self.batch_size)), progress)
        for number, items in zip(numbers, ranges, strict=True)
      )

  def _padded(self, items: range) -> np.ndarray:
    """Items in whole batches: the last one stands in for what is missing."""
    found = np.arange(items.start, items.start - (-len(items) // self.batch_size) * self.batch_size)
    return np.minimum(found, items[-1])

  def _batches(self, items: np.ndarray) -> Iterator[Encoded]:
    """Batches of items, and what is made of them, for each split."""
    picked = _Picked(self.source, items, skip_unreadable=self.skip_unreadable)
    read = ordered_batches(
      picked,
      batch_size=self.batch_size,
      rows=range(self.batch_size),
      num_threads=self.num_threads,
      prefetch=self.prefetch,
      workers=self.workers,
    )

    def dispatch(_: int) -> Encoded:
      batch = next(read)
      return batch, self.made(batch["image"])

    for _, result in one_ahead(dispatch, range(len(items) // self.batch_size)):
      yield result

  def made(self, images: np.ndarray) -> Sequence[Array | np.ndarray]:
    """What is stored of a batch of images, for each split."""
    if self.encoder is None:
      return [images]
    return self._compiled(self.encoder, jax.device_put(images, rows_sharding(self.mesh)))

  @functools.cached_property
  def _compiled(self) -> Callable[[Encoder, Array], tuple[Moments, ...]]:
    mirrored = FLIPPED in self.recipe.splits

    def made(encoder: Encoder, images: Array) -> tuple[Moments, ...]:
      return tuple(encoder(x) for x in [images, images[:, :, ::-1]][: 1 + mirrored])

    return jax.jit(made, out_shardings=rows_sharding(self.mesh))

  def _write(self, number: int, batches: Iterator[Encoded], progress: tqdm.tqdm) -> int:
    """One shard of each split."""
    items = self.recipe.items(number)
    written = 0
    with contextlib.ExitStack() as stack:
      writers = [
        stack.enter_context(ShardWriter(self.folder, self.recipe, split, number))
        for split in self.recipe.splits
      ]
      for start, (batch, arrays) in zip(
        range(items.start, items.stop, self.batch_size), batches, strict=True
      ):
        made = [np.asarray(array) for array in arrays]
        here = range(start, min(start + self.batch_size, items.stop))
        for row, item in enumerate(here):
          if batch["readable"][row]:
            self._add(writers, item, [array[row] for array in made], int(batch["label"][row]))
            written += 1
          else:
            self._leave_out(writers, item, progress)
        progress.update(len(here))
    return written

  def _add(
    self, writers: list[ShardWriter], item: int, arrays: list[np.ndarray], label: int
  ) -> None:
    for writer, array in zip(writers, arrays, strict=True):
      if not np.isfinite(array).all():
        raise ValueError(f"the latents of item {item} of the source are not finite in float16")
      writer.add(item, array, label)

  def _leave_out(self, writers: list[ShardWriter], item: int, progress: tqdm.tqdm) -> None:
    reason = f"item {item}"
    try:
      self.source[item]
    except UnreadableImageError as error:
      reason = str(error)
    for writer in writers:
      writer.leave_out(reason)
    progress.write(f"left out: {reason}")

  @property
  def whole(self) -> bool:
    """Whether the shards of all processes are there."""
    names = (name for i in range(self.recipe.shards) for name in self._names(i))
    return all(shards.is_begun(self.folder, name) for name in names)

  def finished(self, claimed: Manifest) -> Manifest:
    """The manifest of the folder, once it is whole.

    Raises:
      ValueError: no image could be read; the files of a finished shard are damaged.
    """
    names = {
      split: [self.recipe.shard_name(split, i) for i in range(self.recipe.shards)]
      for split in self.recipe.splits
    }
    beside = [Checksums(checksums_path(self.folder, name)) for name in names[PLAIN]]
    labels = np.concatenate([found.labels for found in beside])
    if not len(labels):
      raise ValueError(f"none of the {self.recipe.images} images could be read")
    return dataclasses.replace(
      claimed,
      splits={
        split: tuple(shards.describe(self.folder, name) for name in each)
        for split, each in names.items()
      },
      class_histogram=tuple(np.bincount(labels, minlength=len(self.recipe.class_names)).tolist()),
      unreadable=tuple(reason for found in beside for reason in found.unreadable),
    )

  def compare(self, prepared: Latents, count: int) -> tuple[int, list[str]]:
    """Encodes some images anew: how many, and which records are not what they should be."""
    found = [
      Checksums(checksums_path(self.folder, shard.name))
      for shard in prepared.manifest.splits[PLAIN]
    ]
    items = np.concatenate([each.items for each in found])
    indices = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))
    padded = np.resize(indices, -(-len(indices) // self.batch_size) * self.batch_size)
    made = [[np.asarray(array) for array in arrays] for _, arrays in self._batches(items[padded])]
    wrong = []
    for split, parts in zip(self.recipe.splits, zip(*made, strict=True), strict=True):
      read = prepared.mirrored if split == FLIPPED else prepared.__getitem__
      for index, array in zip(indices.tolist(), np.concatenate(parts), strict=False):
        stored = np.float32(read(index)["image"])
        error = np.linalg.norm(array - stored) / max(np.linalg.norm(stored), 1e-6)
        if not error <= AGREEMENT:
          wrong.append(
            f"{split}, example {index}: what item {items[index]} of the source gives now differs "
            f"by {error:.1%}"
          )
    return len(indices), wrong


def check(folder: pathlib.Path, manifest: Manifest) -> list[str]:
  """Reads every record of a finished folder; what is wrong, nothing if all is well."""
  wrong = []
  names = [
    (split, i, shard) for split, all_ in manifest.splits.items() for i, shard in enumerate(all_)
  ]
  for split, i, shard in tqdm.tqdm(names, "checking", unit="shard", leave=False, disable=None):
    found = shards.manifest_mismatch(folder, [shard]) + shards.damage(folder, shard.name)
    wrong += [f"{split}, shard {i}: {reason}" for reason in found]
  return wrong
