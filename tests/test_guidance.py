"""Guidance of the target and the labels that are dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_jax.methods.guidance import Guidance, LabelDropout
from meanflow_jax.methods.row_groups import RowGroups
from tests import tiny

T = jnp.linspace(0, 1, 11)
V, V_C, V_U = jax.random.normal(jax.random.key(0), (3, 11, 2, 2, 1))
SCALES = [(1.0, 0.0), (3.0, 0.0), (1.0, 0.5), (0.2, 0.92), (0.4, 0.6)]


@pytest.mark.parametrize(("omega", "kappa"), SCALES)
def test_the_guided_velocity_has_the_effective_scale(omega, kappa):
  """A conditional velocity that is guided by omega / (1 - kappa) is its own target."""
  scale = omega / (1 - kappa)
  guided = scale * V + (1 - scale) * V_U
  target = Guidance(omega, kappa, 0.0, 1.0)(V, guided, V_U, T)
  np.testing.assert_allclose(target, guided, atol=1e-5)


@pytest.mark.parametrize(("omega", "kappa"), SCALES)
def test_guidance_of_equal_velocities_changes_nothing(omega, kappa):
  np.testing.assert_allclose(Guidance(omega, kappa, 0.0, 1.0)(V, V, V, T), V, atol=1e-6)


@pytest.mark.parametrize(("omega", "kappa"), SCALES)
def test_what_guidance_does_not_ask_for_does_not_matter(omega, kappa):
  guidance = Guidance(omega, kappa, 0.0, 1.0)
  target = guidance(V, V_C, V_U, T)
  change = lambda **changes: guidance(**{"v": V, "v_c": V_C, "v_u": V_U, "t": T} | changes)
  ignores = lambda **changes: np.allclose(change(**changes), target, atol=1e-6)
  assert ignores(v_c=V_C + 1) == (not guidance.needs_conditional)
  assert ignores(v_u=V_U + 1) == (not guidance.needs_unconditional)
  assert guidance.is_on == (not ignores(v_c=V_C + 1, v_u=V_U + 2))


def test_guidance_holds_inside_its_interval_alone():
  everywhere, inside = (
    Guidance(2.0, 0.5, start, end)(V, V_C, V_U, T) for start, end in [(0.0, 1.0), (0.25, 0.75)]
  )
  within = slice(3, 8)  # 0.3, ..., 0.7
  np.testing.assert_array_equal(inside[within], everywhere[within])
  for outside in (slice(0, 3), slice(8, None)):
    np.testing.assert_array_equal(inside[outside], V[outside])
    assert (jnp.abs(everywhere - V)[outside] > 0).all()


def test_the_ends_of_the_interval_belong_to_it():
  ends = Guidance(2.0, 0.0, 0.25, 0.75)
  t = jnp.array([0.25, 0.75, 0.249, 0.751])
  guided = (ends(V[:4], V_C[:4], V_U[:4], t) != V[:4]).any(axis=(1, 2, 3))
  np.testing.assert_array_equal(guided, [True, True, False, False])


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ((1.0, 1.0, 0.0, 1.0), "kappa must lie in"),
    ((1.0, -0.1, 0.0, 1.0), "kappa must lie in"),
    ((0.4, 0.5, 0.0, 1.0), r"effective scale omega / \(1 - kappa\) of 1.* got 0.8 "),
    ((-3.0, 0.0, 0.0, 1.0), "effective scale .* got -3"),
    ((float("nan"), 0.0, 0.0, 1.0), "effective scale .* got nan"),
    ((float("inf"), 0.0, 0.0, 1.0), "effective scale .* got inf"),
    ((1.0, 0.0, 0.6, 0.4), "guidance interval"),
    ((1.0, 0.0, -0.1, 1.0), "guidance interval"),
    ((1.0, 0.0, 0.0, 1.1), "guidance interval"),
  ],
)
def test_impossible_guidance_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    Guidance(*settings)


BATCH = 20_000


def dropped(rate: float, droppable: str, rows: RowGroups) -> jax.Array:
  return LabelDropout(rate, droppable)(jax.random.key(0), jnp.zeros(BATCH, jnp.int32), rows)


@pytest.mark.parametrize(("rate", "equal"), [(0.1, 0.75), (0.1, 0.25), (0.2, 0.25), (0.3, 1.0)])
@pytest.mark.parametrize("droppable", ["all", "equal"])
def test_the_rate_is_that_of_all_rows(rate, equal, droppable):
  drops = dropped(rate, droppable, RowGroups.from_fraction(equal))
  deviation = np.sqrt(rate * (1 - rate) / BATCH)
  assert abs(drops.mean() - rate) < 4 * deviation


def test_only_rows_with_equal_times_drop_where_only_they_may():
  rows = RowGroups.from_fraction(0.5)
  equal, ahead = rows.split(dropped(0.1, "equal", rows))
  assert not ahead.any()
  assert equal.any()


def test_all_rows_drop_alike_where_all_may():
  rows = RowGroups.from_fraction(0.5)
  equal, ahead = rows.split(dropped(0.4, "all", rows))
  assert abs(equal.mean() - ahead.mean()) < 0.03


@pytest.mark.parametrize(("rate", "equal"), [(0.25, 0.25), (0.5, 0.5), (1.0, 1.0)])
def test_a_rate_as_large_as_the_share_drops_all_of_it(rate, equal):
  rows = RowGroups.from_fraction(equal)
  np.testing.assert_array_equal(dropped(rate, "equal", rows), rows.mask(BATCH))


@pytest.mark.parametrize(("rate", "equal"), [(0.1, 0.0), (0.3, 0.25), (0.76, 0.75)])
def test_a_rate_beyond_the_share_is_refused(rate, equal):
  with pytest.raises(ValueError, match="exceeds the rows with r = t"):
    tiny.meanflow(equal_fraction=equal, dropout=rate, droppable="equal")
  tiny.meanflow(equal_fraction=equal, dropout=rate, droppable="all")


def test_nothing_drops_at_rate_0():
  for droppable in ("all", "equal"):
    assert not dropped(0.0, droppable, RowGroups.from_fraction(0.0)).any()


def test_impossible_dropout_is_refused():
  for rate in (-0.1, 1.1):
    with pytest.raises(ValueError, match="rate of label dropout"):
      LabelDropout(rate, "all")
  with pytest.raises(ValueError, match="droppable rows must be one of"):
    LabelDropout(0.1, "some")


def test_all_rows_with_equal_times_may_drop_their_label_whatever_the_rounding():
  for size in range(1, 65):
    for first in range(1, size + 1):
      rate, rows = first / size, RowGroups(size, first)
      assert LabelDropout(rate, "equal").probability(rows) == 1
