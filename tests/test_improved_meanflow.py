"""Improved MeanFlow: true of exact flows, equal to the plain formula, no more work than needed."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from meanflow_jax import evaluate, train
from meanflow_jax.arrays import GuidanceScale, Image, Label, NetworkFn, Time
from meanflow_jax.methods.guidance import GuidanceInput, LabelDropout
from meanflow_jax.methods.improved_meanflow import Draws, ImprovedMeanFlow
from meanflow_jax.methods.meanflow import AdaptiveWeight
from meanflow_jax.methods.sampler import sample, time_grid
from meanflow_jax.methods.time_sampling import TimePairs, Uniform
from meanflow_jax.train_step import sampling_params, velocity_fn
from tests import tiny
from tests.exact import GaussianFlow, per_image
from tests.plain import plain_improved_objective
from tests.runs import devices, logged, mesh_of, train_step
from tests.runs import tiny as tiny_config

BATCH, IMAGE = 16, (4, 4, 1)
KEY = jax.random.key(0)
MEANS, NULL_MEAN, S = (-1.0, 0.5, 0.9), 0.2, 0.4


def improved(
  *,
  equal_fraction: float = 0.5,
  omega_max: float = 8.0,
  omega_exponent: float = 1.0,
  interval_split: float = 0.5,
  dropout: float = 0.0,
  droppable: str = "all",
  p: float = 1.0,
) -> ImprovedMeanFlow:
  return ImprovedMeanFlow(
    times=TimePairs(Uniform(), Uniform(), "sorted", equal_fraction),
    label_dropout=LabelDropout(dropout, droppable),
    weight=AdaptiveWeight(p, 1e-2),
    null_label=3,
    omega_max=omega_max,
    omega_exponent=omega_exponent,
    interval_split=interval_split,
  )


def data(batch: int = BATCH) -> tuple[Image, Label]:
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(batch, *IMAGE))), jnp.asarray(rng.integers(3, size=batch))


# The objective of exact flows.


class GuidedGaussian:
  """A network that knows the guided flow of Gaussians: guidance extrapolates their means.

  Each row's flow is the one towards omega mean(y) + (1 - omega) mean(null), as if guidance held
  for all t; without class it is the flow to the null class' mean.
  """

  def __init__(self, s: float = S, off: float = 0.0):
    self.s, self.off = s, off

  def __call__(
    self,
    z: Image,
    r: Time,
    t: Time,
    y: Label,
    guidance: GuidanceScale | None = None,
    heads: tuple[str, ...] | None = None,
  ) -> Any:
    omega = guidance.omega if guidance else jnp.ones_like(t)
    mean = jnp.asarray((*MEANS, NULL_MEAN))[y]
    guided = jnp.where(y == 3, NULL_MEAN, omega * mean + (1 - omega) * NULL_MEAN) + self.off
    flow = lambda r: _flow_to(guided, self.s, z, r, t)
    if heads is None:
      return flow(r)
    return tuple({"u": flow(r), "v": flow(t)}[head] for head in heads)


def _flow_to(mean: Time, s: float, z: Image, r: Time, t: Time) -> Image:
  """The average velocity of `GaussianFlow`, for means of each row's own."""
  flow = GaussianFlow((0.0,), s)
  centre = per_image(mean)
  centred = z - per_image(1 - t) * centre
  return flow(centred, r, t, jnp.zeros_like(t, jnp.int32)) - centre


def exact_draws(
  method: ImprovedMeanFlow, y: Label, *, everywhere: bool = True
) -> tuple[Image, Draws]:
  """Data and draws whose velocity e - x is the true conditional one; guidance holds for all t."""
  z, _ = data()
  draws = method.draw(KEY, z, y)
  if everywhere:
    draws = draws.replace(guidance=GuidanceScale.everywhere(draws.guidance.omega))
  flow = GaussianFlow((*MEANS, NULL_MEAN), S)
  x, e = flow.expected_pair(z, draws.t, jnp.where(draws.dropped, method.null_label, y))
  return x, draws.replace(noise=e)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("fraction", "dropout"), [(0.0, 0.0), (0.5, 0.0), (0.5, 0.3), (1.0, 0.3)])
def test_the_guided_flow_has_no_error(fraction, dropout):
  """Each row by the scale it has drawn, in both heads."""
  method, y = improved(equal_fraction=fraction, dropout=dropout, droppable="equal"), data()[1]
  x, draws = exact_draws(method, y)
  assert jnp.ptp(draws.guidance.omega) > 1
  assert draws.dropped.any() == (dropout > 0)
  loss, metrics = method.objective(GuidedGaussian(), x, y, draws)
  assert loss < 1e-20
  assert metrics["error"] < 1e-20
  assert metrics["velocity_error"] < 1e-20


