"""A step is the same on any number of devices, and does what the optimizer and averages promise."""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from meanflow_jax import train_step as train_step_module
from meanflow_jax.arrays import told
from meanflow_jax.data.sources import Digits
from meanflow_jax.runtime.mesh import global_batch, replicated
from meanflow_jax.train_step import (
  Averages,
  Purpose,
  TrainState,
  TrainStep,
  make_optimizer,
  model_image,
  pixel_inputs,
  stream,
  velocity_fn,
)
from tests.runs import assert_close, comparable, mesh_of, stepped, tiny, train_step
from tests.tiny import meanflow, random_params

HostBatch = dict[str, np.ndarray]

STEPS = 20
DEEP = {"model.depth": 3, "train.batch_size": 32}


@functools.cache
def digit_batches(count: int, rows: int) -> list[HostBatch]:
  digits = Digits(split="train")
  items = [digits[index] for index in range(count * rows)]
  images, labels = (np.stack([item[key] for item in items]) for key in ("image", "label"))
  return [
    {"image": image, "label": label}
    for image, label in zip(np.split(images, count), np.split(labels, count), strict=True)
  ]


class Trained(NamedTuple):
  """The last state, copies of all states and metrics, and how often the step was compiled."""

  state: TrainState
  history: list[TrainState]
  metrics: list[dict[str, Any]]
  compilations: int


def advance(
  step: TrainStep, mesh: Mesh, state: TrainState, host_batches: Iterable[HostBatch]
) -> Trained:
  jitted, history, metrics = step.jitted(mesh), [jax.tree.map(np.array, state)], []
  for batch in [global_batch(mesh, batch) for batch in host_batches]:
    with jax.transfer_guard("disallow"):
      state, of_step = jitted(state, batch)
      jax.block_until_ready(of_step)
    history.append(jax.tree.map(np.array, state))
    metrics.append(jax.device_get(of_step))
  return Trained(state, history, metrics, jitted._cache_size())


@functools.cache
def trained(equal_fraction: float, data: int, fsdp: int) -> Trained:
  """Twenty steps of a transformer of which no parameter began at zero."""
  mesh = mesh_of(data, fsdp)
  step = train_step(tiny({"method.times.equal_fraction": equal_fraction}), mesh)
  shardings = jax.tree.map(lambda x: x.sharding, step.abstract_state(mesh))
  params = random_params(step.network, step.image_shape)
  state = jax.device_put(
    TrainState(
      step=jnp.int32(0),
      params=params,
      ema=step.averages.init(params),
      opt_state=step.optimizer.init(params),
    ),
    shardings,
  )
  return advance(step, mesh, state, digit_batches(STEPS, 16))


# With a fraction of 1, all rows have r = t: plain flow matching.
SAME = [(0.5, 8, 1), (0.5, 2, 4), (0.5, 1, 8), (1.0, 2, 4)]


@pytest.mark.parametrize(("equal_fraction", "data", "fsdp"), SAME)
def test_any_mesh_trains_the_same(equal_fraction: float, data: int, fsdp: int) -> None:
  one, many = trained(equal_fraction, 1, 1), trained(equal_fraction, data, fsdp)
  assert len(one.metrics) == len(many.metrics) == STEPS
  for ours, theirs in zip(many.metrics, one.metrics, strict=True):
    assert_close(ours, theirs, rtol=1e-4)
  ours, theirs = comparable(many.history[-1]), comparable(one.history[-1])
  assert_close(ours, theirs, rtol=1e-3)
  # The comparison means something: every array has moved far beyond the tolerance.
  start = comparable(one.history[0]).params
  moved = lambda a, b: np.abs(a - b).max() / np.abs(b).max()
  assert min(jax.tree.leaves(jax.tree.map(moved, theirs.params, start))) > 0.02


@pytest.mark.parametrize(("equal_fraction", "data", "fsdp"), [*SAME, (0.5, 1, 1)])
def test_a_step_is_compiled_once(equal_fraction: float, data: int, fsdp: int) -> None:
  assert trained(equal_fraction, data, fsdp).compilations == 1


def test_the_transfer_guard_is_on_guard() -> None:
  mesh = mesh_of(8, 1)
  step, batch = affine_step(), digit_batches(1, 16)[0]
  with (
    pytest.raises(Exception, match="Disallowed host-to-device transfer"),
    jax.transfer_guard("disallow"),
  ):
    step.jitted(mesh)(step.new_state(mesh), batch)


