"""Methods and networks small enough to compile in no time, every parameter random."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from meanflow_jax.arrays import Image, Label, Time, VelocityFn
from meanflow_jax.methods.guidance import Guidance, LabelDropout
from meanflow_jax.methods.meanflow import AdaptiveWeight, MeanFlow
from meanflow_jax.methods.time_sampling import TimePairs, Uniform
from meanflow_jax.models.dit import DiT
from meanflow_jax.models.in_context_dit import InContextDiT
from meanflow_jax.train_step import init_params

Params = dict[str, Any]

# Compiles in half the time, to slower code.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def meanflow(
  *,
  equal_fraction: float,
  guidance: dict[str, float] | None = None,
  dropout: float = 0.0,
  droppable: str = "all",
  p: float = 1.0,
  null_label: int = 3,
) -> MeanFlow:
  unguided = {"omega": 1.0, "kappa": 0.0, "t_start": 0.0, "t_end": 1.0}
  return MeanFlow(
    times=TimePairs(Uniform(), Uniform(), "sorted", equal_fraction),
    guidance=Guidance(**unguided | (guidance or {})),
    label_dropout=LabelDropout(dropout, droppable),
    weight=AdaptiveWeight(p, 1e-2),
    null_label=null_label,
  )


def mlp_params(*, pixels: int, labels: int, hidden: int = 16) -> Params:
  rng = np.random.default_rng(0)
  shapes = {"into": (pixels + 2, hidden), "table": (labels, hidden), "out": (hidden, pixels)}
  return {name: jnp.asarray(0.5 * rng.normal(size=shape)) for name, shape in shapes.items()}


def mlp(params: Params) -> VelocityFn:
  """A perceptron of all its inputs."""

  def velocity(z: Image, r: Time, t: Time, y: Label) -> Image:
    pixels = z.reshape(z.shape[0], math.prod(z.shape[1:]))
    inputs = jnp.concatenate([pixels, r[:, None], t[:, None]], axis=1)
    hidden = jnp.tanh(inputs @ params["into"] + params["table"][y])
    return (hidden @ params["out"]).reshape(z.shape)

  return velocity


def dit(**changes: Any) -> DiT:
  settings = {
    "patch_size": 2,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
    "conditioning": ("t", "h"),
    "time_frequencies": 16,
    "positions": "sincos",
    "dtype": "float32",
    "scan": True,
    "remat": "none",
  }
  return DiT(**settings | changes)


def in_context_dit(**changes: Any) -> InContextDiT:
  settings = {
    "patch_size": 2,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
    "conditioning": ("h",),
    "positions": "none",
    "head_depth": 1,
    "class_tokens": 2,
    "omega_tokens": 1,
    "interval_tokens": 1,
    "time_tokens": 2,
    "time_frequencies": 16,
    "dtype": "float32",
    "scan": True,
    "remat": "none",
  }
  return InContextDiT(**settings | changes)


def random_params(network: nn.Module, image_shape: tuple[int, ...]) -> Params:
  """Parameters of which none is zero: at its own initialisation a DiT is the zero function."""
  shapes = jax.eval_shape(lambda: init_params(network, 0, image_shape))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)
