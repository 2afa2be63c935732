"""alpha-Flow: flow matching along a trajectory at one end, MeanFlow at the other, and between."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_jax.arrays import Image, Label, VelocityFn
from meanflow_jax.methods.alpha_flow import AlphaFlow, Draws
from meanflow_jax.methods.meanflow import Rows
from tests import tiny
from tests.exact import GaussianFlow, per_image
from tests.runs import assert_close, mesh_of, stepped, train_step
from tests.runs import tiny as tiny_config

BATCH, IMAGE, STEPS = 16, (4, 4, 1), 1000
KEY = jax.random.key(0)
FLOW = GaussianFlow(means=(0.7,), s=0.4)


def alpha_flow(*, p: float = 1.0, fraction: float = 0.5, **own: Any) -> AlphaFlow:
  return AlphaFlow(**vars(tiny.meanflow(equal_fraction=fraction, p=p)), **own)


METHOD = alpha_flow(anneal_to=STEPS)


def data() -> tuple[Image, Label]:
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(BATCH, *IMAGE))), jnp.asarray(rng.integers(3, size=BATCH))


def draws_of(method: AlphaFlow, alpha: float) -> Draws:
  return method.draw(KEY, *data()).replace(alpha=jnp.full(BATCH, alpha))


def valued(method: Any, draws: Any) -> Any:
  """Metrics and gradient of an objective."""
  x, y = data()
  loss = lambda params: method.objective(tiny.mlp(params), x, y, draws)
  return jax.grad(loss, has_aux=True)(tiny.mlp_params(pixels=16, labels=4))


# alpha.


def test_alpha_falls_from_one_to_zero():
  alphas = np.array([METHOD.alpha(step) for step in range(0, STEPS + 1, 10)])
  assert alphas[0] == 1
  assert alphas[-1] == 0
  assert (np.diff(alphas) <= 0).all()
  assert METHOD.alpha(STEPS // 2) == pytest.approx(0.5)
  # A sigmoid, cut where it is nearly flat.
  assert METHOD.alpha(450) == pytest.approx(1 / (1 + np.exp(-25 * 0.05)))
  between = alphas[(alphas > 0) & (alphas < 1)]
  assert between.min() >= METHOD.clamp
  assert between.max() <= 1 - METHOD.clamp


def test_alpha_is_that_of_the_step():
  x, y = data()
  for step in (0, 480, STEPS):
    drawn = METHOD.draw(KEY, x, y, step)
    np.testing.assert_array_equal(drawn.alpha, np.full(BATCH, METHOD.alpha(step)))
    np.testing.assert_array_equal(drawn.noise, METHOD.draw(KEY, x, y).noise)


# The objective.


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_with_alpha_zero_it_is_meanflow(p):
  method = alpha_flow(p=p)
  meanflow = tiny.meanflow(equal_fraction=0.5, p=p)
  ours, theirs = valued(method, draws_of(method, 0.0)), valued(meanflow, draws_of(method, 0.0))
  assert ours[1].pop("alpha") == 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), ours, theirs)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_gradient_is_that_of_the_papers_loss_times_one_over_alpha(alpha, p):
  """Of alpha = 1 the target is v; the weight is that of the error divided by alpha."""
  method, (x, y) = alpha_flow(p=p, fraction=0.0), data()
  draws = draws_of(method, alpha)
  r, t = per_image(draws.r), per_image(draws.t)
  v = draws.noise - x
  z = x + t * v
  s = alpha * draws.r + (1 - alpha) * draws.t
  z_s = z - (t - per_image(s)) * v

  def loss(params: tiny.Params) -> jax.Array:
    u_of = tiny.mlp(params)
    rest = u_of(z_s, draws.r, s, y)
    error = u_of(z, draws.r, draws.t, y) - jax.lax.stop_gradient(alpha * v + (1 - alpha) * rest)
    squares = jnp.sum(error**2, axis=(1, 2, 3))
    weight = 1 / jax.lax.stop_gradient(squares / alpha**2 + method.weight.c) ** p
    return jnp.mean(weight * squares) / alpha

  assert r.max() > 0
  expected = jax.grad(loss)(tiny.mlp_params(pixels=16, labels=4))
  ours, _ = valued(method, draws)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), ours, expected
  )


@pytest.mark.usefixtures("float64")
def test_on_the_true_flow_the_targets_error_vanishes_with_alpha():
  """The paper's target is off by the square of alpha; of it, divided by alpha, ours by alpha."""
  z, y = data()[0], jnp.zeros(BATCH, jnp.int32)
  r = jnp.linspace(0, 0.6, BATCH)
  rows = Rows(z, r, r + 0.4, y, y)
  v = FLOW(z, rows.t, rows.t, y)

  def error(alpha: float) -> float:
    u, target = METHOD.average_velocity(FLOW, rows, v, draws_of(METHOD, alpha))
    np.testing.assert_allclose(u, FLOW(z, rows.r, rows.t, y), rtol=1e-12)
    return float(jnp.abs(target - u).max())

  errors = [error(2.0**-k) for k in range(8)]
  assert errors[0] > 0.1
  ratios = np.array(errors[:-1]) / errors[1:]
  np.testing.assert_allclose(ratios[3:], 2, rtol=0.1)
  assert error(0.0) < 1e-12


