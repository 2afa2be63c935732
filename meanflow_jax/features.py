"""What images are compared by: feature extractors, each with the conventions it stands for."""

import pathlib
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from meanflow_jax.arrays import Image
from meanflow_jax.metrics.summary import FEATURES, LOGITS, SPATIAL
from meanflow_jax.models import dinov2, inception
from meanflow_jax.runtime import pretrained

# The values of 8-bit images, 0 to 255, in float32.
Levels = Float[Array, "B H W C"]
Features = dict[str, Float[Array, "B _"]]


class Extractor(flax.struct.PyTreeNode):
  """A feature network with its weights: a pytree, to be passed to jitted functions.

  Attributes:
    params: the weights.
    apply: weights and levels to `features`, and where it has them `spatial` and `logits`.
    name: "pixels", "inception" or "dinov2".
    convention: all that changes the numbers, in words; figures compare only where it is equal.
  """

  params: PyTree
  apply: Callable[[PyTree, Levels], Features] = flax.struct.field(pytree_node=False)
  name: str = flax.struct.field(pytree_node=False)
  convention: str = flax.struct.field(pytree_node=False)

  def __call__(self, levels: Levels) -> Features:
    """The features of a batch, in full precision where a device would round products."""
    with jax.default_matmul_precision("highest"):
      return self.apply(self.params, levels)


def pixels(*, resolution: int) -> Extractor:
  """The pixels themselves, in [-1, 1]; larger images are averaged down to a resolution.

  Raises:
    ValueError: a resolution below 1.
  """
  if resolution < 1:
    raise ValueError(f"evaluate.pixels.resolution must be at least 1, got {resolution}")

  def apply(_: PyTree, levels: Levels) -> Features:
    return {FEATURES: _pixels(levels / 127.5 - 1, resolution)}

  return Extractor((), apply, "pixels", f"pixels at most {resolution} wide")


def _pixels(images: Image, resolution: int) -> Float[Array, "B F"]:
  batch, height, width, channels = images.shape
  if max(height, width) > resolution:
    shape = (batch, resolution, resolution, channels)
    images = jax.image.resize(images, shape, "linear", antialias=True)
  return images.reshape(batch, -1)


def fid_inception(*, weights: str, inputs: str, logits_bias: bool) -> Extractor:
  """FID's InceptionV3: features of 2048 numbers, spatial ones of 2023, logits of 1008 classes.

  Args:
    weights: the safetensors file.
    inputs: one of `inception.CONVENTIONS`.
    logits_bias: whether the last layer's bias is part of the logits (ADM leaves it out).

  Raises:
    FileNotFoundError: no such file; says where it is published.
    ValueError: no such convention, or other weights.
  """
  if inputs not in inception.CONVENTIONS:
    raise ValueError(
      f"evaluate.inception.inputs must be one of {sorted(inception.CONVENTIONS)}, got {inputs!r}"
    )
  tensors, origin = pretrained.load_inception(pathlib.Path(weights).expanduser())
  network, prepare = inception.Inception(), inception.CONVENTIONS[inputs]

  def apply(params: PyTree, levels: Levels) -> Features:
    found = network.apply({"params": params}, prepare(_rgb(levels)))
    logits = found.logits if logits_bias else found.logits_without_bias
    spatial = found.spatial.reshape(len(levels), -1)
    return {FEATURES: found.pool3, SPATIAL: spatial, LOGITS: logits}

  bias = "with" if logits_bias else "without"
  convention = f"InceptionV3 ({origin.short}), {inputs} input, logits {bias} bias"
  return Extractor(inception.params_from_torch(tensors), apply, "inception", convention)


def fd_dinov2(*, weights: str, dtype: str) -> Extractor:
  """DINOv2's class token (FD-DINOv2, arXiv 2306.04675).

  Args:
    weights: the folder of config.json and the safetensors file.
    dtype: of computation.

  Raises:
    FileNotFoundError: no such folder; says where it is published.
    ValueError: other weights.
  """
  folder = pathlib.Path(weights).expanduser()
  config, tensors = pretrained.load(folder, pretrained.DINOV2)
  origin = pretrained.origin(folder / pretrained.DINOV2.weights)
  network = dinov2.from_config(config, dtype=dtype)

  def apply(params: PyTree, levels: Levels) -> Features:
    token, _ = network.apply({"params": params}, dinov2.preprocess(_rgb(levels)))
    return {FEATURES: token}

  convention = f"DINOv2 ({origin.short}), bicubic to {dinov2.SIDE}, class token, {dtype}"
  return Extractor(dinov2.params_from_torch(network, tensors), apply, "dinov2", convention)


def _rgb(levels: Levels) -> Float[Array, "B H W 3"]:
  """Grey images as what they look like to a network of colours."""
  return jnp.broadcast_to(levels, (*levels.shape[:-1], 3)) if levels.shape[-1] == 1 else levels


NAMES = {("frechet", "inception"): "fid", ("frechet", "dinov2"): "fd_dinov2"}


def figure_name(figure: str, extractor: str) -> str:
  """What a figure is called: inception's by their usual names, others with their features'."""
  usual = figure if extractor == "inception" else f"{figure}_{extractor}"
  return NAMES.get((figure, extractor), usual)
