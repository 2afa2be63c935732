"""Image i is a function of (seed, i) alone, and pictures and arrays reach the disk as they are."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from meanflow_jax import build
from meanflow_jax.generate import ROUNDING, Generator, Labels
from meanflow_jax.methods.guidance import SamplingGuidance
from meanflow_jax.methods.sampler import time_grid
from meanflow_jax.runtime import images as image_files
from meanflow_jax.runtime.mesh import abstract, constrain_rows, parameter_shardings
from tests.runs import assert_close, mesh_of, tiny
from tests.tiny import dit, meanflow, random_params

SHAPE = (8, 8, 1)
METHOD = meanflow(equal_fraction=0.5)
NETWORK = dit(depth=1, patch_size=4)


def generator(
  shape: tuple[int, int], batch_size: int, *, labels: str = "random", seed: int = 3
) -> Generator:
  mesh = mesh_of(*shape)
  return Generator(
    network=NETWORK.clone(constrain=constrain_rows(mesh)),
    step=METHOD.step,
    guidance=SamplingGuidance(1.0, 0.0, 1.0, METHOD.null_label),
    grid=time_grid(2),
    image_shape=SHAPE,
    labels=Labels(labels, 1, 3),
    seed=seed,
    batch_size=batch_size,
    rounding="meanflow",
    mesh=mesh,
    decoder=None,
  )


def generate(made: Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Images (not rounded) and labels, from parameters that lie where a run's would."""
  params = placed_params(made)
  compiled = jax.jit(made.__call__)
  batches = [compiled(params, None, made.place(i)) for i in range(0, count, made.batch_size)]
  images, labels = (np.concatenate(parts)[:count] for parts in zip(*batches, strict=True))
  return images, labels


def placed_params(made: Generator) -> Any:
  params = random_params(NETWORK, SHAPE)
  shardings = parameter_shardings(made.mesh, abstract(params, jax.tree.map(lambda x: None, params)))
  return jax.device_put(params, shardings)


@functools.cache
def one_by_one() -> tuple[np.ndarray, np.ndarray]:
  return generate(generator((1, 1), 1), 30)


@pytest.mark.parametrize(
  ("shape", "batch_size", "count"),
  [((1, 1), 8, 30), ((8, 1), 8, 5), ((8, 1), 24, 30), ((2, 4), 24, 24), ((2, 4), 24, 29)],
)
def test_an_image_depends_on_its_number_alone(
  shape: tuple[int, int], batch_size: int, count: int
) -> None:
  images, labels = generate(generator(shape, batch_size), count)
  assert images.shape == (count, *SHAPE)
  assert labels.shape == (count,)
  assert_close(images, one_by_one()[0][:count], rtol=1e-6)
  np.testing.assert_array_equal(labels, one_by_one()[1][:count])