def spread(tree: Any, parts: int) -> float:
  """The share of a tree's numbers that lie on one device in `parts`; the rest lies on all."""
  leaves = jax.tree.leaves(tree)
  divided = [x.size for x in leaves if x.addressable_shards[0].data.size * parts == x.size]
  whole = [x.size for x in leaves if x.addressable_shards[0].data.size == x.size]
  assert sum(divided) + sum(whole) == sum(x.size for x in leaves)
  return sum(divided) / (sum(divided) + sum(whole))


@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (1, 8)])
def test_parameters_moments_and_averages_are_spread_over_fsdp(data: int, fsdp: int) -> None:
  mesh = mesh_of(data, fsdp)
  for state in (train_step(tiny(), mesh).new_state(mesh), trained(0.5, data, fsdp).state):
    moments = [state.opt_state[-1][0].mu, state.opt_state[-1][0].nu]
    for tree in [state.params, *state.ema.values(), *moments]:
      assert spread(tree, fsdp) > 0.9
    kernel = state.params["blocks"]["mlp_in"]["kernel"]
    assert kernel.shape == (1, 16, 64)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 16, 64 // fsdp)}


def test_without_fsdp_every_device_holds_all_parameters() -> None:
  assert spread(trained(0.5, 8, 1).state, 8) == 0


class Affine(nn.Module):
  """The smallest network of all arguments: its step compiles in no time."""

  @nn.compact
  def __call__(self, z: jax.Array, t: jax.Array, h: jax.Array, y: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.normal(), z.shape[1:])
    times = self.param("times", nn.initializers.normal(), (2,))
    table = self.param("table", nn.initializers.normal(), (11,))
    shift = times[0] * t + times[1] * h + table[y]
    return z * scale[None] + shift[:, None, None, None]


def affine_step(**changes: Any) -> TrainStep:
  rate = changes.pop("learning_rate", 0.1)
  guidance = {"omega": 1.5, "kappa": 0.3}
  settings = {
    "network": Affine(),
    "image_shape": (8, 8, 1),
    "inputs": pixel_inputs,
    "method": meanflow(equal_fraction=0.5, guidance=guidance, dropout=0.2, null_label=10),
    "optimizer": optax.adam(rate),
    "learning_rate": lambda step: rate + 0 * step,
    "averages": Averages((0.9,), ramp=False),
    "accumulate": 1,
    "seed": 0,
  }
  return TrainStep(**settings | changes)


def affine_run(
  steps: int, *, rows: int = 8, shape: tuple[int, int] = (1, 1), **changes: Any
) -> Trained:
  step, mesh = affine_step(**changes), mesh_of(*shape)
  return advance(step, mesh, step.new_state(mesh), digit_batches(steps, rows))


def test_the_state_is_donated() -> None:
  mesh = mesh_of(2, 4)
  step = affine_step()
  state = step.new_state(mesh)
  new, _ = jax.block_until_ready(
    step.jitted(mesh)(state, global_batch(mesh, digit_batches(1, 16)[0]))
  )
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  assert not any(x.is_deleted() for x in jax.tree.leaves(new))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_microbatches_add_up_to_the_batch(accumulate: int) -> None:
  whole, parts = affine_run(5), affine_run(5, accumulate=accumulate)
  assert_close(parts.metrics, whole.metrics, rtol=1e-5)
  assert_close(parts.history, whole.history, rtol=1e-4)


def test_any_mesh_accumulates_the_same() -> None:
  one = affine_run(STEPS, rows=32, accumulate=2)
  many = affine_run(STEPS, rows=32, accumulate=2, shape=(2, 4))
  assert many.compilations == 1
  assert_close(many.metrics, one.metrics, rtol=1e-4)
  assert_close(many.history, one.history, rtol=1e-3)


@pytest.fixture(scope="module")
def unrolled() -> TrainState:
  """After two steps of a network of three layers, on one device."""
  return stepped(tiny(DEEP), mesh_of(1, 1), 2)


@pytest.mark.parametrize(
  ("accumulate", "scan", "shape"),
  [(1, True, (1, 1)), (2, True, (4, 2)), (2, True, (8, 1)), (2, False, (8, 1))],
)
def test_layers_in_a_loop_learn_the_same(
  unrolled: TrainState, accumulate: int, scan: bool, shape: tuple[int, int]
) -> None:
  changes = DEEP | {"model.scan": scan, "train.accumulate": accumulate}
  assert_close(stepped(tiny(changes), mesh_of(*shape), 2), unrolled, rtol=1e-4)


def test_microbatches_take_whole_groups_from_all_over_the_batch() -> None:
  groups = meanflow(equal_fraction=0.75).times.rows
  dealt = train_step_module.microbatches(jnp.arange(16), 2, groups)
  np.testing.assert_array_equal(dealt, [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]])


