"""Attention against its definition, and its derivatives against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.test_util import check_grads

from meanflow_jax.kernels import attention

SHAPE = (2, 5, 3, 4)  # B N K D


def heads(dtype: str = "float64", scale: float = 1.0) -> tuple[jax.Array, ...]:
  q, k, v = jax.random.normal(jax.random.key(0), (3, *SHAPE))
  return tuple(jnp.asarray(x, dtype) for x in (scale * q, scale * k, jnp.abs(v)))


def definition(q: jax.Array, k: jax.Array, v: jax.Array) -> np.ndarray:
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(SHAPE[-1])
  return np.einsum("bhqk,bkhd->bqhd", scipy.special.softmax(scores, axis=-1), v)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2**-7)])
def test_attention_is_softmax_of_scaled_products(dtype, tolerance):
  """Scores up to 100: rounded to bfloat16, they would be wrong by 0.2."""
  q, k, v = heads(dtype, scale=4.0)
  mixed = attention(q, k, v)
  assert mixed.dtype == dtype
  np.testing.assert_allclose(np.asarray(mixed, np.float64), definition(q, k, v), rtol=tolerance)


@pytest.mark.usefixtures("float64")
def test_both_modes_of_differentiation_agree_with_finite_differences():
  """To second order, as a gradient is taken through a JVP."""
  check_grads(attention, heads(), order=2, modes=["fwd", "rev"], atol=1e-4, rtol=1e-4)
