"""The diffusion transformer (arXiv 2212.09748), conditioned on times and a label."""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from meanflow_jax.arrays import Image, Label, Time
from meanflow_jax.kernels import plain
from meanflow_jax.models.embeddings import TimeEmbedder
from meanflow_jax.models.patches import join_patches
from meanflow_jax.models.rematerialisation import kept, kept_product
from meanflow_jax.models.transformer import PatchTransformer, Tokens

Condition = Float[Array, "B E"]
# Attention [B, N, E] of queries, keys and values [B, N, 3 E] with a number of heads.
Mixer = Callable[[Array, int], Array]
Layer = Callable[[Array], Array]

MLP_RATIO = 4


def _dense(features: int, dtype: str, name: str, *, zero: bool = False, **more: Any) -> Layer:
  init = nn.initializers.zeros if zero else nn.initializers.xavier_uniform()
  return kept_product(nn.Dense(features, dtype=dtype, kernel_init=init, name=name, **more))


def _all_but_bias(x: Array, kernel: Array, bias: Array, *, dtype: str) -> tuple[Array, ...]:
  """What a layer computes with, of a dtype but for the bias, which stays float32."""
  return x.astype(dtype), kernel.astype(dtype), bias


def _norm(dtype: str) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=dtype)


def _modulate(x: Tokens, shift: Condition, scale: Condition) -> Tokens:
  return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
  """Multi-head self-attention."""

  num_heads: int
  dtype: str
  attention: Mixer

  @nn.compact
  def __call__(self, x: Tokens) -> Tokens:
    """Mixes tokens."""
    width = x.shape[-1]
    # XLA sums the gradient of this bias, which comes out of a kernel, in float32 twice as fast.
    qkv = _dense(3 * width, self.dtype, "qkv", promote_dtype=_all_but_bias)(x)
    mixed = kept(self.attention(qkv, self.num_heads))
    return _dense(width, self.dtype, "out")(mixed)


class Block(nn.Module):
  """A transformer block with adaLN-zero conditioning (arXiv 2212.09748, section 3.2)."""

  num_heads: int
  dtype: str
  attention: Mixer
  constrain: Callable[[Array], Array]

  @nn.compact
  def __call__(self, x: Tokens, condition: Condition) -> tuple[Tokens, None]:
    """Applies attention and perceptron; the second value is the (empty) output of a scan."""
    width = x.shape[-1]
    modulation = self.constrain(_dense(6 * width, self.dtype, "modulation", zero=True)(condition))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
    attended = Attention(self.num_heads, self.dtype, self.attention, name="attention")(
      _modulate(_norm(self.dtype)(x), shift_a, scale_a)
    )
    x = x + gate_a[:, None] * attended
    hidden = _modulate(_norm(self.dtype)(x), shift_m, scale_m)
    hidden = nn.gelu(_dense(MLP_RATIO * width, self.dtype, "mlp_in")(hidden), approximate=True)
    x = x + gate_m[:, None] * _dense(width, self.dtype, "mlp_out")(hidden)
    return self.constrain(x), None


class DiT(PatchTransformer):
  """A diffusion transformer over images or latents.

  Attributes:
    attention: of queries, keys and values in one array [B, N, 3 E], with a number of heads.
    constrain: fixes the sharding of activations.
  """

  STACKS: ClassVar[tuple[str, ...]] = ("blocks",)

  attention: Mixer = plain.packed
  constrain: Callable[[Array], Array] = lambda x: x

  def __post_init__(self):
    super().__post_init__()
    if self.positions == "none":
      raise ValueError("model.positions 'none' would leave a DiT without any; choose another")
    if self.width % self.num_heads:
      raise ValueError(
        f"model.width {self.width} must be divisible by model.num_heads {self.num_heads}"
      )

  @nn.compact
  def __call__(self, z: Image, t: Time, h: Time, y: Label) -> Image:
    """The average velocity over [t - h, t], float32 of the shape of z.

    Raises:
      ValueError: if the image's sides are not divisible by the patch size.
    """
    condition = self.constrain(self._condition(t, h, y))
    x = self.constrain(self._embed_patches(z))
    settings = self.num_heads, self.dtype, self.attention, self.constrain
    x, _ = self._stack(Block, self.depth)(*settings, name="blocks")(x, condition)
    return self._unembed(x, condition, z.shape).astype(jnp.float32)

  def tokens(self, side: int) -> int:
    """Of a square image."""
    return (side // self.patch_size) ** 2

  def forward_flops(self, image_shape: tuple[int, ...]) -> int:
    """Floating-point operations of the matrix products in one image's forward pass."""
    side, _, channels = image_shape
    tokens, patch = self.tokens(side), self.patch_size**2 * channels
    block = tokens * ((4 + 2 * MLP_RATIO) * self.width**2 + 2 * tokens * self.width)
    block += 6 * self.width**2
    times = len(self.conditioning) * (self.time_frequencies + self.width) * self.width
    ends = 2 * tokens * patch * self.width + 2 * self.width**2
    return 2 * (self.depth * block + times + ends)

  def _condition(self, t: Time, h: Time, y: Label) -> Condition:
    """SiLU of the summed embeddings of times and label, the input of every modulation."""
    embedded = [
      TimeEmbedder(self.width, self.time_frequencies, name=f"{name}_embedder")(time)
      for name, time in self._times(t, h).items()
    ]
    if self.num_classes:
      init = nn.initializers.normal(0.02)
      table = nn.Embed(self.num_classes + 1, self.width, embedding_init=init, name="label_embedder")
      embedded.append(table(y))
    return nn.silu(sum(embedded)).astype(self.dtype)

  def _unembed(self, x: Tokens, condition: Condition, shape: tuple) -> Image:
    """The final modulated projection, back from patches to an image."""
    modulation = _dense(2 * self.width, self.dtype, "final_modulation", zero=True)(condition)
    shift, scale = jnp.split(self.constrain(modulation), 2, axis=-1)
    x = _modulate(_norm(self.dtype)(x), shift, scale)
    features = self.patch_size**2 * shape[-1]
    patches = _dense(features, self.dtype, "final", zero=True)(x)
    return join_patches(patches, self.patch_size, shape)
