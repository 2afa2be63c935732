"""A flow that is known in closed form: the oracle of methods and samplers."""

import dataclasses

import jax.numpy as jnp

from meanflow_jax.arrays import Image, Label, Time


def per_image(values: Time) -> Image:
  return jnp.reshape(values, (-1, 1, 1, 1))


@dataclasses.dataclass(frozen=True)
class GaussianFlow:
  """The true average velocity, a `VelocityFn`, where data of label y is N(means[y], s^2).

  z_t is N((1 - t) mean, sigma(t)^2) with sigma(t)^2 = (1 - t)^2 s^2 + t^2, and along the flow
  (z_t - (1 - t) mean) / sigma(t) is constant. So noise z_1 arrives at mean + s z_1.
  """

  means: tuple[float, ...]
  s: float

  def sigma(self, t: Time) -> Time:
    return jnp.sqrt((1 - t) ** 2 * self.s**2 + t**2)

  def __call__(self, z: Image, r: Time, t: Time, y: Label) -> Image:
    # (1 - sigma(r) / sigma(t)) / (t - r), multiplied out so that r = t is no exception.
    slope = (t + r - self.s**2 * (2 - t - r)) / (self.sigma(t) * (self.sigma(t) + self.sigma(r)))
    return per_image(slope) * self.centred(z, t, y) - self.mean(y)

  def mean(self, y: Label) -> Image:
    return per_image(jnp.asarray(self.means)[y])

  def centred(self, z: Image, t: Time, y: Label) -> Image:
    return z - per_image(1 - t) * self.mean(y)

  def transport(self, z: Image, t: Time, r: Time, y: Label) -> Image:
    """Where a point z at time t is at time r."""
    ratio = per_image(self.sigma(r) / self.sigma(t))
    return per_image(1 - r) * self.mean(y) + ratio * self.centred(z, t, y)

  def expected_pair(self, z: Image, t: Time, y: Label) -> tuple[Image, Image]:
    """E[x | z_t = z] and E[e | z_t = z]: the pair through z whose velocity is the true one."""
    share = self.centred(z, t, y) / per_image(self.sigma(t) ** 2)
    return self.mean(y) + per_image((1 - t) * self.s**2) * share, per_image(t) * share
