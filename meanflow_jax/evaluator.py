"""From parameters to figures: what is generated, extracted and compared for a row of a table."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxtyping import PyTree

from meanflow_jax.features import Extractor, figure_name
from meanflow_jax.generate import Generator
from meanflow_jax.metrics.summary import FEATURES, FIGURES, KEEPING, Summary, compare
from meanflow_jax.runtime.reference_statistics import Statistics
from meanflow_jax.stream import GeneratedImages, Resumable, Summaries
from meanflow_jax.train_step import item_name

Figures = dict[str, float]

_log = logging.getLogger(__name__)

# Figures of what other extractors do not give.
INCEPTION_ONLY = {"sfid", "inception_score"}


@dataclasses.dataclass(frozen=True)
class Setting:
  """How the images of one row of the table are made.

  Attributes:
    nfe: steps of the time grid.
    ema: which average of the parameters; 0 are the parameters themselves.
    omega: scale of the guidance when sampling.
    t_min, t_max: where in t it is on.
  """

  nfe: int
  ema: float
  omega: float
  t_min: float
  t_max: float

  @property
  def sampling(self) -> "Setting":
    """The same without its parameters."""
    return dataclasses.replace(self, ema=0.0)


@dataclasses.dataclass(frozen=True)
class Reference:
  """The real images, as statistics on disk or as a source to make them from.

  Attributes:
    stored: by extractor.
    make: the statistics of the others, when first asked for; None where there are no images.
  """

  stored: dict[str, Statistics]
  make: Callable[[], dict[str, Statistics]] | None

  @functools.cached_property
  def statistics(self) -> dict[str, Statistics]:
    """By extractor."""
    return self.stored | (self.make() if self.make else {})


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Which figures are computed, of which features.

  Attributes:
    extractors: of the features.
    figures: some of `FIGURES`.
    reference: the real images; None where no figure needs them.
  """

  extractors: tuple[Extractor, ...]
  figures: tuple[str, ...]
  reference: Reference | None

  @property
  def keep(self) -> bool:
    """Whether features of single images are needed: then memory grows with their number."""
    return bool(KEEPING & set(self.figures))

  @property
  def names(self) -> list[str]:
    """The names of all numbers that there will be."""
    return [
      figure_name(name, extractor)
      for extractor, figure in self._pairs()
      for name in FIGURES[figure]
    ]

  def __call__(self, summaries: Summaries) -> Figures:
    """The figures of some images, by name."""
    found: Figures = {}
    for extractor in self.extractors:
      if self.reference:
        _warn_of_few(extractor.name, summaries[extractor.name])
    for extractor, figure in self._pairs():
      values = compare(figure, summaries[extractor], self._real(extractor))
      found |= {figure_name(name, extractor): value for name, value in values.items()}
    return found

  def record(self) -> dict[str, Any]:
    """The conventions, and what the figures compare with."""
    record: dict[str, Any] = {"conventions": {e.name: e.convention for e in self.extractors}}
    if self.reference:
      record["references"] = {k: v.record() for k, v in self.reference.statistics.items()}
    return record

  def _pairs(self) -> list[tuple[str, str]]:
    """Extractors and the figures that their features allow."""
    return [
      (extractor.name, figure)
      for extractor in self.extractors
      for figure in self.figures
      if extractor.name == "inception" or figure not in INCEPTION_ONLY
    ]

  def _real(self, extractor: str) -> Summary | None:
    return self.reference.statistics[extractor].summary if self.reference else None


def _warn_of_few(extractor: str, summary: Summary) -> None:
  moments = summary.moments[FEATURES]
  if moments.count <= moments.mean.size:
    _log.warning(
      "%d images for %d %s features: their covariance is singular. The Frechet distance comes out "
      "too large, by the more the fewer the images: compare it with figures of as many images only",
      moments.count,
      moments.mean.size,
      extractor,
    )


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Compares what some parameters generate with real images.

  Attributes:
    generators: of the images, one for each row of the table.
    comparison: the figures.
    count: images for each row.
  """

  generators: dict[Setting, Generator]
  comparison: Comparison
  count: int

  @property
  def items(self) -> set[str]:
    """Which parameters it takes, by their names in a checkpoint."""
    return {item_name(setting.ema) for setting in self.generators}

  def __call__(
    self,
    items: Mapping[str, PyTree],
    resumable: Callable[[Setting], Resumable] = lambda _: Resumable(None),
    check: Callable[[], None] = lambda: None,
  ) -> dict[Setting, Figures]:
    """The figures of some parameters, for each row of the table.

    Args:
      items: at least the parameters `items`.
      resumable: where the sums of a row are kept meanwhile.
      check: called after each batch; what it raises ends the evaluation.
    """
    return {
      setting: self.comparison(
        images.summaries(
          items[item_name(setting.ema)],
          self.count,
          keep=self.comparison.keep,
          resumable=resumable(setting),
          check=check,
          title=", ".join(f"{key} {value:g}" for key, value in vars(setting).items()),
        )
      )
      for setting, images in self._images.items()
    }

  @functools.cached_property
  def _images(self) -> dict[Setting, GeneratedImages]:
    """Settings that differ in the parameters alone share what is compiled."""
    made = {
      setting.sampling: GeneratedImages(generator, self.comparison.extractors)
      for setting, generator in self.generators.items()
    }
    return {setting: made[setting.sampling] for setting in self.generators}

  @property
  def names(self) -> list[str]:
    """The names of all numbers that there will be, as `tagged` gives them."""
    return list(
      self.tagged(dict.fromkeys(self.generators, dict.fromkeys(self.comparison.names, 0.0)))
    )

  def tagged(self, figures: Mapping[Setting, Figures]) -> Figures:
    """One number per name: with the setting, as far as it varies, after the figure's name."""
    return {
      f"{name}_{self._tag(setting)}": value
      for setting, row in figures.items()
      for name, value in row.items()
    }

  def _tag(self, setting: Setting) -> str:
    varies = varying(map(vars, self.generators)) - {"nfe"}
    keys = ("nfe", *(key for key in vars(setting) if key in varies))
    return "_".join(f"{key}{vars(setting)[key]:g}" for key in keys)


def varying(rows: Iterable[Mapping[str, Any]]) -> set[str]:
  """The fields of a setting that are not the same in all rows."""
  rows, names = list(rows), [field.name for field in dataclasses.fields(Setting)]
  return {name for name in names if len({row.get(name) for row in rows}) > 1}
