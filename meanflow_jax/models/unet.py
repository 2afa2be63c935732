"""The DDPM++ U-Net (arXiv 2011.13456, appendix H; 2206.00364, appendix C), told two times.

Every level halves the image's sides; the decoder gets back what each layer of the encoder made. The
sum of two branches is divided by sqrt(2), so that it has their variance.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from meanflow_jax.arrays import Image, Label, Time, told
from meanflow_jax.kernels import plain
from meanflow_jax.models.rematerialisation import REMAT
from meanflow_jax.models.torch_layout import Params, Tensors, read_tensors

Condition = Float[Array, "B E"]
Resized = Float[Array, "B h w c"]
Keys = Key[Array, "B"]

DTYPES = ("float32", "bfloat16")
CONDITION = 4  # its width, in units of the network's
GROUPS, GROUP_SIZE = 32, 4  # of a norm: at most, and channels of one at least
MAX_PERIOD = 10_000
HALF = math.sqrt(0.5)
NEARLY_ZERO = 1e-10  # the variance of weights that begin without effect


def _init(scale: float) -> nn.initializers.Initializer:
  """Xavier-uniform, with the variance times `scale`."""
  return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


def _dense(features: int, dtype: str, name: str, *, scale: float = 1.0) -> nn.Dense:
  return nn.Dense(features, dtype=dtype, kernel_init=_init(scale), name=name)


def _conv(features: int, dtype: str, name: str, *, scale: float = 1.0) -> nn.Conv:
  return nn.Conv(features, (3, 3), dtype=dtype, kernel_init=_init(scale), name=name)


def _norm(channels: int, dtype: str, name: str) -> nn.GroupNorm:
  return nn.GroupNorm(_groups(channels), epsilon=1e-6, dtype=dtype, name=name)


def _groups(channels: int) -> int:
  return max(1, min(GROUPS, channels // GROUP_SIZE))


def halved(x: Image) -> Resized:
  """Every second pixel, after the filter (1, 3, 3, 1) / 8 along both sides; zeros around."""
  for axis in (1, 2):
    padded = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)])
    size = x.shape[axis] - 1
    a, b, c, d = (
      jax.lax.slice_in_dim(padded, start, start + size, stride=2, axis=axis) for start in range(4)
    )
    x = (a + 3 * b + 3 * c + d) / 8
  return x


def doubled(x: Image) -> Resized:
  """Twice the pixels, by the filter (1, 3, 3, 1) / 4 along both sides; zeros around."""
  for axis in (1, 2):
    padded = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(4)])
    size = x.shape[axis]
    before, after = (
      jax.lax.slice_in_dim(padded, start, start + size, axis=axis) for start in (0, 2)
    )
    pairs = jnp.stack([3 * x + before, 3 * x + after], axis=axis + 1) / 4
    x = pairs.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])
  return x


def dropped(x: Image, keys: Keys, rate: float) -> Image:
  """Zeros in a share of each row's values, by a key of its own, the others made larger."""
  # Flat draws: counters of several dimensions take XLA:CPU long to compile.
  draw = lambda key: jax.random.bernoulli(key, 1 - rate, (x[0].size,))
  return jnp.where(jax.vmap(draw)(keys).reshape(x.shape), x / (1 - rate), 0)


RESAMPLING = {"down": halved, "": lambda x: x, "up": doubled}


class ResidualBlock(nn.Module):
  """Two convolutions, with the condition added between them, and attention if it has heads."""

  features: int
  resample: str
  num_heads: int
  dropout: float
  dtype: str
  constrain: Callable[[Array], Array]

  @nn.compact
  def __call__(self, x: Image, condition: Condition, keys: Keys | None) -> Resized:
    """From an image [B, H, W, C] to one of `features` channels, halved or doubled."""
    channels, resample = x.shape[-1], RESAMPLING[self.resample]
    hidden = resample(nn.silu(_norm(channels, self.dtype, "norm_in")(x)))
    hidden = _conv(self.features, self.dtype, "conv_in")(hidden)
    shift = self.constrain(_dense(self.features, self.dtype, "condition")(condition))
    hidden = hidden + shift[:, None, None]
    hidden = nn.silu(_norm(self.features, self.dtype, "norm_out")(hidden))
    if keys is not None:
      hidden = dropped(hidden, keys, self.dropout)
    hidden = _conv(self.features, self.dtype, "conv_out", scale=NEARLY_ZERO)(hidden)
    x = resample(x)
    if self.resample or channels != self.features:
      x = _dense(self.features, self.dtype, "skip")(x)
    x = (x + hidden) * HALF
    if self.num_heads:
      x = (x + self._attended(x)) * HALF
    return self.constrain(x)

  def _attended(self, x: Image) -> Image:
    batch, height, width, channels = x.shape
    x = _norm(channels, self.dtype, "attention_norm")(x)
    qkv = _dense(3 * channels, self.dtype, "qkv", scale=0.2)(x)
    mixed = plain.packed(qkv.reshape(batch, height * width, 3 * channels), self.num_heads)
    return _dense(channels, self.dtype, "attention_out", scale=NEARLY_ZERO)(mixed.reshape(x.shape))