@pytest.mark.parametrize("ramp", [False, True])
def test_averages_follow_their_recurrence(ramp: bool) -> None:
  decays, steps = (0.9, 0.15), 4
  history = affine_run(steps, averages=Averages(decays, ramp=ramp)).history
  for decay in decays:
    expected = history[0].params
    for done in range(steps):
      now = min(decay, (1 + done) / (10 + done)) if ramp else decay
      blend = lambda a, b, now=now: now * np.float64(a) + (1 - now) * np.float64(b)
      expected = jax.tree.map(blend, expected, history[done + 1].params)
    assert_close(history[-1].ema[str(decay)], expected, rtol=1e-5)


def test_averages_begin_as_copies() -> None:
  state = affine_step().init()
  assert_close(state.ema["0.9"], state.params, rtol=0)
  assert state.ema["0.9"]["scale"] is not state.params["scale"]


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5])
def test_impossible_averages_are_refused(decay: float) -> None:
  with pytest.raises(ValueError, match=f"EMA.*between 0 and 1, got {decay}"):
    Averages((0.9, decay), ramp=False)


def test_metrics_are_those_of_the_loss_and_its_gradient() -> None:
  step, batch = affine_step(), digit_batches(1, 8)[0]
  state = step.init()
  _, metrics = jax.jit(step)(state, batch)

  def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    key = stream(step.seed, Purpose.DRAW, 0)
    fn = velocity_fn(step.network, params)
    return step.method.loss(fn, key, jnp.asarray(batch["image"]), jnp.asarray(batch["label"]))

  (value, named), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
  norm = lambda tree: math.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree)))
  expected = {
    "loss": value,
    "error": named["error"],
    "velocity_error": named["velocity_error"],
    "gradient_norm": norm(gradient),
    "parameter_norm": norm(state.params),
    "learning_rate": 0.1,
  }
  assert metrics.keys() == expected.keys()
  for name, number in expected.items():
    np.testing.assert_allclose(metrics[name], number, rtol=1e-5, err_msg=name)


def test_the_gradient_norm_is_that_before_clipping() -> None:
  clipped = optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(0.1))
  (plain,), (other,) = affine_run(1).metrics, affine_run(1, optimizer=clipped).metrics
  assert plain["gradient_norm"] > 0.01
  np.testing.assert_allclose(other["gradient_norm"], plain["gradient_norm"], rtol=1e-6)


def test_draws_are_a_function_of_seed_and_step() -> None:
  batch = digit_batches(1, 8)[0]
  params = affine_step().init().params
  losses = {}
  for seed in (0, 1):
    step = affine_step(seed=seed)
    jitted = jax.jit(step)
    for number in (0, 1, 7):
      state = step.init().replace(step=jnp.int32(number), params=params)
      first, second = (float(jitted(state, batch)[1]["error"]) for _ in range(2))
      assert first == second
      losses[seed, number] = first
  assert len(set(losses.values())) == 6


def test_draws_do_not_depend_on_the_way_to_a_step() -> None:
  step, batches = affine_step(), digit_batches(3, 8)
  walked = affine_run(3)
  there = step.init().replace(step=jnp.int32(2), params=walked.history[2].params)
  error = jax.jit(step)(there, batches[2])[1]["error"]
  np.testing.assert_allclose(error, walked.metrics[2]["error"], rtol=1e-6)


class Noisy(nn.Module):
  """Says what a number drawn with the key of each row is, whatever it is asked."""

  @nn.compact
  def __call__(self, z: jax.Array, t: jax.Array, h: jax.Array, y: Any) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, ())
    keys = told(y).dropout
    drawn = jnp.ones(z.shape[0]) if keys is None else jax.vmap(jax.random.uniform)(keys)
    return scale * jnp.broadcast_to(drawn[:, None, None, None], z.shape)


@functools.cache
def drawn(number: int = 0, devices: int = 1, dropout: bool = True, **changes: Any) -> float:
  """A mean over the rows, which weighs each number by itself, and so knows them all."""
  method = meanflow(equal_fraction=0.5, null_label=10)
  step = affine_step(network=Noisy(), method=method, dropout=dropout, **changes)
  mesh = mesh_of(devices, 1)
  state = step.new_state(mesh).replace(step=jax.device_put(np.int32(number), replicated(mesh)))
  batch = global_batch(mesh, digit_batches(1, 16)[0])
  return float(step.jitted(mesh)(state, batch)[1]["error"])


