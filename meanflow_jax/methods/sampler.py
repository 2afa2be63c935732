"""Sampling on a grid of times: one function evaluation per step."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from meanflow_jax.arrays import Image, Label, Time, VelocityFn

StepFn = Callable[[VelocityFn, Image, Time, Time, Label], Image]


def time_grid(nfe: int, grid: Sequence[float] = ()) -> tuple[float, ...]:
  """The times 1 = t_0 > ... > t_n = 0 of n function evaluations; a given `grid` wins over `nfe`.

  Raises:
    ValueError: if `nfe` is below 1, or `grid` does not decrease from 1 to 0.
  """
  if not grid:
    if nfe < 1:
      raise ValueError(f"sampling takes at least one function evaluation, got nfe = {nfe}")
    return tuple(1 - k / nfe for k in range(nfe + 1))
  decreasing = all(a > b for a, b in itertools.pairwise(grid))
  if len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or not decreasing:
    raise ValueError(f"a time grid must decrease strictly from 1 to 0, got {tuple(grid)}")
  return tuple(float(t) for t in grid)


def sample(
  step: StepFn, velocity_fn: VelocityFn, noise: Image, y: Label, grid: Sequence[float]
) -> Image:
  """Takes noise z_1 to data z_0 with one `step` for each interval of the grid."""
  times = jnp.asarray(grid, noise.dtype)

  def advance(z: Image, interval: tuple[jax.Array, jax.Array]) -> tuple[Image, None]:
    t, r = (jnp.broadcast_to(time, z.shape[:1]) for time in interval)
    return step(velocity_fn, z, t, r, y), None

  return jax.lax.scan(advance, noise, (times[:-1], times[1:]))[0]
