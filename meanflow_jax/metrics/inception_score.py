"""The inception score (arXiv 1606.03498), from a stream of logits; float64 on the host."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from meanflow_jax.metrics.feature_sets import Estimate

Sums = Float[np.ndarray, "S K"]


@dataclasses.dataclass(frozen=True)
class SplitScores:
  """What the score needs of the images of each of S consecutive splits: sums over them.

  Attributes:
    count: images in all; the first count mod S splits have one image more, as `np.array_split`.
    images: seen so far, in each split.
    p: sums of the probabilities of K classes.
    p_log_p: sums of p log p.
  """

  count: int
  images: Int[np.ndarray, "S"]
  p: Sums
  p_log_p: Sums

  @classmethod
  def empty(cls, count: int, classes: int, splits: int = 10) -> "SplitScores":
    """Before the first of `count` images.

    Raises:
      ValueError: if there are fewer images than splits.
    """
    if not 1 <= splits <= count:
      raise ValueError(f"an inception score in {splits} splits of {count} images")
    sums = np.zeros((splits, classes))
    return cls(count, np.zeros(splits, np.int64), sums, sums)

  def plus(self, index: Int[np.ndarray, "n"], logits: Float[np.ndarray, "n K"]) -> "SplitScores":
    """With some images more, given their numbers in [0, count).

    The logarithms of probabilities serve as logits too.

    Raises:
      ValueError: if a logit is not finite.
    """
    bad = np.count_nonzero(~np.isfinite(logits).all(axis=1))
    if bad:
      raise ValueError(f"{bad} of {len(logits)} logits are not finite")
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    split = self._split_of(index)
    return self + dataclasses.replace(
      self,
      images=np.bincount(split, minlength=len(self.images)),
      p=self._sums(split, p),
      p_log_p=self._sums(split, p * log_p),
    )

  def __add__(self, other: "SplitScores") -> "SplitScores":
    """The sums over both streams, of images of the same set."""
    return SplitScores(
      self.count, self.images + other.images, self.p + other.p, self.p_log_p + other.p_log_p
    )

  def score(self) -> Estimate:
    """exp E KL(p(y|x) || p(y)): its mean and deviation over the splits."""
    marginal = self.p / self.images[:, None]
    log_marginal = np.log(np.where(marginal > 0, marginal, 1))  # what never occurs weighs nothing
    divergence = (self.p_log_p - self.p * log_marginal).sum(axis=1) / self.images
    return Estimate.of(list(np.exp(divergence)))

  def _split_of(self, index: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    size, longer = divmod(self.count, len(self.images))
    sizes = size + (np.arange(len(self.images)) < longer)
    return np.searchsorted(np.cumsum(sizes), index, side="right")

  def _sums(self, split: Int[np.ndarray, "n"], values: Float[np.ndarray, "n K"]) -> Sums:
    belongs = np.arange(len(self.images))[:, None] == split[None]
    return belongs.astype(np.float64) @ values
