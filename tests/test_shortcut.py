"""Shortcut models: exact flows are composed of their halves; times are those of halved steps."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_jax import build
from meanflow_jax.arrays import Image, Label, told, with_dropout
from meanflow_jax.methods.meanflow import Rows
from meanflow_jax.methods.shortcut import Shortcut
from tests import tiny
from tests.exact import GaussianFlow, per_image
from tests.runs import assert_close, mesh_of, stepped, train_step
from tests.runs import tiny as tiny_config

BATCH, IMAGE = 16, (4, 4, 1)
KEY = jax.random.key(0)
FLOW = GaussianFlow(means=(0.7,), s=0.4)


def shortcut(
  *,
  steps: int = 128,
  fraction: float = 0.5,
  p: float = 1.0,
  guidance: dict[str, float] | None = None,
) -> Shortcut:
  meanflow = tiny.meanflow(equal_fraction=fraction, p=p, guidance=guidance)
  return Shortcut(**vars(meanflow), steps=steps)


def data(batch: int = BATCH) -> tuple[Image, Label]:
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(batch, *IMAGE))), jnp.asarray(rng.integers(3, size=batch))


# The times.


def test_lengths_are_halves_of_one_and_as_likely_as_each_other():
  """Down to two of the shortest steps, and each place as likely."""
  x, y = data(4096)
  draws = shortcut(steps=16, fraction=0.0).draw(KEY, x, y)
  lengths, places = np.asarray(draws.t - draws.r), np.asarray(draws.r / (draws.t - draws.r))
  counts = collections.Counter(lengths.tolist())
  assert counts.keys() == {1, 1 / 2, 1 / 4, 1 / 8}
  assert min(counts.values()) > 0.9 * 1024
  at = collections.Counter(places[lengths == 1 / 8].tolist())
  assert at.keys() == {*range(8)}
  assert min(at.values()) > 0.6 * 128


def test_rows_with_r_equal_to_t_are_as_in_meanflow():
  (x, y), method = data(), shortcut()
  draws, equal = method.draw(KEY, x, y), np.asarray(method.rows.mask(BATCH))
  np.testing.assert_array_equal(draws.r[equal], draws.t[equal])
  assert len(set(draws.t[equal].tolist())) == equal.sum()  # any times
  assert (draws.r < draws.t)[~equal].all()


# The objective.


@pytest.mark.usefixtures("float64")
def test_the_true_flow_is_made_of_its_halves():
  """Only the shortest steps, those of flow matching, are off, by less the shorter they are."""
  x, _ = data()
  y = jnp.zeros(BATCH, jnp.int32)

  def errors(steps: int) -> tuple[np.ndarray, np.ndarray]:
    method = shortcut(steps=steps, fraction=0.0)
    draws = method.draw(KEY, x, y)
    rows = Rows(x, draws.r, draws.t, y, y)
    u, target = method.average_velocity(FLOW, rows, x, draws)
    np.testing.assert_array_equal(u, FLOW(x, draws.r, draws.t, y))
    shortest = np.asarray(draws.t - draws.r) == 2 / steps
    off = np.abs(np.asarray(target - u)).max(axis=(1, 2, 3))
    return off[~shortest], off[shortest]

  others, of_flow_matching = errors(8)
  assert others.max() < 1e-12
  assert of_flow_matching.min() > 1e-3
  assert errors(512)[1].max() < of_flow_matching.max() / 20


@pytest.mark.usefixtures("float64")
def test_it_is_the_plain_formula_for_any_network():
  method, (x, y) = shortcut(steps=4, fraction=0.0, p=0.0), data()
  draws = method.draw(KEY, x, y)
  middle = (draws.r + draws.t) / 2
  euler = draws.t - draws.r == 1 / 2  # whose halves are the shortest steps
  assert 0 < euler.sum() < BATCH

  def plain(params: tiny.Params) -> jax.Array:
    u = tiny.mlp(params)
    z = x + per_image(draws.t) * (draws.noise - x)
    half = per_image((draws.t - draws.r) / 2)
    first = u(z, jnp.where(euler, draws.t, middle), draws.t, y)
    second = u(z - half * first, jnp.where(euler, middle, draws.r), middle, y)
    target = jax.lax.stop_gradient(first + second) / 2
    return jnp.mean(jnp.sum((u(z, draws.r, draws.t, y) - target) ** 2, axis=(1, 2, 3)))

  params = tiny.mlp_params(pixels=16, labels=4)
  ours = jax.grad(lambda params: method.objective(tiny.mlp(params), x, y, draws)[0])(params)
  compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
  jax.tree.map(compare, ours, jax.grad(plain)(params))


@pytest.mark.parametrize("guidance", [{}, {"omega": 0.7, "kappa": 0.5}, {"omega": 2.0}])
def test_it_costs_what_it_says(guidance):
  """Of rows with r < t, two evaluations for the target; guidance of the others alone."""
  method, (x, y) = shortcut(guidance=guidance), data()
  rows: collections.Counter[str] = collections.Counter()

  def network(z: Image, r: Any, t: Any, y: Label) -> Image:
    rows["seen"] += z.shape[0]
    return z

  jax.eval_shape(lambda: method.loss(network, KEY, x, y))
  assert rows["seen"] == BATCH + 2 * BATCH // 2 + (BATCH // 2 if guidance else 0)
  assert method.flops(lambda: 1.0) * BATCH == rows["seen"] + 2 * BATCH


@pytest.mark.usefixtures("float64")
def test_rows_with_r_equal_to_t_are_guided_as_in_meanflow():
  settings = {"equal_fraction": 0.5, "dropout": 0.3, "guidance": {"omega": 0.7, "kappa": 0.5}}
  meanflow, (x, y) = tiny.meanflow(**settings), data()
  method = Shortcut(**vars(meanflow))
  draws = meanflow.draw(KEY, x, y)
  network, v = tiny.mlp(tiny.mlp_params(pixels=16, labels=4)), draws.noise - x
  z = x + per_image(draws.t) * v
  rows, t = meanflow.rows, draws.t
  u_equal = rows.split(network(z, t, t, y))[0]
  ours, theirs = (
    rows.split(kind.guided_velocity(network, z, v, y, draws, u_equal))
    for kind in (method, meanflow)
  )
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
  np.testing.assert_array_equal(ours[1], rows.split(v)[1])
  assert jnp.abs(ours[0] - rows.split(v)[0]).max() > 0.1


def test_targets_are_those_of_a_network_without_dropout():
  method, (x, y) = shortcut(), data()
  keys = jax.random.split(KEY, BATCH)
  seen = []

  def network(z: Image, r: Any, t: Any, y: Label) -> Image:
    seen.append((z.shape[0], told(y).dropout is not None))
    return z

  method.loss(network, KEY, x, with_dropout(y, keys))
  half = BATCH // 2
  assert sorted(seen) == [(half, False), (half, False), (half, True), (half, True)]


@pytest.mark.usefixtures("float64")
def test_sampling_takes_steps_of_the_lengths_that_are_taught():
  """And Euler's where they are the shortest, at r = t."""
  x, _ = data()
  y, asked = jnp.zeros(BATCH, jnp.int32), []

  def network(z: Image, r: Any, t: Any, y: Label) -> Image:
    asked.append(float(t[0] - r[0]))
    return FLOW(z, r, t, y)

  method = shortcut(steps=8)
  for t, r in ((1.0, 0.5), (0.5, 0.25), (0.25, 0.125)):
    at = lambda time: jnp.full(BATCH, time)
    x = method.step(network, x, at(t), at(r), y)
  assert asked == [0.5, 0.25, 0.0]


# The run.

CHANGES = {"method.name": "shortcut", "train.steps": 4}


@pytest.mark.slow
def test_devices_and_microbatches_change_no_number():
  """But rounding: what a start of zeros has let grow to 1e-10 by now is the rest of large sums."""
  config = tiny_config(CHANGES | {"train.batch_size": 32})
  one = stepped(config, mesh_of(1, 1), 4)
  config.train.accumulate = 2
  assert_close(stepped(config, mesh_of(4, 2), 4), one, rtol=1e-3)


@pytest.mark.parametrize("steps", [0, 1, 12])
def test_steps_that_cannot_be_halved_are_refused(steps):
  with pytest.raises(ValueError, match=f"2, 4, 8, ..., got {steps}"):
    build.method(tiny_config(CHANGES | {"method.shortcut.steps": steps}))


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_data_and_longer_steps_are_both_needed(fraction):
  rows = {"method.times.equal_fraction": fraction, "method.label_dropout.droppable": "all"}
  with pytest.raises(
    ValueError, match=f"equal_fraction must lie between 0 and 1, got {fraction:g}"
  ):
    train_step(tiny_config(CHANGES | rows), mesh_of(1, 1))