def test_dropout_is_a_function_of_seed_step_and_row() -> None:
  base = drawn()
  assert drawn.__wrapped__() == base
  assert drawn(devices=8) == pytest.approx(base, rel=1e-5)
  assert drawn(accumulate=4) == pytest.approx(base, rel=1e-5)
  assert drawn(devices=2, accumulate=2) == pytest.approx(base, rel=1e-5)
  others = [drawn(dropout=False), drawn(seed=1), drawn(number=1)]
  assert min(abs(other - base) for other in others) > 1e-3


def test_streams_differ_in_seed_purpose_and_step() -> None:
  keys = [stream(s, p, n) for s in (0, 1) for p in Purpose for n in (0, 1)]
  assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


def test_bytes_and_floats_show_the_model_the_same_images() -> None:
  pixels = np.array([[[[0], [51]], [[127], [255]]]], np.uint8)
  seen = model_image(jnp.asarray(pixels))
  assert seen.dtype == jnp.float32
  np.testing.assert_allclose(seen.ravel(), [-1, -0.6, 127 / 127.5 - 1, 1], atol=1e-6)
  np.testing.assert_array_equal(model_image(seen), seen)


# The optimizer.

OPTIMIZER: dict[str, Any] = {
  "learning_rate": 0.5,
  "schedule": "constant",
  "warmup_steps": 0,
  "total_steps": 100,
  "b1": 0.9,
  "b2": 0.95,
  "weight_decay": 0.0,
  "clip_norm": 0.0,
}


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_schedules(schedule: str, warmup: int) -> None:
  settings = {"schedule": schedule, "warmup_steps": warmup}
  _, rate = make_optimizer(**OPTIMIZER | settings)
  for step in (0, 1, 5, 9, 10, 11, 40, 99, 100):
    factor = step / warmup if step < warmup else 1.0
    if schedule == "cosine" and step >= warmup:
      factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (100 - warmup)))
    np.testing.assert_allclose(rate(step), 0.5 * factor, rtol=1e-5, atol=1e-7)


def updates(gradients: list[Any], params: Any, **changes: Any) -> list[Any]:
  """The optimizer's updates for a sequence of gradients, of parameters that stay."""
  optimizer, _ = make_optimizer(**OPTIMIZER | changes)
  state, made = optimizer.init(params), []
  for gradient in gradients:
    update, state = optimizer.update(gradient, state, params)
    made.append(update)
  return made


def adam(gradients: list[np.ndarray], rate: float) -> list[np.ndarray]:
  """Adam's updates (arXiv 1412.6980, algorithm 1)."""
  mean = square = np.zeros_like(gradients[0])
  made = []
  for count, gradient in enumerate(gradients, start=1):
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.95 * square + 0.05 * gradient**2
    made.append(-rate * mean / (1 - 0.9**count) / (np.sqrt(square / (1 - 0.95**count)) + 1e-8))
  return made


GRADIENTS = [np.array([0.3, -0.4]), np.array([30.0, 40.0]), np.array([0.0, 0.1])]


def test_adam() -> None:
  ours = updates([jnp.asarray(g, jnp.float32) for g in GRADIENTS], jnp.ones(2))
  np.testing.assert_allclose(ours, adam(GRADIENTS, 0.5), rtol=1e-5)


def test_large_gradients_are_clipped_to_the_norm() -> None:
  clipped = [g * min(1, 2 / np.linalg.norm(g)) for g in GRADIENTS]
  assert (clipped[1] != GRADIENTS[1]).all()
  ours = updates([jnp.asarray(g, jnp.float32) for g in GRADIENTS], jnp.ones(2), clip_norm=2.0)
  np.testing.assert_allclose(ours, adam(clipped, 0.5), rtol=1e-5)


def test_adamw_decays_apart_from_the_moments() -> None:
  params = jnp.array([2.0, -4.0])
  gradients = [jnp.asarray(g, jnp.float32) for g in GRADIENTS]
  plain, decayed = updates(gradients, params), updates(gradients, params, weight_decay=0.1)
  np.testing.assert_allclose(np.subtract(decayed, plain), [-0.05 * params] * 3, rtol=1e-4)


@pytest.mark.parametrize("warmup", [-1, 100, 101])
def test_warm_up_must_end_before_training_does(warmup: int) -> None:
  with pytest.raises(ValueError, match=f"warmup_steps {warmup} .* 100 steps"):
    make_optimizer(**OPTIMIZER | {"warmup_steps": warmup})


def test_unknown_schedules_are_refused() -> None:
  with pytest.raises(ValueError, match=r"schedule must be one of .*constant.*cosine.*'linear'"):
    make_optimizer(**OPTIMIZER | {"schedule": "linear"})
