"""Golden files of FID's Inception, of its input convention, and of metrics from features."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meanflow_jax.metrics.feature_sets import precision_recall
from meanflow_jax.metrics.inception_score import SplitScores
from meanflow_jax.metrics.moments import Moments, frechet_distance
from meanflow_jax.models import inception
from tests.fill import filled

Golden = dict[str, np.ndarray]
Comparison = tuple[str, np.ndarray, np.ndarray]

TOLERANCE = 1e-4  # the references' own single precision: positions in large images, small means


def recognises(golden: Golden, meta: dict[str, Any]) -> bool:
  """Whether a file is of a kind that is checked here."""
  return _kind(golden) is not None


def check(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
  """Names, our numbers and the reference's."""
  checks = {"inception": check_inception, "resize": check_resize, "metrics": check_metrics}
  return checks[_kind(golden)](golden)


def _kind(golden: Golden) -> str | None:
  if "tensors" in golden and any(name.startswith("pool3") for name in golden):
    return "inception"
  if {"image", "rows", "resized_rows"} <= golden.keys():
    return "resize"
  if any(re.match("fid_|inception_score_|precision_k|recall_k", name) for name in golden):
    return "metrics"
  return None


# The network.


def check_inception(golden: Golden) -> Iterator[Comparison]:
  """For each image there are arrays of the same suffix."""
  params = inception.params_from_torch(filled(json.loads(str(golden["tensors"]))))
  apply = jax.jit(network_outputs)
  for name in golden:
    if name.startswith("image"):
      suffix = name.removeprefix("image")
      for output, ours in apply(params, jnp.asarray(golden[name])).items():
        if output + suffix in golden:
          yield output + suffix, np.asarray(ours), golden[output + suffix]


def network_outputs(params: inception.Params, images: inception.Pixels) -> dict[str, jax.Array]:
  """All that the golden files hold of some images."""
  features, state = inception.Inception().apply(
    {"params": params}, inception.pytorch_inputs(images), mutable=["intermediates"]
  )
  (mixed6e,) = state["intermediates"]["Mixed_6e"]
  return {
    "pool3": features.pool3,
    "spatial": features.spatial,
    "mixed6e_mean": mixed6e.mean((1, 2)),
    "logits": features.logits,
    "logits_without_bias": features.logits_without_bias,
  }


# The other conventions.


def check_resize(golden: Golden) -> Iterator[Comparison]:
  """Two conventions end in (x - 128) / 128; a file holds one of them, and is named after it.

  What is called TensorFlow 1's resize need not be it: MeanFlow's reference means to, but reads
  with half-pixel centres (`meanflow_inputs`).
  """
  images, rows = jnp.asarray(golden["image"]), golden["rows"]
  candidates = {
    name: np.asarray(inception.CONVENTIONS[name](images)) for name in ("tensorflow", "meanflow")
  }
  distance = lambda name: np.abs(candidates[name][:, rows] - golden["resized_rows"]).max()
  name = min(candidates, key=distance)
  yield f"resized_rows ({name})", candidates[name][:, rows], golden["resized_rows"]
  if "resized_mean" in golden:
    yield (
      f"resized_mean ({name})",
      candidates[name].mean((1, 2), np.float64),
      golden["resized_mean"],
    )


# Metrics.


def check_metrics(golden: Golden) -> Iterator[Comparison]:
  """The names say what is computed: of which features, in how many splits, with which k."""
  yield from check_distances(golden)
  for name, reference in golden.items():
    if match := re.fullmatch(r"inception_score_(\d+)splits?", name):
      logits = golden["logits"]
      empty = SplitScores.empty(len(logits), logits.shape[1], int(match[1]))
      score = empty.plus(np.arange(len(logits)), logits).score()
      yield name, np.float64(score.mean), reference
    elif match := re.fullmatch(r"(precision|recall)_k(\d+)", name):
      both = precision_recall(golden["a"], golden["b"], k=int(match[2]))
      yield name, np.float64(getattr(both, match[1])), reference


def check_distances(golden: Golden) -> Iterator[Comparison]:
  moments = {name: Moments.of(array) for name, array in golden.items() if array.ndim == 2}
  for (a, first), (b, second) in itertools.product(moments.items(), repeat=2):
    for name in {f"fid_{a}{b}", f"fid_{a}_{b}"} & golden.keys():
      ours, reference = np.float64(frechet_distance(first, second)), golden[name]
      # A distance is a difference of traces: where nothing is left of them but rounding, it can
      # only be held against them.
      traces = np.trace(first.covariance) + np.trace(second.covariance)
      rest = traces if abs(reference) < 1e-9 * traces else 0
      yield name, ours + rest, reference + rest
