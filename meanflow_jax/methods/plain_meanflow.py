"""MeanFlow as it is usually computed, to measure against."""

from meanflow_jax.arrays import Image, Label, Scalar, VelocityFn
from meanflow_jax.methods.meanflow import Draws, MeanFlow
from meanflow_jax.methods.row_groups import RowGroups


class PlainMeanFlow(MeanFlow):
  """The same loss with nothing saved: the JVP on all rows, guidance in passes of its own."""

  def objective(
    self, velocity_fn: VelocityFn, x: Image, y: Label, draws: Draws
  ) -> tuple[Scalar, dict[str, Scalar]]:
    """The loss of `MeanFlow`, as if no row had r = t; of the metrics `error` alone."""
    return super().objective(velocity_fn, x, y, draws.replace(rows=RowGroups(size=1, first=0)))
