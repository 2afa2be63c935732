"""Images of every kind come out right, and a batch is a function of (seed, step) alone."""

import io
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from meanflow_jax.data import loader, sources, transforms
from meanflow_jax.data.loader import Batch
from meanflow_jax.data.transforms import Example


class Numbered:
  """Item i shows the pixels (i, 255), so that both its number and its orientation are visible."""

  def __init__(self, length: int, label: Callable[[int], int] = lambda index: 0):
    self.num_classes = 10
    self._length, self._label = length, label

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Example:
    pixels = np.array([[[index], [255]]], np.uint8)
    return {"image": pixels, "label": np.int32(self._label(index))}


def read(source: sources.Source, **changes: Any) -> Iterator[Batch]:
  settings = {
    "batch_size": 8,
    "rows": range(8),
    "seed": 0,
    "flip": False,
    "first_step": 0,
    "num_threads": 2,
    "prefetch": 2,
  }
  return loader.batches(source, **settings | changes)


def images(batches: Iterator[Batch], count: int) -> np.ndarray:
  return np.concatenate([batch["image"] for batch in itertools.islice(batches, count)])


def numbers(batches: Iterator[Batch], count: int) -> np.ndarray:
  return images(batches, count)[:, 0, 0, 0]


# The loader.


@pytest.mark.parametrize("length", [100, 3])
@pytest.mark.parametrize("num_threads", [0, 3])
def test_a_batch_depends_on_its_step_alone(length: int, num_threads: int):
  uninterrupted = list(itertools.islice(read(Numbered(length), flip=True), 30))
  for step in (0, 1, 12, 29):
    resumed = next(read(Numbered(length), flip=True, first_step=step, num_threads=num_threads))
    np.testing.assert_array_equal(resumed["image"], uninterrupted[step]["image"])


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("share", ["blocks", "strides"])
def test_hosts_read_the_same_batch_however_they_share_it(hosts: int, share: str):
  rows = np.arange(8)
  shares = np.split(rows, hosts) if share == "blocks" else [rows[h::hosts] for h in range(hosts)]
  source = sources.Synthetic(length=21, image_size=4, channels=3, num_classes=5, seed=1)
  for step in range(6):
    whole = next(read(source, flip=True, first_step=step))
    for mine in shares:
      part = next(read(source, flip=True, first_step=step, rows=mine.tolist()))
      np.testing.assert_array_equal(part["image"], whole["image"][mine])
      np.testing.assert_array_equal(part["label"], whole["label"][mine])


def test_batches_are_stacked_in_the_types_of_the_source():
  batch = next(read(sources.Digits(split="train"), rows=[3, 1]))
  assert batch["image"].shape == (2, 8, 8, 1)
  assert batch["image"].dtype == np.float32
  assert batch["label"].shape == (2,)
  assert batch["label"].dtype == np.int32


def test_every_epoch_is_another_permutation():
  epochs = numbers(read(Numbered(24)), 9).reshape(3, 24)
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(24), (3, 1)))
  assert len({tuple(epoch) for epoch in epochs}) == 3
  assert tuple(range(24)) not in map(tuple, epochs)


def test_a_source_smaller_than_a_batch_runs_through_several_epochs():
  epochs = numbers(read(Numbered(4)), 3).reshape(6, 4)
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(4), (6, 1)))


def test_seeds_change_the_order_and_the_flips():
  assert (numbers(read(Numbered(100), seed=0), 5) != numbers(read(Numbered(100), seed=1), 5)).any()
  single = Numbered(1)
  flips = [images(read(single, seed=seed, flip=True), 5) for seed in (0, 1)]
  assert (flips[0] != flips[1]).any()


def test_half_of_the_images_are_mirrored_and_nothing_else_changes():
  plain, augmented = (images(read(Numbered(64), flip=flip), 128) for flip in (False, True))
  mirrored = (augmented != plain).any(axis=(1, 2, 3))
  np.testing.assert_array_equal(augmented[mirrored], plain[mirrored][:, :, ::-1])
  # 1024 fair coins: five standard deviations are 0.08.
  assert abs(mirrored.mean() - 0.5) < 0.08


def test_flips_belong_to_the_element_of_the_sequence_and_not_to_the_item():
  assert set(images(read(Numbered(1), flip=True), 2)[:, 0, 0, 0]) == {0, 255}


