"""What a method is: its draws, what it asks of a network, its loss and its sampling step.

A method is a frozen dataclass in a file of its own in this folder, with `METHOD = its class` at the
end. Its name in a config, `method.name`, is that of the file. Its fields say what it takes. Those
without a default are shared sections of `config.method` (times, guidance, label_dropout, weight)
and `null_label`; those with one are the keys of its own section, `method.<name>`.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Array, Int

from meanflow_jax.arrays import Image, Label, NetworkFn, PRNGKey, Scalar, Time, VelocityFn, per_row
from meanflow_jax.methods.guidance import GuidanceInput, SamplingGuidance
from meanflow_jax.methods.row_groups import RowGroups

Metrics = dict[str, Scalar]
Step = Int[Array, ""] | int


class Method(abc.ABC):
  """What training and sampling know of a method.

  Attributes:
    HEADS: the velocities that its loss trains; its networks are those with just these heads.
    GUIDANCE: those of its own keys that say how guidance is trained, if not `guidance` does.
  """

  HEADS: ClassVar[tuple[str, ...]] = ("u",)
  GUIDANCE: ClassVar[tuple[str, ...]] = ()

  @property
  @abc.abstractmethod
  def rows(self) -> RowGroups:
    """How a batch splits into rows with r = t, the first of each group, and rows with r < t."""

  @property
  def is_guided(self) -> bool:
    """Whether targets differ from the velocities of data and noise by classifier-free guidance."""
    return False

  @property
  def needs_unconditional(self) -> bool:
    """Whether a velocity without class, which dropped labels teach, has a part in that."""
    return self.is_guided

  def check_steps(self, total: int) -> None:  # noqa: B027 most methods have nothing to check
    """Raises a ValueError if something would not happen within so many steps of training."""

  @abc.abstractmethod
  def draw(self, key: PRNGKey, x: Image, y: Label, step: Step = 0) -> Any:
    """Draws all random numbers of one step, and all that changes in the course of training.

    Args:
      key: new at each step.
      x, y: data and labels.
      step: how many steps of the optimizer are done.

    Returns:
      A pytree of arrays [B, ...] with at least the times `r` and `t`, split among microbatches with
      the data.
    """

  @abc.abstractmethod
  def objective(
    self, network_fn: NetworkFn, x: Image, y: Label, draws: Any
  ) -> tuple[Scalar, Metrics]:
    """The loss for given draws, deterministic, and its metrics.

    Among these is `error`: the unweighted squared error per element, which tells progress.
    """

  @abc.abstractmethod
  def flops(self, forward: Callable[..., float]) -> float:
    """What a step costs for each row; a backward pass counts as two forward passes.

    Args:
      forward: what a forward pass costs, of the `heads` given by name.
    """

  @abc.abstractmethod
  def sampling_guidance(
    self, omega: float, t_min: float, t_max: float
  ) -> SamplingGuidance | GuidanceInput:
    """How a trained model is guided when sampling, by a scale omega for t in [t_min, t_max].

    Raises:
      ValueError: it cannot be, or not so.
    """

  def loss(self, network_fn: NetworkFn, key: PRNGKey, x: Image, y: Label) -> tuple[Scalar, Metrics]:
    """`objective` of a fresh draw."""
    return self.objective(network_fn, x, y, self.draw(key, x, y))

  def step(self, velocity_fn: VelocityFn, z: Image, t: Time, r: Time, y: Label) -> Image:
    """One sampling step from t to r < t: z_r = z_t - (t - r) u(z_t, r, t).

    A model of plain flow matching knows u at r = t only: its step is Euler's.
    """
    start = t if self.rows.rest == 0 else r
    return z - per_row(t - r) * velocity_fn(z, start, t, y)
