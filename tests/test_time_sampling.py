"""The two times of a row: how they are distributed, ordered and made equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from meanflow_jax.methods.time_sampling import LogitNormal, TimePairs, Uniform

BATCH = 20_000
KEY = jax.random.key(0)
SAMPLERS = {
  "uniform": (Uniform(), scipy.stats.uniform.cdf),
  "logit_normal": (
    LogitNormal(-0.4, 1.5),
    lambda time: scipy.stats.norm.cdf(scipy.special.logit(time), -0.4, 1.5),
  ),
}


def assert_distributed(times, cdf):
  assert scipy.stats.kstest(np.asarray(times, np.float64), cdf).pvalue > 0.01


@pytest.mark.parametrize("name", SAMPLERS)
def test_times_follow_their_distribution(name):
  sampler, cdf = SAMPLERS[name]
  times = sampler(KEY, BATCH)
  assert ((times >= 0) & (times <= 1)).all()
  assert_distributed(times, cdf)


@pytest.mark.parametrize("std", [0.0, -1.0])
def test_a_logit_normal_has_a_positive_deviation(std):
  with pytest.raises(ValueError, match="must be positive"):
    LogitNormal(0.0, std)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sorted_times_are_the_larger_and_the_smaller_of_two(name):
  sampler, cdf = SAMPLERS[name]
  r, t = TimePairs(sampler, sampler, "sorted", 0.0)(KEY, BATCH)
  assert_distributed(t, lambda time: cdf(time) ** 2)
  assert_distributed(r, lambda time: 1 - (1 - cdf(time)) ** 2)


def test_sorting_mixes_different_distributions():
  (first, cdf), (second, other_cdf) = SAMPLERS.values()
  _, t = TimePairs(first, second, "sorted", 0.0)(KEY, BATCH)
  assert_distributed(t, lambda time: cdf(time) * other_cdf(time))


def test_clipped_times_keep_the_distribution_of_t():
  (first, cdf), (second, other_cdf) = SAMPLERS.values()
  r, t = TimePairs(first, second, "clipped", 0.0)(KEY, BATCH)
  assert_distributed(t, cdf)
  assert_distributed(r, lambda time: 1 - (1 - cdf(time)) * (1 - other_cdf(time)))
  assert 0.1 < jnp.mean(r == t) < 0.9  # where r was clipped


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.3, 0.5, 0.75, 1.0])
def test_times_are_equal_on_the_given_rows_and_no_others(fraction):
  pairs = TimePairs(Uniform(), Uniform(), "sorted", fraction)
  r, t = pairs(KEY, 200)
  np.testing.assert_array_equal(r == t, pairs.rows.mask(200))
  assert jnp.mean(r == t) == pytest.approx(fraction, abs=1e-6)
  assert (r <= t).all()


@pytest.mark.parametrize("pairing", ["sorted", "clipped"])
def test_rows_with_equal_times_take_t(pairing):
  """Masking leaves t as it was: both kinds of rows see the same t."""
  masked, free = (
    TimePairs(LogitNormal(-0.6, 1.6), LogitNormal(-4.0, 1.6), pairing, fraction)(KEY, 64)
    for fraction in (0.75, 0.0)
  )
  np.testing.assert_array_equal(masked[1], free[1])
  np.testing.assert_array_equal(masked[0][3::4], free[0][3::4])


@pytest.mark.parametrize("pairing", ["sorted", "clipped"])
def test_r_is_never_after_t(pairing):
  r, t = TimePairs(LogitNormal(-2.0, 2.0), LogitNormal(2.0, 2.0), pairing, 0.25)(KEY, BATCH)
  assert (r <= t).all()


def test_settings_that_cannot_be_meant_are_refused():
  with pytest.raises(ValueError, match="time pairing must be one of"):
    TimePairs(Uniform(), Uniform(), "ordered", 0.5)
  for fraction in (-0.1, 1.1):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
      TimePairs(Uniform(), Uniform(), "sorted", fraction)
