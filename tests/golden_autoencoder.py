"""Golden files of Stable Diffusion's autoencoder; the weights follow from the tensors' names."""

import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from meanflow_jax.models import autoencoder
from tests.fill import filled

Golden = dict[str, np.ndarray]
Comparison = tuple[str, np.ndarray, np.ndarray]

TOLERANCE = 2e-5


def recognises(golden: Golden, meta: dict[str, Any]) -> bool:
  del meta
  return {"tensors", "image_nchw", "latent_nchw", "mean", "decoded_nchw"} <= golden.keys()


def check(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
  network = autoencoder.from_config(meta["config"], "float32")
  tensors = filled(json.loads(str(golden["tensors"])))
  params = autoencoder.params_from_torch(network, tensors)
  apply = lambda method: lambda params, x: network.apply({"params": params}, x, method=method)
  mean, std = jax.jit(apply("encode"))(params, golden["image_nchw"].transpose(0, 2, 3, 1))
  yield "mean", nchw(mean), golden["mean"]
  yield "std", nchw(std), golden["std"]
  yield "logvar", nchw(2 * np.log(std)), golden["logvar"]
  decoded = jax.jit(apply("decode"))(params, golden["latent_nchw"].transpose(0, 2, 3, 1))
  yield "decoded", nchw(decoded), golden["decoded_nchw"]


def nchw(images: jax.Array) -> np.ndarray:
  return np.asarray(images).transpose(0, 3, 1, 2)
