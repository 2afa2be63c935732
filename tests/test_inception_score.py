"""The inception score where it is known, from one batch or from many."""

import numpy as np
import pytest
import scipy.special
import scipy.stats

from meanflow_jax.metrics.feature_sets import Estimate
from meanflow_jax.metrics.inception_score import SplitScores

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(200, 12)) * 3


def sums(logits: np.ndarray, splits: int = 10, batches: tuple[int, ...] = ()) -> SplitScores:
  """Of all logits; in batches that end before the given numbers."""
  total = SplitScores.empty(len(logits), logits.shape[1], splits)
  for index in np.split(np.arange(len(logits)), batches):
    total = total.plus(index, logits[index])
  return total


def inception_score(logits: np.ndarray, splits: int = 10) -> Estimate:
  return sums(logits, splits).score()


@pytest.mark.parametrize("splits", [1, 2, 10])
def test_images_that_all_look_the_same_score_one(splits):
  row = RNG.normal(size=(1, 12))
  for logits in (np.zeros((40, 12)), np.repeat(row, 40, axis=0)):
    assert inception_score(logits, splits) == pytest.approx((1, 0), abs=1e-12)


def test_sure_and_evenly_spread_predictions_score_the_number_of_classes():
  """Also where certainty is complete, so that the other classes have probability 0."""
  logits = np.tile(np.eye(12), (10, 1))
  assert inception_score(logits * 1e4, 10) == pytest.approx((12, 0), rel=1e-12)
  scores = [inception_score(logits * sureness, 1).mean for sureness in (0, 1, 5, 50)]
  assert scores == sorted(scores)
  assert scores[0] == pytest.approx(1)
  assert scores[-1] == pytest.approx(12)


def test_classes_that_never_occur_do_not_count():
  logits = np.full((40, 12), -1e5)
  logits[:20, 3] = logits[20:, 7] = 0
  assert inception_score(logits, 1).mean == pytest.approx(2)
  assert inception_score(logits, 2) == pytest.approx((1, 0))  # each of the splits knows one class


def test_the_score_agrees_with_its_definition():
  scores = []
  for part in np.split(LOGITS, 10):
    p = scipy.special.softmax(part, axis=1)
    marginal = np.broadcast_to(p.mean(axis=0), p.shape)
    scores.append(np.exp(scipy.stats.entropy(p, marginal, axis=1).mean()))
  assert inception_score(LOGITS) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_the_score_takes_logits_up_to_a_constant_and_log_probabilities():
  expected = pytest.approx(inception_score(LOGITS), rel=1e-10)
  assert inception_score(LOGITS + 1e3 * RNG.normal(size=(200, 1))) == expected
  assert inception_score(scipy.special.log_softmax(LOGITS, axis=1)) == expected


def test_single_precision_logits_are_scored_in_double():
  logits = LOGITS.astype(np.float32)
  assert inception_score(logits) == inception_score(logits.astype(np.float64))


def test_batches_and_hosts_make_no_difference():
  whole = sums(LOGITS[:197], 10).score()
  assert sums(LOGITS[:197], 10, (1, 50, 51, 160)).score() == pytest.approx(whole, rel=1e-12)
  order = RNG.permutation(197)
  empty = SplitScores.empty(197, 12)
  hosts = [empty.plus(part, LOGITS[part]) for part in np.array_split(order, 3)]
  assert (hosts[2] + hosts[0] + hosts[1]).score() == pytest.approx(whole, rel=1e-12)


def test_what_cannot_be_scored_is_refused():
  with pytest.raises(ValueError, match="10 splits of 9 images"):
    SplitScores.empty(9, 12)
  broken = LOGITS.copy()
  broken[3, 1], broken[5] = np.nan, np.inf
  with pytest.raises(ValueError, match="2 of 200 logits are not finite"):
    sums(broken)
