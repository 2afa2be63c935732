"""Kernel distance, precision and recall where they are known."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from meanflow_jax.metrics.feature_sets import kid, precision_recall

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(120, 5)), RNG.normal(size=(90, 5)) * 0.7 + 0.4


# Kernel distance.


def unbiased(a: np.ndarray, b: np.ndarray) -> float:
  """The definition: means over pairs of different vectors."""
  kernel = lambda x, y: polynomial_kernel(x, y, degree=3, gamma=None, coef0=1)
  different = lambda x: kernel(x, x)[~np.eye(len(x), dtype=bool)].mean()
  return different(a) + different(b) - 2 * kernel(a, b).mean()


def test_the_kernel_distance_of_whole_sets_agrees_with_its_definition():
  ours = kid(A, A[::-1] + B.mean(axis=0), subsets=3, subset_size=1000)
  assert ours.mean == pytest.approx(unbiased(A, A[::-1] + B.mean(axis=0)), rel=1e-10)
  assert ours.std == pytest.approx(0, abs=1e-12)  # all subsets are the whole


def test_sets_may_differ_in_size():
  assert kid(A, B, subsets=400, subset_size=60).mean == pytest.approx(unbiased(A, B), rel=0.1)


def test_the_kernel_distance_of_two_points_is_in_closed_form():
  x, y = RNG.normal(size=(2, 4))
  expected = (x @ x / 4 + 1) ** 3 + (y @ y / 4 + 1) ** 3 - 2 * (x @ y / 4 + 1) ** 3
  ours = kid(np.tile(x, (9, 1)), np.tile(y, (7, 1)), subsets=2)
  assert ours == pytest.approx((expected, 0), rel=1e-10, abs=1e-10)


def test_sets_of_one_distribution_are_at_no_distance_on_average():
  """However small the subsets are; where vectors are paired with themselves it is not so."""
  subsets = 2000
  a, b = RNG.normal(size=(2, 20_000, 4))
  small = kid(a, b, subsets=subsets, subset_size=5)
  error = small.std / np.sqrt(subsets)
  assert abs(small.mean) < 4 * error
  kernel = lambda x: ((x * x).sum(axis=1) / 4 + 1) ** 3
  bias = 2 * (kernel(a).mean() - 1) / 5  # the mean of the kernel of two vectors is near 1
  assert bias > 10 * error


def test_subsets_follow_from_the_seed():
  draw = lambda seed: kid(A, B, subsets=5, subset_size=20, seed=seed)
  assert draw(1) == draw(1)
  assert draw(1) != draw(2)


# Precision and recall.


def brute_force(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float]:
  def within(points: np.ndarray, manifold: np.ndarray) -> float:
    radii = NearestNeighbors(n_neighbors=k).fit(manifold).kneighbors()[0][:, -1]
    distances = np.linalg.norm(points[:, None] - manifold[None], axis=2)
    return np.mean((distances <= radii[None]).any(axis=1))

  return within(generated, real), within(real, generated)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_precision_and_recall_agree_with_their_definition(k):
  assert precision_recall(A, B, k=k) == brute_force(A, B, k)


def test_precision_and_recall_change_places_with_the_sets():
  ours = precision_recall(A, B)
  assert precision_recall(B, A) == (ours.recall, ours.precision)
  assert ours.precision != ours.recall


@pytest.mark.parametrize("block", [1, 7, 119, 120, 1000])
def test_blocks_do_not_matter(block):
  far = A + 1e5, B + 1e5  # a constant of all features does not either
  assert precision_recall(*far, block=block) == precision_recall(A, B)


def test_a_set_is_within_itself():
  assert precision_recall(A, A[::-1]) == (1, 1)


def test_distant_sets_share_nothing():
  assert precision_recall(A, A + 100) == (0, 0)


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_copies_are_at_no_distance_from_each_other(block):
  """What repeats more often than there are neighbours has no room around it."""
  copies = np.repeat(A[:4] * 1e3 + 1 / 3, 5, axis=0)
  assert precision_recall(copies, copies, block=block) == (1, 1)
  assert precision_recall(copies, copies + 1e-2, block=block) == (0, 0)


def test_all_modes_but_one_are_recalled():
  real = np.concatenate([A, A + 100])
  ours = precision_recall(real, A)
  assert ours == (1, 0.5)


# Mistakes.


def test_what_cannot_be_measured_is_refused():
  broken = A.copy()
  broken[3, 1], broken[5] = np.nan, np.inf
  for figure in (kid, precision_recall):
    with pytest.raises(ValueError, match="2 of 120 feature vectors are not finite"):
      figure(B, broken)
    with pytest.raises(ValueError, match="features of 5 and of 4 numbers"):
      figure(A, B[:, :4])
  with pytest.raises(ValueError, match="100 subsets of 1 feature vectors"):
    kid(A[:1], B)
  with pytest.raises(ValueError, match="neighbour 3 of 120 real and 3 generated"):
    precision_recall(A, B[:3])
  with pytest.raises(ValueError, match="blocks of 0"):
    precision_recall(A, B, block=0)
