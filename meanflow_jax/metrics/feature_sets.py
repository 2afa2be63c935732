"""Figures of merit that take the features of single images; float64 on the host.

Unlike moments, these cannot be streamed: all features are kept, which for 50,000 images of 2048
float32 numbers are 0.4 GB a set. What is computed from them comes in blocks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

# Squared distances below this part of the squared norms are rounding: the vectors are equal.
ROUNDING = 1e-13

FeatureSet = Float[np.ndarray, "N F"]
OtherSet = Float[np.ndarray, "M G"]  # G = F, which is checked


class Estimate(NamedTuple):
  """A figure and how it spreads over splits or subsets (the standard deviation)."""

  mean: float
  std: float

  @classmethod
  def of(cls, values: list[float]) -> "Estimate":
    """The mean and spread of some values."""
    return cls(float(np.mean(values)), float(np.std(values)))


class PrecisionRecall(NamedTuple):
  """Which part of the generated images looks real, and of the real ones could be generated."""

  precision: float
  recall: float


def kid(
  a: FeatureSet, b: OtherSet, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
  """The kernel inception distance over random subsets (arXiv 1801.01401, section 4).

  It is the unbiased estimate of the squared maximum mean discrepancy under the kernel
  (x . y / F + 1)^3, so it may be negative. Subsets are drawn without replacement, from as many
  vectors as the smaller set has if these are fewer than `subset_size`.

  Raises:
    ValueError: if the features differ in size, are fewer than two or not finite, or there are no
      subsets.
  """
  _check_pair(a, b)
  size = min(subset_size, len(a), len(b))
  if size < 2 or subsets < 1:
    raise ValueError(f"a kernel distance over {subsets} subsets of {size} feature vectors")
  rng = np.random.default_rng(seed)
  draw = lambda features: features[rng.choice(len(features), size, replace=False)]
  return Estimate.of([_squared_discrepancy(draw(a), draw(b)) for _ in range(subsets)])


def _squared_discrepancy(a: FeatureSet, b: FeatureSet) -> float:
  """Unbiased, of sets of equal size: no vector is paired with itself."""
  a, b = a.astype(np.float64), b.astype(np.float64)
  size, width = a.shape
  kernel = lambda x, y: (x @ y.T / width + 1) ** 3
  off_diagonal = lambda k: (k.sum() - np.trace(k)) / (size * (size - 1))
  within = off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b))
  return float(within - 2 * kernel(a, b).mean())


def precision_recall(
  real: FeatureSet, generated: OtherSet, *, k: int = 3, block: int = 1000
) -> PrecisionRecall:
  """Improved precision and recall (arXiv 1904.06991, eq. 1 and 2).

  A vector is within a set's manifold if it lies no further from one of its vectors than the k-th
  nearest other vector of that set does. Beside both sets in double precision, `block` rows of
  distances are in memory; the time is that of all pairs.

  Raises:
    ValueError: if the features differ in size or are not finite, or a set has no k neighbours.
  """
  _check_pair(real, generated)
  if not 1 <= k < min(len(real), len(generated)):
    raise ValueError(
      f"neighbour {k} of {len(real)} real and {len(generated)} generated feature vectors"
    )
  if block < 1:
    raise ValueError(f"blocks of {block} feature vectors")
  centre = real.mean(axis=0, dtype=np.float64)[None]  # smaller norms lose fewer digits
  real, generated = real - centre, generated - centre
  return PrecisionRecall(
    precision=float(np.mean(_within(generated, real, k, block))),
    recall=float(np.mean(_within(real, generated, k, block))),
  )


def _within(points: OtherSet, manifold: FeatureSet, k: int, block: int) -> Bool[np.ndarray, "M"]:
  """Which points lie within a manifold."""
  radii = np.concatenate(
    [
      np.partition(distances, k, axis=1)[:, k]  # number 0 is the vector itself
      for distances in _squared_distances(manifold, manifold, block)
    ]
  )
  blocks = _squared_distances(points, manifold, block)
  return np.concatenate([(distances <= radii[None]).any(axis=1) for distances in blocks])


def _squared_distances(
  a: OtherSet, b: FeatureSet, block: int
) -> Iterator[Float[np.ndarray, "R N"]]:
  """The squared distances of some rows of `a` after the other to all of `b`."""
  norms = np.einsum("nf,nf->n", b, b)[None]
  for start in range(0, len(a), block):
    rows = a[start : start + block]
    scale = np.einsum("nf,nf->n", rows, rows)[:, None] + norms
    distances = scale - 2 * (rows @ b.T)
    yield np.where(distances > ROUNDING * scale, distances, 0)


def _check_pair(a: FeatureSet, b: OtherSet) -> None:
  if a.shape[1] != b.shape[1]:
    raise ValueError(f"features of {a.shape[1]} and of {b.shape[1]} numbers cannot be compared")
  for features in (a, b):
    _check_finite("feature vectors", features)


def _check_finite(what: str, rows: FeatureSet) -> None:
  bad = np.count_nonzero(~np.isfinite(rows).all(axis=1))
  if bad:
    raise ValueError(f"{bad} of {len(rows)} {what} are not finite")