@pytest.mark.usefixtures("float64")
def test_where_r_is_not_t_a_dropped_label_leaves_the_derivative_along_the_conditional_flow():
  """As published; so the head u has an error there, and the head v none."""
  method, y = improved(equal_fraction=0.0, dropout=0.5), data()[1]
  x, draws = exact_draws(method, y)
  _, metrics = method.objective(GuidedGaussian(), x, y, draws)
  assert metrics["error"] > 1e-3
  assert metrics["velocity_error"] < 1e-20


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("wrong", [{"s": 0.5}, {"off": 0.1}])
def test_any_other_flow_has_an_error_in_both_heads(wrong):
  method, y = improved(), data()[1]
  x, draws = exact_draws(method, y)
  _, metrics = method.objective(GuidedGaussian(**wrong), x, y, draws)
  assert min(metrics.values()) > 1e-3


@pytest.mark.usefixtures("float64")
def test_the_derivative_is_along_the_networks_own_velocity():
  """Which depends on z alone: noise that is not the expected one changes no derivative."""
  method, y = improved(equal_fraction=0.0, omega_max=1.0), data()[1]
  x, draws = exact_draws(method, y)
  shift = 0.3 * jax.random.normal(KEY, x.shape)
  z = x + per_image(draws.t) * (draws.noise - x)
  e = draws.noise + shift
  x = (z - per_image(draws.t) * e) / per_image(1 - draws.t)
  _, metrics = method.objective(GuidedGaussian(), x, y, draws.replace(noise=e))
  noise = jnp.mean((shift / per_image(1 - draws.t)) ** 2)  # of e - x about its expectation
  assert metrics["error"] == pytest.approx(float(noise), rel=1e-6)
  assert metrics["velocity_error"] == pytest.approx(float(noise), rel=1e-6)


@pytest.mark.usefixtures("float64")
def test_guidance_holds_inside_the_interval_alone():
  """Outside it the target is the velocity without guidance, whatever the scale."""
  method, y = improved(equal_fraction=0.0), data()[1]
  x, draws = exact_draws(method, y)
  outside = GuidanceScale(draws.guidance.omega, jnp.full(BATCH, 0.999), jnp.ones(BATCH))
  v_t, z = draws.noise - x, x + per_image(draws.t) * (draws.noise - x)
  none = jnp.zeros((0, *IMAGE))
  guided, _ = method.guided_velocity(GuidedGaussian(), z, v_t, y, draws, none)
  unguided, _ = method.guided_velocity(
    GuidedGaussian(), z, v_t, y, draws.replace(guidance=outside), none
  )
  np.testing.assert_allclose(unguided, v_t, atol=1e-12)
  assert jnp.abs(guided - v_t).mean() > 0.1


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("grid", [(1.0, 0.0), (1.0, 0.4, 0.0), time_grid(5)])
@pytest.mark.parametrize("omega", [1.0, 2.5])
def test_sampling_is_guided_as_asked(omega, grid):
  """However many steps, noise arrives at the extrapolated mean."""
  noise, y = data()
  velocity = improved().sampling_guidance(omega, 0.0, 1.0).guided(GuidedGaussian())
  images = sample(improved().step, velocity, noise, y, grid)
  mean = omega * jnp.asarray(MEANS)[y] + (1 - omega) * NULL_MEAN
  np.testing.assert_allclose(images, per_image(mean) + S * noise, atol=1e-10)


# The objective of any network.


def heads_of(params: dict[str, Any]) -> NetworkFn:
  """Two perceptrons, told guidance by shifting their times' inputs."""

  def network(z, r, t, y, guidance=None, heads=None):
    told = 0.3 * jnp.log(guidance.omega) + 0.2 * guidance.t_min - 0.1 * guidance.t_max
    made = {name: tiny.mlp(params[name])(z, r - told, t + told, y) for name in heads or "u"}
    return tuple(made[name] for name in heads) if heads else made["u"]

  return network


def assert_plain(method: ImprovedMeanFlow, make: Callable, params: Any, eps: float) -> None:
  """Ours equals the plain objective in value, metrics and gradient, whichever labels drop."""
  x, y = data()
  x = x.astype(jnp.result_type(float))

  def with_gradient(objective: Callable) -> Callable:
    loss = lambda params, draws: objective(make(params), x, y, draws)
    return tiny.jit(jax.value_and_grad(loss, has_aux=True))

  ours = with_gradient(method.objective)
  plain = with_gradient(lambda *args: plain_improved_objective(method, *args))
  for dropped in (jnp.zeros(BATCH, bool), jnp.arange(BATCH) % 3 == 0):
    draws = method.draw(KEY, x, y).replace(dropped=dropped)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=eps * np.abs(b).max()),
      ours(params, draws),
      plain(params, draws),
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("omega_max", [1.0, 8.0])
def test_the_objective_is_the_plain_one(omega_max, fraction):
  method = improved(equal_fraction=fraction, omega_max=omega_max)
  params = {name: tiny.mlp_params(pixels=16, labels=4) for name in "uv"}
  params["v"] = jax.tree.map(lambda x: 0.8 * x, params["v"])
  assert_plain(method, heads_of, params, 1e-12)


