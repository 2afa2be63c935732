"""From images on the devices to summaries on the hosts: one compiled step after the other.

Images stay where they are made. A host sees the features of its own devices' images, adds up their
moments in double precision, and hands these to the others at the end.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import operator
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, PyTree

from meanflow_jax.arrays import Image
from meanflow_jax.data.loader import ordered_batches
from meanflow_jax.data.sources import Source
from meanflow_jax.features import Extractor, Features
from meanflow_jax.generate import Decoder, Generator, finite, one_ahead, require_finite
from meanflow_jax.metrics.summary import Summary
from meanflow_jax.runtime.mesh import global_batch, local_rows, replicated, rows_sharding

# Images between two writes of the sums: not seconds, as all hosts must write at the same image.
SAVE_EVERY = 5_000
# How many writes are kept: hosts that stop at different moments have one of them in common.
KEPT = 3

# What a step makes of a batch: which images are finite, and their features by extractor.
Step = tuple[Bool[Array, "B"], dict[str, Features]]
Summaries = dict[str, Summary]


def extract(extractors: Sequence[Extractor], levels: Image) -> dict[str, Features]:
  """The features of images given by their levels, 0 to 255; to be jitted."""
  return {extractor.name: extractor(levels) for extractor in extractors}


def step_shardings(mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
  """Where a `Step` lies: features with their images; which are finite, all hosts know."""
  return replicated(mesh), rows_sharding(mesh)


@dataclasses.dataclass(frozen=True)
class Resumable:
  """Where the sums so far are kept, so that an interrupted evaluation goes on.

  Attributes:
    folder: of this process's files, named after all that the sums depend on; None keeps nothing.
  """

  folder: pathlib.Path | None

  def load(self) -> tuple[int, Summaries]:
    """How many images are done on all hosts, and this host's summaries of them."""
    if self.folder is None:
      return 0, {}
    here = self._files()
    on_all = set.intersection(
      *(set(json.loads(d)) for d in _gathered(json.dumps([*here]).encode()))
    )
    if not on_all:
      return 0, {}
    done = max(on_all)
    with np.load(here[done], allow_pickle=False) as stored:
      return done, _from_arrays(stored)

  def save(self, done: int, summaries: Summaries) -> None:
    """Keeps the summaries of the first `done` images, and some of those before."""
    if self.folder is None:
      return
    self.folder.mkdir(parents=True, exist_ok=True)
    partial = self.folder / "partial"
    with open(partial, "wb") as file:
      np.savez(file, **_to_arrays(summaries))
    os.replace(partial, self.folder / f"{done}.npz")
    for older in list(self._files().values())[:-KEPT]:
      older.unlink()

  def discard(self) -> None:
    """Removes the folder, and with the last one its parent."""
    if self.folder is not None and self.folder.exists():
      shutil.rmtree(self.folder)
      with contextlib.suppress(OSError):  # others are in it
        self.folder.parent.rmdir()

  def _files(self) -> dict[int, pathlib.Path]:
    """By number of images, ascending."""
    return dict(sorted((int(path.stem), path) for path in self.folder.glob("*.npz")))


@dataclasses.dataclass(frozen=True)
class GeneratedImages:
  """What a generator makes, as summaries; compiled once for all parameters.

  Attributes:
    generator: of the images.
    extractors: of the features; all see the same images.
  """

  generator: Generator
  extractors: tuple[Extractor, ...]

  def summaries(
    self,
    params: PyTree,
    count: int,
    *,
    keep: bool,
    resumable: Resumable,
    check: Callable[[], None],
    title: str,
  ) -> Summaries:
    """Of images 0, ..., count - 1, by extractor.

    Args:
      params: of the generator's network.
      count: of images.
      keep: whether the features of single images are needed.
      resumable: where the sums so far are kept.
      check: called after each batch; what it raises ends the evaluation.
      title: of the progress bar.

    Raises:
      ValueError: if an image or a feature is not finite.
    """
    dispatch = functools.partial(self._dispatch, params)
    size = self.generator.batch_size
    return _add_up(dispatch, count, size, keep=keep, title=title, resumable=resumable, check=check)

  def _dispatch(self, params: PyTree, first: int) -> Step:
    made = self.generator
    return self._compiled(params, made.decoder, self.extractors, made.place(first))

  @functools.cached_property
  def _compiled(self) -> Callable[[PyTree, Decoder | None, Sequence[Extractor], Array], Step]:
    def step(
      params: PyTree, decoder: Decoder | None, extractors: Sequence[Extractor], first: Array
    ) -> Step:
      images, _ = self.generator(params, decoder, first)
      return finite(images), extract(extractors, self.generator.levels(images))

    return jax.jit(step, out_shardings=step_shardings(self.generator.mesh))


