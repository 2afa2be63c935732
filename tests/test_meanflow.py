"""The objective: true of exact flows, equal to the plain formula, and no more work than needed."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from meanflow_jax.arrays import Image, Label, Time, VelocityFn
from meanflow_jax.methods.meanflow import AdaptiveWeight, Draws, MeanFlow, velocity_and_derivative
from meanflow_jax.methods.plain_meanflow import PlainMeanFlow
from meanflow_jax.train_step import velocity_fn
from tests import tiny
from tests.exact import GaussianFlow, per_image
from tests.plain import plain_objective

BATCH, IMAGE = 16, (4, 4, 1)
KEY = jax.random.key(0)
FLOW = GaussianFlow(means=(0.7,), s=0.4)
GUIDANCE = {
  "none": {},
  "omega": {"omega": 2.0},
  "omega + kappa = 1": {"omega": 0.3, "kappa": 0.7},
  "kappa": {"kappa": 0.5},
  "interval": {"omega": 0.7, "kappa": 0.5, "t_start": 0.3, "t_end": 0.7},
}


def data(batch: int = BATCH) -> tuple[Image, Label]:
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(batch, *IMAGE))), jnp.asarray(rng.integers(3, size=batch))


def points() -> tuple[Image, Time, Time, Label]:
  """Points z with times r < t and labels 0."""
  z, _ = data()
  r = jnp.linspace(0, 0.6, BATCH)
  return z, r, r + 0.4, jnp.zeros(BATCH, jnp.int32)


# The identity.


@pytest.mark.usefixtures("float64")
def test_the_identity_holds_for_the_true_flow():
  z, r, t, y = points()
  v = FLOW(z, t, t, y)
  u, du_dt = velocity_and_derivative(FLOW, z, r, t, y, v)
  np.testing.assert_allclose(u + per_image(t - r) * du_dt, v, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_the_derivative_is_that_along_the_flow():
  z, r, t, y = points()
  step = 1e-5
  ahead, behind = (FLOW(FLOW.transport(z, t, time, y), r, time, y) for time in (t + step, t - step))
  u, du_dt = velocity_and_derivative(FLOW, z, r, t, y, FLOW(z, t, t, y))
  np.testing.assert_array_equal(u, FLOW(z, r, t, y))
  np.testing.assert_allclose(du_dt, (ahead - behind) / (2 * step), atol=1e-8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tangents", [(1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 0, 1), (-1, 0, -1)])
def test_no_other_tangents_satisfy_the_identity(tangents):
  z, r, t, y = points()
  v = FLOW(z, t, t, y)
  of_z, of_r, of_t = tangents
  along = of_z * v, jnp.full_like(r, of_r), jnp.full_like(t, of_t)
  u, du_dt = jax.jvp(lambda z, r, t: FLOW(z, r, t, y), (z, r, t), along)
  assert jnp.abs(u + per_image(t - r) * du_dt - v).max() > 0.1


def test_the_derivative_carries_no_gradient():
  z, r, t, y = points()
  params = tiny.mlp_params(pixels=16, labels=4)
  derivative = lambda params: velocity_and_derivative(tiny.mlp(params), z, r, t, y, z)[1].sum()
  assert jnp.abs(derivative(params)) > 1e-2
  assert not any(leaf.any() for leaf in jax.tree.leaves(jax.grad(derivative)(params)))


# The objective of exact flows.


def draws_at(method: MeanFlow, flow: GaussianFlow, y: Label) -> tuple[Image, Draws]:
  """Data and draws whose velocity e - x is the flow's own; rows that dropped belong to null."""
  z, _ = data()
  draws = method.draw(KEY, z, y)
  x, e = flow.expected_pair(z, draws.t, jnp.where(draws.dropped, method.null_label, y))
  return x, draws.replace(noise=e)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_the_true_flow_has_no_error(fraction):
  method, y = tiny.meanflow(equal_fraction=fraction), jnp.zeros(BATCH, jnp.int32)
  x, draws = draws_at(method, FLOW, y)
  loss, metrics = method.objective(FLOW, x, y, draws)
  assert loss < 1e-20
  assert all(value < 1e-20 for value in metrics.values())
  assert ("velocity_error" in metrics) == (fraction > 0)


