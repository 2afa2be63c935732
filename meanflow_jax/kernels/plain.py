"""Attention as XLA compiles it, on any platform; scores are written to memory."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meanflow_jax.kernels import rotary
from meanflow_jax.kernels.rotary import Scales

Heads = Float[Array, "B N K D"]
Packed = Float[Array, "B N _"]  # heads side by side


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the arguments of fused attention lie in memory.

  Queries, keys and values are three arrays [B, N, K D], or `packed` into one [B, N, 3 K D], as a
  projection puts them out: taking that apart would cost as much memory traffic as a kernel does.

  Attributes:
    heads: K.
    packed: whether arguments, and so tangents and gradients, are one array.
    interpret: run in Python, on any platform.
  """

  heads: int
  packed: bool
  interpret: bool = False

  def width(self, argument: Packed) -> int:
    """K D."""
    return argument.shape[2] // (3 if self.packed else 1)


def attention(q: Heads, k: Heads, v: Heads) -> Heads:
  """Softmax attention without a mask, scores scaled by 1 / sqrt(D).

  The softmax is taken in float32. Differentiable in forward and reverse mode.
  """
  return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def packed(qkv: Packed, heads: int) -> Packed:
  """The same of queries, keys and values in one array.

  Args:
    qkv: [B, N, 3 K D].
    heads: K.

  Returns:
    [B, N, K D].
  """
  return attention(*apart(qkv, heads)).reshape(*qkv.shape[:2], qkv.shape[2] // 3)


def turned(qkv: Packed, heads: int, scales: Scales) -> Packed:
  """The same, of queries and keys that are normalised and turned first, as `rotary` says.

  Args:
    qkv: [B, N, 3 K D].
    heads: K.
    scales: [B, 2, D].

  Returns:
    [B, N, K D].
  """
  return attention(*turned_heads(qkv, heads, scales)).reshape(*qkv.shape[:2], qkv.shape[2] // 3)


def apart(qkv: Packed, heads: int) -> tuple[Heads, Heads, Heads]:
  """Queries, keys and values."""
  batch, tokens, columns = qkv.shape
  shape = batch, tokens, heads, columns // (3 * heads)  # batches may be empty
  q, k, v = (part.reshape(shape) for part in jnp.split(qkv, 3, axis=-1))
  return q, k, v


def turned_heads(qkv: Packed, heads: int, scales: Scales) -> tuple[Heads, Heads, Heads]:
  """Queries, keys and values, of which the first two are normalised and turned."""
  q, k, v = apart(qkv, heads)
  q, k = (
    rotary.turn(rotary.normalised(x, scales[:, i])).astype(x.dtype) for i, x in enumerate((q, k))
  )
  return q, k, v
