"""Where images come from: random access to examples behind one small interface."""

import copy
import io
import logging
import os
import zipfile
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from meanflow_jax.data import transforms
from meanflow_jax.data.transforms import Example

_log = logging.getLogger(__name__)

_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@runtime_checkable
class Source(Protocol):
  """Random access to examples, from any number of threads at once.

  Items are {"image": [H, W, C] uint8, float32 in [-1, 1], or moments of latents (`data.latents`);
  "label": int32 scalar}: one shape for all images, labels in [0, num_classes), arrays that nobody
  writes to.
  """

  num_classes: int

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class Mirroring(Protocol):
  """A source whose mirrored items are not the mirror images of its arrays."""

  def mirrored(self, index: int) -> Example:
    """The item of the mirrored image."""
    ...


class Digits:
  """scikit-learn's 1797 handwritten digits, float32 [8, 8, 1]: real images without a download.

  Args:
    split: "train" (1500 images), "test" (the other 297) or "all".
  """

  num_classes = 10

  def __init__(self, *, split: str):
    from sklearn.datasets import load_digits

    order = np.random.RandomState(0).permutation(1797)
    splits = {"train": order[:1500], "test": order[1500:], "all": np.arange(1797)}
    if split not in splits:
      raise ValueError(f"digits have no split {split!r}, only {', '.join(splits)}")
    digits = load_digits()
    self._images = (digits.images[splits[split], :, :, None] / 8 - 1).astype(np.float32)
    self._labels = digits.target[splits[split]].astype(np.int32)

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> Example:
    return {"image": self._images[index], "label": self._labels[index]}


class Tfds:
  """A TFDS image dataset that is prepared on disk, read without TensorFlow.

  Uses the features "image" and "label"; without labels all images are of one class.

  Args:
    name: as TFDS spells it: "cifar10", "imagenet2012:5.1.0", ...
    split: as TFDS spells it: "train", "train[:10%]", ...
    data_dir: the folder of prepared datasets; "" is TFDS' own default.
    image_size: height and width of the centre crop, in pixels.
    channels: 1 (grey) or 3 (RGB).

  Attributes:
    class_names: in the order of their labels; empty without labels.
    num_classes: their number; 1 without labels.

  Raises:
    FileNotFoundError: the dataset is not prepared there for random access.
    ValueError: it has no such split, no image, or a label that is not a class.
  """

  def __init__(self, *, name: str, split: str, data_dir: str, image_size: int, channels: int):
    import tensorflow_datasets as tfds

    try:
      self._records = tfds.builder(name, data_dir=data_dir or None).as_data_source(split)
    except (tfds.core.DatasetNotFoundError, NotImplementedError) as error:
      raise FileNotFoundError(_not_prepared(name, data_dir)) from error
    features = self._records.dataset_info.features
    if "image" not in features:
      raise ValueError(f"{name} has no feature 'image', only {', '.join(sorted(features))}")
    self._has_labels = "label" in features
    if self._has_labels and not isinstance(features["label"], tfds.features.ClassLabel):
      raise ValueError(f"the label of {name} is not a class but {features['label']}")
    self.num_classes = features["label"].num_classes if self._has_labels else 1
    self.class_names = list(features["label"].names) if self._has_labels else []
    # TFDS would decode with OpenCV where that is installed, and hand out CMYK as it is.
    self._records.decoders = {"image": tfds.decode.SkipDecoding()}
    self._image_size, self._channels = image_size, channels

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    record = self._records[index]
    with _open(record["image"]) as image:
      pixels = transforms.square(image, size=self._image_size, channels=self._channels)
    return {"image": pixels, "label": np.int32(record["label"] if self._has_labels else 0)}


def _open(stored: bytes | np.ndarray) -> Image.Image:
  """An encoded image, or its pixels [H, W, C], which is what `tfds.testing.mock_data` serves."""
  if isinstance(stored, bytes):
    return Image.open(io.BytesIO(stored))
  # Pillow knows grey images as [H, W] only.
  return Image.fromarray(stored[:, :, 0] if stored.shape[2] == 1 else stored)


def _not_prepared(name: str, data_dir: str) -> str:
  folder = data_dir or "the default folder of TFDS ($TFDS_DATA_DIR or ~/tensorflow_datasets)"
  return (
    f"{name} is not prepared for random access in {folder}. Prepare it once, where TensorFlow is "
    f"installed: tfds.builder({name!r}, data_dir={data_dir or None!r}, file_format='array_record')"
    ".download_and_prepare(). A folder that holds it as TFRecord files cannot take both."
  )


class UnreadableImageError(ValueError):
  """A file that should hold an image does not, or not all of it."""


