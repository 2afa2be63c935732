"""Holds the project against golden files: python tests/golden_check.py FILE...

Prints one line per compared quantity with its largest error, relative to the largest magnitude of
the array, and exits with status 1 if one is beyond tolerance.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from tests import golden_autoencoder, golden_dinov2, golden_inception, golden_meanflow

KINDS = (golden_meanflow, golden_autoencoder, golden_dinov2, golden_inception)


def main(paths: list[str]) -> int:
  if not paths:
    print(__doc__)
    return 2
  results = [check(pathlib.Path(path)) for path in paths]  # all of them, even after a failure
  return int(not all(results))


def check(path: pathlib.Path) -> bool:
  """Prints the comparison of one file; whether all of it is within tolerance."""
  golden, meta = load(path)
  kind = next((kind for kind in KINDS if kind.recognises(golden, meta)), None)
  if kind is None:
    print(f"FAIL            {path.name}  is of unknown kind, with the arrays {sorted(golden)}")
    return False
  good = True
  for name, ours, reference in kind.check(golden, meta):
    error = relative_error(ours, reference)
    passed = error <= kind.TOLERANCE  # False for NaN
    good &= passed
    print(f"{'ok  ' if passed else 'FAIL'} {error:9.2e}  {path.name}  {name}")
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
  sys.exit(main(sys.argv[1:]))
