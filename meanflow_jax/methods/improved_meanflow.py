"""Improved MeanFlow: a regression to velocities, with guidance as an input (arXiv 2512.02012)."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from meanflow_jax.arrays import (
  GuidanceScale,
  Image,
  Label,
  NetworkFn,
  PRNGKey,
  Scalar,
  Time,
  per_row,
  without_class,
)
from meanflow_jax.methods import meanflow
from meanflow_jax.methods.guidance import GuidanceInput, LabelDropout
from meanflow_jax.methods.meanflow import AdaptiveWeight, draw_noise, velocity_and_derivative
from meanflow_jax.methods.method import Method, Metrics, Step
from meanflow_jax.methods.row_groups import RowGroups
from meanflow_jax.methods.time_sampling import TimePairs

U, V = "u", "v"
EqualRows = Float[Array, "A H W C"]  # images of the A rows with r = t alone
AheadRows = Float[Array, "D H W C"]  # of the others


@no_type_check  # what jax.tree.map puts in an array's place is no array
class Draws(meanflow.Draws):
  """All randomness of one step: that of MeanFlow, and guidance for each row."""

  guidance: GuidanceScale


class _Rows(NamedTuple):
  """What the network sees of some rows; `y_in` is the label after dropout."""

  z: Image
  r: Time
  t: Time
  y: Label
  y_in: Label
  guidance: GuidanceScale


@dataclasses.dataclass(frozen=True)
class ImprovedMeanFlow(Method):
  """The objective of improved MeanFlow; u and an auxiliary velocity v are two heads of a network.

  V = u + (t - r) du/dt is regressed to the guided velocity, du/dt being taken along the network's
  own conditional velocity, which depends on z alone; the head v is regressed to the same. Guidance
  of random scales, on random intervals of t, is an input in training and chosen when sampling.

  Attributes:
    times: the distribution of (r, t).
    label_dropout: which rows learn the unconditional velocity; should these be rows with r < t,
      their derivative stays along the conditional one.
    weight: the weight of a row's error, of either head.
    null_label: the label that stands for no class.
    omega_max: the largest scale; 1 is without guidance.
    omega_exponent: scales have the density omega^-exponent on [1, omega_max].
    interval_split: intervals start in [0, split] and end in [split, 1], uniformly.
  """

  HEADS: ClassVar[tuple[str, ...]] = (U, V)
  GUIDANCE: ClassVar[tuple[str, ...]] = ("omega_max", "omega_exponent", "interval_split")

  times: TimePairs
  label_dropout: LabelDropout
  weight: AdaptiveWeight
  null_label: int
  omega_max: float = 8.0
  omega_exponent: float = 1.0
  interval_split: float = 0.5

  def __post_init__(self):
    self.label_dropout.probability(self.rows)
    if not 1 <= self.omega_max < math.inf:
      raise ValueError(
        f"method.improved_meanflow.omega_max must be 1, for no guidance, or more: {self.omega_max}"
      )
    if not math.isfinite(self.omega_exponent):
      raise ValueError(
        f"method.improved_meanflow.omega_exponent must be a number, got {self.omega_exponent}"
      )
    if not 0 < self.interval_split < 1:
      raise ValueError(
        "method.improved_meanflow.interval_split must lie between 0 and 1, so that no interval is "
        f"empty; got {self.interval_split}"
      )

  @property
  def rows(self) -> RowGroups:
    """How a batch splits into rows with r = t and rows with r < t."""
    return self.times.rows

  @property
  def is_guided(self) -> bool:
    """Whether scales other than 1 are drawn."""
    return self.omega_max > 1

  def flops(self, forward: Callable[..., float]) -> float:
    """What a step costs for each row, from what a forward pass of some heads costs."""
    ahead = self.rows.rest / self.rows.size
    regressed = 3 * forward(heads=self.HEADS) + ahead * forward(heads=(U,))
    return regressed + (ahead + self.is_guided) * forward(heads=(V,))

  def sampling_guidance(self, omega: float, t_min: float, t_max: float) -> GuidanceInput:
    """Guidance as an input of the network.

    Raises:
      ValueError: the model knows none, the scale is below 1, or the interval is empty.
    """
    if omega != 1 and not self.is_guided:
      raise ValueError(
        "this model was trained without guidance (method.improved_meanflow.omega_max 1): when "
        f"sampling it cannot be {omega}. Leave sample.guidance.omega (and evaluate.omega) at 1"
      )
    return GuidanceInput(omega, t_min, t_max)

  def draw(self, key: PRNGKey, x: Image, y: Label, step: Step = 0) -> Draws:
    """Draws all random numbers of one step for data x with labels y; all steps are alike."""
    key_noise, key_times, key_dropout, key_guidance = jax.random.split(key, 4)
    r, t = self.times(key_times, x.shape[0])
    return Draws(
      noise=draw_noise(key_noise, x),
      r=r,
      t=t,
      dropped=self.label_dropout(key_dropout, y, self.rows),
      guidance=self.draw_guidance(key_guidance, x.shape[0]),
      rows=self.rows,
    )

  def draw_guidance(self, key: PRNGKey, batch: int) -> GuidanceScale:
    """Draws scale and interval of each row; it holds for all t on rows with r = t."""
    key_omega, key_start, key_end = jax.random.split(key, 3)
    start = self.interval_split * jax.random.uniform(key_start, (batch,))
    end = 1 - (1 - self.interval_split) * jax.random.uniform(key_end, (batch,))
    equal = self.rows.mask(batch)
    omega = self.omega_at(jax.random.uniform(key_omega, (batch,)))
    return GuidanceScale(omega, jnp.where(equal, 0, start), jnp.where(equal, 1, end))

  def omega_at(self, share: Float[Array, "B"]) -> Float[Array, "B"]:
    """The scale below which a share of all scales lies."""
    power = 1 - self.omega_exponent
    if power == 0:
      return self.omega_max**share
    return (1 + share * (self.omega_max**power - 1)) ** (1 / power)

  def objective(
    self, network_fn: NetworkFn, x: Image, y: Label, draws: Draws
  ) -> tuple[Scalar, Metrics]:
    """The loss for given draws, deterministic, and its metrics.

    Rows with r = t need no derivative, and their own v is the conditional velocity of guidance.

    Returns:
      The weighted errors of both heads, averaged over rows, and as metrics the unweighted squared
      errors per element against the guided velocity: `error` of V and `velocity_error` of v.
    """
    v_t = draws.noise - x
    z = x + per_row(draws.t) * v_t
    y_in = without_class(y, self.null_label, draws.dropped)
    equal, ahead = draws.rows.split(_Rows(z, draws.r, draws.t, y, y_in, draws.guidance))

    u_equal, v_equal = network_fn(
      equal.z, equal.t, equal.t, equal.y_in, guidance=equal.guidance, heads=self.HEADS
    )
    v_g, tangent = self.guided_velocity(network_fn, z, v_t, y, draws, v_equal)
    both = lambda z, r, t, y: network_fn(z, r, t, y, guidance=ahead.guidance, heads=self.HEADS)
    (u_ahead, v_ahead), (du_dt, _) = velocity_and_derivative(
      both, ahead.z, ahead.r, ahead.t, ahead.y_in, tangent
    )
    regressed = draws.rows.merge(u_equal, u_ahead + per_row(ahead.t - ahead.r) * du_dt)
    squares = (regressed - v_g) ** 2, (draws.rows.merge(v_equal, v_ahead) - v_g) ** 2
    loss = sum(self.weight(jnp.sum(s, axis=(1, 2, 3))).mean() for s in squares)
    return loss, {"error": jnp.mean(squares[0]), "velocity_error": jnp.mean(squares[1])}

  def guided_velocity(
    self, network_fn: NetworkFn, z: Image, v_t: Image, y: Label, draws: Draws, v_equal: EqualRows
  ) -> tuple[Image, AheadRows]:
    """The guided velocity of each row and, where r < t, the conditional one, without gradient.

    v_g = v_t + (1 - 1 / w) (v_c - v_u) with the scale w that is in force at t: a conditional
    velocity that meets it is guided by w. Rows that dropped their label keep v_t.

    Args:
      network_fn: the network.
      z: the noised data z_t.
      v_t: the velocity e - x.
      y: the labels before dropout.
      draws: times, guidance, and the rows that dropped their label.
      v_equal: the head v on rows with r = t, which the loss needs anyway.
    """
    w = draws.guidance.in_force(draws.t)
    v_c_ahead, v_u = self._guidance_velocities(network_fn, z, y, draws, w)
    if not self.is_guided:
      return v_t, v_c_ahead
    v_c = draws.rows.merge(stop_gradient(v_equal), v_c_ahead)
    guided = v_t + per_row(1 - 1 / w) * (v_c - v_u)
    return jnp.where(per_row(draws.dropped), v_t, guided), v_c_ahead

  def _guidance_velocities(
    self, network_fn: NetworkFn, z: Image, y: Label, draws: Draws, w: Float[Array, "B"]
  ) -> tuple[AheadRows, Image | None]:
    """The head v given y and w on rows with r < t, and without class on all, in one pass."""
    rows = draws.rows

    @jax.named_scope("guidance")
    def velocity(z: Image, t: Time, y: Label, w: Float[Array, "B"]) -> Image:
      scale = GuidanceScale.everywhere(w)
      return stop_gradient(network_fn(z, t, t, y, guidance=scale, heads=(V,))[0])

    _, ahead = rows.split((z, draws.t, y, w))
    if not self.is_guided:
      return velocity(*ahead), None
    null = (z, draws.t, without_class(y, self.null_label), jnp.ones_like(w))
    both = RowGroups(size=rows.size + rows.rest, first=rows.size)
    v_u, v_c_ahead = both.split(velocity(*both.merge(null, ahead)))
    return v_c_ahead, v_u


METHOD = ImprovedMeanFlow
