"""Sinusoids are distinct, and know differences only."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_jax.models.embeddings import MAX_PERIOD, TimeEmbedder, sincos_positions, sinusoidal


def test_sinusoids_of_times_know_their_difference_only():
  t = np.linspace(0, 1, 5)
  embedded = np.asarray(sinusoidal(jnp.asarray(t, jnp.float32), 32), np.float64)
  frequencies = MAX_PERIOD ** -(np.arange(16) / 16)
  expected = np.cos((t[:, None, None] - t[:, None]) * frequencies).sum(axis=-1)
  np.testing.assert_allclose(embedded @ embedded.T, expected, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 5), (16, 16)])
def test_positions_are_distinct(rows, columns):
  positions = sincos_positions(rows, columns, 32)
  assert positions.shape == (rows * columns, 32)
  distances = np.linalg.norm(positions[:, None] - positions, axis=-1)
  assert (distances[~np.eye(len(positions), dtype=bool)] > 0.5).all()


def test_positions_know_their_offset_only():
  positions = sincos_positions(3, 5, 16).astype(np.float64)
  places = list(itertools.product(range(3), range(5)))
  seen: dict[tuple[int, int], float] = {}
  for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
    product = seen.setdefault((a[0] - b[0], a[1] - b[1]), positions[i] @ positions[j])
    assert positions[i] @ positions[j] == pytest.approx(product, abs=1e-5)


def test_the_first_half_encodes_the_column_and_the_second_the_row():
  positions = sincos_positions(3, 5, 16).reshape(3, 5, 2, 8)
  assert not np.diff(positions[:, :, 0], axis=0).any()
  assert not np.diff(positions[:, :, 1], axis=1).any()


def test_times_are_embedded_in_float32_by_a_smooth_function():
  embedder = TimeEmbedder(width=8, frequencies=16)
  t = jnp.array([0.1, 0.1, 0.9])
  params = embedder.init(jax.random.key(0), t)
  params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
  embedded = embedder.apply(params, t)
  assert embedded.dtype == jnp.float32
  np.testing.assert_array_equal(embedded[0], embedded[1])
  assert jnp.abs(embedded[0] - embedded[2]).max() > 1e-2