WRONG = {
  "another mean": GaussianFlow(means=(0.8,), s=0.4),
  "another deviation": GaussianFlow(means=(0.7,), s=0.5),
  "the velocity at t": lambda z, r, t, y: FLOW(z, t, t, y),
  "the velocity at r": lambda z, r, t, y: FLOW(z, r, r, y),
  "from t to r": lambda z, r, t, y: -FLOW(z, r, t, y),
  "data at t = 1": lambda z, r, t, y: FLOW(z, 1 - t, 1 - r, y),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", WRONG)
def test_any_other_flow_has_an_error(name):
  method, y = tiny.meanflow(equal_fraction=0.5), jnp.zeros(BATCH, jnp.int32)
  x, draws = draws_at(method, FLOW, y)
  assert method.objective(WRONG[name], x, y, draws)[1]["error"] > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("omega", "kappa"), [(1.0, 0.0), (2.5, 0.0), (1.0, 0.5), (0.2, 0.92)])
@pytest.mark.parametrize("droppable", ["all", "equal"])
def test_the_guided_flow_has_no_error(omega, kappa, droppable):
  """Guidance of Gaussians of one deviation extrapolates their means: that flow is known, too.

  With omega + kappa != 1 the conditional network must be the flow to the extrapolated mean, and
  the unconditional one that to the null class' mean, for all targets to be met.
  """
  null, scale = 0.2, omega / (1 - kappa)
  means = (-1.0, 0.5, 0.9)
  guided = tuple(scale * mean + (1 - scale) * null for mean in means)
  method = tiny.meanflow(
    equal_fraction=0.5,
    guidance={"omega": omega, "kappa": kappa},
    dropout=0.25,
    droppable=droppable,
  )
  y = data()[1]
  x, draws = draws_at(method, GaussianFlow((*means, null), s=0.4), y)
  assert 0 < draws.dropped.sum() < BATCH
  error = lambda means: method.objective(GaussianFlow(means, s=0.4), x, y, draws)[1]["error"]
  assert error((*guided, null)) < 1e-20
  assert error((*guided, null + 0.1)) > 1e-4
  if scale != 1:
    assert error((*means, null)) > 1e-3


@pytest.mark.parametrize("step", [0, 4, 5, 6])
def test_guidance_may_begin_later(step):
  """Before, the objective is that without; so one step of training is compiled for both."""
  guidance = {"omega": 0.7, "kappa": 0.5}
  make = lambda **guidance: tiny.meanflow(equal_fraction=0.5, dropout=0.3, guidance=guidance)
  staged, (x, y) = make(**guidance, from_step=5), data()
  draws = staged.draw(KEY, x, y, jnp.int32(step))
  assert jnp.all(draws.guided == (step >= 5))
  same = make(**guidance if step >= 5 else {})

  def gradient(method: MeanFlow, draws: Draws) -> tuple:
    loss = lambda params: method.objective(tiny.mlp(params), x, y, draws)[0]
    return jax.value_and_grad(loss)(tiny.mlp_params(pixels=16, labels=4))

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    gradient(staged, draws),
    gradient(same, draws.replace(guided=None)),
  )


def test_guidance_that_would_never_begin_is_refused():
  method = tiny.meanflow(equal_fraction=0.5, guidance={"omega": 2.0, "from_step": 5})
  method.check_steps(6)
  with pytest.raises(ValueError, match=r"from_step 5 is not within train\.steps 5"):
    method.check_steps(5)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_the_true_flow_is_where_the_expected_gradient_vanishes(fraction):
  """Of a flow a u, scaled by a number: at a = 1 for random data and noise, and not at 0.8."""
  batch = 2**16
  x = FLOW.means[0] + FLOW.s * jax.random.normal(jax.random.key(1), (batch, 1, 1, 1))
  y = jnp.zeros(batch, jnp.int32)
  method = tiny.meanflow(equal_fraction=fraction, p=0.0)

  @jax.jit
  @jax.grad
  def slope(a: jax.Array) -> jax.Array:
    return method.loss(lambda z, r, t, y: a * FLOW(z, r, t, y), KEY, x, y)[0]

  assert abs(slope(1.0)) < 0.02
  assert slope(0.8) < -0.2


# The objective of any network.


