"""Batches as a function of (seed, step): the step is all there is to remember of a position."""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from meanflow_jax.data.sources import Mirroring, Source
from meanflow_jax.data.transforms import Example, mirror

Batch = dict[str, np.ndarray]
"""Stacked examples: "image" [b, H, W, C] and "label" [b] int32."""


def batches(
  source: Source,
  *,
  batch_size: int,
  rows: Sequence[int],
  seed: int,
  flip: bool,
  first_step: int,
  num_threads: int,
  prefetch: int,
) -> Iterator[Batch]:
  """This host's rows of the batches of steps first_step, first_step + 1, ..., without end.

  Row j of step s is element s * batch_size + j of an endless sequence: the source in one order
  after another, each epoch's a function of (seed, epoch), each flip of (seed, element). So hosts
  that share the rows of a batch in any way read the same batch, and no position needs storing.

  Args:
    source: the examples; may be smaller than a batch.
    batch_size: rows of the global batch.
    rows: numbers of the rows to read here, each in [0, batch_size), in the order of the result.
    seed: of the order and the flips; not negative.
    flip: whether to mirror half of the images at random.
    first_step: where to start; what lies before is not read.
    num_threads: each makes one batch at a time; 0 reads in the caller's thread.
    prefetch: batches to hold ready or in the making; fewer than num_threads leave threads idle.

  Raises:
    ValueError: an empty source or rows outside the batch; from the iterator: a label outside
      [0, source.num_classes). What a source raises in a thread arrives here, with a note that
      names the item.
  """
  if not rows or min(rows) < 0 or max(rows) >= batch_size:
    raise ValueError(f"rows must be some of 0 ... {batch_size - 1}, not {rows}")
  checked = _Checked(source)
  indices = grain.MapDataset.source(range(len(source))).seed(seed).shuffle().repeat()
  if flip:
    elements = indices.random_map(_tossed).map(lambda tossed: checked.read(*tossed))
  else:
    elements = indices.map(checked.read)
  steps = _Rows(elements, batch_size, rows).batch(len(rows), drop_remainder=True)
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
  return iter(steps[first_step:].to_iter_dataset(options))


def _tossed(index: int, rng: np.random.Generator) -> tuple[int, bool]:
  """An item, and whether to mirror it, as half of them are (a Grain random map)."""
  return index, rng.random() >= 0.5


def ordered_batches(
  source: Source,
  *,
  batch_size: int,
  rows: Sequence[int],
  num_threads: int,
  prefetch: int,
  workers: int = 0,
) -> Iterator[Batch]:
  """This host's rows of batches that hold every example once, in the order of the source.

  What the last batch lacks is filled from the start of the source. Arguments and errors are those
  of `batches`; with `workers`, as many processes read, each with its own threads.
  """
  steps = -(-len(source) // batch_size)
  indices = grain.MapDataset.source(range(len(source))).repeat()
  elements = _Rows(indices.map(_Checked(source).read), batch_size, rows)
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
  found = elements.batch(len(rows), drop_remainder=True)[:steps].to_iter_dataset(options)
  if workers:
    found = found.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return iter(found)


class _Rows(grain.MapDataset[Example]):
  """The given rows of consecutive batches, one after another."""

  def __init__(self, elements: grain.MapDataset[Example], batch_size: int, rows: Sequence[int]):
    super().__init__(elements)
    self._batch_size, self._rows = batch_size, rows

  def __len__(self) -> int:
    return len(self._parent) // self._batch_size * len(self._rows)

  def __getitem__(self, index: int) -> Example:
    step, row = divmod(index, len(self._rows))
    return self._parent[step * self._batch_size + self._rows[row]]


class _Checked:
  """A source whose errors name the item, and whose labels are classes.

  An embedding looks up any label without complaint: a wrong one would train in silence.

  Raises:
    ValueError: if the source is empty.
  """

  def __init__(self, source: Source):
    if not len(source):
      raise ValueError(f"{type(source).__name__} holds no examples")
    self._source = source

  def read(self, index: int, mirrored: bool = False) -> Example:
    """An item; where the source has none of its own, its mirror image is made of its pixels."""
    try:
      example = self._read(index, mirrored)
    except Exception as error:
      error.add_note(f"while reading item {index} of {type(self._source).__name__}")
      raise
    if not 0 <= example["label"] < self._source.num_classes:
      raise ValueError(
        f"item {index} of {type(self._source).__name__} has label {example['label']}, "
        f"outside [0, {self._source.num_classes})"
      )
    return example

  def _read(self, index: int, mirrored: bool) -> Example:
    if not mirrored:
      return self._source[index]
    if isinstance(self._source, Mirroring):
      return self._source.mirrored(index)
    return mirror(self._source[index])
