"""Reads prepared examples: latents or pixels, checked record by record."""

import bisect
import itertools
import os
import pathlib
import zlib
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from meanflow_jax.data import manifest as manifests
from meanflow_jax.data import shards
from meanflow_jax.data.manifest import FLIPPED, PLAIN, Manifest, Shard
from meanflow_jax.data.sources import UnreadableImageError
from meanflow_jax.data.transforms import Example, mirror


class DamagedRecordError(UnreadableImageError):
  """A record is not what was written."""


class Latents:
  """A folder that meanflow_jax.prepare made.

  An item's "image" is as it is stored: mean and standard deviation side by side (float16
  [H, W, 2 C]), or pixels (uint8 [H, W, C]).

  Attributes:
    manifest: what the folder says of itself.
    num_classes, class_names: of its labels.

  Raises:
    FileNotFoundError: there are no prepared examples.
    ValueError: they are not finished, or the files are not those of the manifest.
    DamagedRecordError: (from an item) naming the shard and the record.
  """

  def __init__(self, *, path: str):
    folder = pathlib.Path(path).expanduser()
    self.manifest = manifests.read(folder)
    if not self.manifest.complete:
      raise ValueError(
        f"the preparation in {folder} is not finished: run its command again, it goes on"
      )
    self.class_names = list(self.manifest.recipe.class_names)
    self.num_classes = len(self.class_names)
    self._splits = {
      split: _Split(folder, self.manifest, found) for split, found in self.manifest.splits.items()
    }

  def __len__(self) -> int:
    return len(self._splits[PLAIN])

  def __getitem__(self, index: int) -> Example:
    return self._splits[PLAIN][index]

  @property
  def has_mirrored(self) -> bool:
    """Whether `mirrored` works: latents are mirrored before they are encoded, or never."""
    return self.manifest.recipe.kind == "pixels" or FLIPPED in self._splits

  def mirrored(self, index: int) -> Example:
    """The item of the mirrored image."""
    if self.manifest.recipe.kind == "pixels":
      return mirror(self[index])
    return self._splits[FLIPPED][index]


class _Part(NamedTuple):
  """What ArrayRecord reads of a file, so that it need not open all of them to count."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


class _Split:
  """The records of one split."""

  def __init__(self, folder: pathlib.Path, manifest: Manifest, found: tuple[Shard, ...]):
    if wrong := shards.manifest_mismatch(folder, found):
      raise ValueError(
        f"{folder} is not what its manifest says: {'; '.join(wrong[:3])}"
        f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. "
        f"{manifests.COMMAND} --check={folder} tells all; the command that made it mends it"
      )
    self._folder, self._shards = folder, found
    self._ends = list(itertools.accumulate(shard.records for shard in found))
    self._codec = shards.Codec(manifest.recipe)
    path = lambda shard: os.fspath(folder / shard.name)
    parts = [_Part(path(shard), 0, shard.records, shard.records) for shard in found]
    self._records = ArrayRecordDataSource(parts)
    beside = (manifests.checksums_path(folder, shard.name) for shard in found)
    self._crc32 = np.concatenate([shards.Checksums(path).crc32 for path in beside])

  def __len__(self) -> int:
    return len(self._crc32)

  def __getitem__(self, index: int) -> Example:
    try:
      record = self._records[index]
    except (RuntimeError, IndexError) as error:
      raise DamagedRecordError(f"{self._place(index)} cannot be read: {error}") from error
    if zlib.crc32(record) != self._crc32[index]:
      raise DamagedRecordError(f"{self._place(index)} is damaged: its checksum differs")
    image, label = self._codec.decode(record)
    return {"image": image, "label": label}

  def _place(self, index: int) -> str:
    """In words: the shard, the file, and the record in it."""
    shard = bisect.bisect_right(self._ends, index)
    first = self._ends[shard] - self._shards[shard].records
    return f"record {index - first} of shard {shard} ({self._folder / self._shards[shard].name})"