def test_the_objective_of_a_transformer_is_the_plain_one():
  network = tiny.in_context_dit()
  make = lambda params: velocity_fn(network, params)
  assert_plain(improved(), make, tiny.random_params(network, IMAGE), 2e-5)


# The work.


HIDDEN = 4_000  # so wide that its products outweigh everything else


def wide(weights: Float[Array, "P H"]) -> NetworkFn:
  """Heads of two products each, on a trunk of two products."""

  def pass_through(x: Array) -> Array:
    return jnp.tanh(x @ weights) @ weights.T

  def network(z, r, t, y, guidance=None, heads=("u",)):
    told = r - t + y + guidance.omega + guidance.t_min
    trunk = pass_through((z + per_image(told)).reshape(z.shape[0], math.prod(IMAGE)))
    scale = {"u": 2.0, "v": 3.0}
    return tuple(pass_through(scale[head] * trunk).reshape(z.shape) for head in heads)

  return network


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("omega_max", [1.0, 8.0])
def test_the_network_sees_no_more_rows_than_needed(fraction, omega_max):
  """Both heads once; v without class everywhere, given the class where r < t; a JVP there, of u."""
  method, (x, y) = improved(equal_fraction=fraction, omega_max=omega_max), data()
  weights = jnp.ones((math.prod(IMAGE), HIDDEN))
  loss = jax.jit(lambda weights, x, y: method.loss(wide(weights), KEY, x, y))
  flops = loss.lower(weights, x, y).compile().cost_analysis()["flops"]
  passes = flops / (4 * math.prod(IMAGE) * HIDDEN)  # of a trunk or a head, of a row
  ahead, guided = round((1 - fraction) * BATCH), BATCH * (omega_max > 1)
  both, one = 3, 2  # heads, with the trunk
  expected = BATCH * both + ahead * one + (ahead + guided) * one
  assert passes == pytest.approx(expected, rel=0.02)
  cost = lambda heads: 1 + len(heads)
  assert method.flops(cost) * BATCH == pytest.approx(expected + 2 * BATCH * both)


def test_no_derivative_of_the_auxiliary_head_is_compiled():
  """The step costs what `flops` says, by XLA's count of matrix products."""
  network, method = tiny.in_context_dit(width=64, depth=3, scan=False), improved()
  params = tiny.random_params(network, (8, 8, 1))
  x, y = jnp.zeros((BATCH, 8, 8, 1)), jnp.zeros(BATCH, jnp.int32)
  draws = method.draw(KEY, x, y)
  loss = lambda params: method.objective(velocity_fn(network, params), x, y, draws)[0]
  counted = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"] / BATCH
  expected = method.flops(lambda heads: network.forward_flops((8, 8, 1), heads))
  assert counted == pytest.approx(expected, rel=0.1)


# The draws.


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_scales_have_the_density_asked_for(exponent):
  method = improved(omega_exponent=exponent, omega_max=8.0)
  omega = np.asarray(method.draw_guidance(KEY, 20_000).omega, np.float64)
  assert omega.min() >= 1
  assert omega.max() <= 8
  density = lambda w: w**-exponent
  total = scipy.integrate.quad(density, 1, 8)[0]
  grid = np.linspace(1, 8, 200)
  cdf = [scipy.integrate.quad(density, 1, w)[0] / total for w in grid]
  assert scipy.stats.kstest(omega, lambda w: np.interp(w, grid, cdf)).pvalue > 0.01


def test_intervals_are_uniform_on_either_side_and_whole_where_r_is_t():
  method = improved(interval_split=0.3)
  drawn = method.draw_guidance(KEY, 20_000)
  equal, ahead = method.rows.split(drawn)
  np.testing.assert_array_equal(equal.t_min, 0)
  np.testing.assert_array_equal(equal.t_max, 1)
  for found, start, width in ((ahead.t_min, 0, 0.3), (ahead.t_max, 0.3, 0.7)):
    uniform = scipy.stats.uniform(start, width)
    assert scipy.stats.kstest(np.asarray(found, np.float64), uniform.cdf).pvalue > 0.01
  assert np.ptp(equal.omega) > 5