class Folder:
  """Image files: one class per sub-folder, or a flat folder of a single class.

  Sub-folders, sorted by name, are labelled 0, 1, ...; below them images are found at any depth.
  Hidden files and folders are left out. Files are decoded at each access.

  Args:
    path: the folder.
    image_size: height and width of the centre crop, in pixels.
    channels: 1 (grey) or 3 (RGB).
    skip_unreadable: let the next readable image stand in for a broken one, with one warning.

  Attributes:
    class_names: the sub-folders in the order of their labels; empty for a flat folder.
    num_classes: their number; 1 for a flat folder.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: no images, a class without images, or images beside class folders.
  """

  def __init__(self, *, path: str, image_size: int, channels: int, skip_unreadable: bool):
    path = os.path.expanduser(path)
    if not os.path.isdir(path):
      name = path or "data.folder.path is empty, which"
      raise FileNotFoundError(f"{name} is not a folder; expected images, or one folder per class")
    self._path = path
    self._image_size, self._channels = image_size, channels
    self._skip_unreadable = skip_unreadable
    self._reported: dict[str, UnreadableImageError] = {}
    self.class_names, files = _find_classes(path)
    self.num_classes = max(1, len(self.class_names))
    self._files = [file for of_class in files for file in of_class]
    self._labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(f) for f in files])

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Example:
    """The example; raises `UnreadableImageError`, naming the file, unless such are skipped."""
    if not self._skip_unreadable:
      return self._read(index)
    for offset in range(len(self)):
      try:
        return self._read((index + offset) % len(self))
      except UnreadableImageError as error:
        self._warn_once(error)
    raise UnreadableImageError(f"none of the {len(self)} images in {self._path} can be read")

  def without_substitutes(self) -> "Folder":
    """The same images, where a broken one is always an error."""
    strict = copy.copy(self)
    strict._skip_unreadable = False
    return strict

  def _read(self, index: int) -> Example:
    try:
      with Image.open(self._files[index]) as image:
        pixels = transforms.square(image, size=self._image_size, channels=self._channels)
    # Depending on the format, Pillow raises nearly anything on a broken file.
    except Exception as error:
      raise UnreadableImageError(f"cannot read {self._files[index]}: {error}") from error
    return {"image": pixels, "label": self._labels[index]}

  def _warn_once(self, error: UnreadableImageError) -> None:
    # `setdefault` is atomic: of several threads with one broken file, one is the first.
    if self._reported.setdefault(str(error), error) is error:
      _log.warning("%s; the next image stands in for it", error)


def _find_classes(path: str) -> tuple[list[str], list[list[str]]]:
  """Names of the classes of a folder, and their files; no names but one list where it is flat."""
  folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
  names = [name for name in folders if not name.startswith(".")]
  files = [_find_images(os.path.join(path, name)) for name in names]
  flat = sorted(os.path.join(path, name) for name in _images_among(os.listdir(path)))
  if flat and any(files):
    raise ValueError(f"{path} holds images ({flat[0]}, ...) beside folders of images ({names})")
  if flat:
    return [], [flat]
  if not any(files):
    known = " ".join(sorted(_EXTENSIONS))
    raise ValueError(f"no images in {path} or its sub-folders (looked for {known}, in any case)")
  if empty := [name for name, found in zip(names, files, strict=True) if not found]:
    raise ValueError(f"class folders without images in {path}: {', '.join(empty)}")
  return names, files


def _find_images(folder: str) -> list[str]:
  found = []
  for parent, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not name.startswith(".")]
    found += [os.path.join(parent, name) for name in _images_among(names)]
  return sorted(found)


def _images_among(names: Iterable[str]) -> list[str]:
  visible = (name for name in names if not name.startswith("."))
  return [name for name in visible if os.path.splitext(name)[1].lower() in _EXTENSIONS]


class Npz:
  """Images of one size in an .npz file as evaluators read it: uint8 `arr_0` [N, H, W, C].

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it holds no such array.
  """

  num_classes = 1

  def __init__(self, path: str):
    try:
      with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
        self._images = stored["arr_0"]
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
      raise ValueError(f"{path} is not an .npz file with an array arr_0: {error}") from error
    if self._images.ndim != 4 or self._images.dtype != np.uint8 or not len(self._images):
      found = f"{self._images.dtype}{list(self._images.shape)}"
      raise ValueError(f"arr_0 of {path} must be uint8 images [N, H, W, C], not {found}")

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Example:
    return {"image": self._images[index], "label": np.int32(0)}


class Pictures:
  """All images below a folder, as they are: in colour, of one size, without labels.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: no images; from an item: an image of another size than the first.
  """

  num_classes = 1

  def __init__(self, path: str):
    if not os.path.isdir(path):
      raise FileNotFoundError(f"{path} is neither a folder nor an .npz file")
    self._files = _find_images(path)
    if not self._files:
      raise ValueError(f"no images in {path} or its sub-folders")
    self._shape = self._read(0).shape

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Example:
    image = self._read(index)
    if image.shape != self._shape:
      raise ValueError(
        f"{self._files[index]} is {image.shape[:2]} while {self._files[0]} is {self._shape[:2]}: "
        "figures are of images of one size"
      )
    return {"image": image, "label": np.int32(0)}

  def _read(self, index: int) -> np.ndarray:
    try:
      with Image.open(self._files[index]) as image:
        return transforms.to_array(image, 3)
    except Exception as error:
      raise UnreadableImageError(f"cannot read {self._files[index]}: {error}") from error


def made_elsewhere(path: str) -> Source:
  """Images to be scored: a folder of them, or an .npz file.

  Raises:
    FileNotFoundError: there is neither.
    ValueError: there are no images, or not of one size.
  """
  return Npz(path) if path.endswith(".npz") else Pictures(path)


class Synthetic:
  """Noise, uint8, and random labels as a function of (seed, index) alone: to time a loader."""

  def __init__(self, *, length: int, image_size: int, channels: int, num_classes: int, seed: int):
    self.num_classes = num_classes
    self._length, self._seed = length, seed
    self._shape = (image_size, image_size, channels)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < self._length:
      raise IndexError(f"index {index} of {self._length} synthetic images")
    rng = np.random.default_rng((self._seed, index))
    return {
      "image": rng.integers(256, size=self._shape, dtype=np.uint8),
      "label": np.int32(rng.integers(self.num_classes)),
    }
