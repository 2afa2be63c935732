"""Attention against its definition, and its derivatives against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from meanflow_jax.kernels.plain import attention

SHAPE = (2, 5, 3, 4)  # B N K D


def heads(dtype: str, scale: float = 1.0) -> tuple[jax.Array, ...]:
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


def test_both_modes_of_differentiation_agree_with_finite_differences():
  """To second order, as a gradient is taken through a JVP."""
  x = heads("float32")
  *along, weights = jax.random.normal(jax.random.key(1), (4, *SHAPE))

  def moved(step: float) -> float:
    there = (
      np.asarray(a, np.float64) + step * np.asarray(b) for a, b in zip(x, along, strict=True)
    )
    return np.vdot(definition(*there), weights)

  weighted = lambda q, k, v: jnp.vdot(attention(q, k, v), weights)
  forward = lambda f: lambda *x: jax.jvp(f, x, tuple(along))[1]
  reverse = lambda f: lambda *x: sum(map(jnp.vdot, jax.grad(f, argnums=(0, 1, 2))(*x), along))
  step = 1e-3
  first = (moved(step) - moved(-step)) / (2 * step)
  second = (moved(step) - 2 * moved(0) + moved(-step)) / step**2
  for mode in (forward, reverse):
    assert jax.jit(mode(weighted))(*x) == pytest.approx(first, rel=1e-4)
    for outer in (forward, reverse):
      assert jax.jit(outer(mode(weighted)))(*x) == pytest.approx(second, rel=1e-3)
