"""Shards of prepared examples: ArrayRecord files, and the checksums of their records.

A shard is written under a temporary name, read back, and only then gets its own: a file that has
its name and its checksums is whole.
"""

import contextlib
import errno
import io
import os
import pathlib
import types
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from array_record.python import array_record_module
from array_record.python.array_record_data_source import ArrayRecordDataSource

from meanflow_jax.data.manifest import KINDS, Recipe, Shard, checksums_path

# One record per chunk, for random access; noise in float16 does not compress.
OPTIONS = "group_size:1,uncompressed"

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_TEXTS = tuple(os.strerror(code) for code in FULL)


class ShardError(ValueError):
  """A shard could not be written, or is not what it was."""


class Codec:
  """Arrays and labels as records: the serialised tf.train.Example of TensorFlow-datasets."""

  def __init__(self, recipe: Recipe):
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    kind = KINDS[recipe.kind]
    self._recipe = recipe
    self._feature, self._dtype, self._shape = kind.feature, np.dtype(kind.dtype), recipe.shape
    self._example, self._protos = tf_example_pb2.Example, tf_feature_pb2

  def __reduce__(self) -> tuple[type["Codec"], tuple[Recipe]]:
    return Codec, (self._recipe,)  # modules cannot be pickled

  def encode(self, array: np.ndarray, label: int) -> bytes:
    """The record of an array [H, W, C] and its label."""
    if array.shape != tuple(self._shape) or array.dtype != self._dtype:
      raise ValueError(f"{array.dtype}{array.shape} where {self._dtype}{self._shape} is stored")
    protos = self._protos
    features = {
      self._feature: protos.Feature(bytes_list=protos.BytesList(value=[array.tobytes()])),
      "label": protos.Feature(int64_list=protos.Int64List(value=[label])),
    }
    example = self._example(features=protos.Features(feature=features))
    return example.SerializeToString(deterministic=True)

  def decode(self, record: bytes) -> tuple[np.ndarray, np.int32]:
    """The array, which is not writeable, and the label of a record."""
    feature = self._example.FromString(record).features.feature
    (data,) = feature[self._feature].bytes_list.value
    (label,) = feature["label"].int64_list.value
    return np.frombuffer(data, self._dtype).reshape(self._shape), np.int32(label)


class Checksums:
  """What is known of a shard's records without reading them.

  Attributes:
    crc32: of each record.
    labels: of each record.
    items: which image of the source each record is.
    unreadable: what was left out, in words.
  """

  def __init__(self, path: pathlib.Path):
    """Reads them; raises a ValueError if the file is damaged."""
    try:
      with np.load(path, allow_pickle=False) as stored:
        self.crc32, self.labels = stored["crc32"], stored["labels"]
        self.items, self.unreadable = stored["items"], stored["unreadable"].tolist()
    except Exception as error:  # depending on what is broken, nearly anything
      raise ShardError(f"{path} is damaged or missing: {error}") from error