class Layer(NamedTuple):
  """Where a residual block stands.

  Attributes:
    name: of its parameters.
    inputs, skipped: channels that go in, and how many of them come from the encoder.
    features: channels that come out.
    level: of what comes out.
    resample: "down", "up" or "".
    attends: whether attention follows.
  """

  name: str
  inputs: int
  skipped: int
  features: int
  level: int
  resample: str
  attends: bool


class UNet(nn.Module):
  """A U-Net over images.

  Attributes:
    width: channels of the first convolution.
    multipliers: channels of each level, in units of the width.
    blocks: residual blocks of a level of the encoder; the decoder has one more.
    attention_at: heights of the images at which blocks attend.
    num_heads: of the attention.
    time_frequencies: sinusoids of a time's embedding.
    dropout: the rate, before the second convolution of each block, for labels that bring keys.
    num_classes: size of the label table without the null class; 0 takes no labels.
    augmentation: how many numbers say how an image was augmented; 0: it is not told.
    dtype: the dtype of computation; the condition, norms' statistics, softmax are float32.
    remat: what the backward pass recomputes: "none", "matmuls": all but convolutions and products
      with weights, "blocks": all but the input of each block.
    constrain: fixes the sharding of activations.
  """

  width: int
  multipliers: tuple[int, ...]
  blocks: int
  attention_at: tuple[int, ...]
  num_heads: int
  time_frequencies: int
  dropout: float
  num_classes: int
  augmentation: int
  dtype: str
  remat: str
  constrain: Callable[[Array], Array] = lambda x: x

  def __post_init__(self):
    for name, choices in (("dtype", DTYPES), ("remat", REMAT)):
      if getattr(self, name) not in choices:
        raise ValueError(f"model.{name} must be one of {choices}, got {getattr(self, name)!r}")
    for name in ("width", "blocks", "num_heads"):
      if getattr(self, name) < 1:
        raise ValueError(f"model.unet.{name} must be at least 1, got {getattr(self, name)}")
    if not self.multipliers or min(self.multipliers) < 1:
      raise ValueError(f"model.unet.multipliers must be 1 or more each, got {self.multipliers}")
    if self.time_frequencies < 4 or self.time_frequencies % 2:
      raise ValueError(
        f"model.unet.time_frequencies must be even and above 2, got {self.time_frequencies}"
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(f"model.unet.dropout must lie in [0, 1), got {self.dropout}")
    self._check_channels()
    super().__post_init__()

  @nn.compact
  def __call__(self, z: Image, t: Time, h: Time, y: Label) -> Image:
    """The average velocity over [t - h, t], float32 of the shape of z.

    Raises:
      ValueError: the image's sides cannot be halved at each level, or labels tell of an
        augmentation that the network is not told of.
    """
    self.check_sides(z.shape[1:])
    condition = self.constrain(self._condition(t, h, y))
    encoder, decoder = self.layers(z.shape[1])
    x = self.constrain(_conv(self.width, self.dtype, "conv_in")(z))
    made = [x]
    for number, layer in enumerate((*encoder, *decoder)):
      x = jnp.concatenate([x, made.pop()], axis=-1) if layer.skipped else x
      x = self._block(layer)(x, condition, self._keys(y, number))
      if number < len(encoder):
        made.append(x)
    x = nn.silu(_norm(x.shape[-1], self.dtype, "norm_out")(x))
    u = _conv(z.shape[-1], self.dtype, "conv_out", scale=NEARLY_ZERO)(x)
    return u.astype(jnp.float32)

  def check_sides(self, image_shape: tuple[int, ...]) -> None:
    """Raises a ValueError if images [H, W, C] cannot be halved at each level."""
    height, columns, _ = image_shape
    part = 2 ** (len(self.multipliers) - 1)
    if height % part or columns % part:
      raise ValueError(
        f"an image of {height} x {columns} is not divisible by {part}, to be halved between "
        f"{len(self.multipliers)} levels (model.unet.multipliers)"
      )

  def layers(self, height: int) -> tuple[list[Layer], list[Layer]]:
    """The blocks of the encoder and of the decoder, in order, for images of a height."""
    encoder = list(self._encoder(height))
    channels = [self.width, *(layer.features for layer in encoder)]
    return encoder, list(self._decoder(height, channels))

  def _encoder(self, height: int) -> Iterator[Layer]:
    channels = self.width
    for level, multiplier in enumerate(self.multipliers):
      name, features = f"encoder_{level}", multiplier * self.width
      if level:
        yield Layer(f"{name}_down", channels, 0, channels, level, "down", False)
      for block in range(self.blocks):
        attends = height >> level in self.attention_at
        yield Layer(f"{name}_block_{block}", channels, 0, features, level, "", attends)
        channels = features

  def _decoder(self, height: int, made: list[int]) -> Iterator[Layer]:
    channels, lowest = made[-1], len(self.multipliers) - 1
    for level in range(lowest, -1, -1):
      name, features = f"decoder_{level}", self.multipliers[level] * self.width
      if level == lowest:
        yield Layer(f"{name}_in_0", channels, 0, channels, level, "", True)
        yield Layer(f"{name}_in_1", channels, 0, channels, level, "", False)
      else:
        yield Layer(f"{name}_up", channels, 0, channels, level, "up", False)
      for block in range(self.blocks + 1):
        skipped = made.pop()
        attends = block == self.blocks and height >> level in self.attention_at
        inputs = channels + skipped
        yield Layer(f"{name}_block_{block}", inputs, skipped, features, level, "", attends)
        channels = features

  def forward_flops(self, image_shape: tuple[int, ...]) -> int:
    """Floating-point operations of one image's convolutions and matrix products, forward."""
    height, columns, channels = image_shape
    pixels, wide = height * columns, CONDITION * self.width
    encoder, decoder = self.layers(height)
    total = 2 * self.time_frequencies * wide + wide**2
    total += pixels * 9 * channels * (self.width + decoder[-1].features)
    for layer in (*encoder, *decoder):
      of_level = pixels >> 2 * layer.level
      total += of_level * 9 * (layer.inputs + layer.features) * layer.features
      total += wide * layer.features
      if layer.resample or layer.inputs != layer.features:
        total += of_level * layer.inputs * layer.features
      if layer.attends:
        total += of_level * (4 * layer.features**2 + 2 * of_level * layer.features)
    return 2 * total

  def _condition(self, t: Time, h: Time, y: Label) -> Condition:
    """SiLU of what both times, class and augmentation add up to, the input of every block."""
    size = 2 * self.time_frequencies
    x = jnp.concatenate([sinusoids(time, self.time_frequencies) for time in (t, h)], axis=1)
    if self.num_classes:
      init = nn.initializers.normal(0.2)
      table = nn.Embed(self.num_classes + 1, size, embedding_init=init, name="label_embedder")
      x += table(told(y).label)
    changes = told(y).augmentation
    if self.augmentation:
      none = jnp.zeros((t.shape[0], self.augmentation))
      embedder = nn.Dense(
        size, use_bias=False, kernel_init=_init(1.0), name="augmentation_embedder"
      )
      x += embedder(none if changes is None else changes)
    elif changes is not None:
      raise ValueError("the images are augmented, of which the network is not told")
    wide = CONDITION * self.width
    for name in ("condition_hidden", "condition_out"):
      x = nn.silu(self.constrain(_dense(wide, "float32", name)(x)))
    return x.astype(self.dtype)

  def _keys(self, y: Label, number: int) -> Keys | None:
    """For the dropout of a block, from those of the rows."""
    keys = told(y).dropout
    if keys is None or not self.dropout:
      return None
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)

  def _block(self, layer: Layer) -> ResidualBlock:
    """A block that keeps for the backward pass what `remat` says."""
    block = ResidualBlock
    if self.remat == "blocks":
      block = nn.remat(ResidualBlock)
    if self.remat == "matmuls":
      block = nn.remat(ResidualBlock, policy=_is_product)
    return block(
      features=layer.features,
      resample=layer.resample,
      num_heads=self.num_heads if layer.attends else 0,
      dropout=self.dropout,
      dtype=self.dtype,
      constrain=self.constrain,
      name=layer.name,
    )

  def _check_channels(self) -> None:
    """Norms take whole groups, attention whole heads."""
    encoder, decoder = self.layers(1)
    for layer in (*encoder, *decoder):
      for channels in (layer.inputs, layer.features):
        if channels % (groups := _groups(channels)):
          raise ValueError(
            f"{channels} channels ({layer.name}) do not divide into {groups} groups of a norm: "
            f"choose another model.unet.width than {self.width}, a multiple of 32, say"
          )
      if layer.features % self.num_heads:
        raise ValueError(
          f"{layer.features} channels ({layer.name}) do not divide into model.unet.num_heads "
          f"{self.num_heads}"
        )