@pytest.mark.parametrize(("batch_size", "count"), [(8, 16), (8, 13), (16, 5)])
def test_batches_are_the_images_in_8_bits(batch_size: int, count: int) -> None:
  made = generator((8, 1), batch_size)
  batches = list(made.batches(placed_params(made), count))
  assert [len(images) for images, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
  images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
  assert images.dtype == np.uint8
  expected, expected_labels = generate(made, count)
  np.testing.assert_array_equal(images, ROUNDING["meanflow"](jnp.asarray(expected)))
  np.testing.assert_array_equal(labels, expected_labels)


def test_an_image_that_is_not_finite_is_refused() -> None:
  made = generator((8, 1), 8)
  params = jax.tree.map(lambda x: x.at[...].set(jnp.nan), placed_params(made))
  with pytest.raises(ValueError, match="8 of the 8 images from number 0 on are not finite"):
    list(made.batches(params, 13))


def test_images_of_different_numbers_and_seeds_differ() -> None:
  images, labels = one_by_one()
  distances = np.abs(images[:, None] - images[None]).max(axis=(2, 3, 4))
  assert distances[~np.eye(30, dtype=bool)].min() > 0.1
  assert set(labels.tolist()) == {0, 1, 2}
  others, other_labels = generate(generator((1, 1), 8, seed=4), 30)
  assert np.abs(others - images).max(axis=(1, 2, 3)).min() > 0.1
  assert (other_labels != labels).any()


def test_the_label_decides_the_image_and_not_the_noise() -> None:
  images, labels = one_by_one()
  ones, their_labels = generate(generator((1, 1), 8, labels="one"), 30)
  assert (their_labels == 1).all()
  assert_close(ones[labels == 1], images[labels == 1], rtol=1e-6)
  assert np.abs(ones - images)[labels != 1].max(axis=(1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("batch_size", [0, -8, 12])
def test_a_batch_that_devices_cannot_share_is_refused(batch_size: int) -> None:
  with pytest.raises(ValueError, match=f"sample.batch_size {batch_size} .* 8 devices"):
    generator((8, 1), batch_size)


def labels_of(rule: Labels, count: int, seed: int = 0) -> list[int]:
  keys = jax.random.split(jax.random.key(seed), count)
  return jax.vmap(rule)(keys, jnp.arange(count)).tolist()


def test_label_rules() -> None:
  assert labels_of(Labels("balanced", 0, 4), 10) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
  assert labels_of(Labels("one", 2, 4), 3) == [2, 2, 2]
  assert labels_of(Labels("balanced", 0, 0), 3) == [0, 0, 0]
  drawn = np.bincount(labels_of(Labels("random", 0, 4), 4_000), minlength=4)
  assert len(drawn) == 4
  np.testing.assert_allclose(drawn, 1_000, atol=150)  # five standard deviations
  assert labels_of(Labels("random", 0, 4), 50) != labels_of(Labels("random", 0, 4), 50, seed=1)


@pytest.mark.parametrize(("label", "num_classes"), [(4, 4), (-1, 4)])
def test_a_label_that_is_no_class_is_refused(label: int, num_classes: int) -> None:
  with pytest.raises(ValueError, match=rf"sample.label .*\[0, {num_classes}\).*got {label}"):
    Labels("one", label, num_classes)


@pytest.mark.parametrize("rule", ["one", "random"])
def test_an_unconditional_model_has_no_class_to_ask_for(rule: str) -> None:
  with pytest.raises(ValueError, match=rf"sample.labels '{rule}'.* unconditional"):
    Labels(rule, 0, 0)


def test_unknown_label_rules_are_refused() -> None:
  with pytest.raises(ValueError, match=r"sample.labels must be one of .*balanced.*'even'"):
    Labels("even", 0, 4)


@pytest.mark.parametrize(
  ("rounding", "expected"),
  [("meanflow", [0, 0, 1, 128, 254, 255, 255]), ("adm", [0, 0, 0, 127, 254, 255, 255])],
)
def test_levels_round_as_in_the_published_evaluations(rounding: str, expected: list[int]) -> None:
  values = jnp.array([-9, -1, -1 + 1 / 128, 0, 126.9 / 127.5, 1, 9], jnp.float32)
  rounded = ROUNDING[rounding](values.reshape(-1, 1, 1, 1))
  assert rounded.ravel().tolist() == expected


@pytest.mark.parametrize("rounding", sorted(ROUNDING))
def test_levels_of_real_images_come_back(rounding: str) -> None:
  levels = np.arange(256, dtype=np.float32).reshape(-1, 1, 1, 1)
  difference = ROUNDING[rounding](jnp.asarray(levels / np.float32(127.5) - 1)) - levels
  assert set(difference.ravel().tolist()) <= {0, 1, -1}


def test_a_given_grid_wins_over_the_number_of_evaluations() -> None:
  assert build.grid(tiny({"sample.nfe": 3})) == (1, 1 - 1 / 3, 1 - 2 / 3, 0)
  assert build.grid(tiny({"sample.nfe": 3, "sample.grid": (1.0, 0.7, 0.0)})) == (1, 0.7, 0)


# Pictures and arrays.


def tiles(picture: np.ndarray, side: int = 32) -> np.ndarray:
  """The pictures of a grid [rows, columns, side, side, C], having checked its white lines."""
  height, width, channels = picture.shape
  assert height % (side + 2) == width % (side + 2) == 0
  rows, columns = height // (side + 2), width // (side + 2)
  found = picture.reshape(rows, side + 2, columns, side + 2, channels).swapaxes(1, 2)
  for line in (found[:, :, 0], found[:, :, -1], found[:, :, :, 0], found[:, :, :, -1]):
    assert (line == 255).all()
  return found[:, :, 1:-1, 1:-1]


def numbered(count: int, side: int = 32, channels: int = 3) -> np.ndarray:
  """Image i is of shade i, but for channel c's c more."""
  shades = np.arange(count, dtype=np.uint8)[:, None] + np.arange(channels, dtype=np.uint8)
  return np.broadcast_to(shades[:, None, None], (count, side, side, channels)).copy()


def shades(picture: np.ndarray) -> list[list[int]]:
  found = tiles(picture)
  assert (found == found[:, :, :1, :1]).all()
  return found[:, :, 0, 0, 0].tolist()


def test_a_grid_has_one_row_per_class() -> None:
  picture = image_files.grid(numbered(6), np.array([2, 0, 1, 0, 1, 2]))
  assert shades(picture) == [[1, 3], [2, 4], [0, 5]]


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 2, 3, 4]])
def test_other_grids_are_nearly_square_and_in_order(labels: list[int]) -> None:
  picture = image_files.grid(numbered(5), np.array(labels))
  assert shades(picture) == [[0, 1, 2], [3, 4, 255]]