def of_source(
  source: Source,
  extractors: Sequence[Extractor],
  mesh: Mesh,
  *,
  batch_size: int,
  keep: bool,
  num_threads: int,
  prefetch: int,
  title: str,
) -> tuple[Summaries, int]:
  """The summaries of all images of a source, by extractor, and the sum of their digests.

  Arguments and errors are as those of `GeneratedImages` and `data.loader.ordered_batches`.
  """
  if batch_size % mesh.size:
    raise ValueError(f"sample.batch_size {batch_size} is not divisible by {mesh.size} devices")
  compiled = jax.jit(
    lambda extractors, image: (finite(image), extract(extractors, levels_of(image))),
    out_shardings=step_shardings(mesh),
  )
  rows = local_rows(mesh, batch_size)
  batches = ordered_batches(
    source, batch_size=batch_size, rows=rows, num_threads=num_threads, prefetch=prefetch
  )
  digests: list[int] = []

  def dispatch(first: int) -> Step:
    images = next(batches)["image"]
    present = [image for row, image in zip(rows, images, strict=True) if first + row < len(source)]
    digests.append(sum(map(digest, present)))
    return compiled(extractors, global_batch(mesh, {"image": images})["image"])

  summaries = _add_up(dispatch, len(source), batch_size, keep=keep, title=title)
  return summaries, sum(int(part) for part in _gathered(str(sum(digests)).encode()))


def levels_of(image: Array) -> Image:
  """The levels of real images, uint8 or float32 in [-1, 1]; they are not rounded."""
  if image.dtype == jnp.uint8:
    return image.astype(jnp.float32)
  return jnp.clip(127.5 * (image + 1), 0, 255)


def digest(image: np.ndarray) -> int:
  """64 bits of the hash of an image's pixels."""
  return int.from_bytes(hashlib.sha256(np.ascontiguousarray(image)).digest()[:8], "big")


def _add_up(
  dispatch: Callable[[int], Step],
  count: int,
  batch_size: int,
  *,
  keep: bool,
  title: str,
  resumable: Resumable = Resumable(None),
  check: Callable[[], None] = lambda: None,
) -> Summaries:
  """The summaries of `count` images, `batch_size` to a step; the same on all hosts."""
  done, summaries = resumable.load()
  saved = done
  settings = {"desc": title, "unit": "image", "leave": False, "disable": None}
  progress = tqdm.tqdm(total=count, initial=done, **settings)
  try:
    for first, (are_finite, outputs) in one_ahead(dispatch, range(done, count, batch_size)):
      progress.update(first - progress.n)
      require_finite(np.asarray(are_finite)[: count - first], first)
      parts = {
        name: Summary.of(count, *_local(arrays, first, count), keep=keep)
        for name, arrays in outputs.items()
      }
      # In one statement: an interruption must find both or neither.
      summaries, done = _sums(summaries, parts), min(first + batch_size, count)
      if done // SAVE_EVERY > saved // SAVE_EVERY:
        resumable.save(done, summaries)
        saved = done
      check()
  finally:
    progress.close()
    if done > saved:
      resumable.save(done, summaries)
  return _over_hosts(summaries)


def _sums(summaries: Summaries, parts: Summaries) -> Summaries:
  return {k: summaries[k] + part if k in summaries else part for k, part in parts.items()}


def _local(arrays: Features, first: int, count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """This host's images of a step: their numbers, and what there is of them."""
  index, values = _rows(tuple(arrays.values()), first, count)
  return index, dict(zip(arrays, values, strict=True))


def _rows(
  arrays: tuple[Array, ...], first: int, count: int
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
  """The rows that lie on this host's devices, below `count`, and their numbers."""
  shards = arrays[0].addressable_shards
  rows = np.concatenate([np.arange(len(arrays[0]))[shard.index[0]] for shard in shards])
  real = first + rows < count
  values = (np.concatenate([s.data for s in a.addressable_shards])[real] for a in arrays)
  return first + rows[real], tuple(values)


def _over_hosts(summaries: Summaries) -> Summaries:
  """The sums of all hosts' summaries."""
  if jax.process_count() == 1:  # then they need not be copied
    return summaries
  buffer = io.BytesIO()
  np.savez(buffer, **_to_arrays(summaries))
  each = [_from_arrays(np.load(io.BytesIO(part))) for part in _gathered(buffer.getvalue())]
  return {name: functools.reduce(operator.add, (part[name] for part in each)) for name in each[0]}


def _gathered(data: bytes) -> list[bytes]:
  """The bytes of every host; devices would cut 64-bit numbers to 32 bits."""
  if jax.process_count() == 1:
    return [data]
  sizes = np.atleast_1d(multihost_utils.process_allgather(np.int32(len(data))))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(data)] = np.frombuffer(data, np.uint8)
  parts = np.atleast_2d(multihost_utils.process_allgather(padded))
  return [part[:size].tobytes() for part, size in zip(parts, sizes, strict=True)]


def _to_arrays(summaries: Summaries) -> dict[str, np.ndarray]:
  return {
    f"{name}/{key}": array
    for name, summary in summaries.items()
    for key, array in summary.to_arrays().items()
  }


def _from_arrays(stored: Mapping[str, np.ndarray]) -> Summaries:
  parts: dict[str, dict[str, np.ndarray]] = {}
  for path in stored:
    name, _, key = path.partition("/")
    if key:
      parts.setdefault(name, {})[key] = stored[path]
  return {name: Summary.from_arrays(arrays) for name, arrays in parts.items()}
