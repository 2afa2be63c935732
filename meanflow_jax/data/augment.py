"""Images changed at random on the devices, with labels that say how (arXiv 2206.00364, appendix F).

Networks that are told of the changes learn from more images than there are, and make none that are
changed: without labels (zeros) they generate images as they were.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from meanflow_jax.arrays import Image, Mask, PRNGKey, per_row

LABELS = 6  # numbers of a label
SCALE = 0.2  # standard deviation of the binary logarithm of a scale or anisotropy
SHIFT = 0.125  # of a translation, in parts of the image's side
TURNED = 0.5  # of the stretches, how many are not along rows

# The scaling filter of the wavelet sym6: Daubechies' least asymmetric one with 6 vanishing moments.
SYM6 = (
  0.015404109327027373,
  0.0034907120842174702,
  -0.11799011114819057,
  -0.048311742585633,
  0.4910559419267466,
  0.787641141030194,
  0.3379294217276218,
  -0.07263752278646252,
  -0.021060292512300564,
  0.04472490177066578,
  0.0017677118642428036,
  -0.007800708325034148,
)
BEFORE = len(SYM6) // 2 - 1  # taps on the left of a pixel's own two

PerRow = Float[Array, "B"]


class Change(NamedTuple):
  """What is done to each row, in this order; zeros leave it as it is.

  Attributes:
    flip: 1 mirrors it.
    scale: its size is multiplied by 2^(0.2 scale).
    stretch: it is stretched by 2^(0.2 stretch) along a direction, and compressed across.
    direction: of that, an angle, anticlockwise from the right.
    right, down: it is moved by 0.125 times its side.
  """

  flip: PerRow
  scale: PerRow
  stretch: PerRow
  direction: PerRow
  right: PerRow
  down: PerRow

  @property
  def label(self) -> Float[Array, "B 6"]:
    """What a network is told."""
    along = self.stretch * jnp.cos(self.direction), self.stretch * jnp.sin(self.direction)
    return jnp.stack([self.flip, self.scale, *along, self.right, self.down], axis=1)

  @property
  def warps(self) -> Mask:
    """Whether more is done to a row than to mirror it."""
    return (self.scale != 0) | (self.stretch != 0) | (self.right != 0) | (self.down != 0)


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Draws changes, and applies them.

  Attributes:
    probability: of scale, of anisotropy and of translation, each for itself.
    flip: whether half of the images are mirrored.
  """

  probability: float
  flip: bool

  def __post_init__(self):
    if not 0 <= self.probability <= 1:
      raise ValueError(f"augmentation.probability must lie in [0, 1], got {self.probability}")

  @property
  def is_on(self) -> bool:
    """Whether any image is changed."""
    return self.flip or self.probability > 0

  def __call__(self, key: PRNGKey, images: Image) -> tuple[Image, Float[Array, "B 6"]]:
    """Changed images, and their labels."""
    change = self.draw(key, images.shape[0])
    return apply(change, images), change.label

  def draw(self, key: PRNGKey, batch: int) -> Change:
    """The changes of a batch."""
    # Few and flat calls, for each takes XLA:CPU half a second to compile.
    key_uniform, key_normal = jax.random.split(key)
    uniform = jax.random.uniform(key_uniform, (6 * batch,)).reshape(6, batch)
    scale, stretch, right, down = jax.random.normal(key_normal, (4 * batch,)).reshape(4, batch)
    scaled, stretched, moved = uniform[:3] < self.probability
    turned = stretched & (uniform[3] < TURNED)
    return Change(
      flip=(uniform[4] < 0.5 * self.flip).astype(jnp.float32),
      scale=jnp.where(scaled, scale, 0),
      stretch=jnp.where(stretched, stretch, 0),
      direction=jnp.where(turned, math.pi * (2 * uniform[5] - 1), 0),
      right=jnp.where(moved, right, 0),
      down=jnp.where(moved, down, 0),
    )


def apply(change: Change, images: Image) -> Image:
  """The images after their changes; rows that are not warped keep their exact values."""
  images = jnp.where(per_row(change.flip > 0), images[:, :, ::-1], images)
  return jnp.where(per_row(change.warps), warped(change, images), images)


