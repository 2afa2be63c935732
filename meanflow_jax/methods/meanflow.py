"""MeanFlow: average velocities learnt from their identity (arXiv 2505.13447)."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, PyTree

from meanflow_jax.arrays import (
  Image,
  Label,
  Mask,
  NetworkFn,
  PRNGKey,
  Scalar,
  Time,
  VelocityFn,
  per_row,
  told,
  without_class,
  without_dropout,
)
from meanflow_jax.kernels import forward_mode
from meanflow_jax.methods.guidance import Guidance, LabelDropout, SamplingGuidance
from meanflow_jax.methods.method import Method, Step
from meanflow_jax.methods.row_groups import RowGroups
from meanflow_jax.methods.time_sampling import TimePairs

EqualRows = Float[Array, "A H W C"]  # images of the A rows with r = t alone


@no_type_check  # what jax.tree.map puts in an array's place is no array
class Draws(flax.struct.PyTreeNode, kw_only=True):
  """All randomness of one step.

  Attributes:
    noise: e ~ N(0, I).
    r, t: the two times of each row.
    dropped: the rows that take the null class and the unguided target.
    guided: whether guidance has begun, the same on all rows; None: it always has.
    rows: the rows with r = t come first in each group; static.
  """

  noise: Image
  r: Time
  t: Time
  dropped: Mask
  guided: Mask | None = None
  rows: RowGroups = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class AdaptiveWeight:
  """Weights a row's squared error by 1 / stopgrad(error + c)^p (section 4.3)."""

  p: float
  c: float

  def __post_init__(self):
    if not 0 < self.c < math.inf:
      raise ValueError(f"the adaptive weight's c must be positive, got {self.c}")
    if not 0 <= self.p < math.inf:
      raise ValueError(f"the adaptive weight's p must be 0, for no weight, or more; got {self.p}")

  def __call__(self, error: Float[Array, "B"]) -> Float[Array, "B"]:
    """The weighted error of each row, from its squared error summed over the elements."""
    return error / stop_gradient(error + self.c) ** self.p


class Rows(NamedTuple):
  """What the network sees of some rows; `y_in` is the label after dropout."""

  z: Image
  r: Time
  t: Time
  y: Label
  y_in: Label


def draw_noise(key: PRNGKey, x: Image) -> Image:
  """e ~ N(0, I) for data x."""
  # Drawn flat, the same numbers: counters in four dimensions take XLA:CPU long to compile.
  return jax.random.normal(key, (x.size,), x.dtype).reshape(x.shape)


def velocity_and_derivative(
  velocity_fn: VelocityFn | NetworkFn, z: Image, r: Time, t: Time, y: Label, tangent: Image
) -> tuple[PyTree, PyTree]:
  """u(z, r, t) and du/dt = tangent . grad_z u + d_t u along the flow (eq. 8).

  The derivative carries no gradient: it only enters targets. Where the function returns several
  velocities, there are as many derivatives.
  """
  with jax.named_scope("jvp_du_dt"):
    u, du_dt = forward_mode.jvp(
      lambda z, r, t: velocity_fn(z, r, t, y),
      (z, r, t),
      (tangent, jnp.zeros_like(r), jnp.ones_like(t)),
    )
  return u, stop_gradient(du_dt)


