"""Distributions of the two times r <= t of a training row."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from meanflow_jax.arrays import PRNGKey, Time
from meanflow_jax.methods.row_groups import RowGroups

PAIRINGS = ("sorted", "clipped")

# Draws a batch of so many times in [0, 1].
TimeSampler = Callable[[PRNGKey, int], Time]


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Times uniform on [0, 1]."""

  def __call__(self, key: PRNGKey, batch: int) -> Time:
    """Draws `batch` times."""
    return jax.random.uniform(key, (batch,))


@dataclasses.dataclass(frozen=True)
class LogitNormal:
  """Times whose logit is normal (arXiv 2403.03206, section 3.1)."""

  mean: float
  std: float

  def __post_init__(self):
    if self.std <= 0:
      raise ValueError(f"the standard deviation of a logit-normal must be positive, got {self.std}")

  def __call__(self, key: PRNGKey, batch: int) -> Time:
    """Draws `batch` times."""
    return jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (batch,)))


@dataclasses.dataclass(frozen=True)
class TimePairs:
  """Pairs r <= t, with r = t on a fixed fraction of the rows (arXiv 2505.13447, section 4.3).

  Attributes:
    t, r: the distributions that the two times are drawn from.
    pairing: "sorted": t and r are the larger and the smaller of the two draws;
      "clipped": t is its draw and r = min(r, t).
    equal_fraction: fraction of the rows with r = t; 1 is plain flow matching.
  """

  t: TimeSampler
  r: TimeSampler
  pairing: str
  equal_fraction: float

  def __post_init__(self):
    if self.pairing not in PAIRINGS:
      raise ValueError(f"time pairing must be one of {PAIRINGS}, got {self.pairing!r}")
    RowGroups.from_fraction(self.equal_fraction)

  @property
  def rows(self) -> RowGroups:
    """The rows with r = t: the first of each group."""
    return RowGroups.from_fraction(self.equal_fraction)

  def __call__(self, key: PRNGKey, batch: int) -> tuple[Time, Time]:
    """Draws (r, t), each [B]."""
    key_t, key_r = jax.random.split(key)
    t, r = self.t(key_t, batch), self.r(key_r, batch)
    if self.pairing == "sorted":
      t, r = jnp.maximum(t, r), jnp.minimum(t, r)
    r = jnp.minimum(r, t)
    return jnp.where(self.rows.mask(batch), t, r), t
