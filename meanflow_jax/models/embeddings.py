"""Embeddings of times and positions."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from meanflow_jax.arrays import Time

MAX_PERIOD = 10_000


def sinusoidal(time: Time, size: int) -> Float[Array, "B F"]:
  """cos and sin of times at `size` / 2 geometric frequencies from 1 to 1 / 10000."""
  half = size // 2
  frequencies = jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
  angles = time[:, None] * frequencies[None]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def sincos_positions(rows: int, columns: int, width: int) -> Float[np.ndarray, "N E"]:
  """Sine-cosine embeddings of the positions of a 2-D grid, row by row.

  The first half of the features encodes the column, the second the row (as in DiT,
  arXiv 2212.09748). `width` must be divisible by 4.
  """
  frequencies = 1 / MAX_PERIOD ** (np.arange(width // 4) / (width // 4))
  row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
  angles = [np.outer(position.reshape(-1), frequencies) for position in (column, row)]
  features = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
  return np.concatenate(features, axis=1).astype(np.float32)


class TimeEmbedder(nn.Module):
  """Sinusoids of an unscaled time in [0, 1], then a two-layer perceptron; in float32."""

  width: int
  frequencies: int
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)

  @nn.compact
  def __call__(self, time: Time) -> Float[Array, "B E"]:
    """Embeds one time per row."""
    x = sinusoidal(time, self.frequencies)
    x = nn.silu(nn.Dense(self.width, kernel_init=self.kernel_init, name="hidden")(x))
    return nn.Dense(self.width, kernel_init=self.kernel_init, name="out")(x)
