"""Checkpoint folders of the references, with a golden file that has their parameters."""

import pathlib
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np

from meanflow_jax.runtime.weights import Weights, read_meanflow
from tests import golden_imeanflow, golden_meanflow
from tests.golden_meanflow import Comparison, Golden

KINDS = (golden_meanflow, golden_imeanflow)
TOLERANCE = 2e-5


class UnknownKindError(Exception):
  """A folder without a checkpoint, or one that no golden file here belongs to."""


def check(
  folder: pathlib.Path, goldens: Iterable[tuple[str, Golden, dict[str, Any]]]
) -> tuple[str, Iterator[Comparison]]:
  """The name of the golden file whose parameters come nearest, and how it compares.

  Raises:
    UnknownKindError: none of them has parameters of these names and shapes.
  """
  try:
    weights = read_meanflow(folder)
  except (ValueError, OSError) as error:
    raise UnknownKindError(error) from error
  fitting = {
    distance(weights, golden): (name, kind, golden, meta)
    for name, golden, meta in goldens
    for kind in KINDS
    if kind.recognises(golden, meta) and same_shapes(weights, golden)
  }
  if not fitting or weights.sets.keys() != {"params", "ema_params"}:
    parts = sorted({path.split("/")[1] for path in weights.sets["params"]})
    raise UnknownKindError(f"no golden file fits {sorted(weights.sets)} made of {parts}")
  name, *found = fitting[min(fitting)]
  return name, comparisons(weights, *found)


def comparisons(
  weights: Weights, kind: ModuleType, golden: Golden, meta: dict[str, Any]
) -> Iterator[Comparison]:
  network, shape = kind.network(meta), golden_meanflow.image_shape(meta)
  reference = kind.params_of(golden, meta, "params")
  half = jax.tree.map(lambda x: x / 2, reference)
  params, ema = (
    kind.from_theirs(network, shape, weights.sets[name]) for name in ("params", "ema_params")
  )
  yield from golden_meanflow.compare_trees("params", params, reference)
  yield from golden_meanflow.compare_trees("ema_params", ema, half)
  y = golden_meanflow.y_after_drop(golden, meta)
  for name, ours in jax.jit(lambda p: kind.velocities(network, p, golden, y))(params).items():
    yield name, ours, golden[name]


def parameters(golden: Golden) -> dict[str, np.ndarray]:
  prefix = "params/"
  return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}


def same_shapes(weights: Weights, golden: Golden) -> bool:
  shapes = lambda tensors: {name: x.shape for name, x in tensors.items()}
  return shapes(weights.sets["params"]) == shapes(parameters(golden))


def distance(weights: Weights, golden: Golden) -> float:
  theirs = weights.sets["params"]
  return max(float(np.abs(x - theirs[name]).max()) for name, x in parameters(golden).items())
