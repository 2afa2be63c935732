"""The state of training and the step that advances it: where mathematics meets devices."""

import dataclasses
import enum
import functools
from collections.abc import Callable, Collection
from typing import Any, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from meanflow_jax.arrays import (
  Image,
  Label,
  NetworkFn,
  PRNGKey,
  Scalar,
  Time,
  Told,
  with_dropout,
)
from meanflow_jax.data.augment import Augmentation
from meanflow_jax.guard import Guard, GuardState, part_norms
from meanflow_jax.methods.method import Method
from meanflow_jax.methods.row_groups import RowGroups
from meanflow_jax.models.autoencoder import sample_latent, scale_latents
from meanflow_jax.runtime.mesh import FSDP, abstract, parameter_shardings, replicated, shardings_of

SCHEDULES = ("constant", "cosine")

# What profiles tell apart; the first of these that encloses an operation.
SCOPES = ("guidance", "jvp_du_dt", "network", "optimizer", "ema", "draws")

Batch = dict[str, Array]
Inputs = Callable[[PRNGKey, Batch], tuple[Image, Label]]
Metrics = dict[str, Float[Array, "..."]]  # numbers, and lists of them for a diagnosis


class Purpose(enum.IntEnum):
  """What a random stream is for: its key is folded from (seed, purpose, step)."""

  INIT = 0
  DRAW = 1
  SAMPLE_NOISE = 2
  SAMPLE_LABEL = 3
  INPUTS = 4
  DROPOUT = 5


@no_type_check  # what jax.tree.map puts in an array's place is no array
class TrainState(flax.struct.PyTreeNode):
  """All that training changes.

  Attributes:
    step: optimizer steps done.
    params: of the network, float32.
    ema: their moving averages, by name.
    opt_state: of the optimizer.
    guard: of the guard against spikes, where there is one.
  """

  step: Int[Array, ""]
  params: PyTree
  ema: dict[str, PyTree]
  opt_state: PyTree
  guard: GuardState | None = None

  @property
  def position(self) -> Int[Array, ""]:
    """The number of the next batch and of its draws: the step, but for what a guard passed over."""
    return self.step if self.guard is None else self.step + self.guard.offset


def item_name(decay: float) -> str:
  """The name of an average in a checkpoint; 0 stands for the parameters themselves."""
  return f"ema_{decay}" if decay else "params"


def to_items(state: TrainState) -> dict[str, PyTree]:
  """A state as a checkpoint's items, so that any of them restores alone."""
  averages = {f"ema_{decay}": params for decay, params in state.ema.items()}
  guard = {} if state.guard is None else {"guard": state.guard}
  return {"params": state.params, "opt_state": state.opt_state, **averages, **guard}


def from_items(items: dict[str, PyTree], step: Int[Array, ""]) -> TrainState:
  """Undoes `to_items`."""
  averages = {k.removeprefix("ema_"): v for k, v in items.items() if k.startswith("ema_")}
  return TrainState(
    step=step,
    params=items["params"],
    ema=averages,
    opt_state=items["opt_state"],
    guard=items.get("guard"),
  )


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


def velocity_fn(network: nn.Module, params: PyTree) -> NetworkFn:
  """The network as an average velocity: (r, t) becomes (t, h = t - r) here and nowhere else."""

  @jax.named_scope("network")
  def velocity(z: Image, r: Time, t: Time, y: Label, **more: Any) -> Any:
    return network.apply({"params": params}, z, t, t - r, y, **more)

  return velocity


def sampling_params(network: nn.Module, params: PyTree) -> PyTree:
  """The parameters without those of heads that only training asks for."""
  left_out = getattr(network, "TRAINING_ONLY", ())
  return {name: tree for name, tree in params.items() if name not in left_out}


def init_params(network: nn.Module, seed: int, image_shape: tuple[int, ...]) -> PyTree:
  """The parameters before training, of a network for images [H, W, C]."""
  image, time = jnp.zeros((1, *image_shape)), jnp.zeros((1,))
  key = stream(seed, Purpose.INIT)
  return network.init(key, image, time, time, jnp.zeros((1,), jnp.int32))["params"]


def model_image(image: Array) -> Image:
  """Images as the model sees them: uint8 becomes float32 in [-1, 1], floats stay."""
  return image / 127.5 - 1 if image.dtype == jnp.uint8 else image.astype(jnp.float32)


def pixel_inputs(key: PRNGKey, batch: Batch) -> tuple[Image, Label]:
  """What a model of pixels sees of a batch: images and labels."""
  del key
  return model_image(batch["image"]), batch["label"]


