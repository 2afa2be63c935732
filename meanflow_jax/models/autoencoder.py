"""Stable Diffusion's autoencoder (arXiv 2112.10752).

The architecture is that of AutoencoderKL in Hugging Face's diffusers, whose published weights
(stabilityai/sd-vae-ft-mse and -ema) it takes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meanflow_jax.arrays import Image, PRNGKey
from meanflow_jax.kernels.plain import attention
from meanflow_jax.models.torch_layout import Params, Tensors, read_tensors, renamed

# Latents have about unit variance once multiplied by it (arXiv 2112.10752, appendix G).
SCALE_FACTOR = 0.18215

DTYPES = ("float32", "bfloat16")
EPSILON = 1e-6
LOG_VARIANCE = (-30.0, 20.0)

# The parts of the parameters that decoding reads.
DECODING = ("decoder", "post_quant_conv")

# Of another height, width and number of channels than the Image that goes in.
Other = Float[Array, "B h w c"]


def scale_latents(latents: Image) -> Image:
  """What the autoencoder encodes to -> what generators learn."""
  return latents * SCALE_FACTOR


def unscale_latents(latents: Image) -> Image:
  """What generators make -> what the autoencoder decodes."""
  return latents / SCALE_FACTOR


def sample_latent(key: PRNGKey, mean: Image, std: Image) -> Image:
  """Draws (unscaled) latents of encoded images."""
  # Drawn flat, the same numbers compile in a fraction of the time on CPUs.
  noise = jax.random.normal(key, (mean.size,), mean.dtype).reshape(mean.shape)
  return mean + std * noise


def _conv(features: int, dtype: str, name: str, size: int = 3, **settings: Any) -> nn.Conv:
  padding = settings.pop("padding", size // 2)
  return nn.Conv(features, (size, size), padding=padding, dtype=dtype, name=name, **settings)


def _norm(groups: int, dtype: str, name: str) -> nn.GroupNorm:
  # Variance as the mean of squared deviations: the squares of large means would drown it.
  return nn.GroupNorm(groups, epsilon=EPSILON, use_fast_variance=False, dtype=dtype, name=name)


class ResnetBlock(nn.Module):
  """Two convolutions beside a shortcut."""

  channels: int
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Image) -> Other:
    """Changes the number of channels, where it differs, in the first convolution."""
    h = nn.silu(_norm(self.groups, self.dtype, "norm1")(x))
    h = _conv(self.channels, self.dtype, "conv1")(h)
    h = nn.silu(_norm(self.groups, self.dtype, "norm2")(h))
    h = _conv(self.channels, self.dtype, "conv2")(h)
    if x.shape[-1] != self.channels:
      x = _conv(self.channels, self.dtype, "shortcut", size=1)(x)
    return x + h


class AttentionBlock(nn.Module):
  """Self-attention of one head over all places of an image."""

  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Image) -> Image:
    """Mixes places."""
    batch, height, width, channels = x.shape
    h = _norm(self.groups, self.dtype, "norm")(x).reshape(batch, height * width, channels)
    dense = lambda name: nn.Dense(channels, dtype=self.dtype, name=name)
    q, k, v = (dense(name)(h)[:, :, None] for name in ("to_q", "to_k", "to_v"))
    return x + dense("to_out")(attention(q, k, v)[:, :, 0]).reshape(x.shape)


class MidBlock(nn.Module):
  """Attention between two residual blocks, at the lowest resolution."""

  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Image) -> Image:
    """Keeps the shape."""
    x = ResnetBlock(x.shape[-1], self.groups, self.dtype, name="resnet_0")(x)
    x = AttentionBlock(self.groups, self.dtype, name="attention")(x)
    return ResnetBlock(x.shape[-1], self.groups, self.dtype, name="resnet_1")(x)


class DownBlock(nn.Module):
  """Residual blocks, then half the resolution."""

  channels: int
  layers: int
  last: bool
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Image) -> Other:
    """The last block of the encoder keeps the resolution."""
    for i in range(self.layers):
      x = ResnetBlock(self.channels, self.groups, self.dtype, name=f"resnet_{i}")(x)
    if self.last:
      return x
    ends = ((0, 1), (0, 1))  # the published weights were trained with zeros on these sides only
    return _conv(self.channels, self.dtype, "downsample", strides=2, padding=ends)(x)


class UpBlock(nn.Module):
  """Residual blocks, then twice the resolution."""

  channels: int
  layers: int
  last: bool
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Image) -> Other:
    """The last block of the decoder keeps the resolution."""
    for i in range(self.layers):
      x = ResnetBlock(self.channels, self.groups, self.dtype, name=f"resnet_{i}")(x)
    if self.last:
      return x
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    return _conv(self.channels, self.dtype, "upsample")(x)


class Encoder(nn.Module):
  """Images -> mean and logarithm of the variance of latents, side by side."""

  block_channels: tuple[int, ...]
  layers: int
  latent_channels: int
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Image) -> Other:
    """Halves the resolution after every block but the last."""
    x = _conv(self.block_channels[0], self.dtype, "conv_in")(x)
    for i, channels in enumerate(self.block_channels):
      last = i == len(self.block_channels) - 1
      x = DownBlock(channels, self.layers, last, self.groups, self.dtype, name=f"down_{i}")(x)
    x = MidBlock(self.groups, self.dtype, name="mid")(x)
    x = nn.silu(_norm(self.groups, self.dtype, "norm_out")(x))
    return _conv(2 * self.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
  """Latents -> images; the encoder's blocks in reverse, each with one layer more."""

  block_channels: tuple[int, ...]
  layers: int
  channels: int
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Image) -> Other:
    """Doubles the resolution after every block but the last."""
    x = _conv(self.block_channels[-1], self.dtype, "conv_in")(x)
    x = MidBlock(self.groups, self.dtype, name="mid")(x)
    for i, channels in enumerate(reversed(self.block_channels)):
      last = i == len(self.block_channels) - 1
      x = UpBlock(channels, self.layers + 1, last, self.groups, self.dtype, name=f"up_{i}")(x)
    x = nn.silu(_norm(self.groups, self.dtype, "norm_out")(x))
    return _conv(self.channels, self.dtype, "conv_out")(x)


