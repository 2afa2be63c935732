"""Classifier-free guidance inside the training target (arXiv 2505.13447, section 4.2)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from meanflow_jax.arrays import (
  GuidanceScale,
  Image,
  Label,
  Mask,
  NetworkFn,
  PRNGKey,
  Time,
  VelocityFn,
  per_row,
  told,
  without_class,
)
from meanflow_jax.methods.row_groups import RowGroups

ROUNDING = 1e-9  # of a scale: 0.4 / (1 - 0.6) is a little less than 1
DROPPABLE_ROWS = ("all", "equal")


@dataclasses.dataclass(frozen=True)
class Guidance:
  """The guided velocity  omega v + kappa u(y) + (1 - omega - kappa) u(null).

  It holds for t in [t_start, t_end]; outside, omega = 1 and kappa = 0. The effective guidance
  scale is omega / (1 - kappa); with kappa = 0 this is eq. 19 of the paper.

  Attributes:
    omega, kappa: of the formula.
    t_start, t_end: where in t it holds.
    from_step: of training: before it no target is guided.
  """

  omega: float
  kappa: float
  t_start: float
  t_end: float
  from_step: int = 0

  def __post_init__(self):
    if self.from_step < 0:
      raise ValueError(f"guidance from_step must be 0 or more, got {self.from_step}")
    if not 0 <= self.kappa < 1:
      raise ValueError(f"guidance kappa must lie in [0, 1), got {self.kappa}")
    if not 1 - ROUNDING <= self.scale < math.inf:
      raise ValueError(
        "guidance must have an effective scale omega / (1 - kappa) of 1, for none, or more: got "
        f"{self.scale:g} (omega {self.omega:g}, kappa {self.kappa:g})"
      )
    if not 0 <= self.t_start < self.t_end <= 1:
      raise ValueError(
        f"the guidance interval must satisfy 0 <= t_start < t_end <= 1, "
        f"got t_start {self.t_start} and t_end {self.t_end}"
      )

  @property
  def scale(self) -> float:
    """The effective scale; 1 is without guidance."""
    return self.omega / (1 - self.kappa)

  @property
  def needs_conditional(self) -> bool:
    """Whether u(z, t, t | y) has a part in the target."""
    return self.kappa != 0

  @property
  def needs_unconditional(self) -> bool:
    """Whether u(z, t, t | null) has a part in the target."""
    return not math.isclose(self.omega + self.kappa, 1)

  @property
  def is_on(self) -> bool:
    """Whether the target differs from the velocity at all."""
    return self.needs_conditional or self.needs_unconditional

  def __str__(self) -> str:
    return (
      f"an effective scale of {self.scale:g} (method.guidance: omega {self.omega:g}, kappa "
      f"{self.kappa:g}) for t in [{self.t_start:g}, {self.t_end:g}]"
    )

  def __call__(self, v: Image, v_c: Image, v_u: Image, t: Time) -> Image:
    """Combines the velocity with the network's conditional and unconditional ones."""
    inside = (t >= self.t_start) & (t <= self.t_end)
    omega = per_row(jnp.where(inside, self.omega, 1))
    kappa = per_row(jnp.where(inside, self.kappa, 0))
    return omega * v + kappa * v_c + (1 - omega - kappa) * v_u


@dataclasses.dataclass(frozen=True)
class LabelDropout:
  """Gives a fraction of all rows the null class, and with it the unguided target.

  Attributes:
    rate: the fraction of all rows.
    droppable: which rows may drop: "all", or only the rows with r = t ("equal"), whose own
      probability is then rate / (their share).
  """

  rate: float
  droppable: str

  def __post_init__(self):
    if self.droppable not in DROPPABLE_ROWS:
      raise ValueError(f"droppable rows must be one of {DROPPABLE_ROWS}, got {self.droppable!r}")
    if not 0 <= self.rate <= 1:
      raise ValueError(f"the rate of label dropout must lie in [0, 1], got {self.rate}")

  def probability(self, rows: RowGroups) -> float:
    """The probability with which a droppable row drops its label.

    Raises:
      ValueError: if there are too few droppable rows for the rate.
    """
    if self.rate == 0 or self.droppable == "all":
      return self.rate
    share = rows.first / rows.size
    if self.rate > share:
      raise ValueError(
        f"label dropout of {self.rate} of all rows exceeds the rows with r = t "
        f"({rows.first} of {rows.size}): lower the rate or let all rows drop their label"
      )
    return self.rate / share

  def __call__(self, key: PRNGKey, y: Label, rows: RowGroups) -> Mask:
    """Draws which rows drop their label [B]."""
    (batch,) = told(y).label.shape
    dropped = jax.random.bernoulli(key, self.probability(rows), (batch,))
    return dropped if self.droppable == "all" else dropped & rows.mask(batch)


def check_sampling(omega: float, t_min: float, t_max: float) -> None:
  """Raises a ValueError if the scale is below 1, or the interval of t empty."""
  if not (math.isfinite(omega) and omega >= 1):
    raise ValueError(
      f"sample.guidance.omega (and evaluate.omega) must be 1, for no guidance, or more: got {omega}"
    )
  if not 0 <= t_min < t_max <= 1:
    raise ValueError(
      "sample.guidance (and evaluate) must satisfy 0 <= t_min < t_max <= 1 (omega 1 is without "
      f"guidance), got t_min {t_min} and t_max {t_max}"
    )


@dataclasses.dataclass(frozen=True)
class SamplingGuidance:
  """Classifier-free guidance when sampling (arXiv 2207.12598): u(null) + omega (u(y) - u(null)).

  It costs a second evaluation of the network in each step. Models with guidance in their training
  target need none of it; those of plain flow matching usually do.

  Attributes:
    omega: the scale; 1 is off.
    t_min, t_max: where in t it is on (arXiv 2404.07724).
    null_label: the label that stands for no class.
  """

  omega: float
  t_min: float
  t_max: float
  null_label: int

  def __post_init__(self):
    check_sampling(self.omega, self.t_min, self.t_max)

  def guided(self, velocity_fn: VelocityFn) -> VelocityFn:
    """The velocity with guidance; rows and their unconditional twins are one batch."""
    if self.omega == 1:
      return velocity_fn
    pairs = RowGroups(size=2, first=1)

    def guided(z: Image, r: Time, t: Time, y: Label) -> Image:
      given, null = (z, r, t, y), (z, r, t, without_class(y, self.null_label))
      u, u_null = pairs.split(velocity_fn(*pairs.merge(given, null)))
      inside = (t >= self.t_min) & (t <= self.t_max)
      return u_null + per_row(jnp.where(inside, self.omega, 1.0)) * (u - u_null)

    return guided


@dataclasses.dataclass(frozen=True)
class GuidanceInput:
  """Guidance when sampling as an input of the network, which has learned it (arXiv 2512.02012).

  It costs no further evaluation.

  Attributes:
    omega: the scale; 1 is off.
    t_min, t_max: where in t it is on.
  """

  omega: float
  t_min: float
  t_max: float

  def __post_init__(self):
    check_sampling(self.omega, self.t_min, self.t_max)

  def guided(self, network_fn: NetworkFn) -> VelocityFn:
    """The velocity with guidance."""

    def guided(z: Image, r: Time, t: Time, y: Label) -> Image:
      scale = GuidanceScale(*(jnp.full_like(t, x) for x in (self.omega, self.t_min, self.t_max)))
      return network_fn(z, r, t, y, guidance=scale)

    return guided
