"""Holds the project against golden files: python tests/golden_check.py PATH...

A path is a golden file (.npz), or a folder of the reference's checkpoints, which is held against a
golden file with its parameters: of the files given (FOLDER GOLDEN.npz) and those beside the folder,
the one that comes nearest.

Prints one line per compared quantity with its largest error, relative to the largest magnitude of
the array, and exits with status 1 if one is beyond tolerance.
"""

import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import absl.logging
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tests import (
  golden_autoencoder,
  golden_checkpoint,
  golden_dinov2,
  golden_imeanflow,
  golden_inception,
  golden_meanflow,
  golden_sit,
  golden_unet,
)

KINDS = (
  golden_meanflow,
  golden_imeanflow,
  golden_autoencoder,
  golden_dinov2,
  golden_inception,
  golden_sit,
  golden_unet,
)
Comparison = tuple[str, np.ndarray, np.ndarray]


def main(paths: list[str]) -> int:
  if not paths:
    print(__doc__)
    return 2
  given = [pathlib.Path(path) for path in paths]
  files = [path for path in given if path.suffix == ".npz"]
  # All of them, even after a failure.
  results = [check_folder(path, files) if path.is_dir() else check(path) for path in given]
  return int(not all(results))


def check(path: pathlib.Path) -> bool:
  """Prints the comparison of one file; whether all of it is within tolerance."""
  golden, meta = load(path)
  kind = next((kind for kind in KINDS if kind.recognises(golden, meta)), None)
  if kind is None:
    print(f"FAIL            {path.name}  is of unknown kind, with the arrays {sorted(golden)}")
    return False
  return within(kind.TOLERANCE, path.name, kind.check(golden, meta))


def check_folder(folder: pathlib.Path, files: Iterable[pathlib.Path] = ()) -> bool:
  """The same of a folder of checkpoints, held against one of these files or of those beside it."""
  beside = sorted(folder.resolve().parent.glob("*.npz"))
  goldens = ((path.name, *load(path)) for path in (*files, *beside))
  try:
    name, comparisons = golden_checkpoint.check(folder, goldens)
  except golden_checkpoint.UnknownKindError as error:
    print(f"FAIL            {folder.name}  is of unknown kind: {error}")
    return False
  return within(golden_checkpoint.TOLERANCE, f"{folder.name} ({name})", comparisons)


def within(tolerance: float, label: str, comparisons: Iterable[Comparison]) -> bool:
  good = True
  for name, ours, reference in comparisons:
    error = relative_error(ours, reference)
    passed = error <= tolerance  # False for NaN
    good &= passed
    print(f"{'ok  ' if passed else 'FAIL'} {error:9.2e}  {label}  {name}")
  return good


def load(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  with np.load(path) as file:
    golden = dict(file)
  return golden, json.loads(str(golden.pop("meta")))


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
  """The largest error relative to the reference's largest magnitude."""
  if ours.shape != reference.shape:
    raise ValueError(f"shapes differ: ours {ours.shape}, reference {reference.shape}")
  error = np.max(np.abs(np.asarray(ours, np.float64) - reference))
  return float(error / max(np.max(np.abs(reference)), np.finfo(np.float32).tiny))


if __name__ == "__main__":
  absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax tells every file it touches
  sys.exit(main(sys.argv[1:]))
