"""The letters of array shapes and the types built from them.

  B  rows of a batch          H, W, C  height, width and channels of an image or latent
  N  tokens of a sequence     K, D     attention heads, size of one head
  E  width of a network       L        layers

Time runs from t = 0 (data) to t = 1 (noise): z_t = (1 - t) x + t e, with velocity v = e - x.
"""

from collections.abc import Callable

from jaxtyping import Array, Bool, Float, Int, Key

Image = Float[Array, "B H W C"]
Time = Float[Array, "B"]
Label = Int[Array, "B"]
Mask = Bool[Array, "B"]
Scalar = Float[Array, ""]
PRNGKey = Key[Array, ""]

# The average velocity u(z, r, t, y) over [r, t], r <= t; u(z, t, t, y) is the velocity at t.
VelocityFn = Callable[[Image, Time, Time, Label], Image]


def per_row(values: Time | Mask) -> Array:
  """Reshapes one value per row [B] to [B, 1, 1, 1], to broadcast against images."""
  return values[:, None, None, None]
