"""The state of training and the step that advances it: where mathematics meets devices."""

import dataclasses
import enum
from typing import no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from meanflow_jax.arrays import Image, Label, PRNGKey, Scalar, VelocityFn
from meanflow_jax.methods.meanflow import Draws, MeanFlow
from meanflow_jax.methods.row_groups import RowGroups
from meanflow_jax.runtime.mesh import abstract, parameter_shardings, replicated, shardings_of

SCHEDULES = ("constant", "cosine")

Batch = dict[str, Array]
Metrics = dict[str, Scalar]


class Purpose(enum.IntEnum):
  """What a random stream is for: its key is folded from (seed, purpose, step)."""

  INIT = 0
  DRAW = 1
  SAMPLE_NOISE = 2
  SAMPLE_LABEL = 3


@no_type_check  # what jax.tree.map puts in an array's place is no array
class TrainState(flax.struct.PyTreeNode):
  """All that training changes.

  Attributes:
    step: optimizer steps done.
    params: of the network, float32.
    ema: their moving averages, by name.
    opt_state: of the optimizer.
  """

  step: Int[Array, ""]
  params: PyTree
  ema: dict[str, PyTree]
  opt_state: PyTree


def item_name(decay: float) -> str:
  """The name of an average in a checkpoint; 0 stands for the parameters themselves."""
  return f"ema_{decay}" if decay else "params"


def to_items(state: TrainState) -> dict[str, PyTree]:
  """A state as a checkpoint's items, so that any of them restores alone."""
  averages = {f"ema_{decay}": params for decay, params in state.ema.items()}
  return {"params": state.params, "opt_state": state.opt_state, **averages}


def from_items(items: dict[str, PyTree], step: Int[Array, ""]) -> TrainState:
  """Undoes `to_items`."""
  averages = {k.removeprefix("ema_"): v for k, v in items.items() if k.startswith("ema_")}
  return TrainState(step=step, params=items["params"], ema=averages, opt_state=items["opt_state"])


@dataclasses.dataclass(frozen=True)
class Averages:
  """Exponential moving averages of the parameters.

  Attributes:
    decays: one average for each.
    ramp: whether decay starts low, min(decay, (1 + step) / (10 + step)).
  """

  decays: tuple[float, ...]
  ramp: bool

  def __post_init__(self):
    for decay in self.decays:
      if not 0 < decay < 1:
        raise ValueError(f"an EMA's decay must lie between 0 and 1, got {decay}")

  def init(self, params: PyTree) -> dict[str, PyTree]:
    """The averages before the first step: the parameters, each a copy of its own."""
    return {str(decay): jax.tree.map(jnp.copy, params) for decay in self.decays}

  def update(
    self, ema: dict[str, PyTree], params: PyTree, step: Int[Array, ""]
  ) -> dict[str, PyTree]:
    """The averages after a step."""
    ramp = (1 + step) / (10 + step) if self.ramp else 1.0
    return {
      str(decay): optax.incremental_update(params, ema[str(decay)], 1 - jnp.minimum(decay, ramp))
      for decay in self.decays
    }


