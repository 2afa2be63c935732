"""The transformer of improved MeanFlow (arXiv 2512.02012): told by tokens, with two heads."""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from meanflow_jax.arrays import GuidanceScale, Image, Label, Time
from meanflow_jax.kernels import plain
from meanflow_jax.kernels.rotary import Scales
from meanflow_jax.models.embeddings import TimeEmbedder
from meanflow_jax.models.patches import join_patches
from meanflow_jax.models.rematerialisation import kept, kept_product
from meanflow_jax.models.transformer import PatchTransformer, Tokens

# Attention [B, N, E] of queries, keys and values [B, N, 3 E] with a number of heads; queries and
# keys are normalised, with these scales, and turned by their positions first.
Mixer = Callable[[Array, int, Scales], Array]

GAIN = 0.32  # of the blocks' initial weights


def mlp_size(width: int) -> int:
  """Hidden features of a block's perceptron: with its gate, as many weights as of 4 widths."""
  return 8 * width // 3


def _scaled(gain: float) -> nn.initializers.Initializer:
  """Normal, with standard deviation gain / sqrt(inputs)."""
  return nn.initializers.variance_scaling(gain**2, "fan_in", "normal")


class _Scale(nn.Module):
  """The parameter of an RMSNorm that is computed elsewhere."""

  @nn.compact
  def __call__(self, shape: tuple[int, ...]) -> Array:
    return self.param("scale", nn.initializers.ones, shape)