def test_small_images_are_enlarged_pixel_by_pixel() -> None:
  image = np.random.default_rng(0).integers(256, size=(1, 8, 8, 1), dtype=np.uint8)
  (((tile,),),) = (tiles(image_files.grid(image, np.zeros(1, int))),)
  np.testing.assert_array_equal(tile, image[0].repeat(4, axis=0).repeat(4, axis=1))


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3)])
def test_latents_show_their_first_channels(channels: int, shown: int) -> None:
  picture = image_files.grid(numbered(2, channels=channels), np.zeros(2, int))
  assert tiles(picture)[0, 1, 0, 0].tolist() == [1, 2, 3][:shown]


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_read_back_as_they_were(tmp_path: pathlib.Path, channels: int) -> None:
  picture = np.random.default_rng(0).integers(256, size=(20, 30, channels), dtype=np.uint8)
  image_files.save_png(tmp_path / "grid.png", picture)
  with Image.open(tmp_path / "grid.png") as image:
    assert (image.format, image.mode) == ("PNG", "L" if channels == 1 else "RGB")
    np.testing.assert_array_equal(np.asarray(image).reshape(picture.shape), picture)
  assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_arrays_have_the_layout_of_the_public_evaluators(tmp_path: pathlib.Path) -> None:
  images, labels = numbered(5, side=4), np.array([3, 1, 4, 1, 5], np.int32)
  image_files.save_npz(tmp_path / "images.npz", images, labels)
  with np.load(tmp_path / "images.npz", allow_pickle=False) as stored:
    assert stored.files == ["arr_0", "arr_1"]
    assert stored["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(stored["arr_0"], images)
    np.testing.assert_array_equal(stored["arr_1"], labels)
  assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]


WRITERS: dict[str, Callable[[pathlib.Path], None]] = {
  "png": lambda path: image_files.save_png(path, numbered(1)[0]),
  "npz": lambda path: image_files.save_npz(path, numbered(1), np.zeros(1, int)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_write_that_fails_leaves_what_was_there(
  tmp_path: pathlib.Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")

  path = tmp_path / f"images.{kind}"
  path.write_text("precious")
  monkeypatch.setattr(np, "savez", full)
  monkeypatch.setattr(Image.Image, "save", full)
  with pytest.raises(OSError, match="No space left"):
    WRITERS[kind](path)
  assert path.read_text() == "precious"
