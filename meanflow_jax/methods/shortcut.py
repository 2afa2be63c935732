"""Shortcut models: a long step is two of half its length (arXiv 2410.12557)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from meanflow_jax.arrays import Image, Label, PRNGKey, VelocityFn, per_row
from meanflow_jax.methods.meanflow import Draws, MeanFlow, Rows
from meanflow_jax.methods.method import Step


@dataclasses.dataclass(frozen=True)
class Shortcut(MeanFlow):
  """The objective of shortcut models, with times and guidance of MeanFlow where r = t.

  Where r < t, u(z_t, r, t) is regressed to the average velocity of two steps of half the length by
  the network itself. Lengths are 1, 1/2, 1/4, ..., each as likely; steps as short as 1 / `steps`
  are those of flow matching.

  Attributes:
    steps: how many of the shortest steps there are from noise to data, a power of two.
  """

  steps: int = 128

  def __post_init__(self):
    super().__post_init__()
    if self.steps < 2 or self.steps & (self.steps - 1):
      raise ValueError(f"method.shortcut.steps must be 2, 4, 8, ..., got {self.steps}")

  def flops(self, forward: Callable[..., float]) -> float:
    """What a step costs for each row, from what a forward pass costs: of those with r < t two more
    instead of a JVP."""
    return super().flops(forward) + self.rows.rest / self.rows.size * forward()

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

  def average_velocity(
    self, velocity_fn: VelocityFn, rows: Rows, v: Image, draws: Draws
  ) -> tuple[Image, Image]:
    """u(z, r, t) of the rows with r < t, and its target, the mean of two shorter steps.

    The shortest steps ask the network at r = t, where data teach it, and not where nothing does.
    """
    del v, draws
    middle = (rows.r + rows.t) / 2
    shortest = rows.t - middle < 1.5 / self.steps
    start = lambda r, t: jnp.where(shortest, t, r)
    step = lambda z, r, t: stop_gradient(velocity_fn(z, start(r, t), t, rows.y_in))
    first = step(rows.z, middle, rows.t)
    reached = rows.z - per_row(rows.t - middle) * first
    u = velocity_fn(rows.z, rows.r, rows.t, rows.y_in)
    return u, (first + step(reached, rows.r, middle)) / 2


METHOD = Shortcut
