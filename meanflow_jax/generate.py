"""Generates image i of a seed, whatever the batch size and the number of devices."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Num, PyTree, UInt8

from meanflow_jax.arrays import Image, Label, Mask, PRNGKey
from meanflow_jax.methods.guidance import GuidanceInput, SamplingGuidance
from meanflow_jax.methods.sampler import StepFn, sample
from meanflow_jax.models.autoencoder import Autoencoder, unscale_latents
from meanflow_jax.runtime.mesh import replicate, rows_sharding
from meanflow_jax.train_step import Purpose, stream, velocity_fn

LABEL_RULES = ("balanced", "random", "one")

Result = TypeVar("Result")

# From images in [-1, 1] to the values of 8-bit images, 0 to 255. Figures depend on how.


def round_meanflow(images: Image) -> Image:
  """floor(127.5 x + 128), as MeanFlow and its successors."""
  return jnp.clip(jnp.floor(127.5 * images + 128), 0, 255)


def round_adm(images: Image) -> Image:
  """floor(127.5 x + 127.5), as ADM and the reference of the CIFAR-10 recipe."""
  return jnp.clip(jnp.floor(127.5 * images + 127.5), 0, 255)


ROUNDING = {"meanflow": round_meanflow, "adm": round_adm}


def finite(images: Num[Array, "B H W C"]) -> Bool[Array, "B"]:
  """Which images are finite: rounding would make white of infinite ones."""
  return jnp.isfinite(images).all(axis=(1, 2, 3))


def require_finite(are_finite: Bool[np.ndarray, "b"], first: int) -> None:
  """Raises a ValueError unless all images, of which `first` is the first one's number, are."""
  bad = int(np.count_nonzero(~are_finite))
  if bad:
    raise ValueError(
      f"{bad} of the {len(are_finite)} images from number {first} on are not finite: no picture "
      "and no figure would be right; look at the parameters that were asked for"
    )


class Decoder(flax.struct.PyTreeNode):
  """An autoencoder's way from (scaled) latents to images: a pytree, to be passed to functions.

  Attributes:
    params: its weights.
    network: the autoencoder.
    name: which weights these are; part of the record of figures.
  """

  params: PyTree
  network: Autoencoder = flax.struct.field(pytree_node=False)
  name: str = flax.struct.field(pytree_node=False)

  def output_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
    """[H, W, C] of the images of latents [h, w, c]."""
    sides = (side * self.network.downsampling for side in latent_shape[:2])
    return (*sides, self.network.out_channels)

  def __call__(self, latents: Image) -> Float[Array, "B h w c"]:
    """The images of latents, float32 in about [-1, 1]."""
    images = self.network.apply({"params": self.params}, unscale_latents(latents), method="decode")
    return images.astype(jnp.float32)


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
    if self.rule != "balanced" and not self.num_classes:
      raise ValueError(
        f"sample.labels {self.rule!r} asks for classes, and the model is unconditional "
        "(data.num_classes = 0): leave it at 'balanced'"
      )
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
    guidance: classifier-free guidance of the network's velocity, or an input of the network.
    grid: times 1 = t_0 > ... > t_n = 0, one function evaluation for each interval.
    image_shape: [H, W, C] of what the network sees.
    labels: the class of each image.
    seed: image i depends on (seed, i) alone.
    batch_size: images per compiled call.
    rounding: one of `ROUNDING`, from images to 8 bits.
    mesh: the devices.
    decoder: makes images of latents; None where the network sees pixels.
  """

  network: nn.Module
  step: StepFn
  guidance: SamplingGuidance | GuidanceInput
  grid: tuple[float, ...]
  image_shape: tuple[int, ...]
  labels: Labels
  seed: int
  batch_size: int
  rounding: str
  mesh: Mesh
  decoder: Decoder | None

  def __post_init__(self):
    if self.batch_size < 1 or self.batch_size % self.mesh.size:
      raise ValueError(
        f"sample.batch_size {self.batch_size} is not divisible by {self.mesh.size} devices"
      )
    if self.rounding not in ROUNDING:
      raise ValueError(f"sample.rounding must be one of {sorted(ROUNDING)}, got {self.rounding!r}")

  @property
  def nfe(self) -> int:
    """Steps of the time grid; classifier-free guidance evaluates the network twice in each."""
    return len(self.grid) - 1

  @property
  def output_shape(self) -> tuple[int, ...]:
    """[H, W, C] of the images."""
    return self.decoder.output_shape(self.image_shape) if self.decoder else self.image_shape

  def __call__(
    self, params: PyTree, decoder: Decoder | None, first: Int[Array, ""]
  ) -> tuple[Image, Label]:
    """Images first, ..., first + batch_size - 1 and their labels; to be jitted.

    The decoder is an argument: weights that a jitted function closes over become constants.
    """
    rows = rows_sharding(self.mesh)
    index = jax.lax.with_sharding_constraint(first + jnp.arange(self.batch_size), rows)
    noise, y = jax.vmap(self._noise_and_label)(index)
    velocity = self.guidance.guided(velocity_fn(self.network, params))
    images = sample(self.step, velocity, noise, y, self.grid)
    return (decoder(images) if decoder else images), y

  def levels(self, images: Image) -> Image:
    """Images rounded to the values of 8-bit ones, 0 to 255, in float32."""
    return ROUNDING[self.rounding](images)

  def _noise_and_label(self, index: Int[Array, ""]) -> tuple[Float[Array, "H W C"], Array]:
    key = stream(self.seed, Purpose.SAMPLE_NOISE, index)
    noise = jax.random.normal(key, (math.prod(self.image_shape),)).reshape(self.image_shape)
    return noise, self.labels(stream(self.seed, Purpose.SAMPLE_LABEL, index), index)

  def batches(
    self, params: PyTree, count: int
  ) -> Iterator[tuple[UInt8[np.ndarray, "b H W C"], Int[np.ndarray, "b"]]]:
    """Images 0, ..., count - 1, 8-bit, and their labels, on every host.

    Raises:
      ValueError: if an image is not finite.
    """
    dispatch = functools.partial(self.dispatch, params)
    for first, made in one_ahead(dispatch, range(0, count, self.batch_size)):
      images, labels, are_finite = multihost_utils.process_allgather(made, tiled=True)
      require_finite(are_finite[: count - first], first)
      yield images[: count - first], labels[: count - first]

  def dispatch(self, params: PyTree, first: int) -> tuple[Array, Label, Mask]:
    """Starts to make images first, ..., first + batch_size - 1 by one compiled program.

    Returns:
      The 8-bit images, their labels, and which were finite before rounding; on the devices.
    """
    return self._compiled(params, self.decoder, self.place(first))

  def place(self, first: int) -> Array:
    """A number on all devices."""
    return replicate(self.mesh, np.int32(first))

  @functools.cached_property
  def _compiled(self) -> Callable[[PyTree, Decoder | None, Array], tuple[Array, Label, Mask]]:
    def made(params: PyTree, decoder: Decoder | None, first: Array) -> tuple[Array, Label, Mask]:
      images, labels = self(params, decoder, first)
      return self.levels(images).astype(jnp.uint8), labels, finite(images)

    return jax.jit(made, out_shardings=rows_sharding(self.mesh))


def one_ahead(
  dispatch: Callable[[int], Result], firsts: Iterable[int]
) -> Iterator[tuple[int, Result]]:
  """The result for each number, while the devices are at work on the next one."""
  ahead: tuple[int, Result] | None = None
  for first in firsts:
    done, ahead = ahead, (first, dispatch(first))
    if done:
      yield done
  if ahead:
    yield ahead