class ShardWriter:
  """Writes one shard; as a context it finishes the shard, or after an error leaves nothing.

  Raises:
    OSError: the disk is full, or takes no files here.
    ShardError: what was written does not read back.
  """

  def __init__(self, folder: pathlib.Path, recipe: Recipe, split: str, shard: int):
    name = recipe.shard_name(split, shard)
    self._path, self._checksums = folder / name, checksums_path(folder, name)
    self._partial = folder / f".{name}.partial"
    self._codec = Codec(recipe)
    self._crc32: list[int] = []
    self._labels: list[int] = []
    self._items: list[int] = []
    self._unreadable: list[str] = []
    self._checksums.parent.mkdir(exist_ok=True)
    self._writer = array_record_module.ArrayRecordWriter(str(self._partial), OPTIONS)

  def add(self, item: int, array: np.ndarray, label: int) -> None:
    """Appends the example that was made of an item of the source."""
    record = self._codec.encode(array, label)
    with _named(self._partial):
      self._writer.write(record)
    self._crc32.append(zlib.crc32(record))
    self._labels.append(label)
    self._items.append(item)

  def leave_out(self, reason: str) -> None:
    """Notes an image that cannot be read."""
    self._unreadable.append(reason)

  def __enter__(self) -> "ShardWriter":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None:
    try:
      if error is None:
        self._finish()
    finally:
      if self._writer.is_open():
        # Closing writes what is left: where the disk is full, that fails once more.
        _quietly_close(self._writer)
      self._partial.unlink(missing_ok=True)

  def _finish(self) -> None:
    with _named(self._partial):
      self._writer.close()
    _sync(self._partial)
    crc32 = np.array(self._crc32, np.uint32)
    if damaged := list(_damaged(self._partial, crc32)):
      raise ShardError(f"{self._partial} does not hold what was written to it: {damaged[0]}")
    os.replace(self._partial, self._path)
    arrays = {
      "crc32": crc32,
      "labels": np.array(self._labels, np.int32),
      "items": np.array(self._items, np.int64),
      "unreadable": np.array(self._unreadable, np.str_),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    partial = self._checksums.with_name(f".{self._checksums.name}.partial")
    partial.write_bytes(buffer.getvalue())
    _sync(partial)
    os.replace(partial, self._checksums)
    _sync(self._path.parent)
    _sync(self._checksums.parent)


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
  """What ArrayRecord says of a full disk, as the operating system's own error."""
  try:
    yield
  except RuntimeError as error:
    code = errno.ENOSPC if any(text in str(error) for text in FULL_TEXTS) else errno.EIO
    raise OSError(code, str(error), str(path)) from error


def _quietly_close(writer: array_record_module.ArrayRecordWriter) -> None:
  try:
    writer.close()
  except RuntimeError:
    return


def _sync(path: pathlib.Path) -> None:
  """Waits until a file, or a folder's list of names, is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def describe(folder: pathlib.Path, name: str) -> Shard:
  """The facts of a finished shard, for the manifest; raises a ShardError if it is not."""
  path, beside = folder / name, checksums_path(folder, name)
  records = len(Checksums(beside).crc32)
  if not path.is_file():
    raise ShardError(f"{path} is missing")
  return Shard(name, records, path.stat().st_size, zlib.crc32(beside.read_bytes()))


def is_begun(folder: pathlib.Path, name: str) -> bool:
  """Whether a shard claims to be finished."""
  return (folder / name).exists() and checksums_path(folder, name).exists()


def disown(folder: pathlib.Path, names: Iterable[str]) -> None:
  """Takes the checksums of damaged shards away: they do not count as finished any more."""
  for name in names:
    checksums_path(folder, name).unlink(missing_ok=True)


def damage(folder: pathlib.Path, name: str) -> list[str]:
  """Reads a whole shard; what is wrong with which record of it, nothing if it is whole."""
  try:
    crc32 = Checksums(checksums_path(folder, name)).crc32
  except ShardError as error:
    return [str(error)]
  return [f"{name}, {reason}" for reason in _damaged(folder / name, crc32)]


def _damaged(path: pathlib.Path, crc32: np.ndarray) -> Iterator[str]:
  """Record by record, after the number of records; in step with the disk."""
  try:
    records = ArrayRecordDataSource([str(path)])
    if len(records) != len(crc32):
      yield f"{len(records)} records where there were {len(crc32)}"
  except (RuntimeError, ValueError) as error:
    yield f"the file is damaged: {error}"
    return
  with records:
    for index in range(min(len(records), len(crc32))):
      try:
        if zlib.crc32(records[index]) != crc32[index]:
          yield f"record {index}: its checksum differs"
      except (RuntimeError, IndexError) as error:
        yield f"record {index}: {error}"


def manifest_mismatch(folder: pathlib.Path, shards: Sequence[Shard]) -> list[str]:
  """In which files of a folder the manifest is wrong, without reading records."""
  wrong = []
  for shard in shards:
    path, beside = folder / shard.name, checksums_path(folder, shard.name)
    if not path.is_file():
      wrong.append(f"{shard.name} is missing")
    elif (size := path.stat().st_size) != shard.bytes:
      wrong.append(f"{shard.name} has {size} bytes instead of {shard.bytes}")
    elif not beside.is_file() or zlib.crc32(beside.read_bytes()) != shard.checksums:
      wrong.append(f"the checksums of {shard.name} are missing or changed")
  return wrong