def test_there_is_no_jvp_before_the_last_phase():
  """Both ways are compiled, and one runs."""
  ran = []

  def network(passed: VelocityFn) -> VelocityFn:
    @jax.custom_jvp
    def noticed(z: Image) -> Image:
      return z

    @noticed.defjvp
    def rule(primals, tangents):
      return noticed(*primals), jax.pure_callback(
        lambda tangent: ran.append(1) or np.asarray(tangent), tangents[0], tangents[0]
      )

    return lambda z, r, t, y: passed(noticed(z), r, t, y)

  x, y = data()
  of = network(tiny.mlp(tiny.mlp_params(pixels=16, labels=4)))
  loss = jax.jit(lambda draws: METHOD.objective(of, x, y, draws)[0])
  jax.block_until_ready([loss(draws_of(METHOD, alpha)) for alpha in (1.0, 0.3)])
  assert not ran
  jax.block_until_ready(loss(draws_of(METHOD, 0.0)))
  assert ran


def test_without_rows_ahead_it_is_flow_matching():
  method = alpha_flow(fraction=1.0)
  ours, theirs = (
    valued(kind, draws_of(method, 0.5)) for kind in (method, tiny.meanflow(equal_fraction=1.0))
  )
  ours[1].pop("alpha")
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# The run.

CHANGES = {"method.name": "alpha_flow", "method.alpha_flow.anneal_to": 4, "train.steps": 4}


@pytest.mark.slow
def test_devices_and_microbatches_change_no_number():
  """Through all phases."""
  config = tiny_config(CHANGES | {"train.batch_size": 32})
  one = stepped(config, mesh_of(1, 1), 5)
  config.train.accumulate = 2
  assert_close(stepped(config, mesh_of(4, 2), 5), one, rtol=1e-4)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"anneal_from": 4}, "anneal_from < anneal_to, got 4 and 4"),
    ({"sharpness": 0.0}, "got 0.0 and 0.005"),
    ({"clamp": 0.7}, "clamp between 0 and 0.5"),
    ({"anneal_to": 5}, "anneal_to 5 is beyond train.steps 4: .* give --config"),
  ],
)
def test_impossible_schedules_are_refused(changes, words):
  own = {f"method.alpha_flow.{key}": value for key, value in changes.items()}
  with pytest.raises(ValueError, match=words):
    train_step(tiny_config(CHANGES | own), mesh_of(1, 1))


def test_alpha_is_among_the_metrics():
  x, y = data()
  network = tiny.mlp(tiny.mlp_params(pixels=16, labels=4))
  assert METHOD.objective(network, x, y, draws_of(METHOD, 0.25))[1]["alpha"] == 0.25
