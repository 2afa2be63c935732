"""DINOv2's vision transformer (arXiv 2304.07193), the features of FD-DINOv2 (arXiv 2306.04675).

The architecture is that of Dinov2Model in Hugging Face's transformers, whose published weights
(facebook/dinov2-large) it takes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from meanflow_jax.arrays import Image
from meanflow_jax.kernels.plain import attention
from meanflow_jax.models.torch_layout import Params, Tensors, read_tensors, renamed

Tokens = Float[Array, "B N E"]
Feature = Float[Array, "B E"]

DTYPES = ("float32", "bfloat16")
EPSILON = 1e-6
MLP_RATIO = 4

# The side that FD-DINOv2 resizes images to, and ImageNet's mean and deviation per channel.
SIDE = 224
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


def preprocess(images: Num[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
  """Resizes 8-bit values to 224 x 224 and normalises, as FD-DINOv2's reference (arXiv 2306.04675).

  Bicubic is Pillow's: Keys' kernel with a = -0.5, widened when it shrinks (so that it does not
  alias), along rows and then along columns, and rounded to 8 bits after each. (Since version 13,
  Pillow begins with the columns where an image is tall; the reference is older.)
  """
  batch, height = images.shape[:2]
  x = images.astype(jnp.float32)
  for shape in ((batch, height, SIDE, 3), (batch, SIDE, SIDE, 3)):
    x = jax.image.resize(x, shape, "cubic", antialias=True)
    x = jnp.floor(jnp.clip(x, 0, 255) + 0.5)
  mean, deviation = (jnp.asarray(c, jnp.float32)[None, None, None] for c in (MEAN, DEVIATION))
  return (x / 255 - mean) / deviation


def _bicubic(size: int, stored: int) -> Float[np.ndarray, "size stored"]:
  """Weights that resize as PyTorch's `interpolate(size=..., mode="bicubic")` does.

  Keys' kernel with a = -0.75, not widened when it shrinks; half-pixel centres; beyond the ends, the
  last value is repeated.
  """
  a = -0.75
  centres = (np.arange(size) + 0.5) * stored / size - 0.5
  weights = np.zeros((size, stored))
  for tap in (-1, 0, 1, 2):
    places = np.floor(centres).astype(int) + tap
    x = np.abs(centres - places)
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
    np.add.at(
      weights,
      (np.arange(size), places.clip(0, stored - 1)),
      np.where(x <= 1, inner, outer),
    )
  return weights.astype(np.float32)


def interpolate_positions(
  positions: Float[Array, "M E"], rows: int, columns: int
) -> Float[Array, "N E"]:
  """Embeddings of the positions of a grid, from those of the stored (square) one.

  To the size of the grid, as Hugging Face's transformers does. The original code passes the scale
  (rows + 0.1) / stored instead, which places the centres a little differently.
  """
  side = round(positions.shape[0] ** 0.5)
  grid = positions.reshape(side, side, positions.shape[1])
  down, across = jnp.asarray(_bicubic(rows, side)), jnp.asarray(_bicubic(columns, side))
  precise = jax.lax.Precision.HIGHEST
  resized = jnp.einsum("ri,cj,ije->rce", down, across, grid, precision=precise)
  return resized.reshape(rows * columns, positions.shape[1])


def _norm(dtype: str, name: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, dtype=dtype, name=name)


class Block(nn.Module):
  """A pre-norm transformer block whose residuals are scaled per channel (arXiv 2103.17239)."""

  num_heads: int
  dtype: str

  @nn.compact
  def __call__(self, x: Tokens, _: None) -> tuple[Tokens, None]:
    """Applies attention and perceptron; what else goes in and out is a scan's, and empty."""
    width = x.shape[-1]
    dense = lambda features, name: nn.Dense(features, dtype=self.dtype, name=name)
    h = _norm(self.dtype, "norm1")(x)
    heads = (*x.shape[:2], self.num_heads, width // self.num_heads)
    q, k, v = (dense(width, name)(h).reshape(heads) for name in ("query", "key", "value"))
    x = self._add(x, dense(width, "out")(attention(q, k, v).reshape(x.shape)), "layer_scale1")
    h = dense(MLP_RATIO * width, "mlp_in")(_norm(self.dtype, "norm2")(x))
    h = dense(width, "mlp_out")(nn.gelu(h, approximate=False))
    return self._add(x, h, "layer_scale2"), None

  def _add(self, x: Tokens, h: Tokens, name: str) -> Tokens:
    scale = self.param(name, nn.initializers.ones, (x.shape[-1],))
    return x + scale.astype(x.dtype)[None, None] * h


class DINOv2(nn.Module):
  """DINOv2's features of images.

  Attributes:
    patch_size: side of a patch, in pixels.
    width, depth, num_heads: of the transformer.
    grid: side of the grid of positions that is stored, in patches.
    dtype: the dtype of computation; parameters, norms' statistics, softmax and the features are
      float32.
  """

  patch_size: int
  width: int
  depth: int
  num_heads: int
  grid: int
  dtype: str

  def __post_init__(self):
    if self.dtype not in DTYPES:
      raise ValueError(f"DINOv2's dtype must be one of {DTYPES}, got {self.dtype!r}")
    super().__post_init__()

  @nn.compact
  def __call__(self, images: Image) -> tuple[Feature, Feature]:
    """The class token (FD-DINOv2's feature) and the mean of the patches, after the final norm.

    Args:
      images: normalised, see `preprocess`; their sides may be any multiple of the patch size.

    Raises:
      ValueError: if the images' sides are not divisible by the patch size.
    """
    layers = nn.scan(
      Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
    )
    x, _ = layers(self.num_heads, self.dtype, name="blocks")(self._embed(images), None)
    x = _norm("float32", "norm")(x)
    return x[:, 0], x[:, 1:].mean(axis=1)

  def _embed(self, images: Image) -> Tokens:
    """The class token, then linear embeddings of the patches; plus positions."""
    p = self.patch_size
    if images.shape[1] % p or images.shape[2] % p:
      raise ValueError(
        f"an image of {images.shape[1]} x {images.shape[2]} does not divide into patches of {p}"
      )
    embedder = nn.Conv(
      self.width, (p, p), strides=p, padding="VALID", dtype=self.dtype, name="patch_embedder"
    )
    patches = embedder(images)
    batch, rows, columns, width = patches.shape
    init = nn.initializers.normal(0.02)
    token = self.param("class_token", init, (1, 1, width))
    stored = self.param("positions", init, (1, 1 + self.grid**2, width))[0]
    grid = interpolate_positions(stored[1:], rows, columns)
    first = jnp.broadcast_to(token + stored[None, :1], (batch, 1, width))
    rest = patches.reshape(batch, rows * columns, width) + grid[None]
    return jnp.concatenate([first, rest], axis=1).astype(self.dtype)


# Reading what is published.

SIZES = ("hidden_size", "image_size", "num_attention_heads", "num_hidden_layers", "patch_size")
# Keys that change the architecture, and their only value that is implemented.
FIXED = {
  "hidden_act": "gelu",
  "layer_norm_eps": EPSILON,
  "mlp_ratio": MLP_RATIO,
  "num_channels": 3,
  "qkv_bias": True,
  "use_swiglu_ffn": False,
}

# Our parameters' names, and PyTorch's; "{}" is the number of a layer.
PARAMETERS = {
  "class_token": "embeddings.cls_token",
  "positions": "embeddings.position_embeddings",
  "blocks/layer_scale1": "encoder.layer.{}.layer_scale1.lambda1",
  "blocks/layer_scale2": "encoder.layer.{}.layer_scale2.lambda1",
}
MODULES = {
  "patch_embedder": "embeddings.patch_embeddings.projection",
  "blocks/norm1": "encoder.layer.{}.norm1",
  "blocks/query": "encoder.layer.{}.attention.q_proj",
  "blocks/key": "encoder.layer.{}.attention.k_proj",
  "blocks/value": "encoder.layer.{}.attention.v_proj",
  "blocks/out": "encoder.layer.{}.attention.o_proj",
  "blocks/norm2": "encoder.layer.{}.norm2",
  "blocks/mlp_in": "encoder.layer.{}.mlp.fc1",
  "blocks/mlp_out": "encoder.layer.{}.mlp.fc2",
  "norm": "layernorm",
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Names of the attention in older files.
OLD_NAMES = {
  ".attention.attention.query.": ".attention.q_proj.",
  ".attention.attention.key.": ".attention.k_proj.",
  ".attention.attention.value.": ".attention.v_proj.",
  ".attention.output.dense.": ".attention.o_proj.",
}
# Stands in for patches that are hidden during pretraining.
UNUSED = "embeddings.mask_token"


def from_config(config: Mapping[str, Any], dtype: str) -> DINOv2:
  """The network that a published config.json describes.

  Raises:
    ValueError: if it describes another architecture, or leaves out a size.
  """
  if missing := [key for key in SIZES if key not in config]:
    raise ValueError(f"DINOv2's config has no {', '.join(missing)}")
  for key, value in FIXED.items():
    if config.get(key, value) != value:
      raise ValueError(f"DINOv2's {key} must be {value!r}, got {config[key]!r}")
  return DINOv2(
    patch_size=config["patch_size"],
    width=config["hidden_size"],
    depth=config["num_hidden_layers"],
    num_heads=config["num_attention_heads"],
    grid=config["image_size"] // config["patch_size"],
    dtype=dtype,
  )


def params_from_torch(network: DINOv2, tensors: Tensors) -> Params:
  """The network's parameters, from tensors with the published names.

  Raises:
    ValueError: if a tensor is missing, too many or of another shape; lists their names.
  """
  image = jax.ShapeDtypeStruct((1, network.patch_size, network.patch_size, 3), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
  used = {name: tensor for name, tensor in tensors.items() if name != UNUSED}
  return read_tensors(shapes, renamed(used, OLD_NAMES), _torch_name)


def _torch_name(path: str) -> str:
  if path in PARAMETERS:
    return PARAMETERS[path]
  module, _, leaf = path.rpartition("/")
  return f"{MODULES[module]}.{LEAVES[leaf]}"
