"""Statistics of real images on disk, and what must agree before a figure is computed from them.

A file is an `.npz` without pickle: `mu` and `sigma` of the features, `mu_s` and `sigma_s` of the
spatial ones, `features` where single images are needed, and `record`, JSON text that says what
they are of. Published files have the arrays alone (`mu`, `sigma`, or `ref_mu`, `ref_sigma`).
"""

import dataclasses
import json
import os
import pathlib
import zipfile
from typing import Any

import numpy as np

from meanflow_jax.metrics.moments import Moments
from meanflow_jax.metrics.summary import FEATURES, SPATIAL, Summary

UNSTATED = "unstated"
HELP = (
  "statistics of real images are made by python -m meanflow_jax.prepare --statistics, or published "
  "beside the figures that are to be compared with"
)
NAMES = {
  FEATURES: (("mu", "sigma"), ("ref_mu", "ref_sigma")),
  SPATIAL: (("mu_s", "sigma_s"),),
}


@dataclasses.dataclass(frozen=True)
class Statistics:
  """What figures compare with.

  Attributes:
    summary: of the real images.
    convention: of the features (`features.Extractor`), or "unstated".
    resolution: height, width and channels of the images; None where unstated.
    count: of the images; None where unstated.
    fingerprint: of their pixels (`fingerprint`); "unstated" in published files.
  """

  summary: Summary
  convention: str
  resolution: tuple[int, ...] | None
  count: int | None
  fingerprint: str

  def record(self) -> dict[str, Any]:
    """All but the numbers, for JSON."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "summary"}


def fingerprint(digests: int) -> str:
  """Of a set of images, from the sum of their digests: their order does not matter."""
  return f"{digests % 2**64:016x}"


def write(path: pathlib.Path, statistics: Statistics) -> None:
  """Writes statistics whole or not at all.

  Raises:
    FileExistsError: if there is such a file.
  """
  if path.exists():
    raise FileExistsError(f"{path} exists; it is left as it is: choose another name")
  summary = statistics.summary
  arrays = {"record": np.asarray(json.dumps(statistics.record()))}
  for name, moments in summary.moments.items():
    mean, covariance = NAMES[name][0]
    arrays |= {mean: moments.mean, covariance: moments.covariance}
  if summary.kept:
    arrays["features"] = summary.ordered()
  partial = path.with_name(f".{path.name}.partial")
  with open(partial, "wb") as file:
    np.savez(file, **arrays)
  os.replace(partial, path)


def read(path: pathlib.Path, *, convention: str, resolution: tuple[int, ...]) -> Statistics:
  """Reads statistics, for figures of images of a resolution under a convention.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it holds no statistics, or those of another convention, extractor or resolution.
  """
  arrays = _arrays(path)
  moments = {name: found for name in NAMES if (found := _moments(path, name, arrays)) is not None}
  if FEATURES not in moments:
    raise ValueError(f"{path} holds no statistics (mu and sigma), only {sorted(arrays)}")
  stated = json.loads(str(arrays["record"])) if "record" in arrays else {}
  _check(path, "convention", stated, convention)
  _check(path, "resolution", stated, list(resolution))
  count = stated.get("count")
  kept = (np.arange(len(arrays["features"])), arrays["features"]) if "features" in arrays else None
  return Statistics(
    Summary(count or 0, moments, None, *(((kept[0],), (kept[1],)) if kept else ((), ()))),
    convention=stated.get("convention", UNSTATED),
    resolution=resolution if stated else None,
    count=count,
    fingerprint=stated.get("fingerprint", UNSTATED),
  )


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All arrays of a file but images."""
  try:
    if not path.is_file():
      raise FileNotFoundError(f"{path} does not exist: {HELP}")
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
      return {name: stored[name] for name in stored.files if not name.startswith("arr_")}
  except (ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
    raise ValueError(f"{path} is not an .npz file of plain arrays: {error}") from error


def _moments(path: pathlib.Path, name: str, arrays: Any) -> Moments | None:
  for mean_name, covariance_name in NAMES[name]:
    if mean_name in arrays and covariance_name in arrays:
      mean, covariance = np.float64(arrays[mean_name]), np.float64(arrays[covariance_name])
      if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(
          f"{path}: {mean_name} is {mean.shape} and {covariance_name} {covariance.shape}"
        )
      if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: {mean_name} or {covariance_name} is not finite")
      return Moments(2, mean, covariance)  # of 2 images: then the scatter is the covariance
  return None


def _check(path: pathlib.Path, what: str, stated: dict[str, Any], ours: Any) -> None:
  if stated and stated[what] != ours:
    raise ValueError(
      f"{path} is of another {what}: {stated[what]!r}, while these figures are of {ours!r}. Make "
      "statistics with the same settings: python -m meanflow_jax.prepare --statistics"
    )
