"""What remains of a set of images: all that any figure of merit is computed from."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from meanflow_jax.metrics.feature_sets import Estimate, kid, precision_recall
from meanflow_jax.metrics.inception_score import SplitScores
from meanflow_jax.metrics.moments import Moments, frechet_distance

# Outputs of feature extractors, each [n, F]. All give features.
FEATURES, SPATIAL, LOGITS = "features", "spatial", "logits"

# Figures of merit, and the numbers that each is.
FIGURES = {
  "frechet": ("frechet",),
  "sfid": ("sfid",),
  "inception_score": ("inception_score", "inception_score_std"),
  "kid": ("kid", "kid_std"),
  "precision_recall": ("precision", "recall"),
}
# How the numbers begin that are better if higher; the others are distances.
HIGHER_IS_BETTER = ("inception_score", "precision", "recall")
# Figures that need the features themselves, of both sets: memory grows with the images.
KEEPING = {"kid", "precision_recall"}

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Summary:
  """Sums over the images seen so far.

  Attributes:
    count: images that there are to be, in all.
    moments: of the features, and of the spatial features where there are some.
    scores: for the inception score, where there are logits.
    index: numbers of the images whose features are kept, [k] each time.
    kept: their features, [k, F] each time; none but for the figures `KEEPING`.
  """

  count: int
  moments: dict[str, Moments]
  scores: SplitScores | None
  index: tuple[np.ndarray, ...]
  kept: tuple[np.ndarray, ...]

  @classmethod
  def of(
    cls, count: int, index: Int[np.ndarray, "n"], outputs: Mapping[str, np.ndarray], *, keep: bool
  ) -> "Summary":
    """Of some of `count` images, by number, from what an extractor makes of them.

    Raises:
      ValueError: if a feature is not finite, or there are fewer images than splits of the score.
    """
    scores = None
    if LOGITS in outputs:
      logits = outputs[LOGITS]
      scores = SplitScores.empty(count, logits.shape[1]).plus(index, logits)
    moments = {name: Moments.of(outputs[name]) for name in (FEATURES, SPATIAL) if name in outputs}
    kept = ((index,), (outputs[FEATURES],)) if keep else ((), ())
    return cls(count, moments, scores, *kept)

  def __add__(self, other: "Summary") -> "Summary":
    """Of the images of both, which have none in common."""
    scores = self.scores
    if scores is not None and other.scores is not None:
      scores = scores + other.scores
    return Summary(
      self.count,
      {name: moments + other.moments[name] for name, moments in self.moments.items()},
      scores,
      self.index + other.index,
      self.kept + other.kept,
    )

  def to_arrays(self) -> Arrays:
    """As arrays, from which `from_arrays` makes it again."""
    arrays = {"count": np.asarray(self.count)}
    if self.kept:
      arrays |= {"index": np.concatenate(self.index), "kept": np.concatenate(self.kept)}
    parts = {**self.moments, **({LOGITS: self.scores} if self.scores else {})}
    for part, sums in parts.items():
      arrays |= {f"{part}/{field}": np.asarray(value) for field, value in vars(sums).items()}
    return arrays

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Summary":
    """Undoes `to_arrays`."""

    def fields(part: str) -> dict[str, np.ndarray | int]:
      stored = {
        k.removeprefix(f"{part}/"): v for k, v in arrays.items() if k.startswith(f"{part}/")
      }
      return stored and {**stored, "count": int(stored["count"])}

    moments = {name: fields(name) for name in (FEATURES, SPATIAL)}
    scores = fields(LOGITS)
    return cls(
      int(arrays["count"]),
      {name: Moments(**stored) for name, stored in moments.items() if stored},
      SplitScores(**scores) if scores else None,
      *(((arrays["index"],), (arrays["kept"],)) if "kept" in arrays else ((), ())),
    )

  def ordered(self) -> Float[np.ndarray, "k F"]:
    """The kept features in the order of the images.

    Raises:
      ValueError: if none were kept.
    """
    if not self.kept:
      raise ValueError("the features of single images were not kept")
    return np.concatenate(self.kept)[np.argsort(np.concatenate(self.index))]


def compare(figure: str, generated: Summary, real: Summary | None) -> dict[str, float]:
  """One of the `FIGURES`, as one or two numbers by name; the inception score has no `real`.

  Raises:
    ValueError: if a summary lacks what the figure is computed from.
  """
  if figure == "inception_score":
    if generated.scores is None:
      raise ValueError("an inception score takes logits, which these features have not")
    return _estimate("inception_score", generated.scores.score())
  if real is None:
    raise ValueError(f"{figure} compares with real images, of which there are none")
  if figure in KEEPING:
    ours, theirs = generated.ordered(), real.ordered()
    if figure == "kid":
      return _estimate("kid", kid(ours, theirs))
    return precision_recall(theirs, ours)._asdict()
  name = SPATIAL if figure == "sfid" else FEATURES
  if name not in generated.moments or name not in real.moments:
    raise ValueError(f"{figure} takes {name} features of both sets of images")
  return {figure: frechet_distance(generated.moments[name], real.moments[name])}


def _estimate(name: str, estimate: Estimate) -> dict[str, float]:
  return {name: estimate.mean, f"{name}_std": estimate.std}
