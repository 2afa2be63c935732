"""Augmentation: exact where it can be, nothing where nothing was drawn, and its labels say what."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from meanflow_jax.data.augment import LABELS, SYM6, Augmentation, Change, apply, warped
from meanflow_jax.runtime.mesh import rows_sharding
from tests.runs import mesh_of

ROWS, SIDE = 8, 16
KEY = jax.random.key(0)
TAPS = np.array(SYM6)


@pytest.fixture(scope="module")
def images() -> jax.Array:
  """Noise in colour: the hardest there is."""
  return jax.random.uniform(KEY, (ROWS, SIDE, SIDE, 3), minval=-1, maxval=1)


def change(rows: int = ROWS, **values: float | list[float]) -> Change:
  given = {name: jnp.broadcast_to(jnp.float32(value), (rows,)) for name, value in values.items()}
  return Change(**dict.fromkeys(Change._fields, jnp.zeros(rows)) | given)


def draws(rows: int, probability: float = 0.5) -> Change:
  return Augmentation(probability, flip=True).draw(jax.random.key(1), rows)


def by_pixels(pixels: float, side: int = SIDE) -> float:
  """The draw that moves an image so far."""
  return pixels / (0.125 * side)


# The filter.


def response(frequency: float) -> float:
  """Of the filter, 1 at frequency 0, for cycles per sample."""
  return abs(np.exp(-2j * math.pi * frequency * np.arange(len(TAPS))) @ TAPS) / math.sqrt(2)


def asymmetry(taps: np.ndarray) -> float:
  """How far the phase is from a line through 0."""
  omega = np.linspace(0, math.pi, 400, endpoint=False)[1:]
  phase = np.unwrap(np.angle(np.exp(-1j * np.outer(omega, np.arange(len(taps)))) @ taps))
  slope = (omega @ phase) / (omega @ omega)
  return float(np.sum((phase - slope * omega) ** 2))


def test_the_filter_is_that_of_sym6():
  """Of the orthogonal filters with 6 vanishing moments, the one with the straightest phase.

  Daubechies, Ten Lectures on Wavelets, chapters 6.1 and 8.1: besides those at -1, zeros come in
  reciprocal pairs (and conjugate ones), of which one each is chosen.
  """
  moments = len(TAPS) // 2
  powers = [math.comb(moments - 1 + k, k) for k in range(moments)]
  pairs = []
  for y in np.roots(powers[::-1]):
    inside = min(np.roots([1, 4 * y - 2, 1]), key=abs)
    if inside.imag > -1e-9:
      pairs.append((inside, 1 / inside))
  candidates = []
  for chosen in itertools.product(*pairs):
    zeros = [zero for z in chosen for zero in ({z, z.conjugate()} if z.imag else {z})]
    taps = np.real(np.poly([-1.0] * moments + zeros))
    candidates.append(taps * math.sqrt(2) / taps.sum())
  straightest = min(map(asymmetry, candidates))
  best = [taps for taps in candidates if asymmetry(taps) < straightest * 1.01]
  assert len(best) == 2  # one and its mirror image
  assert min(np.abs(TAPS - taps).max() for taps in best) < 1e-9


def test_the_filter_is_orthogonal():
  for lag in range(0, len(TAPS), 2):
    np.testing.assert_allclose(TAPS[lag:] @ TAPS[: len(TAPS) - lag], lag == 0, atol=1e-12)


# What is exact.


def test_flips_are_exact(images):
  flips = jnp.array([0.0, 1.0] * (ROWS // 2))
  expected = jnp.where(flips[:, None, None, None] == 1, images[:, :, ::-1], images)
  np.testing.assert_array_equal(jax.jit(apply)(change(flip=flips), images), expected)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (0, -3), (-2, 5), (15, -15)])
def test_whole_pixel_translations_are_exact(images, down, right):
  moved = jax.jit(warped)(change(down=by_pixels(down), right=by_pixels(right)), images)
  edge = SIDE - 1
  outside = np.pad(images, ((0, 0), (edge, edge), (edge, edge), (0, 0)), mode="reflect")
  top, left = edge - down, edge - right
  expected = outside[:, top : top + SIDE, left : left + SIDE]
  np.testing.assert_allclose(moved, expected, atol=3e-6)


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_what_has_no_label_is_left_as_it_is(images, probability):
  augmentation = Augmentation(probability, flip=False)
  assert augmentation.is_on == (probability > 0)
  made, labels = jax.jit(augmentation)(KEY, images)
  none = (labels == 0).all(axis=1)
  assert none.all() if probability == 0 else 0 < none.sum() < ROWS
  changed = (made != images).any(axis=(1, 2, 3))
  np.testing.assert_array_equal(changed, ~none)


# What is not.


def along(matrix_of_axis: np.ndarray, axis: int, image: np.ndarray) -> np.ndarray:
  return np.moveaxis(np.tensordot(matrix_of_axis, image, (1, axis)), 0, axis)


def transform(row: Change) -> np.ndarray:
  """From where a pixel was to where it goes, in pixels from the centre, x before y."""
  turn = lambda angle: np.array(
    [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
  )
  size, stretch = 2 ** (0.2 * row.scale), 2 ** (0.2 * row.stretch)
  moved = np.eye(3)
  moved[:2, 2] = 0.125 * SIDE * row.right, 0.125 * SIDE * row.down
  stretched = turn(-row.direction) @ np.diag([stretch, 1 / stretch, 1]) @ turn(row.direction)
  return moved @ stretched @ np.diag([size, size, 1])


def plainly_changed(row: Change, image: np.ndarray) -> np.ndarray:
  """The same of one image step by step: mirror, pad, double, look up, halve; in float64."""
  image = np.float64(image[:, ::-1] if row.flip else image)
  edge = SIDE - 1
  padded = np.pad(image, ((edge, edge), (edge, edge), (0, 0)), mode="reflect")
  size = padded.shape[0]
  stuffed = np.zeros((2 * size, 2 * size, 3))
  stuffed[::2, ::2] = padded
  for axis in (0, 1):
    convolve = lambda line: np.convolve(line, math.sqrt(2) * TAPS)[5 : 5 + 2 * size]
    stuffed = np.apply_along_axis(convolve, axis, stuffed)
  reached = np.arange(-5, 2 * SIDE + 5)
  x, y = np.meshgrid(*[(reached - 0.5) / 2 - (SIDE - 1) / 2] * 2)
  back = np.linalg.inv(transform(row)) @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
  column, line = 2 * (back[:2] + (SIDE - 1) / 2) + 0.5 + 2 * edge
  look_up = lambda channel: scipy.ndimage.map_coordinates(channel, [line, column], order=1)
  found = np.stack([look_up(stuffed[..., c]).reshape(x.shape) for c in range(3)], axis=-1)
  for axis in (0, 1):
    correlate = lambda line: np.correlate(line, TAPS / math.sqrt(2), "valid")[::2]
    found = np.apply_along_axis(correlate, axis, found)
  return found


def test_all_changes_together_are_those_of_a_plain_implementation(images):
  drawn = draws(ROWS, probability=1.0)
  assert all(jnp.unique(values).size > 1 for values in drawn)
  made = jax.jit(apply)(drawn, images)
  for number in range(ROWS):
    row = Change(*(float(values[number]) for values in drawn))
    expected = plainly_changed(row, np.asarray(images[number]))
    np.testing.assert_allclose(made[number], expected, atol=2e-5)


def waves(side: int, cycles: int) -> tuple[float, jax.Array]:
  """Stripes that go on beyond the edges, by reflection, and their cycles per pixel."""
  frequency = cycles / (2 * (side - 1))
  line = jnp.cos(2 * math.pi * frequency * jnp.arange(side))
  return frequency, jnp.broadcast_to(line[None, None, :, None], (1, side, side, 1))


def test_what_a_smaller_image_cannot_show_is_filtered_out():
  """Stripes of 0.45 cycles per pixel, made smaller by 1.5, would become those of 0.325."""
  frequency, stripes = waves(65, 58)
  smaller = change(1, scale=-math.log2(1.5) / 0.2)
  made = jnp.abs(jax.jit(warped)(smaller, stripes)).max()
  # By the filter's response: what is left of the stripes, and of their image by doubling.
  image = 0.5 - frequency / 2
  left = response(frequency / 2) * response(1.5 * frequency / 2)
  left += response(image) * response(1.5 * image)
  assert left < 0.4
  assert made < left + 0.05
  frequency, stripes = waves(65, 13)
  kept = jnp.abs(jax.jit(warped)(smaller, stripes)).max()
  assert 0.95 < kept < 1.02


# Labels, and what is drawn.


def test_a_label_says_what_was_done():
  drawn = draws(64)
  assert drawn.label.shape == (64, LABELS)
  flip, scale, cos, sin, right, down = drawn.label.T
  np.testing.assert_array_equal(flip, drawn.flip)
  np.testing.assert_array_equal(scale, drawn.scale)
  np.testing.assert_allclose(jnp.hypot(cos, sin), jnp.abs(drawn.stretch), atol=1e-6)
  np.testing.assert_allclose(
    cos * jnp.sin(drawn.direction), sin * jnp.cos(drawn.direction), atol=1e-6
  )
  np.testing.assert_array_equal(jnp.stack([right, down]), jnp.stack([drawn.right, drawn.down]))


def test_draws_have_their_probabilities():
  rows, probability = 40_000, 0.12
  drawn = jax.tree.map(np.asarray, draws(rows, probability))
  share = lambda values: np.mean(values != 0)
  near = lambda p: pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / rows))
  assert share(drawn.flip) == near(0.5)
  assert set(np.unique(drawn.flip)) == {0, 1}
  for name in ("scale", "stretch", "right", "down"):
    values = getattr(drawn, name)
    assert share(values) == near(probability), name
    assert values[values != 0].std() == pytest.approx(1, abs=0.06), name
  np.testing.assert_array_equal(drawn.right != 0, drawn.down != 0)
  turned = drawn.direction[drawn.stretch != 0]
  assert share(turned) == pytest.approx(0.5, abs=0.03)
  assert np.abs(turned).max() == pytest.approx(math.pi, abs=0.02)
  assert not drawn.direction[drawn.stretch == 0].any()
  applied = np.stack(
    [values != 0 for values in (drawn.flip, drawn.scale, drawn.stretch, drawn.right)]
  )
  assert np.abs(np.corrcoef(applied) - np.eye(4)).max() < 4 / math.sqrt(rows)


def test_draws_are_a_function_of_the_key(images):
  augment = jax.jit(Augmentation(0.5, flip=True))
  for one, same, other in zip(
    *(augment(jax.random.key(k), images) for k in (0, 0, 1)), strict=True
  ):
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_rows_know_nothing_of_each_other(images):
  drawn = draws(ROWS, probability=1.0)
  made = jax.jit(apply)(drawn, images)
  other = jax.jit(apply)(drawn, images.at[3].set(0.0))
  np.testing.assert_array_equal(np.delete(made, 3, 0), np.delete(other, 3, 0))
  assert (made[3] != other[3]).any()
  alone = jax.jit(apply)(jax.tree.map(lambda values: values[2:4], drawn), images[2:4])
  np.testing.assert_allclose(alone, made[2:4], atol=1e-6)


def test_no_row_leaves_its_device(images):
  sharding = rows_sharding(mesh_of(8, 1))
  augment = Augmentation(0.5, flip=True)
  spread = jax.jit(augment, out_shardings=(sharding, sharding))
  compiled = spread.lower(KEY, jax.device_put(images, sharding)).compile()
  text = compiled.as_text()
  assert not [word for word in ("all-", "collective", "reduce-scatter") if f" {word}" in text]
  many, one = compiled(KEY, jax.device_put(images, sharding)), jax.jit(augment)(KEY, images)
  for ours, theirs in zip(many, one, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_impossible_probabilities_are_refused():
  for probability in (-0.1, 1.1):
    with pytest.raises(ValueError, match=r"augmentation.probability must lie in \[0, 1\]"):
      Augmentation(probability, flip=False)