@dataclasses.dataclass(frozen=True)
class MeanFlow(Method):
  """The MeanFlow objective and its sampling step; with r = t on all rows, flow matching.

  Attributes:
    times: the distribution of (r, t).
    guidance: classifier-free guidance in the target.
    label_dropout: which rows learn the unconditional velocity.
    weight: the weight of a row's error.
    null_label: the label that stands for no class.
  """

  times: TimePairs
  guidance: Guidance
  label_dropout: LabelDropout
  weight: AdaptiveWeight
  null_label: int

  def __post_init__(self):
    self.label_dropout.probability(self.times.rows)

  @property
  def rows(self) -> RowGroups:
    """How a batch splits into rows with r = t and rows with r < t."""
    return self.times.rows

  @property
  def is_guided(self) -> bool:
    """Whether guidance is part of the target."""
    return self.guidance.is_on

  @property
  def needs_unconditional(self) -> bool:
    """Whether the velocity without class has a part in it."""
    return self.guidance.needs_unconditional

  def check_steps(self, total: int) -> None:
    """Raises a ValueError if guidance would never begin."""
    if self.guidance.from_step >= total:
      raise ValueError(
        f"method.guidance.from_step {self.guidance.from_step} is not within train.steps {total}: "
        "guidance would never begin"
      )

  def flops(self, forward: Callable[..., float]) -> float:
    """What a step costs for each row, from what a forward pass costs.

    With dropout in the network, kappa costs a pass of all rows instead of those with r < t.
    """
    ahead = self.times.rows.rest / self.times.rows.size
    guidance = self.guidance.needs_unconditional + ahead * self.guidance.needs_conditional
    return (3 + ahead + guidance) * forward()

  def sampling_guidance(self, omega: float, t_min: float, t_max: float) -> SamplingGuidance:
    """Classifier-free guidance of each step, where the target has none.

    Raises:
      ValueError: guidance was fixed in training; says at which scale.
    """
    guidance = SamplingGuidance(omega, t_min, t_max, self.null_label)
    if self.guidance.is_on and (omega, t_min, t_max) != (1, 0, 1):
      raise ValueError(
        f"the guidance of this model was fixed in training, at {self.guidance}: when sampling it "
        f"cannot be {omega} on [{t_min:g}, {t_max:g}]. Leave sample.guidance (and omega, t_min "
        "and t_max of evaluate) at 1 on [0, 1]"
      )
    return guidance

  def draw(self, key: PRNGKey, x: Image, y: Label, step: Step = 0) -> Draws:
    """Draws all random numbers of one step for data x with labels y, and whether it is guided."""
    key_noise, key_times, key_dropout = jax.random.split(key, 3)
    r, t = self.times(key_times, x.shape[0])
    begins = self.guidance.from_step
    return Draws(
      noise=draw_noise(key_noise, x),
      r=r,
      t=t,
      dropped=self.label_dropout(key_dropout, y, self.times.rows),
      guided=jnp.full(t.shape, step >= begins) if begins else None,
      rows=self.times.rows,
    )

  def objective(
    self, velocity_fn: VelocityFn, x: Image, y: Label, draws: Draws
  ) -> tuple[Scalar, dict[str, Scalar]]:
    """The loss for given draws (Algorithm 1, eq. 10), deterministic, and its metrics.

    (t - r) du/dt vanishes on the rows with r = t, so the JVP runs on the others only.

    Returns:
      The weighted error, averaged over rows, and as metrics the unweighted squared errors per
      element: `error` against the target, `velocity_error` on the rows with r = t against e - x.
    """
    v = draws.noise - x
    z = x + per_row(draws.t) * v
    y_in = without_class(y, self.null_label, draws.dropped)
    equal, ahead = draws.rows.split(Rows(z, draws.r, draws.t, y, y_in))

    u_equal = velocity_fn(equal.z, equal.t, equal.t, equal.y_in)
    v_guided = self.guided_velocity(velocity_fn, z, v, y, draws, u_equal)
    v_equal, v_ahead = draws.rows.split(v_guided)
    u_ahead, target = self.average_velocity(velocity_fn, ahead, v_ahead, draws)
    u = draws.rows.merge(u_equal, u_ahead)
    target = draws.rows.merge(v_equal, target)

    loss = self.weight(jnp.sum((u - target) ** 2, axis=(1, 2, 3))).mean()
    metrics = {"error": jnp.mean((u - target) ** 2)}
    if draws.rows.first:
      metrics["velocity_error"] = jnp.mean((u_equal - draws.rows.split(v)[0]) ** 2)
    return loss, metrics

  def average_velocity(
    self, velocity_fn: VelocityFn, rows: Rows, v: Image, draws: Draws
  ) -> tuple[Image, Image]:
    """u(z, r, t) of the rows with r < t, and its target v - (t - r) du/dt (eq. 10).

    Args:
      velocity_fn: the network.
      rows: these rows alone.
      v: their guided velocity.
      draws: of all rows.
    """
    u, du_dt = velocity_and_derivative(velocity_fn, rows.z, rows.r, rows.t, rows.y_in, v)
    return u, v - per_row(rows.t - rows.r) * du_dt

  def guided_velocity(
    self, velocity_fn: VelocityFn, z: Image, v: Image, y: Label, draws: Draws, u_equal: EqualRows
  ) -> Image:
    """The guided target velocity of each row, without gradient (section 4.2).

    Args:
      velocity_fn: the network.
      z: the noised data z_t.
      v: the conditional velocity e - x.
      y: the labels before dropout.
      draws: the times, the rows that dropped their label, and whether guidance has begun.
      u_equal: u(z, t, t | y) of the rows with r = t, which the loss needs anyway.
    """
    if not self.guidance.is_on:
      return v

    def guided() -> Image:
      v_c, v_u = self._guidance_velocities(velocity_fn, z, y, draws, stop_gradient(u_equal))
      return jnp.where(per_row(draws.dropped), v, self.guidance(v, v_c, v_u, draws.t))

    return guided() if draws.guided is None else jax.lax.cond(draws.guided[0], guided, lambda: v)

  def _guidance_velocities(
    self, velocity_fn: VelocityFn, z: Image, y: Label, draws: Draws, u_equal: EqualRows
  ) -> tuple[Image, Image]:
    """u(z, t, t | y) and u(z, t, t | null), zeros where guidance does not ask for one.

    Rows with r = t have their conditional velocity already, unless the loss took it with dropout;
    all else is one network pass.
    """
    velocity = jax.named_scope("guidance")(lambda z, t, y: stop_gradient(velocity_fn(z, t, t, y)))
    rows = draws.rows
    if told(y).dropout is not None:
      rows, u_equal, y = RowGroups(size=1, first=0), u_equal[:0], without_dropout(y)
    null = (z, draws.t, without_class(y, self.null_label))
    _, ahead = rows.split((z, draws.t, y))
    if not self.guidance.needs_conditional:
      return jnp.zeros_like(z), velocity(*null)
    if not self.guidance.needs_unconditional:
      return rows.merge(u_equal, velocity(*ahead)), jnp.zeros_like(z)
    both = RowGroups(size=rows.size + rows.rest, first=rows.size)
    v_u, v_c = both.split(velocity(*both.merge(null, ahead)))
    return rows.merge(u_equal, v_c), v_u


METHOD = MeanFlow