def sinusoids(time: Time, size: int) -> Float[Array, "B F"]:
  """sin and cos of times at `size` / 2 frequencies from 1 to 1 / 10000, both ends included."""
  half = size // 2
  frequencies = MAX_PERIOD ** -(jnp.arange(half, dtype=jnp.float32) / (half - 1))
  angles = time[:, None] * frequencies[None]
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


def _is_product(primitive: object, *args: object, **params: object) -> bool:
  """Whether a result is kept for the backward pass: of a convolution or a product with weights."""
  dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return primitive is jax.lax.conv_general_dilated_p or dots(primitive, *args, **params)


# The PyTorch layout of the published networks; levels are named by their height.

NETWORK = {
  "conv_in": "enc.{0}x{0}_conv",
  "norm_out": "dec.{0}x{0}_aux_norm",
  "conv_out": "dec.{0}x{0}_aux_conv",
  "condition_hidden": "map_layer0",
  "condition_out": "map_layer1",
  "augmentation_embedder": "map_augment",
}
BLOCK = {
  "norm_in": "norm0",
  "conv_in": "conv0",
  "condition": "affine",
  "norm_out": "norm1",
  "conv_out": "conv1",
  "skip": "skip",
  "attention_norm": "norm2",
  "qkv": "qkv",
  "attention_out": "proj",
}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# The sets of weights in the published trainer's files, by their prefixes, and what else is there.
SETS = {
  "net": "params",
  "net_ema": "ema_0.9999",
  "net_ema1": "ema_0.99995",
  "net_ema2": "ema_0.9996",
}
BUFFERS = ("num_updates", "resample_filter")


