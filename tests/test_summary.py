"""Summaries of images add up to the same in any order, and give the figures of the whole set."""

import numpy as np
import pytest

from meanflow_jax.metrics.feature_sets import kid, precision_recall
from meanflow_jax.metrics.inception_score import SplitScores
from meanflow_jax.metrics.moments import Moments, frechet_distance
from meanflow_jax.metrics.summary import FEATURES, FIGURES, LOGITS, SPATIAL, Summary, compare

COUNT = 61
RNG = np.random.default_rng(0)


def outputs(shift: float = 0.0) -> dict[str, np.ndarray]:
  sizes = {FEATURES: 5, SPATIAL: 7, LOGITS: 4}
  return {k: (RNG.normal(size=(COUNT, n)) + shift).astype(np.float32) for k, n in sizes.items()}


GENERATED, REAL = outputs(0.5), outputs()


def summary(of: dict[str, np.ndarray], parts: list[np.ndarray] | None = None) -> Summary:
  """Of all images, from parts of them by number."""
  index = parts or [np.arange(COUNT)]
  made = [Summary.of(COUNT, i, {k: v[i] for k, v in of.items()}, keep=True) for i in index]
  total = made[0]
  for part in made[1:]:
    total = total + part
  return total


def figures(generated: Summary, real: Summary) -> dict[str, float]:
  return {k: v for name in FIGURES for k, v in compare(name, generated, real).items()}


def test_figures_are_those_of_the_whole_sets():
  found = figures(summary(GENERATED), summary(REAL))
  distance = lambda key: frechet_distance(Moments.of(GENERATED[key]), Moments.of(REAL[key]))
  logits = GENERATED[LOGITS]
  scores = SplitScores.empty(COUNT, 4).plus(np.arange(COUNT), logits).score()
  distances = kid(GENERATED[FEATURES], REAL[FEATURES])
  both = precision_recall(REAL[FEATURES], GENERATED[FEATURES])
  assert found == {
    "frechet": distance(FEATURES),
    "sfid": distance(SPATIAL),
    "inception_score": scores.mean,
    "inception_score_std": scores.std,
    "kid": distances.mean,
    "kid_std": distances.std,
    "precision": both.precision,
    "recall": both.recall,
  }
  assert found.keys() == {name for names in FIGURES.values() for name in names}
  assert 0 < both.precision < 1
  assert both.precision != both.recall


@pytest.mark.parametrize("parts", [2, 7, COUNT])
def test_batches_and_hosts_in_any_order_make_no_difference(parts):
  whole = figures(summary(GENERATED), summary(REAL))
  shuffled = np.array_split(RNG.permutation(COUNT), parts)
  found = figures(summary(GENERATED, shuffled), summary(REAL, shuffled[::-1]))
  assert found == pytest.approx(whole, rel=1e-10)


def test_a_host_without_images_adds_nothing():
  nothing = Summary.of(COUNT, np.arange(0), {k: v[:0] for k, v in GENERATED.items()}, keep=True)
  real = summary(REAL)
  assert figures(nothing + summary(GENERATED), real) == figures(summary(GENERATED), real)


def test_arrays_hold_all_of_it():
  total = summary(GENERATED, np.array_split(np.arange(COUNT), 3))
  again = Summary.from_arrays(total.to_arrays())
  assert figures(again, summary(REAL)) == figures(total, summary(REAL))
  assert (again + Summary.from_arrays(again.to_arrays())).moments[FEATURES].count == 2 * COUNT
  only = Summary.of(COUNT, np.arange(COUNT), {FEATURES: REAL[FEATURES]}, keep=False)
  again = Summary.from_arrays(only.to_arrays())
  assert (again.moments.keys(), again.scores, again.kept) == ({FEATURES}, None, ())


def test_memory_is_that_of_sums_unless_features_are_kept():
  index = np.arange(COUNT)
  sizes = {
    keep: sum(a.nbytes for a in Summary.of(COUNT, index, REAL, keep=keep).to_arrays().values())
    for keep in (False, True)
  }
  assert sizes[True] - sizes[False] == REAL[FEATURES].nbytes + index.nbytes


def test_figures_of_what_is_not_there_are_refused():
  bare = Summary.of(COUNT, np.arange(COUNT), {FEATURES: REAL[FEATURES]}, keep=False)
  for figure, message in {
    "sfid": "spatial features of both",
    "inception_score": "takes logits",
    "kid": "were not kept",
    "precision_recall": "were not kept",
  }.items():
    with pytest.raises(ValueError, match=message):
      compare(figure, bare, bare)
  with pytest.raises(ValueError, match="frechet compares with real images"):
    compare("frechet", bare, None)
