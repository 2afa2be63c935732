"""Generates image i of a seed, whatever the batch size and the number of devices."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree, UInt8

from meanflow_jax.arrays import Image, Label, PRNGKey
from meanflow_jax.methods.sampler import StepFn, sample
from meanflow_jax.runtime.mesh import replicated, rows_sharding
from meanflow_jax.train_step import Purpose, stream, velocity_fn

LABEL_RULES = ("balanced", "random", "one")


@dataclasses.dataclass(frozen=True)
class Labels:
  """Which class image i belongs to.

  Attributes:
    rule: "balanced" (i modulo the number of classes), "random", or "one".
    label: the class of rule "one".
    num_classes: how many there are; 0 for an unconditional model, whose label is always 0.
  """

  rule: str
  label: int
  num_classes: int

  def __post_init__(self):
    if self.rule not in LABEL_RULES:
      raise ValueError(f"sample.labels must be one of {LABEL_RULES}, got {self.rule!r}")
    if self.rule == "one" and not 0 <= self.label < self.num_classes:
      raise ValueError(
        f"sample.label must lie in [0, {self.num_classes}), the model's classes; got {self.label}"
      )

  def __call__(self, key: PRNGKey, index: Int[Array, ""]) -> Int[Array, ""]:
    """The label of one image."""
    if not self.num_classes:
      return jnp.zeros((), jnp.int32)
    if self.rule == "one":
      return jnp.full((), self.label, jnp.int32)
    if self.rule == "balanced":
      return index % self.num_classes
    return jax.random.randint(key, (), 0, self.num_classes)


@dataclasses.dataclass(frozen=True)
class Generator:
  """Samples images in batches spread over all devices.

  Attributes:
    network: the Flax module of the average velocity.
    step: the method's sampling step.
    grid: times 1 = t_0 > ... > t_n = 0, one function evaluation for each interval.
    image_shape: [H, W, C].
    labels: the class of each image.
    seed: image i depends on (seed, i) alone.
    batch_size: images per compiled call.
    mesh: the devices.
  """

  network: nn.Module
  step: StepFn
  grid: tuple[float, ...]
  image_shape: tuple[int, ...]
  labels: Labels
  seed: int
  batch_size: int
  mesh: Mesh

  def __post_init__(self):
    if self.batch_size < 1 or self.batch_size % self.mesh.size:
      raise ValueError(
        f"sample.batch_size {self.batch_size} is not divisible by {self.mesh.size} devices"
      )

  def __call__(self, params: PyTree, first: Int[Array, ""]) -> tuple[Image, Label]:
    """Images first, ..., first + batch_size - 1 and their labels; to be jitted."""
    rows = rows_sharding(self.mesh)
    index = jax.lax.with_sharding_constraint(first + jnp.arange(self.batch_size), rows)
    noise, y = jax.vmap(self._noise_and_label)(index)
    return sample(self.step, velocity_fn(self.network, params), noise, y, self.grid), y

  def _noise_and_label(self, index: Int[Array, ""]) -> tuple[Float[Array, "H W C"], Array]:
    noise = jax.random.normal(stream(self.seed, Purpose.SAMPLE_NOISE, index), self.image_shape)
    return noise, self.labels(stream(self.seed, Purpose.SAMPLE_LABEL, index), index)

  def batches(
    self, params: PyTree, count: int
  ) -> Iterator[tuple[Float[np.ndarray, "b H W C"], Int[np.ndarray, "b"]]]:
    """Images 0, ..., count - 1 and their labels on every host, one batch ahead of the devices."""
    ahead = self._dispatch(params, 0)
    for first in range(0, count, self.batch_size):
      current, rows = ahead, min(self.batch_size, count - first)
      if first + rows < count:
        ahead = self._dispatch(params, first + rows)
      images, labels = multihost_utils.process_allgather(current, tiled=True)
      yield images[:rows], labels[:rows]

  def _dispatch(self, params: PyTree, first: int) -> tuple[Image, Label]:
    return self._compiled(params, jax.device_put(np.int32(first), replicated(self.mesh)))

  @functools.cached_property
  def _compiled(self) -> Callable[[PyTree, Array], tuple[Image, Label]]:
    return jax.jit(self.__call__, out_shardings=rows_sharding(self.mesh))


def to_uint8(images: Float[np.ndarray, "B H W C"]) -> UInt8[np.ndarray, "B H W C"]:
  """Images in [-1, 1] to bytes, floor(127.5 x + 128), as MeanFlow's evaluation rounds."""
  return np.clip(np.floor(127.5 * images + 128), 0, 255).astype(np.uint8)