def sets_from_torch(tensors: Tensors, name: str) -> dict[str, Tensors]:
  """The sets of weights among the tensors of a file: network and averages, or one set alone.

  Args:
    tensors: by name, below the prefix of their set where there are several.
    name: of the set, where there is one.
  """
  weights = {key: x for key, x in tensors.items() if key.rpartition(".")[2] not in BUFFERS}
  if not all(key.partition(".")[0] in SETS for key in weights):
    return {name: weights}
  sets: dict[str, dict[str, np.ndarray]] = {}
  for key, x in weights.items():
    prefix, _, rest = key.partition(".")
    sets.setdefault(SETS[prefix], {})[rest] = x
  return sets


def params_from_torch(network: UNet, image_shape: tuple[int, ...], tensors: Tensors) -> Params:
  """The network's parameters, from tensors with the names of the PyTorch layout.

  Args:
    network: without classes.
    image_shape: [H, W, C]; the names tell of heights.
    tensors: theirs, by name.

  Raises:
    ValueError: if a tensor is missing, too many or of another shape; lists their names.
  """
  image, time = jnp.zeros((1, *image_shape)), jnp.zeros((1,))
  label = jnp.zeros((1,), jnp.int32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image, time, time, label)["params"]
  matrices = {name: x[:, :, 0, 0] if x.shape[2:] == (1, 1) else x for name, x in tensors.items()}
  return read_tensors(shapes, matrices, lambda path: _torch_name(path, image_shape[0]))


def _torch_name(path: str, height: int) -> str:
  *block, module, leaf = path.split("/")
  if not block:
    return f"{NETWORK[module].format(height)}.{LEAVES[leaf]}"
  part, level, kind, *number = block[0].split("_")
  side = height >> int(level)
  return f"{part[:3]}.{side}x{side}_{kind}{''.join(number)}.{BLOCK[module]}.{LEAVES[leaf]}"
