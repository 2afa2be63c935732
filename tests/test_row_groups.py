"""Rows are chosen by position inside small groups, and stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_jax.methods.row_groups import RowGroups
from meanflow_jax.runtime.mesh import make_mesh, rows_sharding

FRACTIONS = [0.0, 0.25, 1 / 3, 0.5, 0.7, 0.75, 1.0]


def test_fractions_are_met_exactly_by_the_smallest_groups():
  for size in range(1, 65):
    for first in range(size + 1):
      groups = RowGroups.from_fraction(first / size)
      assert groups.first * size == first * groups.size
      assert np.gcd(groups.first, groups.size) == 1


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan")])
def test_a_fraction_outside_0_and_1_is_refused(fraction):
  with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
    RowGroups.from_fraction(fraction)


def test_the_first_rows_of_each_group():
  first, rest = RowGroups(size=4, first=1).split(jnp.arange(8))
  np.testing.assert_array_equal(first, [0, 4])
  np.testing.assert_array_equal(rest, [1, 2, 3, 5, 6, 7])


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_split_mask_and_merge_agree(fraction):
  groups = RowGroups.from_fraction(fraction)
  batch = 4 * groups.size
  tree = {"rows": jnp.arange(batch), "images": jnp.arange(6.0 * batch).reshape(batch, 3, 2)}
  mask = np.asarray(groups.mask(batch))
  first, rest = groups.split(tree)
  for name, array in tree.items():
    np.testing.assert_array_equal(first[name], array[mask])
    np.testing.assert_array_equal(rest[name], array[~mask])
  jax.tree.map(np.testing.assert_array_equal, groups.merge(first, rest), tree)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_parts_of_a_batch_split_as_the_whole(fraction):
  """So the result cannot depend on how many devices share the batch."""
  groups = RowGroups.from_fraction(fraction)
  rows = jnp.arange(6 * groups.size)
  parts = [groups.split(part) for part in jnp.split(rows, 3)]
  for ours, whole in zip(zip(*parts, strict=True), groups.split(rows), strict=True):
    np.testing.assert_array_equal(jnp.concatenate(ours), whole)


@pytest.mark.parametrize("fraction", [0.25, 0.75])
def test_no_row_leaves_its_device(fraction):
  groups = RowGroups.from_fraction(fraction)
  sharding = rows_sharding(make_mesh(data=4, fsdp=2))
  rows = jax.device_put(jnp.arange(64.0).reshape(64, 1), sharding)
  there_and_back = lambda x: groups.merge(*groups.split(x))
  for function in (groups.split, there_and_back):
    compiled = jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(rows)
    program = compiled.compile().as_text()
    for word in ("all-gather", "all-to-all", "all-reduce", "collective", "reduce-scatter"):
      assert word not in program


@pytest.mark.parametrize("use", [RowGroups.mask, RowGroups.check])
def test_a_batch_of_broken_groups_is_refused(use):
  with pytest.raises(ValueError, match="a batch of 6 rows does not divide into groups of 4"):
    use(RowGroups(size=4, first=1), 6)
  with pytest.raises(ValueError, match="groups of 4"):
    RowGroups(size=4, first=1).split(jnp.arange(6))


@pytest.mark.parametrize("fraction", [0.999, 0.001, 0.67])
def test_a_fraction_is_never_rounded_to_another(fraction):
  with pytest.raises(ValueError, match=f"{fraction} of the rows"):
    RowGroups.from_fraction(fraction)


@pytest.mark.parametrize(
  ("fraction", "size", "first"), [(0.333, 3, 1), (0.75, 4, 3), (63 / 64, 64, 63)]
)
def test_digits_that_nobody_types_are_not_asked_for(fraction, size, first):
  assert RowGroups.from_fraction(fraction) == RowGroups(size, first)