def assert_close(ours, plain) -> None:
  """Relative to the largest magnitude of each array."""

  def compare(ours: jax.Array, plain: jax.Array) -> None:
    tolerance = 100 * jnp.finfo(ours.dtype).eps
    np.testing.assert_allclose(ours, plain, rtol=0, atol=tolerance * np.abs(plain).max())

  jax.tree.map(compare, ours, plain)


def assert_plain(method: MeanFlow, make: Callable[..., VelocityFn], params, jit) -> None:
  """Ours equals the plain objective in value and gradient, whichever rows drop their label."""
  rows, (x, y) = method.times.rows, data()
  halves = [jnp.arange(BATCH) % 2 == 0, rows.mask(BATCH) & (jnp.arange(BATCH) % 3 == 0)]

  def with_gradient(objective):
    loss = lambda params, draws: objective(make(params), x, y, draws)
    return jit(jax.value_and_grad(loss, has_aux=True))

  ours = with_gradient(method.objective)
  plain = with_gradient(lambda *args: plain_objective(method, *args))
  for dropped in halves:
    draws = method.draw(KEY, x, y).replace(dropped=dropped)
    assert_close(ours(params, draws), plain(params, draws))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_the_objective_is_the_plain_one(guidance, fraction):
  method = tiny.meanflow(equal_fraction=fraction, guidance=GUIDANCE[guidance])
  params = tiny.mlp_params(pixels=16, labels=4)
  assert_plain(method, tiny.mlp, params, tiny.jit)


@pytest.mark.parametrize(
  ("guidance", "fraction"), [("omega", 0.0), ("kappa", 0.75), ("interval", 1.0)]
)
def test_the_objective_of_a_transformer_is_the_plain_one(guidance, fraction):
  method = tiny.meanflow(equal_fraction=fraction, guidance=GUIDANCE[guidance])
  network = tiny.dit(depth=1)
  make = lambda params: velocity_fn(network, params)
  assert_plain(method, make, tiny.random_params(network, IMAGE), tiny.jit)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("guidance", ["none", "kappa"])
def test_what_benchmarks_call_plain_is_the_plain_one(guidance):
  method = tiny.meanflow(equal_fraction=0.75, guidance=GUIDANCE[guidance], dropout=0.2)
  fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
  (x, y), evaluated = data(), []

  def make(params):
    velocity = tiny.mlp(params)
    return lambda z, *args: evaluated.append(len(z)) or velocity(z, *args)

  def loss(method):
    evaluated.clear()
    draws = method.draw(KEY, x, y)
    of = lambda params: method.objective(make(params), x, y, draws)[0]
    return jax.value_and_grad(of)(tiny.mlp_params(pixels=16, labels=4)), sum(evaluated)

  ours, our_rows = loss(method)
  plain, plain_rows = loss(PlainMeanFlow(**fields))
  assert_close(ours, plain)
  assert (our_rows, plain_rows) == {"none": (16, 16), "kappa": (36, 48)}[guidance]


def test_the_loss_is_the_objective_of_the_draw():
  method, (x, y) = tiny.meanflow(equal_fraction=0.5, dropout=0.25), data()
  network = tiny.mlp(tiny.mlp_params(pixels=16, labels=4))
  expected = method.objective(network, x, y, method.draw(KEY, x, y))
  jax.tree.map(np.testing.assert_array_equal, method.loss(network, KEY, x, y), expected)


# The weight.


@pytest.mark.parametrize("p", [0.0, 0.75, 1.0, 2.0])
def test_the_weight_scales_the_gradient_and_has_none(p):
  error = jnp.array([0.0, 0.1, 10.0])
  weight = AdaptiveWeight(p, c=0.5)
  slopes = jax.vmap(jax.grad(lambda e: weight(e[None])[0]))(error)
  np.testing.assert_allclose(slopes, 1 / (error + 0.5) ** p, rtol=1e-6)
  np.testing.assert_allclose(weight(error), error * slopes, rtol=1e-6)


@pytest.mark.parametrize(("p", "c"), [(1.0, 0.0), (1.0, math.nan), (-1.0, 0.1), (math.nan, 0.1)])
def test_an_impossible_weight_is_refused(p, c):
  with pytest.raises(ValueError, match="adaptive weight's"):
    AdaptiveWeight(p, c)


# The work.


HIDDEN = 10_000  # so wide that its products outweigh everything else