def latent_inputs(key: PRNGKey, batch: Batch) -> tuple[Image, Label]:
  """What a model of latents sees: a draw of them, from their mean and std side by side."""
  mean, std = jnp.split(batch["image"].astype(jnp.float32), 2, axis=-1)
  return scale_latents(sample_latent(key, mean, std)), batch["label"]


@dataclasses.dataclass(frozen=True)
class AugmentedInputs:
  """What a model of augmented pixels sees: changed images, and in their labels how."""

  augmentation: Augmentation

  def __call__(self, key: PRNGKey, batch: Batch) -> tuple[Image, Label]:
    """Draws the changes of a batch."""
    images, changes = self.augmentation(key, model_image(batch["image"]))
    return images, Told(batch["label"], augmentation=changes)


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """One optimizer step: a pure function of state and batch, to be jitted.

  Attributes:
    network: the Flax module of the average velocity.
    image_shape: [H, W, C] of what it sees.
    inputs: what it sees of a batch, given a key that is new at each step.
    method: draws and objective.
    optimizer: gradient transformation.
    learning_rate: its schedule, for the metrics.
    averages: the EMAs.
    accumulate: microbatches per step; each has 1 / accumulate of the batch's row groups.
    seed: of all draws.
    guard: against loss spikes, if any.
    dropout: whether the network has any.
  """

  network: nn.Module
  image_shape: tuple[int, ...]
  inputs: Inputs
  method: Method
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  averages: Averages
  accumulate: int
  seed: int
  guard: Guard | None = None
  dropout: bool = False

  def init(self) -> TrainState:
    """The state before the first step."""
    params = init_params(self.network, self.seed, self.image_shape)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      ema=self.averages.init(params),
      opt_state=self.optimizer.init(params),
      guard=self.guard and self.guard.init(),
    )

  def __call__(
    self,
    state: TrainState,
    batch: Batch,
    constrain: Callable[[PyTree], PyTree] = lambda x: x,
    mesh: Mesh | None = None,
  ) -> tuple[TrainState, Metrics]:
    """Takes one step; the metrics belong to the parameters before it.

    Args:
      state: the state before it.
      batch: images and labels.
      constrain: fixes the sharding of gradients.
      mesh: whose devices each take the gradient of their own rows, before the mean over them.
    """
    with jax.named_scope("draws"):
      key = functools.partial(stream, self.seed, step=state.position)
      x, y = self.inputs(key(Purpose.INPUTS), batch)
      if self.dropout:
        y = with_dropout(y, jax.random.split(key(Purpose.DROPOUT), x.shape[0]))
      draws = self.method.draw(key(Purpose.DRAW), x, y, state.step)
    gradient = functools.partial(self._gradient, constrain)
    if mesh is not None:
      gradient = mean_over_devices(gradient, mesh)
    (loss, metrics), grads = gradient(state.params, x, y, draws)
    with jax.named_scope("optimizer"):
      updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
    with jax.named_scope("ema"):
      ema = self.averages.update(state.ema, params, state.step)
    metrics |= {
      "loss": loss,
      "gradient_norm": optax.tree.norm(grads),
      "parameter_norm": optax.tree.norm(state.params),
      "learning_rate": jnp.asarray(self.learning_rate(state.step)),
    }
    new = TrainState(
      step=state.step + 1,
      params=params,
      ema=ema,
      opt_state=opt_state,
    )
    if self.guard is None:
      return new, metrics
    return self._guarded(self.guard, state, new, grads, metrics)

  def _guarded(
    self, guard: Guard, old: TrainState, new: TrainState, grads: PyTree, metrics: Metrics
  ) -> tuple[TrainState, Metrics]:
    """The state after a step that may be a spike, and what a diagnosis asks for."""
    watched, spike = guard.update(old.guard, metrics["gradient_norm"], metrics["error"])
    metrics |= {
      "spike": spike.astype(jnp.float32),
      "limits": guard.limits(old.guard),
      "gradient_norms": part_norms(grads),
    }
    if guard.action == "skip":
      keep = lambda old, new: jnp.where(spike, old, new)
      kept = {name: getattr(new, name) for name in ("params", "ema", "opt_state")}
      before = {name: getattr(old, name) for name in kept}
      new = new.replace(**jax.tree.map(keep, before, kept))
    return new.replace(guard=watched), metrics

  def times(self, position: int, rows: int) -> tuple[Time, Time]:
    """The times (r, t), each [rows], that the step draws for the batch of that number."""

    def drawn() -> tuple[Time, Time]:
      x, y = jnp.zeros((rows, *self.image_shape)), jnp.zeros((rows,), jnp.int32)
      draws = self.method.draw(stream(self.seed, Purpose.DRAW, position), x, y)
      return draws.r, draws.t

    return jax.jit(drawn)()  # the compiler leaves the noise out

  def abstract_state(self, mesh: Mesh) -> TrainState:
    """The shapes of a state, and where on a mesh each array lies."""
    shapes = jax.eval_shape(self.init)
    return abstract(shapes, parameter_shardings(mesh, shapes))

  def new_state(self, mesh: Mesh) -> TrainState:
    """The state before the first step, made where it belongs."""
    return jax.jit(self.init, out_shardings=shardings_of(self.abstract_state(mesh)))()

  def jitted(self, mesh: Mesh) -> jax.stages.Wrapped:
    """The step on a mesh; the state it is given is donated."""
    shardings = shardings_of(self.abstract_state(mesh))
    constrain = lambda grads: jax.lax.with_sharding_constraint(grads, shardings.params)
    whole = mesh.shape[FSDP] == 1 and mesh.size > 1  # all parameters on every device
    how = {"mesh": mesh} if whole else {"constrain": constrain}
    step = functools.partial(self, **how)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))

  def _gradient(
    self,
    constrain: Callable[[PyTree], PyTree],
    params: PyTree,
    x: Image,
    y: Label,
    draws: PyTree,
  ) -> tuple[tuple[Scalar, Metrics], PyTree]:
    """Loss, metrics and gradient, averaged over the microbatches.

    Each backward pass adds to one sum: of layers in a loop there is no other gradient in memory.
    """
    sums = jax.tree.map(jax.new_ref, constrain(jax.tree.map(jnp.zeros_like, params)))

    def add(x: Image, y: Label, draws: PyTree) -> tuple[Scalar, Metrics]:
      def loss(params: PyTree) -> tuple[Scalar, Metrics]:
        return self.method.objective(velocity_fn(self.network, params), x, y, draws)

      value, pull_back, metrics = jax.vjp(loss, params, has_aux=True)
      share = jnp.full_like(value, 1 / self.accumulate)
      add_gradients(sums, pull_back, share, getattr(self.network, "looped", ()))
      return value, metrics

    if self.accumulate == 1:
      values = add(x, y, draws)
    else:
      parts = microbatches((x, y, draws), self.accumulate, self.method.rows)
      _, each = jax.lax.scan(lambda _, part: (None, add(*part)), None, parts)
      values = jax.tree.map(lambda v: jnp.mean(v, axis=0), each)
    return values, constrain(jax.tree.map(jax.ref.freeze, sums))