class Autoencoder(nn.Module):
  """Stable Diffusion's AutoencoderKL.

  `network.apply({"params": params}, images, method="encode")`, likewise "decode". Latents here are
  unscaled (see `scale_latents`).

  Attributes:
    in_channels, out_channels: of images.
    latent_channels: of latents.
    block_channels: per block of the encoder; each but the last halves the resolution.
    layers: residual blocks per block.
    groups: of the norms.
    dtype: the dtype of computation; parameters, norms' statistics and softmax are float32.
  """

  in_channels: int
  out_channels: int
  latent_channels: int
  block_channels: tuple[int, ...]
  layers: int
  groups: int
  dtype: str

  def __post_init__(self):
    if self.dtype not in DTYPES:
      raise ValueError(f"the autoencoder's dtype must be one of {DTYPES}, got {self.dtype!r}")
    super().__post_init__()

  @property
  def downsampling(self) -> int:
    """Pixels per latent, along a side."""
    return 2 ** (len(self.block_channels) - 1)

  def setup(self):
    """Encoder, decoder, and a linear map of latents after the one and before the other."""
    blocks, common = (tuple(self.block_channels), self.layers), (self.groups, self.dtype)
    self.encoder = Encoder(*blocks, self.latent_channels, *common)
    self.decoder = Decoder(*blocks, self.out_channels, *common)
    self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
    self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

  def encode(self, images: Image) -> tuple[Other, Other]:
    """Mean and standard deviation of the latents of images in [-1, 1], in float32.

    Raises:
      ValueError: if the images' sides are not divisible by `downsampling`.
    """
    if images.shape[1] % self.downsampling or images.shape[2] % self.downsampling:
      raise ValueError(
        f"an image of {images.shape[1]} x {images.shape[2]} is not divisible by {self.downsampling}"
      )
    moments = self.quant_conv(self.encoder(images)).astype(jnp.float32)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(0.5 * jnp.clip(log_variance, *LOG_VARIANCE))

  def decode(self, latents: Image) -> Other:
    """Images, about in [-1, 1] (not clipped), in float32."""
    return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

  def __call__(self, images: Image) -> Image:
    """Images as the autoencoder reconstructs them from the mean of their latents."""
    return self.decode(self.encode(images)[0])


