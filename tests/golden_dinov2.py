"""Golden files of DINOv2; the weights follow from the tensors' names."""

import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from meanflow_jax.models import dinov2
from tests.fill import filled

Golden = dict[str, np.ndarray]
Comparison = tuple[str, np.ndarray, np.ndarray]

TOLERANCE = 2e-5


def recognises(golden: Golden, meta: dict[str, Any]) -> bool:
  del meta
  return {"tensors", "pixel_values_nchw", "class_token", "patch_mean"} <= golden.keys()


def check(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
  network = dinov2.from_config(meta["config"], "float32")
  params = dinov2.params_from_torch(network, filled(json.loads(str(golden["tensors"]))))
  features = jax.jit(lambda params, x: network.apply({"params": params}, x))
  token, mean = features(params, golden["pixel_values_nchw"].transpose(0, 2, 3, 1))
  yield "class_token", token, golden["class_token"]
  yield "patch_mean", mean, golden["patch_mean"]
