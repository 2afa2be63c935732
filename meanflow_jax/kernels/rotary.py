"""Queries and keys that are normalised and turned by their positions before they meet.

Each head's features are divided by their root mean square and scaled (QK-norm, arXiv 2010.04245, by
RMSNorm, arXiv 1910.07467), then turned in pairs by rotary positions 0, 1, ... (arXiv 2104.09864),
all in float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Heads = Float[Array, "B N K D"]
Scales = Float[Array, "B 2 D"]  # of the features of queries and of keys, for each row
Table = Float[np.ndarray, "2 d N"]  # d = D / 2 pairs

EPSILON = 1e-6
MAX_PERIOD = 10_000


def table(tokens: int, size: int) -> Table:
  """Cosines and sines of the angles at positions 0, ..., tokens - 1, for heads of a size."""
  frequencies = MAX_PERIOD ** (-np.arange(0, size, 2) / size)
  angles = np.outer(frequencies, np.arange(tokens))
  return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def turn(x: Heads) -> Heads:
  """Turns the pairs (i, i + D / 2) of each head's features, in float32.

  Which features are a pair is a convention; halves need no strided access.
  """
  cos, sin = (jnp.asarray(part.T)[None, :, None] for part in table(x.shape[1], x.shape[-1]))
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def normalised(x: Heads, scale: Float[Array, "B D"]) -> Heads:
  """Each head's features over their root mean square, times a scale, in float32."""
  x = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON)
  return x * (inverse * scale[:, None, None].astype(jnp.float32))
