"""Sampling: exact flows arrive in any number of steps, plain flow matching in the limit."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_jax.arrays import Image
from meanflow_jax.methods.sampler import sample, time_grid
from tests import tiny
from tests.exact import GaussianFlow

FLOW = GaussianFlow(means=(-0.3, 0.7), s=0.4)
Y = jnp.arange(8) % 2
MEANFLOW, FLOW_MATCHING = (tiny.meanflow(equal_fraction=fraction) for fraction in (0.75, 1.0))
BAD_GRIDS = [(1.0,), (0.0,), (0.9, 0.0), (1.0, 0.1), (1.0, 0.5, 0.5, 0.0), (1.0, 0.3, 0.6, 0.0)]


def noise() -> Image:
  return jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 2, 1)))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("grid", [*map(time_grid, (1, 2, 5)), (1.0, 0.9, 0.05, 0.0)])
def test_the_true_average_velocity_arrives_in_any_number_of_steps(grid):
  images = sample(MEANFLOW.step, FLOW, noise(), Y, grid)
  np.testing.assert_allclose(images, FLOW.mean(Y) + FLOW.s * noise(), atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_step_ends_on_the_trajectory():
  t, r = jnp.full(8, 0.8), jnp.full(8, 0.3)
  np.testing.assert_allclose(
    MEANFLOW.step(FLOW, noise(), t, r, Y), FLOW.transport(noise(), t, r, Y), atol=1e-12
  )


@pytest.mark.usefixtures("float64")
def test_flow_matching_converges_with_order_1():
  target = FLOW.mean(Y) + FLOW.s * noise()
  error = lambda steps: jnp.abs(
    sample(FLOW_MATCHING.step, FLOW, noise(), Y, time_grid(steps)) - target
  ).max()
  errors = [float(error(steps)) for steps in (64, 128, 256)]
  for coarse, fine in itertools.pairwise(errors):
    assert math.log2(coarse / fine) == pytest.approx(1, abs=0.05)


def test_one_step_is_the_base_case():
  network, z = tiny.mlp(tiny.mlp_params(pixels=4, labels=4)), noise()
  expected = z - network(z, jnp.zeros(8), jnp.ones(8), Y)
  images = sample(MEANFLOW.step, network, z, Y, time_grid(1))
  np.testing.assert_allclose(images, expected, atol=1e-6)


@pytest.mark.parametrize("grid", [*map(time_grid, (1, 2, 3, 7)), (1.0, 0.75, 0.0)])
def test_each_interval_is_one_evaluation_over_its_length(grid):
  """With u = t - r, an image moves by the sum of squares of the intervals."""
  length = lambda z, r, t, y: jnp.broadcast_to((t - r)[:, None, None, None], z.shape)
  moved = noise() - sample(MEANFLOW.step, length, noise(), Y, grid)
  squares = sum((t - r) ** 2 for t, r in itertools.pairwise(grid))
  np.testing.assert_allclose(moved, squares, atol=1e-6)


@pytest.mark.parametrize("nfe", [1, 2, 3, 10, 49])
def test_grids_of_nfe_equal_intervals(nfe):
  grid = time_grid(nfe)
  np.testing.assert_allclose(np.diff(grid), -1 / nfe, atol=1e-12)
  assert (grid[0], grid[-1], len(grid)) == (1, 0, nfe + 1)
  assert time_grid(nfe=5, grid=grid) == grid  # a grid wins, and every regular one is valid


@pytest.mark.parametrize("grid", BAD_GRIDS)
def test_a_grid_that_does_not_decrease_from_1_to_0_is_refused(grid):
  with pytest.raises(ValueError, match="must decrease strictly from 1 to 0"):
    time_grid(1, grid)


@pytest.mark.parametrize("nfe", [0, -1])
def test_no_steps_are_refused(nfe):
  with pytest.raises(ValueError, match="at least one function evaluation"):
    time_grid(nfe)
