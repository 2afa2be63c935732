"""From `config.model` to a network."""

import functools
import logging
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from meanflow_jax.kernels import attention
from meanflow_jax.models.dit import DiT
from meanflow_jax.models.in_context_dit import InContextDiT
from meanflow_jax.models.unet import UNet
from meanflow_jax.runtime.mesh import FSDP, constrain_rows

# The networks by model.name.
KINDS = {"dit": DiT, "in_context_dit": InContextDiT, "unet": UNet}

_log = logging.getLogger(__name__)


def make(config: ConfigDict, mesh: Mesh, *, told: int) -> nn.Module:
  """The network of `config.model` for the images of `config.data`.

  Args:
    config: of the run.
    mesh: the devices that it runs on.
    told: how many numbers say how an image was augmented.

  Raises:
    ValueError: an unknown network; sizes that do not fit the image, each other or the mesh; an
      augmentation that it cannot be told of.
  """
  make = _unet if kind(config) is UNet else _transformer
  made = make(config, mesh, told)
  if made.width % mesh.shape[FSDP]:
    key = "model.unet.width" if config.model.name == "unet" else "model.width"
    raise ValueError(
      f"mesh.fsdp {mesh.shape[FSDP]} does not divide {key} {made.width}, so that the layers could "
      "not be spread evenly: set it to a divisor"
    )
  return made


def kind(config: ConfigDict) -> type[nn.Module]:
  """The class of `config.model.name`.

  Raises:
    ValueError: there is none of that name.
  """
  name = config.model.name
  if name not in KINDS:
    raise ValueError(f"model.name must be one of {sorted(KINDS)}, got {name!r}")
  return KINDS[name]


def keys(config: ConfigDict) -> dict[str, Any]:
  """The keys of `config.model` that its network is made of; those of its own section go first."""
  fields = kind(config).__dataclass_fields__
  found = config.model.to_dict()
  found |= found.get(found.pop("name"), {})
  return {key: value for key, value in found.items() if key in fields and key != "attention"}


def heads(network: type[nn.Module]) -> tuple[str, ...]:
  """The velocities that a network computes."""
  return getattr(network, "HEADS", ("u",))


def _transformer(config: ConfigDict, mesh: Mesh, told: int) -> DiT | InContextDiT:
  model, data = config.model, config.data
  if told:
    raise ValueError(
      f"a network must be told how images were augmented, and model.name {model.name!r} takes no "
      "such label, but 'unet' does: otherwise set augmentation.probability to 0 and "
      "augmentation.flip to False"
    )
  if model.patch_size < 1 or data.image_size % model.patch_size:
    raise ValueError(
      f"data.image_size {data.image_size} is not divisible by model.patch_size {model.patch_size}"
    )
  fixed = {"num_classes": data.num_classes, "constrain": constrain_rows(mesh)}
  made = kind(config)(**keys(config), **fixed)
  fused = _fused_attention(config, mesh, made.tokens(data.image_size))
  if fused is None:
    return made
  return made.clone(attention=fused.packed if isinstance(made, DiT) else fused.turned)


def _fused_attention(config: ConfigDict, mesh: Mesh, tokens: int) -> attention.Fused | None:
  """What `config.model.attention` is on the devices of a mesh; the log says why it is plain."""
  model, platform = config.model, attention.platform_of(mesh.devices.flat[0])
  chosen, reason = attention.choose(
    model.attention,
    platform,
    tokens=tokens,
    heads=model.num_heads,
    size=model.width // model.num_heads,
    dtype=model.dtype,
  )
  if reason:
    _say_once(reason)
  return None if chosen == "plain" else attention.Fused(mesh, platform=platform)


@functools.cache
def _say_once(message: str) -> None:
  _log.warning(message)


def _unet(config: ConfigDict, mesh: Mesh, told: int) -> UNet:
  data = config.data
  made = UNet(
    **keys(config),
    num_classes=data.num_classes,
    augmentation=told,
    constrain=constrain_rows(mesh),
  )
  made.check_sides((data.image_size, data.image_size, data.channels))
  return made
