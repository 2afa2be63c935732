"""The letters of array shapes and the types built from them.

  B  rows of a batch          H, W, C  height, width and channels of an image or latent
  N  tokens of a sequence     K, D     attention heads, size of one head
  E  width of a network       L        layers
  A  numbers that say how an image was augmented

Time runs from t = 0 (data) to t = 1 (noise): z_t = (1 - t) x + t e, with velocity v = e - x.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

Image = Float[Array, "B H W C"]
Time = Float[Array, "B"]
Class = Int[Array, "B"]
Mask = Bool[Array, "B"]
Scalar = Float[Array, ""]
PRNGKey = Key[Array, ""]


class Told(NamedTuple):
  """What a network is told of rows beside their class.

  Attributes:
    label: the class.
    augmentation: how the image was augmented.
    dropout: the key of each row's own dropout; without, nothing is dropped.
  """

  label: Class
  augmentation: Float[Array, "B A"] | None = None
  dropout: Key[Array, "B"] | None = None


Label = Class | Told

# The average velocity u(z, r, t, y) over [r, t], r <= t; u(z, t, t, y) is the velocity at t.
VelocityFn = Callable[[Image, Time, Time, Label], Image]
# A velocity function that takes more by name, where its network does: `guidance` (a GuidanceScale),
# and `heads`, the names of several velocities, for a tuple of them.
NetworkFn = Callable[..., Any]


class GuidanceScale(NamedTuple):
  """Classifier-free guidance as an input of a network, for each row.

  Attributes:
    omega: the scale; 1 is without guidance.
    t_min, t_max: where in t it holds.
  """

  omega: Time
  t_min: Time
  t_max: Time

  @classmethod
  def everywhere(cls, omega: Time) -> "GuidanceScale":
    """A scale that holds for all t."""
    return cls(omega, jnp.zeros_like(omega), jnp.ones_like(omega))

  @classmethod
  def off(cls, like: Time) -> "GuidanceScale":
    """No guidance, for as many rows as another array has."""
    return cls.everywhere(jnp.ones_like(like))

  def in_force(self, t: Time) -> Time:
    """The scale at t: 1 outside its interval."""
    return jnp.where((t >= self.t_min) & (t <= self.t_max), self.omega, 1)


def per_row(values: Time | Mask) -> Array:
  """Reshapes one value per row [B] to [B, 1, 1, 1], to broadcast against images."""
  return values[:, None, None, None]


def told(y: Label) -> Told:
  """A label, a bare class too, in its parts."""
  return y if isinstance(y, Told) else Told(y)


def without_class(y: Label, null_label: int, rows: Mask | None = None) -> Label:
  """The labels with `null_label` as the class, on all or some rows; what else they say stays."""
  label = told(y).label
  null = jnp.full_like(label, null_label)
  label = null if rows is None else jnp.where(rows, null, label)
  return y._replace(label=label) if isinstance(y, Told) else label


def with_dropout(y: Label, keys: Key[Array, "B"]) -> Told:
  """The labels with a key for each row's dropout: the mask is the row's, however rows are split."""
  return told(y)._replace(dropout=keys)


def without_dropout(y: Label) -> Label:
  """The labels for which nothing is dropped."""
  return y._replace(dropout=None) if isinstance(y, Told) else y