def add_gradients(
  sums: PyTree, pull_back: Callable[..., PyTree], cotangent: Array, looped: Collection[str]
) -> None:
  """Adds the gradients of parameters to sums of them.

  Those of layers in a loop are added layer by layer, so that there is never a second stack. All
  could be added on the way, if jax 0.10 could add to a slice of a parameter.

  Args:
    sums: references to float32 arrays, of the parameters' shapes.
    pull_back: of the parameters, from `jax.vjp`.
    cotangent: its argument.
    looped: names of those parameters that a loop passes over.
  """
  by_value = lambda tree: jax.tree.map(lambda _: jax.ad.GradValue(), tree)
  places = {name: refs if name in looped else by_value(refs) for name, refs in sums.items()}
  (gradients,) = pull_back.with_refs(places)(cotangent)
  others = {name: refs for name, refs in sums.items() if name not in looped}
  add = lambda ref, gradient: jax.ref.addupdate(ref, ..., gradient)
  jax.tree.map(add, others, {name: gradients[name] for name in others})


def mean_over_devices(gradient: Callable[..., PyTree], mesh: Mesh) -> Callable[..., PyTree]:
  """A function of parameters and rows [B, ...]: the mean of its values on each device's rows.

  That is one sum over the devices, where each has all parameters. Left to itself, the compiler sums
  each gradient that there is: one of the rows with r = t and one of the others, of each microbatch.
  """
  everywhere, rows = PartitionSpec(), PartitionSpec(mesh.axis_names)

  def mean(params: PyTree, *own: PyTree) -> PyTree:
    return jax.lax.pmean(gradient(params, *own), mesh.axis_names)

  return lambda params, *batch: jax.shard_map(
    mean,
    mesh=mesh,
    in_specs=(everywhere, *[rows] * len(batch)),
    out_specs=everywhere,
    check_vma=False,
  )(params, *batch)


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