# Reading what is published.

# What a key left out of config.json means.
DEFAULTS = {
  "in_channels": 3,
  "out_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 1,
  "norm_num_groups": 32,
}
# Keys that change the architecture or its use, and their only value that is implemented.
FIXED = {
  "act_fn": "silu",
  "mid_block_add_attention": True,
  "scaling_factor": SCALE_FACTOR,
  "shift_factor": None,
  "use_post_quant_conv": True,
  "use_quant_conv": True,
}
BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

# Parts of our parameters' paths ("down_0/resnet_1/conv1/kernel") that PyTorch calls otherwise.
TORCH_NAMES = {
  "down": "down_blocks",
  "up": "up_blocks",
  "mid": "mid_block",
  "resnet": "resnets",
  "attention": "attentions.0",
  "norm": "group_norm",
  "norm_out": "conv_norm_out",
  "shortcut": "conv_shortcut",
  "downsample": "downsamplers.0.conv",
  "upsample": "upsamplers.0.conv",
  "to_out": "to_out.0",
  "kernel": "weight",
  "scale": "weight",
}
# Names of the attention in older files, such as the published ones.
OLD_NAMES = {
  "attentions.0.query.": "attentions.0.to_q.",
  "attentions.0.key.": "attentions.0.to_k.",
  "attentions.0.value.": "attentions.0.to_v.",
  "attentions.0.proj_attn.": "attentions.0.to_out.0.",
}


def from_config(config: Mapping[str, Any], dtype: str) -> Autoencoder:
  """The network that a published config.json describes.

  Raises:
    ValueError: if it describes another architecture, or leaves out the blocks' channels.
  """
  if "block_out_channels" not in config:
    raise ValueError("the autoencoder's config has no block_out_channels")
  for key, value in FIXED.items():
    if config.get(key, value) != value:
      raise ValueError(f"the autoencoder's {key} must be {value!r}, got {config[key]!r}")
  for key, kind in BLOCK_TYPES.items():
    if set(config.get(key, ())) - {kind}:
      raise ValueError(f"the autoencoder's {key} must all be {kind!r}, got {config[key]!r}")
  sizes = DEFAULTS | {key: config[key] for key in DEFAULTS if key in config}
  return Autoencoder(
    in_channels=sizes["in_channels"],
    out_channels=sizes["out_channels"],
    latent_channels=sizes["latent_channels"],
    block_channels=tuple(config["block_out_channels"]),
    layers=sizes["layers_per_block"],
    groups=sizes["norm_num_groups"],
    dtype=dtype,
  )


def params_from_torch(network: Autoencoder, tensors: Tensors) -> Params:
  """The network's parameters, from tensors with the published names.

  Raises:
    ValueError: if a tensor is missing, too many or of another shape; lists their names.
  """
  side = network.downsampling
  image = jax.ShapeDtypeStruct((1, side, side, network.in_channels), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
  return read_tensors(shapes, renamed(tensors, OLD_NAMES), _torch_name)


def _torch_name(path: str) -> str:
  parts = []
  for part in path.split("/"):
    name, _, index = part.rpartition("_")
    name, suffix = (name, f".{index}") if index.isdigit() else (part, "")
    parts.append(TORCH_NAMES.get(name, name) + suffix)
  return ".".join(parts)