def wide(z: Image, r: Time, t: Time, y: Label) -> Image:
  """A velocity function of two products."""
  rows, pixels = z.shape[0], math.prod(z.shape[1:])
  weights = jnp.ones((pixels, HIDDEN))
  return (z.reshape(rows, pixels) @ weights @ weights.T).reshape(z.shape)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize(
  ("guidance", "extra"),
  [
    ("none", lambda batch, ahead: 0),
    ("omega", lambda batch, ahead: batch),
    ("omega + kappa = 1", lambda batch, ahead: ahead),
    ("kappa", lambda batch, ahead: batch + ahead),
    ("interval", lambda batch, ahead: batch + ahead),
  ],
)
def test_the_network_sees_no_more_rows_than_needed(guidance, extra, fraction):
  """A JVP where r < t; v(null) everywhere; v(y) where r < t, as elsewhere it is u itself."""
  method, (x, y) = tiny.meanflow(equal_fraction=fraction, guidance=GUIDANCE[guidance]), data()
  lowered = jax.jit(lambda x, y: method.loss(wide, KEY, x, y)).lower(x, y)
  passes = lowered.cost_analysis()["flops"] / (4 * math.prod(x.shape[1:]) * HIDDEN)
  ahead = round((1 - fraction) * BATCH)
  assert passes == pytest.approx(BATCH + ahead + extra(BATCH, ahead), rel=1e-2)
  backward = 2 * BATCH
  assert method.flops(lambda: BATCH) == pytest.approx(passes + backward, rel=1e-2)


# The draws.


def test_draws_are_a_function_of_the_key():
  method, (x, y) = tiny.meanflow(equal_fraction=0.5, dropout=0.4), data()
  draws, same, other = (method.draw(jax.random.key(seed), x, y) for seed in (0, 0, 1))
  for name in ("noise", "r", "t", "dropped"):
    np.testing.assert_array_equal(getattr(draws, name), getattr(same, name))
    assert (getattr(draws, name) != getattr(other, name)).any(), name


def test_noise_is_standard_normal():
  method, (x, y) = tiny.meanflow(equal_fraction=0.25), data(batch=1024)
  noise = np.asarray(method.draw(KEY, x, y).noise, np.float64)
  assert scipy.stats.kstest(noise.ravel(), scipy.stats.norm.cdf).pvalue > 0.01


def test_draws_know_nothing_of_each_other():
  batch = 4096
  method, (x, y) = tiny.meanflow(equal_fraction=0.0, dropout=0.5), data(batch)
  draws = method.draw(KEY, x, y)
  # One key for two draws would show in the order in which numbers leave the generator.
  noise = [draws.noise[:, 0, 0, 0], draws.noise.ravel()[:batch]]
  columns = np.stack([*noise, draws.dropped, draws.r, draws.t, x[:, 0, 0, 0], y])
  of_each_other = np.abs(np.corrcoef(columns) - np.eye(7))
  of_each_other[[3, 4], [4, 3]] = 0  # but r < t
  assert of_each_other.max() < 4 / np.sqrt(batch)


def test_a_batch_of_broken_groups_is_refused():
  method, (x, y) = tiny.meanflow(equal_fraction=0.75), data(batch=6)
  with pytest.raises(ValueError, match="does not divide into groups of 4"):
    method.draw(KEY, x, y)


# Flow matching.


def velocity_only(z: Image, r: Time, t: Time, y: Label) -> Image:
  """Knows no average velocity: NaN where r < t."""
  return jnp.where(per_image(r == t), jnp.tanh(z + 1), jnp.nan)


def test_flow_matching_never_asks_for_an_average_velocity():
  method, (x, y) = tiny.meanflow(equal_fraction=1.0, guidance=GUIDANCE["kappa"]), data()
  assert jnp.isfinite(method.loss(velocity_only, KEY, x, y)[0])
  t, r = jnp.full(BATCH, 0.9), jnp.full(BATCH, 0.4)
  euler = method.step(velocity_only, x, t, r, y)
  np.testing.assert_allclose(euler, x - 0.5 * jnp.tanh(x + 1), atol=1e-6)


def test_meanflow_does():
  method, (x, y) = tiny.meanflow(equal_fraction=0.75), data()
  assert jnp.isnan(method.loss(velocity_only, KEY, x, y)[0])
  assert jnp.isnan(method.step(velocity_only, x, jnp.full(BATCH, 0.9), jnp.zeros(BATCH), y)).all()