def test_far_steps_come_at_once():
  class Counting(Numbered):
    reads = 0

    def __getitem__(self, index: int) -> Example:
      Counting.reads += 1
      return super().__getitem__(index)

  next(read(Counting(100), first_step=10**9, num_threads=0))
  assert Counting.reads == 8


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("label", [-1, 10])
def test_labels_that_are_no_class_are_refused(label: int, num_threads: int):
  source = Numbered(9, label=lambda index: label if index == 7 else 0)
  with pytest.raises(ValueError, match=f"item 7 of Numbered has label {label}, outside .0, 10."):
    list(itertools.islice(read(source, num_threads=num_threads), 2))


def test_errors_of_a_source_arrive_with_the_item():
  class Broken(Numbered):
    def __getitem__(self, index: int) -> Example:
      raise OSError("disk on fire")

  with pytest.raises(OSError, match="disk on fire") as caught:
    next(read(Broken(1)))
  assert "while reading item 0 of Broken" in caught.value.__notes__


@pytest.mark.parametrize("rows", [[], [-1], [0, 8]])
def test_rows_outside_the_batch_are_refused(rows: Sequence[int]):
  with pytest.raises(ValueError, match="rows must be"):
    read(Numbered(9), rows=rows)


def test_an_empty_source_is_refused():
  with pytest.raises(ValueError, match="Numbered holds no examples"):
    read(Numbered(0))


def test_ordered_batches_hold_every_item_once_in_order():
  def read(*rows: int) -> list[int]:
    source = Numbered(10, label=lambda index: index)
    batches = loader.ordered_batches(source, batch_size=4, rows=rows, num_threads=2, prefetch=2)
    read = list(batches)
    assert {len(batch["label"]) for batch in read} == {len(rows)}
    np.testing.assert_array_equal(
      numbers(iter(read), len(read)), np.concatenate([batch["label"] for batch in read])
    )
    return np.concatenate([batch["label"] for batch in read]).tolist()

  assert read(0, 1, 2, 3) == [*range(10), 0, 1]  # filled up from the start
  assert read(1, 2) == [1, 2, 5, 6, 9, 0]


# Transforms.


def test_center_crop_halves_by_boxes_and_cuts_the_middle():
  columns = np.tile(np.array([0, 0, 10, 20, 30, 50, 0, 0], np.uint8), (4, 1))
  cropped = transforms.center_crop(Image.fromarray(columns), 2)
  np.testing.assert_array_equal(np.asarray(cropped), [[15, 40], [15, 40]])


@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (16, 90), (5, 7), (1, 1)])
def test_center_crop_makes_squares_of_any_shape(shape: tuple[int, int]):
  constant = Image.new("RGB", shape, (7, 8, 9))
  cropped = np.asarray(transforms.center_crop(constant, 16))
  np.testing.assert_array_equal(cropped, np.full((16, 16, 3), (7, 8, 9)))


