"""What a folder of prepared examples says of itself: manifest.json.

The folder holds one array per image, ready for training: an autoencoder's latents (mean and
standard deviation side by side, float16), or pixels (uint8). There is one manifest, a file of
checksums for each shard, and what TensorFlow-datasets writes.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

FORMAT = 1
NAME = "manifest.json"
COMMAND = "python -m meanflow_jax.prepare"

PLAIN, FLIPPED = "train", "train_flipped"


@dataclasses.dataclass(frozen=True)
class Kind:
  """How examples are stored.

  Attributes:
    dataset: what TensorFlow-datasets calls them.
    feature: the name of the array in a record.
    dtype: of the array.
  """

  dataset: str
  feature: str
  dtype: str


KINDS = {
  "latents": Kind("meanflow_latents", "moments", "float16"),
  "pixels": Kind("meanflow_pixels", "image", "uint8"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """All that the records depend on: a folder is of one recipe.

  Attributes:
    kind: one of `KINDS`.
    shape: [H, W, C] of a record's array.
    image_size: height and width of the images, in pixels.
    autoencoder, autoencoder_sha256: which weights encoded them; "" for pixels.
    autoencoder_dtype: of the computation; "" for pixels.
    scale_factor: by which training multiplies latents; 1 for pixels.
    splits: `PLAIN`, and `FLIPPED` where the mirrored images are encoded too.
    records_per_shard: images of the source per shard; the last has fewer.
    images: their number in the source.
    class_names: in the order of the labels.
    fingerprint: of the source, see `fingerprint`.
  """

  kind: str
  shape: tuple[int, ...]
  image_size: int
  autoencoder: str
  autoencoder_sha256: str
  autoencoder_dtype: str
  scale_factor: float
  splits: tuple[str, ...]
  records_per_shard: int
  images: int
  class_names: tuple[str, ...]
  fingerprint: str

  @property
  def shards(self) -> int:
    """How many there are of each split."""
    return -(-self.images // self.records_per_shard)

  def items(self, shard: int) -> range:
    """Which images of the source a shard holds."""
    first = shard * self.records_per_shard
    return range(first, min(first + self.records_per_shard, self.images))

  def shard_name(self, split: str, shard: int) -> str:
    """The file of a shard, as TensorFlow-datasets names it."""
    dataset = KINDS[self.kind].dataset
    return f"{dataset}-{split}.array_record-{shard:05d}-of-{self.shards:05d}"


@dataclasses.dataclass(frozen=True)
class Shard:
  """A finished shard.

  Attributes:
    name: of its file.
    records: their number.
    bytes: the size of the file.
    checksums: CRC-32 of the file that holds those of the records.
  """

  name: str
  records: int
  bytes: int
  checksums: int


@dataclasses.dataclass(frozen=True)
class Manifest:
  """A folder of prepared examples.

  Attributes:
    recipe: what it holds.
    source: where the images come from, in words.
    splits: the shards of each split; none while the preparation is not finished.
    class_histogram: images of each class.
    unreadable: the images that were left out, and why.
  """

  recipe: Recipe
  source: str
  splits: dict[str, tuple[Shard, ...]] = dataclasses.field(default_factory=dict)
  class_histogram: tuple[int, ...] = ()
  unreadable: tuple[str, ...] = ()

  @property
  def complete(self) -> bool:
    """Whether all shards are there."""
    return bool(self.splits)

  def to_json(self) -> str:
    """The text of the file."""
    return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"


def checksums_path(folder: pathlib.Path, shard_name: str) -> pathlib.Path:
  """Where the checksums of a shard's records lie."""
  return folder / "checksums" / f"{shard_name}.npz"


def read(folder: pathlib.Path) -> Manifest:
  """The manifest of a folder.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is not one, or of another format.
  """
  path = folder / NAME
  if not path.is_file():
    raise FileNotFoundError(
      f"there are no prepared examples in {str(folder)!r} ({NAME} is missing): make them with "
      f"{COMMAND} --config=CONFIG --source=folder:IMAGES --out={folder}"
    )
  try:
    return _from_json(json.loads(path.read_text()))
  except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
    raise ValueError(f"{path} is not a manifest of prepared examples: {error!r}") from error


def _from_json(found: dict[str, Any]) -> Manifest:
  if found["format"] != FORMAT:
    raise ValueError(f"a manifest of format {found['format']} is read by another version of this")
  recipe = {name: _hashable(value) for name, value in found["recipe"].items()}
  return Manifest(
    recipe=Recipe(**recipe),
    source=found["source"],
    splits={split: tuple(Shard(**s) for s in shards) for split, shards in found["splits"].items()},
    class_histogram=tuple(found["class_histogram"]),
    unreadable=tuple(found["unreadable"]),
  )


def _hashable(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value


def begin(folder: pathlib.Path, manifest: Manifest) -> Manifest:
  """Claims a folder for a recipe, or finds it claimed for the same one.

  Returns:
    The manifest that is there now, perhaps of a finished preparation.

  Raises:
    ValueError: the folder is made by another recipe, naming what differs, or holds other files.
  """
  if not (folder / NAME).is_file():
    if folder.is_dir() and any(folder.iterdir()):
      raise ValueError(f"{folder} holds other files and no {NAME}: choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, manifest, new=True)
  found = read(folder)
  if found.recipe != manifest.recipe:
    ours, theirs = dataclasses.asdict(manifest.recipe), dataclasses.asdict(found.recipe)
    differing = [
      f"{name}: {_brief(theirs[name])} there, {_brief(ours[name])} now"
      for name in ours
      if ours[name] != theirs[name]
    ]
    sources = f"source: {found.source} there, {manifest.source} now"
    raise ValueError(
      f"{folder} was made otherwise, and is left as it is: {'; '.join(differing)} ({sources}). "
      "Choose another folder"
    )
  return found


def _brief(value: object) -> str:
  text = repr(value)
  return text if len(text) <= 200 else f"{text[:200]}..."


def write(folder: pathlib.Path, manifest: Manifest, *, new: bool = False) -> None:
  """Writes the manifest whole or not at all; a new one never in the place of another."""
  partial = folder / f".{NAME}.{os.getpid()}.partial"
  with open(partial, "w") as file:
    file.write(manifest.to_json())
    file.flush()
    os.fsync(file.fileno())
  if not new:
    os.replace(partial, folder / NAME)
    return
  try:
    os.link(partial, folder / NAME)
  except FileExistsError:  # another host was faster
    pass
  finally:
    partial.unlink()
