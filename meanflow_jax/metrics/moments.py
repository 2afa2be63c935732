"""Figures of merit from features of generated and real images; float64 on the host."""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Moments:
  """Mean and covariance of a stream of feature vectors of F numbers.

  Attributes:
    count: vectors seen.
    mean: their mean.
    scatter: sum of the outer products of their deviations from it.
  """

  count: int
  mean: Float[np.ndarray, "F"]
  scatter: Float[np.ndarray, "F F"]

  @classmethod
  def of(cls, features: Float[np.ndarray, "N F"]) -> "Moments":
    """The moments of some vectors.

    Raises:
      ValueError: if one is not finite.
    """
    features = np.asarray(features, np.float64)
    if not len(features):
      return cls(0, np.zeros(features.shape[1]), np.zeros(2 * features.shape[1:]))
    bad = np.count_nonzero(~np.isfinite(features).all(axis=1))
    if bad:
      raise ValueError(f"{bad} of {len(features)} feature vectors are not finite")
    mean = features.mean(axis=0)
    centred = features - mean
    return cls(len(features), mean, centred.T @ centred)

  def __add__(self, other: "Moments") -> "Moments":
    """The moments of both streams together (Chan et al. 1979)."""
    count = self.count + other.count
    if not count:
      return self
    shift = other.mean - self.mean
    scatter = self.scatter + other.scatter
    scatter += np.outer(shift, shift) * (self.count * other.count / count)
    return Moments(count, self.mean + shift * (other.count / count), scatter)

  @property
  def covariance(self) -> Float[np.ndarray, "F F"]:
    """The unbiased covariance.

    Raises:
      ValueError: if fewer than two vectors were seen.
    """
    if self.count < 2:
      raise ValueError(f"a covariance takes at least 2 feature vectors, got {self.count}")
    return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
  """The squared Frechet distance of two Gaussians (arXiv 1706.08500, eq. 6).

  The trace of (A B)^(1/2) is taken from the symmetric matrix A^(1/2) B A^(1/2), whose eigenvalues
  are real and, up to rounding, not negative: covariances may be singular.

  Raises:
    ValueError: if the features differ in size.
  """
  if a.mean.shape != b.mean.shape:
    raise ValueError(f"features of {a.mean.size} and of {b.mean.size} numbers cannot be compared")
  values, vectors = np.linalg.eigh(a.covariance)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  product = np.linalg.eigvalsh(root @ b.covariance @ root)
  trace = np.trace(a.covariance) + np.trace(b.covariance)
  cross = 2 * np.sum(np.sqrt(np.maximum(product, 0)))
  return float(np.sum((a.mean - b.mean) ** 2) + trace - cross)