def test_center_crop_resamples_bicubically_below_twice_the_size():
  noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(24, 24), dtype=np.uint8))
  expected = noise.resize((16, 16), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(transforms.center_crop(noise, 16), expected)


def encoded(image: Image.Image, kind: str, **options: Any) -> Image.Image:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return Image.open(file)


def test_cmyk_is_converted():
  red = encoded(Image.new("RGB", (8, 8), "red").convert("CMYK"), "jpeg")
  assert red.mode == "CMYK"
  np.testing.assert_allclose(transforms.to_array(red, 3)[4, 4], (255, 0, 0), atol=4)


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bits_keep_their_upper_byte(kind: str):
  greys = np.array([[0, 255, 256, 0x80FF, 0xFFFF]], np.uint16)
  image = encoded(Image.fromarray(greys), kind)
  np.testing.assert_array_equal(transforms.to_array(image, 1)[0, :, 0], [0, 0, 1, 0x80, 0xFF])
  assert transforms.to_array(image, 3).shape == (1, 5, 3)


def test_transparency_lies_on_white():
  palette = Image.new("P", (2, 1))
  palette.putpalette([255, 0, 0, 0, 0, 255])
  palette.putpixel((1, 0), 1)
  image = encoded(palette, "png", transparency=0)
  assert image.mode == "P"
  np.testing.assert_array_equal(transforms.to_array(image, 3)[0], [(255, 255, 255), (0, 0, 255)])
  half = Image.new("RGBA", (1, 1), (0, 0, 0, 127))
  np.testing.assert_array_equal(transforms.to_array(half, 1), [[[128]]])


def test_palettes_are_converted_before_they_are_resampled():
  stripes = np.tile(np.array([0, 200], np.uint8), (4, 2))
  palette = Image.fromarray(stripes).convert("P")
  np.testing.assert_array_equal(transforms.square(palette, size=2, channels=1), [[[100]] * 2] * 2)


def test_an_animation_is_its_first_frame():
  red, blue = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
  image = encoded(red, "gif", save_all=True, append_images=[blue])
  assert image.n_frames == 2
  assert (transforms.to_array(image, 3) == (255, 0, 0)).all()


def test_the_orientation_of_the_camera_is_ignored():
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees
  assert transforms.to_array(encoded(Image.new("L", (8, 4)), "jpeg", exif=exif), 1).shape[:2] == (
    4,
    8,
  )


def test_what_has_no_8_bit_meaning_is_refused():
  with pytest.raises(ValueError, match="floating-point"):
    transforms.convert(Image.new("F", (2, 2)), 3)
  with pytest.raises(ValueError, match="1 or 3, not 4"):
    transforms.convert(Image.new("RGBA", (2, 2)), 4)


# Sources.


def test_digits_are_split_once_and_for_all():
  train, test, everything = (sources.Digits(split=split) for split in ("train", "test", "all"))
  assert (len(train), len(test), len(everything)) == (1500, 297, 1797)
  distinct = {
    pickle.dumps(item["image"])
    for part in (train, test)
    for item in map(part.__getitem__, range(len(part)))
  }
  assert distinct == {pickle.dumps(everything[index]["image"]) for index in range(1797)}
  first = int(np.random.RandomState(0).permutation(1797)[0])
  np.testing.assert_array_equal(train[0]["image"], everything[first]["image"])
  assert train[0]["label"] == everything[first]["label"]
  with pytest.raises(ValueError, match="no split 'dev', only train, test, all"):
    sources.Digits(split="dev")


def test_digits_fill_the_range_of_images():
  digits = sources.Digits(split="all")
  pixels = np.stack([digits[index]["image"] for index in range(len(digits))])
  assert (pixels.min(), pixels.max(), pixels.dtype) == (-1, 1, np.float32)


def test_synthetic_images_are_a_function_of_seed_and_index():
  def source(seed: int) -> sources.Synthetic:
    return sources.Synthetic(length=50, image_size=4, channels=3, num_classes=5, seed=seed)

  np.testing.assert_array_equal(source(0)[7]["image"], source(0)[7]["image"])
  assert (source(0)[7]["image"] != source(0)[8]["image"]).any()
  assert (source(0)[7]["image"] != source(1)[7]["image"]).any()
  assert {int(item["label"]) for item in source(0)} == set(range(5))


def test_sources_keep_the_protocol(tmp_path: Path):
  paint(tmp_path / "0.png", 0)
  synthetic = sources.Synthetic(length=1, image_size=4, channels=1, num_classes=2, seed=0)
  for source in (sources.Digits(split="test"), synthetic, folder(tmp_path)):
    assert isinstance(source, sources.Source)
    assert source[0]["image"].ndim == 3
    assert source[0]["label"].dtype == np.int32


def folder(path: Path, **changes: Any) -> sources.Folder:
  settings = {"image_size": 8, "channels": 1, "skip_unreadable": False}
  return sources.Folder(path=str(path), **settings | changes)


def paint(path: Path, grey: int) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("L", (12, 10), grey).save(path)


@pytest.fixture
def animals(tmp_path: Path) -> Path:
  names = ["dog/2.png", "cat/deep/1.JPG", "cat/0.webp", "dog/1.tiff", ".cache/x.png", "cat/.x.png"]
  for grey, name in enumerate(names):
    paint(tmp_path / name, 10 * grey)
  (tmp_path / "cat" / "notes.txt").touch()
  return tmp_path


def test_folders_are_classes_in_sorted_order(animals: Path):
  source = folder(animals)
  assert source.class_names == ["cat", "dog"]
  assert source.num_classes == 2
  found = [(int(source[i]["label"]), source[i]["image"]) for i in range(len(source))]
  assert [label for label, _ in found] == [0, 0, 1, 1]
  # cat/0.webp, cat/deep/1.JPG, dog/1.tiff, dog/2.png; lossy formats may be a grey off.
  np.testing.assert_allclose([pixels.mean() for _, pixels in found], [20, 10, 30, 0], atol=1)
  assert all(pixels.shape == (8, 8, 1) for _, pixels in found)


def test_a_flat_folder_is_one_class(tmp_path: Path):
  for name in ("b.png", "a.png"):
    paint(tmp_path / name, ord(name[0]))
  source = folder(tmp_path, channels=3)
  assert (source.class_names, source.num_classes, len(source)) == ([], 1, 2)
  assert [int(source[i]["image"][0, 0, 0]) for i in range(2)] == [ord("a"), ord("b")]
  assert source[1]["label"] == 0


def test_folders_that_cannot_be_meant_are_refused(tmp_path: Path):
  with pytest.raises(FileNotFoundError, match="absent is not a folder; expected images"):
    folder(tmp_path / "absent")
  with pytest.raises(ValueError, match=f"no images in {tmp_path}"):
    folder(tmp_path)
  paint(tmp_path / "cat" / "0.png", 0)
  (tmp_path / "dog").mkdir()
  with pytest.raises(ValueError, match=r"class folders without images .*: dog"):
    folder(tmp_path)
  paint(tmp_path / "stray.png", 0)
  with pytest.raises(ValueError, match=r"holds images .*stray\.png.* beside folders"):
    folder(tmp_path)


def truncate(path: Path) -> None:
  path.write_bytes(path.read_bytes()[:-20])


def test_a_truncated_image_is_named(tmp_path: Path):
  paint(tmp_path / "cut.jpg", 0)
  truncate(tmp_path / "cut.jpg")
  with pytest.raises(sources.UnreadableImageError, match=r"cut\.jpg"):
    next(read(folder(tmp_path)))


def test_the_next_readable_image_stands_in(tmp_path: Path, caplog: pytest.LogCaptureFixture):
  for grey, name in enumerate(["a/0.png", "a/1.jpg", "b/0.png", "b/1.png"]):
    paint(tmp_path / name, grey)
  truncate(tmp_path / "a" / "1.jpg")
  (tmp_path / "b" / "1.png").write_text("not an image")
  source = folder(tmp_path, skip_unreadable=True)
  for _ in range(2):
    seen = [(int(source[i]["image"][0, 0, 0]), int(source[i]["label"])) for i in range(4)]
    assert seen == [(0, 0), (2, 1), (2, 1), (0, 0)]
  assert len(caplog.records) == 2
  assert "1.jpg" in caplog.text
  assert "1.png" in caplog.text


def test_a_folder_of_nothing_readable_is_an_error_even_when_skipping(tmp_path: Path):
  (tmp_path / "x.png").touch()
  with pytest.raises(sources.UnreadableImageError, match="none of the 1 images"):
    folder(tmp_path, skip_unreadable=True)[0]


def open_tfds(name: str, data_dir: str = "", split: str = "train") -> sources.Tfds:
  return sources.Tfds(name=name, split=split, data_dir=data_dir, image_size=16, channels=3)


def test_tfds_images_are_cropped_and_labelled():
  with tfds.testing.mock_data(num_examples=5):
    source = open_tfds("cifar10")
  assert isinstance(source, sources.Source)
  assert (len(source), source.num_classes) == (5, 10)
  batch = next(read(source))
  assert batch["image"].shape == (8, 16, 16, 3)
  assert batch["label"].dtype == np.int32


def test_tfds_grey_images_take_three_channels_and_unlabelled_ones_one_class():
  with tfds.testing.mock_data(num_examples=1):
    grey, unlabelled = open_tfds("mnist"), open_tfds("celeb_a")
  assert grey[0]["image"].shape == (16, 16, 3)
  assert (unlabelled.num_classes, unlabelled[0]["label"]) == (1, 0)


def test_tfds_without_images_or_files_says_so(tmp_path: Path):
  with (
    tfds.testing.mock_data(num_examples=1),
    pytest.raises(ValueError, match="no feature 'image', only description, label, title"),
  ):
    open_tfds("ag_news_subset")
  for name in ("cifar10", "unheard_of"):
    with pytest.raises(FileNotFoundError, match=f"{name} is not prepared .* in {tmp_path}.*once"):
      open_tfds(name, str(tmp_path))


class Shades(tfds.core.GeneratorBasedBuilder):
  """Four grey images, one of them stored as CMYK."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=4)}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, Example]]:
    for label in range(4):
      shade = Image.new("RGB", (20, 16), (60 * label,) * 3)
      image = encoded(shade.convert("CMYK"), "jpeg") if label == 3 else encoded(shade, "png")
      image.fp.seek(0)
      yield label, {"image": image.fp.read(), "label": label}


def test_tfds_files_are_read_without_tensorflow(tmp_path: Path):
  Shades(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
  source = open_tfds("shades", str(tmp_path))
  for item in map(pickle.loads(pickle.dumps(source)).__getitem__, range(4)):
    np.testing.assert_allclose(item["image"], 60 * item["label"], atol=2)
  assert "tensorflow" not in sys.modules
  with pytest.raises(ValueError, match="Unknown split 'test'"):
    open_tfds("shades", str(tmp_path), split="test")