class Block(nn.Module):
  """Attention and a gated perceptron (SwiGLU), each added through a gate that starts at zero."""

  num_heads: int
  dtype: str
  attention: Mixer
  constrain: Callable[[Array], Array]

  @nn.compact
  def __call__(self, x: Tokens) -> tuple[Tokens, None]:
    """Applies both; the second value is the (empty) output of a scan."""
    attended = self._attend(self._norm("attention_norm")(x))
    x = x + self._gate("attention_gate", x) * attended
    hidden = self._dense(2 * mlp_size(x.shape[-1]), "mlp_in")(self._norm("mlp_norm")(x))
    gate, hidden = jnp.split(hidden, 2, axis=-1)
    hidden = self._dense(x.shape[-1], "mlp_out")(nn.silu(gate) * hidden)
    x = x + self._gate("mlp_gate", x) * hidden
    return self.constrain(x), None

  def _attend(self, x: Tokens) -> Tokens:
    batch, _, width = x.shape
    size = (width // self.num_heads,)
    scales = jnp.stack([_Scale(name=f"{name}_norm")(size) for name in ("q", "k")])
    scales = jnp.broadcast_to(scales[None], (batch, *scales.shape))
    qkv = self._dense(3 * width, "qkv")(x)
    mixed = kept(self.attention(qkv, self.num_heads, scales))
    return self._dense(width, "attention_out")(mixed)

  def _dense(self, features: int, name: str) -> Callable[[Array], Array]:
    layer = nn.Dense(
      features, use_bias=False, dtype=self.dtype, kernel_init=_scaled(GAIN), name=name
    )
    return kept_product(layer)

  def _norm(self, name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=name)

  def _gate(self, name: str, x: Tokens) -> Float[Array, "1 1 E"]:
    return self.param(name, nn.initializers.zeros, x.shape[-1:]).astype(self.dtype)[None, None]


class InContextDiT(PatchTransformer):
  """A transformer that is told label, guidance and times by tokens before those of the image.

  A trunk carries two heads: u, the average velocity, and v, an auxiliary velocity at t that only
  training asks for. Queries and keys are turned by the positions of all tokens; published networks
  add none to patches, and are told h alone.

  Attributes:
    head_depth: how many of the `depth` blocks between input and output are a head's own.
    class_tokens, omega_tokens, interval_tokens, time_tokens: how many tokens say the label, the
      guidance scale, each end of its interval, and each time.
    attention: of queries, keys and values in one array, with the scales of the norms of the first
      two.
    constrain: fixes the sharding of activations.
  """

  STACKS: ClassVar[tuple[str, ...]] = ("trunk", "u_blocks", "v_blocks")
  HEADS: ClassVar[tuple[str, ...]] = ("u", "v")
  TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("v_blocks", "v_norm", "v_out")  # parameters of v

  head_depth: int
  class_tokens: int
  omega_tokens: int
  interval_tokens: int
  time_tokens: int
  attention: Mixer = plain.turned
  constrain: Callable[[Array], Array] = lambda x: x

  def __post_init__(self):
    super().__post_init__()
    for name in ("class_tokens", "omega_tokens", "interval_tokens", "time_tokens"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"model.in_context_dit.{name} must be at least 1, got {getattr(self, name)}"
        )
    if not 1 <= self.head_depth <= self.depth:
      raise ValueError(
        f"model.in_context_dit.head_depth {self.head_depth} must lie between 1 and model.depth "
        f"{self.depth}, which counts the blocks of trunk and one head"
      )
    if self.width % (2 * self.num_heads):
      raise ValueError(
        f"model.width {self.width} must be divisible by twice model.num_heads {self.num_heads}"
      )

  @nn.compact
  def __call__(
    self,
    z: Image,
    t: Time,
    h: Time,
    y: Label,
    guidance: GuidanceScale | None = None,
    heads: Sequence[str] | None = None,
  ) -> Image | tuple[Image, ...]:
    """The velocities that the heads say, float32 of the shape of z.

    Args:
      z: what the velocities are of.
      t: its time.
      h: t - r, the length of the interval that u is the average over.
      y: the label.
      guidance: with which scale, and where in t; None is without guidance.
      heads: some of "u" and "v", for a tuple of velocities; None for u itself.

    Raises:
      ValueError: if the image's sides are not divisible by the patch size.
    """
    guidance = GuidanceScale.off(t) if guidance is None else guidance
    x = jnp.concatenate([*self._prefix(t, h, y, guidance), self._embed_patches(z)], axis=1)
    x = self._layers("trunk", self.depth - self.head_depth, self.constrain(x))
    # All parameters are made, whatever is asked for.
    names = self.HEADS if self.is_initializing() else heads or ("u",)
    velocities = tuple(self._head(name, x, z.shape) for name in names)
    return velocities[0] if heads is None else velocities

  def tokens(self, side: int) -> int:
    """Of a square image, with those that tell the network."""
    return (side // self.patch_size) ** 2 + sum(self._token_counts().values())

  def forward_flops(self, image_shape: tuple[int, ...], heads: Sequence[str] = ("u",)) -> int:
    """Floating-point operations of the matrix products in one image's forward pass."""
    side, _, channels = image_shape
    tokens, count, patch = self.tokens(side), len(heads), self.patch_size**2 * channels
    patches, told = (side // self.patch_size) ** 2, self._token_counts()
    weights = 4 * self.width**2 + 3 * self.width * mlp_size(self.width)
    block = tokens * (weights + 2 * tokens * self.width)
    blocks = self.depth - self.head_depth + count * self.head_depth
    numbers = len(told) - bool(self.num_classes)
    embedders = numbers * (self.time_frequencies + self.width) * self.width
    return 2 * (blocks * block + embedders + (1 + count) * patches * patch * self.width)

  def _token_counts(self) -> dict[str, int]:
    """How many tokens say what, in their order."""
    label = {"label": self.class_tokens} if self.num_classes else {}
    interval = dict.fromkeys(("t_min", "t_max"), self.interval_tokens)
    times = dict.fromkeys(self.conditioning, self.time_tokens)
    return label | {"omega": self.omega_tokens} | interval | times

  def _prefix(self, t: Time, h: Time, y: Label, guidance: GuidanceScale) -> list[Array]:
    """Learned tokens, to each of which the embedding of what it says is added."""
    normal = nn.initializers.normal(1 / math.sqrt(self.width))
    numbers = {"omega": 1 - 1 / guidance.omega, "t_min": guidance.t_min, "t_max": guidance.t_max}
    numbers |= self._times(t, h)

    def embedded(name: str) -> Float[Array, "B E"]:
      if name == "label":
        table = (self.num_classes + 1, self.width)
        return nn.Embed(*table, embedding_init=normal, name="label_embedder")(y)
      size = self.width, self.time_frequencies
      return TimeEmbedder(*size, kernel_init=_scaled(1.0), name=f"{name}_embedder")(numbers[name])

    return [
      (
        self.param(f"{name}_tokens", normal, (count, self.width))[None] + embedded(name)[:, None]
      ).astype(self.dtype)
      for name, count in self._token_counts().items()
    ]

  def _layers(self, name: str, depth: int, x: Tokens) -> Tokens:
    if not depth:
      return x
    settings = self.num_heads, self.dtype, self.attention, self.constrain
    return self._stack(Block, depth)(*settings, name=name)(x)[0]

  def _head(self, name: str, x: Tokens, shape: tuple) -> Image:
    """Blocks, and a projection of the image's tokens back to an image."""
    x = self._layers(f"{name}_blocks", self.head_depth, x)
    x = x[:, sum(self._token_counts().values()) :]
    x = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=f"{name}_norm")(x)
    features = self.patch_size**2 * shape[-1]
    zeros = nn.initializers.zeros
    out = nn.Dense(features, dtype=self.dtype, kernel_init=zeros, name=f"{name}_out")(x)
    return join_patches(out, self.patch_size, shape).astype(jnp.float32)
