"""Golden files of SiT with two time embedders; the weights follow from the tensors' names."""

import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from meanflow_jax.models import dit_layouts
from meanflow_jax.models.dit import DiT
from tests.fill import filled

Golden = dict[str, np.ndarray]
Comparison = tuple[str, np.ndarray, np.ndarray]

TOLERANCE = 2e-5


def recognises(golden: Golden, meta: dict[str, Any]) -> bool:
  del meta
  return {"tensors", "z_nchw", "r", "t", "y", "u_nchw"} <= golden.keys()


def dit(meta: dict[str, Any]) -> DiT:
  config = meta["config"]
  return DiT(
    patch_size=config["patch_size"],
    width=config["hidden_size"],
    depth=config["depth"],
    num_heads=config["num_heads"],
    num_classes=config["num_classes"],
    conditioning=("t", "h"),
    time_frequencies=256,
    positions="sincos",
    dtype="float32",
    scan=True,
    remat="none",
  )


def check(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
  network, z = dit(meta), golden["z_nchw"].transpose(0, 2, 3, 1)
  tensors = filled(json.loads(str(golden["tensors"])))
  params = dit_layouts.from_sit(network, z.shape[1:], tensors)
  r, t, y = golden["r"], golden["t"], golden["y"].astype(np.int32)
  u = jax.jit(network.apply)({"params": params}, z, t, t - r, y)
  yield "u", np.asarray(u).transpose(0, 3, 1, 2), golden["u_nchw"]