def stream(seed: int, purpose: Purpose, step: Int[Array, ""] | int = 0) -> PRNGKey:
  """The random key of a purpose at a step, or for an image."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def velocity_fn(network: nn.Module, params: PyTree) -> VelocityFn:
  """The network as an average velocity: (r, t) becomes (t, h = t - r) here and nowhere else."""
  return lambda z, r, t, y: network.apply({"params": params}, z, t, t - r, y)


def init_params(network: nn.Module, seed: int, image_shape: tuple[int, ...]) -> PyTree:
  """The parameters before training, of a network for images [H, W, C]."""
  image, time = jnp.zeros((1, *image_shape)), jnp.zeros((1,))
  key = stream(seed, Purpose.INIT)
  return network.init(key, image, time, time, jnp.zeros((1,), jnp.int32))["params"]


def model_image(image: Array) -> Image:
  """Images as the model sees them: uint8 becomes float32 in [-1, 1], floats stay."""
  return image / 127.5 - 1 if image.dtype == jnp.uint8 else image.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """One optimizer step: a pure function of state and batch, to be jitted.

  Attributes:
    network: the Flax module of the average velocity.
    image_shape: [H, W, C] of what it sees.
    method: draws and objective.
    optimizer: gradient transformation.
    learning_rate: its schedule, for the metrics.
    averages: the EMAs.
    accumulate: microbatches per step; each has 1 / accumulate of the batch's row groups.
    seed: of all draws.
  """

  network: nn.Module
  image_shape: tuple[int, ...]
  method: MeanFlow
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  averages: Averages
  accumulate: int
  seed: int

  def init(self) -> TrainState:
    """The state before the first step."""
    params = init_params(self.network, self.seed, self.image_shape)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      ema=self.averages.init(params),
      opt_state=self.optimizer.init(params),
    )

  def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Takes one step; the metrics belong to the parameters before it."""
    x, y = model_image(batch["image"]), batch["label"]
    draws = self.method.draw(stream(self.seed, Purpose.DRAW, state.step), x, y)
    (loss, metrics), grads = self._gradient(state.params, x, y, draws)
    updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
      "loss": loss,
      "gradient_norm": optax.tree.norm(grads),
      "parameter_norm": optax.tree.norm(state.params),
      "learning_rate": jnp.asarray(self.learning_rate(state.step)),
    }
    state = TrainState(
      step=state.step + 1,
      params=params,
      ema=self.averages.update(state.ema, params, state.step),
      opt_state=opt_state,
    )
    return state, metrics

  def abstract_state(self, mesh: Mesh) -> TrainState:
    """The shapes of a state, and where on a mesh each array lies."""
    shapes = jax.eval_shape(self.init)
    return abstract(shapes, parameter_shardings(mesh, shapes))

  def new_state(self, mesh: Mesh) -> TrainState:
    """The state before the first step, made where it belongs."""
    return jax.jit(self.init, out_shardings=shardings_of(self.abstract_state(mesh)))()

  def jitted(self, mesh: Mesh) -> jax.stages.Wrapped:
    """The step on a mesh; the state it is given is donated."""
    shardings = shardings_of(self.abstract_state(mesh)), replicated(mesh)
    return jax.jit(self, donate_argnums=0, out_shardings=shardings)

  def _gradient(
    self, params: PyTree, x: Image, y: Label, draws: Draws
  ) -> tuple[tuple[Scalar, Metrics], PyTree]:
    """Loss, metrics and gradient, averaged over the microbatches."""

    def loss(params: PyTree, x: Image, y: Label, draws: Draws) -> tuple[Scalar, Metrics]:
      return self.method.objective(velocity_fn(self.network, params), x, y, draws)

    gradient = jax.value_and_grad(loss, has_aux=True)
    if self.accumulate == 1:
      return gradient(params, x, y, draws)

    parts = microbatches((x, y, draws), self.accumulate, self.method.times.rows)
    add = lambda total, part: jax.tree.map(lambda a, b: a + b / self.accumulate, total, part)
    zeros = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype),
      jax.eval_shape(gradient, params, *jax.tree.map(lambda a: a[0], parts)),
    )
    return jax.lax.scan(lambda sum_, p: (add(sum_, gradient(params, *p)), None), zeros, parts)[0]


def microbatches(rows: PyTree, count: int, groups: RowGroups) -> PyTree:
  """Deals the row groups of each array [B, ...] out to [count, B / count, ...].

  Neighbouring groups go to different microbatches, so that no row leaves its device.
  """

  def deal(x: Array) -> Array:
    dealt = x.reshape(-1, count, groups.size, *x.shape[1:]).swapaxes(0, 1)
    return dealt.reshape(count, -1, *x.shape[1:])

  return jax.tree.map(deal, rows)


def make_optimizer(
  *,
  learning_rate: float,
  schedule: str,
  warmup_steps: int,
  total_steps: int,
  b1: float,
  b2: float,
  weight_decay: float,
  clip_norm: float,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Adam (AdamW where weight_decay > 0) and its schedule of the learning rate.

  Args:
    learning_rate: after warm-up.
    schedule: "constant", or "cosine" to 0 at `total_steps`.
    warmup_steps: of linear warm-up from 0.
    total_steps: of training.
    b1, b2: Adam's.
    weight_decay: decoupled.
    clip_norm: bound on the gradient's norm; 0 does not clip.

  Raises:
    ValueError: an unknown schedule, a value out of range, or a warm-up as long as training.
  """
  if schedule not in SCHEDULES:
    raise ValueError(f"optimizer.schedule must be one of {SCHEDULES}, got {schedule!r}")
  if not learning_rate > 0 or not (0 <= b1 < 1 and 0 <= b2 < 1):
    raise ValueError(
      "optimizer.learning_rate must be positive, b1 and b2 in [0, 1), "
      f"got {learning_rate}, {b1} and {b2}"
    )
  if weight_decay < 0 or clip_norm < 0:
    raise ValueError(
      "optimizer.weight_decay and optimizer.clip_norm must be 0 or more, "
      f"got {weight_decay} and {clip_norm}"
    )
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(f"optimizer.warmup_steps {warmup_steps} is not within {total_steps} steps")
  start = 0.0 if warmup_steps else learning_rate  # optax stays at `start` where there is no warm-up
  rate = optax.warmup_constant_schedule(start, learning_rate, warmup_steps)
  if schedule == "cosine":
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, total_steps)
  clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
  return optax.chain(*clip, optax.adamw(rate, b1, b2, weight_decay=weight_decay)), rate
