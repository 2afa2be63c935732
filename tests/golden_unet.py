"""Golden files of the DDPM++ U-Net; the weights follow from the tensors' names."""

import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meanflow_jax.arrays import Told
from meanflow_jax.methods.meanflow import velocity_and_derivative
from meanflow_jax.models.unet import UNet, params_from_torch
from meanflow_jax.train_step import velocity_fn
from tests.fill import filled

Golden = dict[str, np.ndarray]
Comparison = tuple[str, np.ndarray, np.ndarray]

TOLERANCE = 2e-5
# Settings that a file may state, and their values where it does not: those of the CIFAR-10 recipe.
DEFAULTS = {
  "model_channels": 128,
  "channel_mult": (2, 2, 2),
  "num_blocks": 4,
  "attn_resolutions": (16,),
  "num_heads": 1,
  "channel_mult_noise": 2,
  "augment_dim": 0,
}


def recognises(golden: Golden, meta: dict[str, Any]) -> bool:
  del meta
  names = {"tensors", "z_nchw", "t", "h", "v_nchw", "u_nchw", "du_dt_nchw"}
  return names <= golden.keys()


def unet(config: dict[str, Any]) -> UNet:
  config = DEFAULTS | {key: value for key, value in config.items() if key in DEFAULTS}
  return UNet(
    width=config["model_channels"],
    multipliers=tuple(config["channel_mult"]),
    blocks=config["num_blocks"],
    attention_at=tuple(config["attn_resolutions"]),
    num_heads=config["num_heads"],
    time_frequencies=config["channel_mult_noise"] * config["model_channels"],
    dropout=0.0,
    num_classes=0,
    augmentation=config["augment_dim"],
    dtype="float32",
    remat="none",
  )


def check(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
  nhwc = {
    key.removesuffix("_nchw"): jnp.asarray(value.transpose(0, 2, 3, 1))
    for key, value in golden.items()
    if key.endswith("_nchw")
  }
  z, t, h = nhwc["z"], jnp.asarray(golden["t"]), jnp.asarray(golden["h"])
  network = unet(meta["config"])
  params = params_from_torch(network, z.shape[1:], filled(json.loads(str(golden["tensors"]))))
  none = jnp.zeros(len(z), jnp.int32)
  y = Told(none, jnp.asarray(golden["augment_label"])) if network.augmentation else none

  @jax.jit
  def ours(params: dict[str, Any]) -> tuple[jax.Array, ...]:
    """dz = v, dr = 0, dt = 1, as in training."""
    velocity = velocity_fn(network, params)
    u, du_dt = velocity_and_derivative(velocity, z, t - h, t, y, nhwc["v"])
    return u, du_dt, velocity(z, t - h, t, none)

  for name, found in zip(("u", "du_dt", "u_without_augment"), ours(params), strict=True):
    if name in nhwc:
      yield name, found, nhwc[name]
