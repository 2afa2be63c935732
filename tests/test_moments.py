"""Moments of streams, and the Frechet distance where it is known."""

import functools
import operator

import numpy as np
import pytest
import scipy.linalg

from meanflow_jax.metrics.moments import Moments, frechet_distance

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(200, 6)) @ RNG.normal(size=(6, 6)) + 1e3 * RNG.normal(size=6)
ORTHOGONAL = np.linalg.qr(RNG.normal(size=(6, 6)))[0]


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> Moments:
  return Moments(count=2, mean=np.asarray(mean), scatter=np.asarray(covariance))


def random_gaussian(size: int, rank: int) -> Moments:
  factor = RNG.normal(size=(size, rank))
  return gaussian(RNG.normal(size=size), factor @ factor.T)


@pytest.mark.parametrize("cuts", [[], [1], [100], [1, 2, 3, 199], list(range(1, 200))])
def test_moments_do_not_depend_on_how_a_stream_is_cut(cuts):
  merged = functools.reduce(operator.add, map(Moments.of, np.split(FEATURES, cuts)))
  assert merged.count == 200
  np.testing.assert_allclose(merged.mean, FEATURES.mean(axis=0), rtol=1e-10)
  np.testing.assert_allclose(merged.covariance, np.cov(FEATURES.T), rtol=1e-10, atol=1e-10)


def test_moments_merge_in_any_order():
  a, b, c = map(Moments.of, np.split(FEATURES, [20, 50]))
  for merged in (a + (b + c), c + a + b):
    np.testing.assert_allclose(merged.scatter, (a + b + c).scatter, rtol=1e-10)


def test_moments_of_single_precision_are_taken_in_double():
  features = FEATURES.astype(np.float32)
  expected = np.cov(features.astype(np.float64).T)
  np.testing.assert_allclose(Moments.of(features).covariance, expected, rtol=1e-10)


def test_the_distance_of_independent_features_is_in_closed_form():
  means, deviations = RNG.normal(size=(2, 6)), RNG.uniform(0, 2, size=(2, 6))
  a, b = (gaussian(m, np.diag(d**2)) for m, d in zip(means, deviations, strict=True))
  expected = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
  assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_the_distance_agrees_with_a_general_matrix_root():
  for _ in range(5):
    a, b = random_gaussian(6, 8), random_gaussian(6, 8)
    cross = np.trace(scipy.linalg.sqrtm(a.covariance @ b.covariance).real)
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_a_rotation_of_the_features_changes_nothing():
  a, b = random_gaussian(6, 8), random_gaussian(6, 8)
  turn = lambda m: gaussian(ORTHOGONAL @ m.mean, ORTHOGONAL @ m.covariance @ ORTHOGONAL.T)
  assert frechet_distance(turn(a), turn(b)) == pytest.approx(frechet_distance(a, b), rel=1e-8)


def test_singular_covariances_are_measured_in_their_subspace():
  small = random_gaussian(2, 3), random_gaussian(2, 3)
  plane = ORTHOGONAL[:, :2]
  large = (gaussian(plane @ m.mean, plane @ m.covariance @ plane.T) for m in small)
  assert frechet_distance(*large) == pytest.approx(frechet_distance(*small), abs=1e-6)


def test_orthogonal_subspaces_share_nothing():
  first, rest = ORTHOGONAL[:, :2], ORTHOGONAL[:, 2:]
  a, b = gaussian(np.zeros(6), first @ first.T), gaussian(np.zeros(6), rest @ rest.T)
  assert frechet_distance(a, b) == pytest.approx(2 + 4, abs=1e-6)


@pytest.mark.parametrize("count", [3, 200])
def test_features_are_at_no_distance_from_themselves(count):
  """Also if fewer than their size."""
  a = Moments.of(FEATURES[:count])
  shift = np.arange(6.0)
  assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
  moved = Moments.of(FEATURES[:count] + shift)
  assert frechet_distance(a, moved) == pytest.approx(np.sum(shift**2), rel=1e-6)


def test_no_features_add_nothing():
  none = Moments.of(FEATURES[:0])
  for total in (none + none, none + Moments.of(FEATURES), Moments.of(FEATURES) + none):
    assert total.count in (0, 200)
    assert np.isfinite(total.scatter).all()
  np.testing.assert_array_equal((none + Moments.of(FEATURES)).scatter, Moments.of(FEATURES).scatter)


def test_what_cannot_be_measured_is_refused():
  broken = FEATURES.copy()
  broken[3, 1], broken[5] = np.nan, np.inf
  with pytest.raises(ValueError, match="2 of 200 feature vectors are not finite"):
    Moments.of(broken)
  with pytest.raises(ValueError, match="at least 2 feature vectors, got 1"):
    _ = Moments.of(FEATURES[:1]).covariance
  with pytest.raises(ValueError, match="features of 6 and of 5 numbers"):
    frechet_distance(random_gaussian(6, 6), random_gaussian(5, 5))
