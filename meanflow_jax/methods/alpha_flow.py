"""alpha-Flow: from flow matching along a trajectory to MeanFlow, by degrees (arXiv 2510.20771)."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from meanflow_jax.arrays import Image, Label, PRNGKey, Scalar, Time, VelocityFn, per_row
from meanflow_jax.methods import meanflow
from meanflow_jax.methods.meanflow import MeanFlow, Rows
from meanflow_jax.methods.method import Metrics, Step


@no_type_check  # what jax.tree.map puts in an array's place is no array
class Draws(meanflow.Draws):
  """All randomness of one step, and its alpha, the same on all rows."""

  alpha: Time


@dataclasses.dataclass(frozen=True)
class AlphaFlow(MeanFlow):
  """The objective of alpha-Flow; with alpha = 0 that of MeanFlow.

  Where r < t, u(z_t, r, t) is regressed to alpha v + (1 - alpha) stopgrad(u(z_s, r, s)), a step of
  length alpha (t - r) along v and what the network says of the rest. alpha anneals from 1, where
  v itself is the target, to 0, where the step becomes a derivative: only then is there a JVP.
  Either costs a forward pass of these rows.

  Attributes:
    anneal_from, anneal_to: the steps between which alpha falls from 1 to 0.
    sharpness: of its sigmoid, which has that many standard widths between these steps.
    clamp: alpha below it is 0, and above 1 - clamp it is 1.
  """

  anneal_from: int = 0
  anneal_to: int = 400_000
  sharpness: float = 25.0
  clamp: float = 5e-3

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.anneal_from < self.anneal_to:
      raise ValueError(
        "method.alpha_flow must satisfy 0 <= anneal_from < anneal_to, got "
        f"{self.anneal_from} and {self.anneal_to}"
      )
    if not (self.sharpness > 0 and 0 < self.clamp < 0.5):
      raise ValueError(
        "method.alpha_flow.sharpness must be positive and clamp between 0 and 0.5, got "
        f"{self.sharpness} and {self.clamp}"
      )

  def check_steps(self, total: int) -> None:
    """Raises a ValueError if guidance would never begin, or alpha not come to 0."""
    super().check_steps(total)
    if self.anneal_to > total:
      raise ValueError(
        f"method.alpha_flow.anneal_to {self.anneal_to} is beyond train.steps {total}: alpha would "
        f"not come to 0; give --config.method.alpha_flow.anneal_to={total}, or less"
      )

  def alpha(self, step: Step) -> Scalar:
    """alpha at a step (section 4.2 of the paper)."""
    middle, length = (self.anneal_from + self.anneal_to) / 2, self.anneal_to - self.anneal_from
    alpha = jax.nn.sigmoid(self.sharpness * (middle - step) / length)
    alpha = jnp.where(alpha > 1 - self.clamp, 1.0, alpha)
    return jnp.where(alpha < self.clamp, 0.0, alpha)

  def draw(self, key: PRNGKey, x: Image, y: Label, step: Step = 0) -> Draws:
    """Draws all random numbers of one step for data x with labels y, and takes its alpha."""
    drawn = super().draw(key, x, y, step)
    return Draws(**vars(drawn), alpha=jnp.full(x.shape[:1], self.alpha(step)))

  def objective(
    self, network_fn: VelocityFn, x: Image, y: Label, draws: Draws
  ) -> tuple[Scalar, Metrics]:
    """That of `MeanFlow`, with alpha among the metrics."""
    loss, metrics = super().objective(network_fn, x, y, draws)
    return loss, metrics | {"alpha": draws.alpha[0]}

  def average_velocity(
    self, velocity_fn: VelocityFn, rows: Rows, v: Image, draws: Draws
  ) -> tuple[Image, Image]:
    """u(z, r, t) of the rows with r < t, and its target.

    The error that u has against the paper's target is alpha times MeanFlow's, in the limit. Divided
    by alpha, its square has the gradient of the paper's loss times 1 / alpha, and neither error nor
    adaptive weight changes its meaning in the course of training.
    """
    if not v.shape[0]:
      return v, v
    alpha = draws.alpha[0]

    def regressed_to_step() -> tuple[Image, Image]:
      u = velocity_fn(rows.z, rows.r, rows.t, rows.y_in)
      length = alpha * (rows.t - rows.r)
      rest = velocity_fn(rows.z - per_row(length) * v, rows.r, rows.t - length, rows.y_in)
      error = stop_gradient(u - alpha * v - (1 - alpha) * rest)
      return u, stop_gradient(u) - error / alpha

    derivative = super().average_velocity
    regressed_to_derivative = lambda: derivative(velocity_fn, rows, v, draws)
    return jax.lax.cond(alpha > 0, regressed_to_step, regressed_to_derivative)


METHOD = AlphaFlow