def warped(change: Change, images: Image) -> Image:
  """Scaled, stretched and moved, but not mirrored; reflections come in from outside.

  As in arXiv 2006.06676, appendix B: images are doubled, read linearly between the pixels, and
  halved again, by the filter of an orthogonal wavelet. So whole-pixel translations are exact, and
  what a smaller image cannot show is filtered out.
  """
  _, height, width, _ = images.shape
  times = lambda axes, matrix, x: jnp.einsum(axes, matrix, x, precision="highest")
  x = times("ih,bhwc->biwc", _doubling(height), images)
  x = times("jw,biwc->bijc", _doubling(width), x)
  x = jax.vmap(_read)(x, *_origins(change, height, width))
  x = times("hi,bijc->bhjc", _halving(height), x)
  return times("wj,bhjc->bhwc", _halving(width), x)


def _origins(
  change: Change, height: int, width: int
) -> tuple[Float[Array, "B I J"], Float[Array, "B I J"]]:
  """Row and column in the doubled image that each pixel of the doubled result is read from."""
  one = lambda values: values[:, None, None]
  cos, sin = jnp.cos(change.direction), jnp.sin(change.direction)
  smaller, narrower = 2 ** (-SCALE * change.scale), 2 ** (-SCALE * change.stretch)
  # What undoes a stretch, in axes that are turned by the direction.
  xx = smaller * (narrower * cos**2 + sin**2 / narrower)
  yy = smaller * (narrower * sin**2 + cos**2 / narrower)
  xy = smaller * (1 / narrower - narrower) * cos * sin
  x = _from_centre(width)[None, None, :] - one(change.right * SHIFT * width)
  y = _from_centre(height)[None, :, None] - one(change.down * SHIFT * height)
  origin_x, origin_y = one(xx) * x + one(xy) * y, one(xy) * x + one(yy) * y
  # Two pixels of the doubled image lie a quarter of a pixel before and after one of the image.
  return 2 * origin_y + (height - 0.5), 2 * origin_x + (width - 0.5)


def _read(
  image: Float[Array, "H W C"], row: Float[Array, "I J"], column: Float[Array, "I J"]
) -> Float[Array, "I J C"]:
  """The values of a periodic image at fractional rows and columns, linear between pixels."""
  height, width, channels = image.shape
  top, left = jnp.floor(row), jnp.floor(column)
  down, right = (row - top)[..., None], (column - left)[..., None]
  # One look-up for all four neighbours.
  below = jnp.concatenate([image, jnp.roll(image, -1, axis=0)], axis=2)
  around = jnp.concatenate([below, jnp.roll(below, -1, axis=1)], axis=2)
  index = jnp.mod(top.astype(int), height) * width + jnp.mod(left.astype(int), width)
  found = around.reshape(height * width, 4 * channels)[index]
  here, beneath, beside, across = jnp.split(found, 4, axis=2)
  upper = (1 - right) * here + right * beside
  lower = (1 - right) * beneath + right * across
  return (1 - down) * upper + down * lower


def _from_centre(size: int) -> Float[np.ndarray, "I"]:
  """Where the pixels of the doubled result lie that `_halving` reads, in pixels of the image."""
  pixel = np.arange(2 * size + len(SYM6) - 2) - BEFORE
  return ((pixel - 0.5) / 2 - (size - 1) / 2).astype(np.float32)


def _doubling(size: int) -> Float[np.ndarray, "I H"]:
  """From pixels to one period of the doubled, endlessly reflected image."""
  period = 2 * size - 2
  matrix = np.zeros((2 * period, size))
  for pixel in range(2 * period):
    for tap, weight in enumerate(SYM6):
      source, odd = divmod(pixel + BEFORE - tap, 2)
      if not odd:
        source %= period
        matrix[pixel, min(source, period - source)] += math.sqrt(2) * weight
  return matrix.astype(np.float32)


def _halving(size: int) -> Float[np.ndarray, "H I"]:
  """From the doubled result to pixels; the transpose of a doubling without reflections, halved."""
  matrix = np.zeros((size, 2 * size + len(SYM6) - 2))
  for pixel in range(size):
    matrix[pixel, 2 * pixel : 2 * pixel + len(SYM6)] = np.array(SYM6) / math.sqrt(2)
  return matrix.astype(np.float32)
