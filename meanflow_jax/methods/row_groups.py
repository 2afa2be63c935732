"""Splits a batch by position inside small groups of neighbouring rows."""

import dataclasses
import fractions
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

_LARGEST_GROUP = 64
_TOLERANCE = 5e-4  # so that 0.333 is a third


@dataclasses.dataclass(frozen=True)
class RowGroups:
  """The first `first` rows of every `size` neighbouring rows, against the rest.

  Splitting is a reshape [B] -> [B / size, size] and a slice of the second axis. A batch that is
  sharded over its rows in whole groups is therefore split without moving a row between devices,
  and the result does not depend on their number.
  """

  size: int
  first: int

  @classmethod
  def from_fraction(cls, fraction: float) -> "RowGroups":
    """The smallest groups in which the given fraction of the rows comes first.

    Raises:
      ValueError: if `fraction` is outside [0, 1], or takes groups of more than 64 rows.
    """
    if not 0 <= fraction <= 1:
      raise ValueError(f"a fraction of rows must lie in [0, 1], got {fraction}")
    exact = fractions.Fraction(fraction).limit_denominator(_LARGEST_GROUP)
    if abs(exact - fraction) > _TOLERANCE or (exact in (0, 1) and exact != fraction):
      raise ValueError(
        f"{fraction} of the rows is no whole number in groups of at most {_LARGEST_GROUP}; "
        f"the nearest that is: {exact} = {float(exact):.4f}"
      )
    return cls(size=exact.denominator, first=exact.numerator)

  @property
  def rest(self) -> int:
    """Rows of each group that do not come first."""
    return self.size - self.first

  def mask(self, batch: int) -> Array:
    """True [B] on the first rows of each group."""
    self.check(batch)
    return jnp.arange(batch) % self.size < self.first

  def split(self, rows: PyTree) -> tuple[PyTree, PyTree]:
    """Splits every array [B, ...] of a tree into its first rows and the rest, in order."""
    take = lambda part: jax.tree.map(
      lambda x: self._grouped(x)[:, part].reshape(-1, *x.shape[1:]), rows
    )
    return take(slice(0, self.first)), take(slice(self.first, self.size))

  def merge(self, first: PyTree, rest: PyTree) -> PyTree:
    """Undoes `split`."""
    return jax.tree.map(self._merge_arrays, first, rest)

  def check(self, batch: Any) -> None:
    """Raises a ValueError if a batch does not consist of whole groups."""
    if batch % self.size:
      raise ValueError(f"a batch of {batch} rows does not divide into groups of {self.size}")

  def _grouped(self, x: Array) -> Array:
    self.check(x.shape[0])
    return x.reshape(-1, self.size, *x.shape[1:])

  def _merge_arrays(self, first: Array, rest: Array) -> Array:
    groups = (first.shape[0] + rest.shape[0]) // self.size
    parts = [first.reshape(groups, self.first, *first.shape[1:])]
    parts += [rest.reshape(groups, self.rest, *rest.shape[1:])]
    return jnp.concatenate(parts, axis=1).reshape(-1, *first.shape[1:])
