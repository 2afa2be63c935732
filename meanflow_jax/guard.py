"""A guard against loss spikes: finds, on the devices, the steps that are far from those before."""

import dataclasses
from collections.abc import Mapping
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from meanflow_jax.arrays import Scalar

ACTIONS = ("off", "record", "skip", "roll_back")
WATCHED = ("gradient_norm", "error")
PATIENCE = 10  # steps in a row that may be skipped for values that are not finite
LAYERS = "blocks"  # the part of a network whose parameters are stacked over layers


@no_type_check  # what jax.tree.map puts in an array's place is no array
class GuardState(flax.struct.PyTreeNode):
  """What the guard remembers; part of the state of training.

  Attributes:
    means: rolling means of the gradient's norm and of the error.
    seen: how many steps are in the means, up to the window.
    not_finite: how many of the last steps, without a gap, had values that are not finite.
    offset: batches and draws that roll-backs have passed over.
  """

  means: Float[Array, "2"]
  seen: Int[Array, ""]
  not_finite: Int[Array, ""]
  offset: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Guard:
  """Calls a step a spike if its gradient norm or error is far above the rolling mean of it.

  What is above counts in the mean as its limit only, so that one spike moves it little, and a
  lasting change of level is learnt: a hundredfold one in some 30 steps, with the defaults.

  Values that are not finite count as a spike where the action can undo them: with "skip" up to
  `PATIENCE` times in a row, with "roll_back" always.

  Attributes:
    action: one of `ACTIONS`.
    factor: limit of a value, relative to its mean.
    window: steps of the means: plain ones over the first so many steps, in which nothing that is
      finite is a spike, and from then on exponential ones.
    steps_back: of a roll-back, at least.
  """

  action: str
  factor: float
  window: int
  steps_back: int

  def __post_init__(self):
    if self.action not in ACTIONS:
      raise ValueError(f"train.guard.action must be one of {ACTIONS}, got {self.action!r}")
    if not 1 < self.factor < float("inf"):
      raise ValueError(f"train.guard.factor must be finite and above 1, got {self.factor}")
    for name in ("window", "steps_back"):
      if getattr(self, name) < 1:
        raise ValueError(f"train.guard.{name} must be at least 1, got {getattr(self, name)}")

  def init(self) -> GuardState:
    """The memory before the first step."""
    # Arrays of their own, as all of them are donated.
    zero = lambda: jnp.zeros((), jnp.int32)
    return GuardState(means=jnp.zeros(2), seen=zero(), not_finite=zero(), offset=zero())

  def limits(self, state: GuardState) -> Float[Array, "2"]:
    """Above these, the gradient's norm and the error are a spike; infinite in the first window."""
    return jnp.where(state.seen >= self.window, self.factor * state.means, jnp.inf)

  def update(
    self, state: GuardState, gradient_norm: Scalar, error: Scalar
  ) -> tuple[GuardState, Bool[Array, ""]]:
    """Takes the next step's values; says whether it is a spike."""
    values, limits = jnp.stack([gradient_norm, error]), self.limits(state)
    finite = jnp.isfinite(values).all()
    not_finite = jnp.where(finite, 0, state.not_finite + 1)
    spike = finite & (values > limits).any()
    if self.action == "skip":
      spike |= ~finite & (not_finite <= PATIENCE)
    if self.action == "roll_back":
      spike |= ~finite
    # A step that is not finite teaches nothing.
    seen = jnp.where(finite, jnp.minimum(state.seen + 1, self.window), state.seen)
    means = state.means + (jnp.minimum(values, limits) - state.means) / jnp.maximum(seen, 1)
    means = jnp.where(finite, means, state.means)
    return state.replace(means=means, seen=seen, not_finite=not_finite), spike


def part_norms(gradient: Mapping[str, PyTree]) -> Float[Array, "parts"]:
  """The gradient's norm in each part of the network, in the order of `part_names`."""
  squares = [_squares(name, gradient[name]) for name in sorted(gradient)]
  return jnp.sqrt(jnp.concatenate(squares))


def part_names(params: Mapping[str, PyTree]) -> list[str]:
  """The network's layers and its other modules, of parameters or their shapes."""
  names = []
  for name in sorted(params):
    depth = jax.tree.leaves(params[name])[0].shape[0] if name == LAYERS else 0
    names += [f"{name}_{layer}" for layer in range(depth)] or [name]
  return names


def _squares(name: str, part: PyTree) -> Float[Array, "parts"]:
  """Sum of squares of a part, by layer where it has layers."""
  layered = name == LAYERS
  total = lambda x: jnp.sum(x**2, axis=tuple(range(layered, x.ndim)))
  return jnp.atleast_1d(sum(total(x) for x in jax.tree.leaves(part)))