def test_draws_know_nothing_of_each_other():
  batch = 4096
  method, (x, y) = improved(equal_fraction=0.0, dropout=0.5), data(batch)
  draws = method.draw(KEY, x, y)
  columns = np.stack([draws.noise[:, 0, 0, 0], draws.dropped, draws.r, draws.t, *draws.guidance])
  of_each_other = np.abs(np.corrcoef(columns) - np.eye(7))
  of_each_other[[2, 3], [3, 2]] = 0  # but r < t
  assert of_each_other.max() < 4 / np.sqrt(batch)


def test_the_scale_in_force():
  scale = GuidanceScale(*(jnp.full(5, x) for x in (3.0, 0.25, 0.75)))
  t = jnp.array([0.0, 0.25, 0.5, 0.75, 0.9])
  np.testing.assert_array_equal(scale.in_force(t), [1, 3, 3, 3, 1])


# A run.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("improved") / "run"
  train.run(tiny_run(), workdir)
  return workdir


def tiny_run(**changes: Any) -> ConfigDict:
  """Eight steps, with guidance of 1.5 when sampling."""
  settings = {
    "model__name": "in_context_dit",
    "model__in_context_dit__head_depth": 1,
    "method__name": "improved_meanflow",
    "sample__guidance__omega": 1.5,
  }
  return tiny_config({k.replace("__", "."): x for k, x in (settings | changes).items()})


def test_one_training_serves_many_scales(trained):
  evaluate.run(tiny_run(evaluate__omega=(1.0, 1.5, 3.0)), trained)
  rows = json.loads((trained / "figures" / "step_0000008.json").read_text())
  assert {row["omega"] for row in rows} == {1.0, 1.5, 3.0}
  assert len({row["figures"]["frechet_pixels"] for row in rows}) > 1  # of a model of eight steps
  guidance = tiny_run().method.improved_meanflow.to_dict()
  assert all(row["guidance"] == guidance for row in rows)
  assert (trained / "figures" / "step_0000008.png").exists()


def test_devices_and_microbatches_change_no_number(trained, tmp_path):
  """Eight devices here, one there, which takes the batch in two parts."""
  with devices(1, 1):
    train.run(tiny_run(train__accumulate=2, evaluate__count=0), tmp_path)
  of_steps = lambda folder: [line for line in logged(folder) if "loss" in line]
  for line, other in zip(of_steps(trained), of_steps(tmp_path), strict=True):
    for name in ("loss", "error", "velocity_error", "gradient_norm"):
      assert line[name] == pytest.approx(other[name], rel=2e-3), name


def test_a_run_counts_the_parameters_of_sampling(capsys):
  config, mesh = tiny_run(model__width=64), mesh_of(1, 1)
  step = train_step(config, mesh)
  state = tiny.jit(step.init)()
  train.announce(config, step.network, state, mesh, 1500)
  count = lambda tree: f"{sum(x.size for x in jax.tree.leaves(tree)) / 1e6:.2f}M"
  used, whole = count(sampling_params(step.network, state.params)), count(state.params)
  assert used != whole
  assert f"{used} parameters (in training {whole})" in capsys.readouterr().out


# Mistakes.


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"omega_max": 0.9}, "omega_max must be 1"),
    ({"omega_max": float("nan")}, "omega_max must be 1"),
    ({"omega_max": float("inf")}, "omega_max must be 1"),
    ({"omega_exponent": float("nan")}, "omega_exponent must be a number"),
    ({"interval_split": 0.0}, "interval_split must lie between 0 and 1"),
    ({"interval_split": 1.0}, "no interval is empty"),
    ({"equal_fraction": 0.25, "dropout": 0.3, "droppable": "equal"}, "exceeds the rows with r = t"),
  ],
)
def test_impossible_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    improved(**settings)


@pytest.mark.parametrize(
  ("guidance", "message"),
  [
    ((0.5, 0.0, 1.0), "omega .* must be 1, for no guidance, or more.*got 0.5"),
    ((float("inf"), 0.0, 1.0), "got inf"),
    ((2.0, 0.5, 0.5), "t_min 0.5 and t_max 0.5"),
    ((2.0, 0.6, 0.4), "t_min < t_max"),
    ((2.0, -0.1, 1.0), "t_min -0.1"),
    ((2.0, 0.0, 1.1), "t_max 1.1"),
  ],
)
def test_impossible_guidance_when_sampling_is_refused(guidance, message):
  with pytest.raises(ValueError, match=message):
    improved().sampling_guidance(*guidance)


def test_a_model_trained_without_guidance_has_none_when_sampling():
  method = improved(omega_max=1.0)
  with pytest.raises(ValueError, match="trained without guidance"):
    method.sampling_guidance(2.0, 0.0, 1.0)
  assert method.sampling_guidance(1.0, 0.0, 1.0) == GuidanceInput(1.0, 0.0, 1.0)
