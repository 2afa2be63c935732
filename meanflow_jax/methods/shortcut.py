"""Shortcut models: a long step is two of half its length (arXiv 2410.12557)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from meanflow_jax.arrays import (
  Image,
  Label,
  PRNGKey,
  Time,
  VelocityFn,
  per_row,
  without_dropout,
)
from meanflow_jax.methods.meanflow import Draws, EqualRows, MeanFlow, Rows
from meanflow_jax.methods.method import Step
from meanflow_jax.methods.row_groups import RowGroups


@dataclasses.dataclass(frozen=True)
class Shortcut(MeanFlow):
  """The objective of shortcut models, with times and guidance of MeanFlow where r = t.

  Where r < t, u(z_t, r, t) is regressed to the average velocity of two steps of half the length by
  the network itself. Lengths are 1, 1/2, 1/4, ..., each as likely; steps as short as 1 / `steps`
  are those of flow matching. Only these lengths are taught: sample in 1, 2, 4, ... equal steps.
  Errors should not be weighted (weight.p = 0), as published: those of rows with r < t are small,
  and an adaptive weight lets them run away with the network.

  Attributes:
    steps: how many of the shortest steps there are from noise to data, a power of two.
  """

  steps: int = 128

  def __post_init__(self):
    super().__post_init__()
    if self.steps < 2 or self.steps & (self.steps - 1):
      raise ValueError(f"method.shortcut.steps must be 2, 4, 8, ..., got {self.steps}")

  def check_steps(self, total: int) -> None:
    """Raises a ValueError if data would never teach, or longer steps never be taught."""
    super().check_steps(total)
    if not 0 < self.rows.first < self.rows.size:
      raise ValueError(
        "shortcut models learn from data where r = t, and longer steps where r < t: "
        f"method.times.equal_fraction must lie between 0 and 1, got {self.times.equal_fraction:g}"
      )

  def flops(self, forward: Callable[..., float]) -> float:
    """What a step costs for each row, from what a forward pass costs: two for the target of rows
    with r < t, and of guidance one for the others."""
    ahead = self.rows.rest / self.rows.size
    guidance = (1 - ahead) * self.guidance.needs_unconditional
    return (3 + 2 * ahead + guidance) * forward()

  def draw(self, key: PRNGKey, x: Image, y: Label, step: Step = 0) -> Draws:
    """Draws all random numbers of one step for data x with labels y; all steps are alike."""
    key_others, key_level, key_place = jax.random.split(key, 3)
    draws = super().draw(key_others, x, y, step)
    count = 2 ** jax.random.randint(key_level, x.shape[:1], 0, self.steps.bit_length() - 1)
    place = jnp.floor(count * jax.random.uniform(key_place, x.shape[:1]))
    equal = self.rows.mask(x.shape[0])
    return draws.replace(
      r=jnp.where(equal, draws.r, place / count), t=jnp.where(equal, draws.t, (place + 1) / count)
    )

  def guided_velocity(
    self, velocity_fn: VelocityFn, z: Image, v: Image, y: Label, draws: Draws, u_equal: EqualRows
  ) -> Image:
    """That of `MeanFlow` where r = t; no target of other rows asks for it."""
    equal, (_, rest, _, _) = draws.rows.split((z, v, y, draws))
    z, v, y, draws_equal = equal
    draws_equal = draws_equal.replace(rows=RowGroups(size=1, first=1))
    guided = super().guided_velocity(velocity_fn, z, v, y, draws_equal, u_equal)
    return draws.rows.merge(guided, rest)

  def average_velocity(
    self, velocity_fn: VelocityFn, rows: Rows, v: Image, draws: Draws
  ) -> tuple[Image, Image]:
    """u(z, r, t) of the rows with r < t, and its target, the mean of two shorter steps.

    The target is that of a network without dropout.
    """
    del v, draws
    middle, y = (rows.r + rows.t) / 2, without_dropout(rows.y_in)
    half = lambda z, t, r: stop_gradient(velocity_fn(z, self._start(t, r), t, y))
    first = half(rows.z, rows.t, middle)
    reached = rows.z - per_row(rows.t - middle) * first
    u = velocity_fn(rows.z, rows.r, rows.t, rows.y_in)
    return u, (first + half(reached, middle, rows.r)) / 2

  def step(self, velocity_fn: VelocityFn, z: Image, t: Time, r: Time, y: Label) -> Image:
    """One sampling step from t to r < t; of those lengths that are taught, best between multiples.

    The shortest are Euler's.
    """
    return z - per_row(t - r) * velocity_fn(z, self._start(t, r), t, y)

  def _start(self, t: Time, r: Time) -> Time:
    """r, but t for the shortest steps: there data teach the network."""
    return jnp.where(t - r < 1.5 / self.steps, t, r)


METHOD = Shortcut
