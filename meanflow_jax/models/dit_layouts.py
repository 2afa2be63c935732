"""The DiT's parameters under the names and axes that other implementations give them.

All of them hold the same network with (t, h = t - r) embedded and sine-cosine positions added:

- our own files: the path of a parameter, "blocks/attention/qkv/kernel", layers stacked;
- MeanFlow's reference in Flax (arXiv 2505.13447): names below "net/", one tensor per layer;
- SiT (arXiv 2401.08740) in PyTorch, as the public re-implementations of MeanFlow extend it: their
  `r_embedder` is given t - r, and so is our `h_embedder`.

Names and shapes do not tell the number of heads, which way time runs, nor what is predicted.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from meanflow_jax.models.dit import DiT
from meanflow_jax.models.embeddings import MAX_PERIOD, sincos_positions
from meanflow_jax.models.torch_layout import (
  FLAX_AXES,
  TORCH_AXES,
  Axes,
  Params,
  Tensors,
  read_tensors,
)

MEANFLOW_NAMES = {
  "patch_embedder": "net/x_embedder/proj",
  "t_embedder/hidden": "net/t_embedder/mlp/layers_0/_flax_linear",
  "t_embedder/out": "net/t_embedder/mlp/layers_2/_flax_linear",
  "h_embedder/hidden": "net/h_embedder/mlp/layers_0/_flax_linear",
  "h_embedder/out": "net/h_embedder/mlp/layers_2/_flax_linear",
  "label_embedder": "net/y_embedder/embedding_table/_flax_embedding",
  "blocks/modulation": "net/blocks/layers_{}/adaLN_modulation/layers_1/_flax_linear",
  "blocks/attention/qkv": "net/blocks/layers_{}/attn/qkv/_flax_linear",
  "blocks/attention/out": "net/blocks/layers_{}/attn/proj/_flax_linear",
  "blocks/mlp_in": "net/blocks/layers_{}/mlp/fc1/_flax_linear",
  "blocks/mlp_out": "net/blocks/layers_{}/mlp/fc2/_flax_linear",
  "final_modulation": "net/final_layer/adaLN_modulation/layers_1/_flax_linear",
  "final": "net/final_layer/linear/_flax_linear",
}
SIT_NAMES = {
  "patch_embedder": "x_embedder.proj",
  "t_embedder/hidden": "t_embedder.mlp.0",
  "t_embedder/out": "t_embedder.mlp.2",
  "h_embedder/hidden": "r_embedder.mlp.0",
  "h_embedder/out": "r_embedder.mlp.2",
  "label_embedder": "y_embedder.embedding_table",
  "blocks/modulation": "blocks.{}.adaLN_modulation.1",
  "blocks/attention/qkv": "blocks.{}.attn.qkv",
  "blocks/attention/out": "blocks.{}.attn.proj",
  "blocks/mlp_in": "blocks.{}.mlp.fc1",
  "blocks/mlp_out": "blocks.{}.mlp.fc2",
  "final_modulation": "final_layer.adaLN_modulation.1",
  "final": "final_layer.linear",
}
POSITIONS = "pos_embed"
# What a flow-matching file may hold beside its network: heads that only its training used.
TRAINING_ONLY = "projectors."

# An average of a constant drifts by rounding, and half precision keeps three digits; a table of
# other positions differs by about 1.
_POSITIONS_TOLERANCE = 5e-3


def to_paths(params: Params) -> dict[str, Array | np.ndarray]:
  """The parameters by path, as our own files hold them."""
  return traverse_util.flatten_dict(params, sep="/")


def from_paths(network: nn.Module, image_shape: tuple[int, ...], tensors: Tensors) -> Params:
  """Undoes `to_paths`, for a network that sees images [H, W, C].

  Raises:
    ValueError: a tensor is missing, too many or of another shape; lists their names.
  """
  return read_tensors(_shapes(network, image_shape), tensors, lambda path: path, FLAX_AXES)


def from_meanflow(network: DiT, image_shape: tuple[int, ...], tensors: Tensors) -> Params:
  """The parameters from those of MeanFlow's reference, by path ("net/x_embedder/proj/kernel").

  Raises:
    ValueError: as `from_paths`, or the network is not the reference's.
  """
  name = lambda path: "/".join(_renamed(path, MEANFLOW_NAMES))
  return _read(network, image_shape, tensors, name, FLAX_AXES)


def from_sit(network: DiT, image_shape: tuple[int, ...], tensors: Tensors) -> Params:
  """The parameters from a PyTorch state dict of a SiT with two time embedders.

  A table of positions among the tensors is compared with ours, and left out.

  Raises:
    ValueError: as `from_meanflow`, or the positions are others than ours.
  """
  leaves = {"kernel": "weight", "embedding": "weight", "bias": "bias"}

  def name(path: str) -> str:
    layer, leaf = _renamed(path, SIT_NAMES)
    return f"{layer}.{leaves[leaf]}"

  used = dict(tensors)
  if POSITIONS in used:
    _check_positions(network, image_shape, used.pop(POSITIONS))
  return _read(network, image_shape, used, name, TORCH_AXES)


def from_flow_matching(
  network: DiT,
  image_shape: tuple[int, ...],
  tensors: Tensors,
  *,
  noise_at: int,
  initial: Params,
) -> Params:
  """The parameters from a SiT that has learned the velocity at one time: u(z, r, t) = v(z, t).

  This is exact for straight paths between data and noise, times in [0, 1] and a velocity per unit
  of time. The second time embedder gets no effect until trained: its last layer is zero, its first
  one `initial`. Of outputs with a variance (twice the channels) the first half is kept, and heads
  that only training used (`TRAINING_ONLY`) are left out. Where noise is at time 0, the velocity is
  negated and time turned round, inside the first layer of the time embedder: the sinusoids of 1 - t
  are a rotation of those of t.

  A network that predicts noise (DiT), or is given times up to 1000, has the same names and shapes.
  It comes out as a starting point, not as the same function.

  Args:
    network: what is to have the parameters.
    image_shape: [H, W, C] of what it sees.
    tensors: PyTorch's, by name.
    noise_at: the time at which the file's network was trained on pure noise: 0 (SiT's own code) or
      1 (ours).
    initial: parameters before training.

  Raises:
    ValueError: as `from_sit`, or the file has a second time embedder.
  """
  second = [name for name in tensors if name.startswith("r_embedder.")]
  if second:
    raise ValueError(f"no flow-matching network: it has a second time embedder, {sorted(second)}")
  used = {name: x for name, x in tensors.items() if not name.startswith(TRAINING_ONLY)}
  used |= _without_effect(initial["h_embedder"]["hidden"])
  final = [
    name for name in ("final_layer.linear.weight", "final_layer.linear.bias") if name in used
  ]
  for name in final:
    used[name] = _first_half(used[name], network.patch_size**2, image_shape[-1])
  if noise_at == 0:
    used |= {name: -np.asarray(used[name], np.float32) for name in final}
    first = "t_embedder.mlp.0.weight"
    if first in used and used[first].shape == (network.width, network.time_frequencies):
      used[first] = time_reversed(used[first])
  return from_sit(network, image_shape, used)


def time_reversed(weight: Float[np.ndarray, "E F"]) -> Float[np.ndarray, "E F"]:
  """A layer after the sinusoids of a time t, for the sinusoids of 1 - t before it.

  cos(f - f t) = cos f cos(f t) + sin f sin(f t), and likewise the sine.
  """
  cos, sin = np.split(np.asarray(weight, np.float64), 2, axis=1)
  half = cos.shape[1]
  f = MAX_PERIOD ** (-np.arange(half) / half)[None]
  parts = cos * np.cos(f) + sin * np.sin(f), cos * np.sin(f) - sin * np.cos(f)
  return np.concatenate(parts, axis=1).astype(np.float32)


def _without_effect(hidden: Params) -> dict[str, np.ndarray]:
  kernel, width = np.asarray(hidden["kernel"]), hidden["bias"].shape[0]
  return {
    "r_embedder.mlp.0.weight": kernel.T,
    "r_embedder.mlp.0.bias": np.asarray(hidden["bias"]),
    "r_embedder.mlp.2.weight": np.zeros((width, width), np.float32),
    "r_embedder.mlp.2.bias": np.zeros(width, np.float32),
  }


def _first_half(x: np.ndarray, places: int, channels: int) -> np.ndarray:
  """Rows (place, channel) of the final layer without those of the variance, if there are any."""
  if x.shape[:1] != (places * 2 * channels,):
    return x
  rows = x.reshape(places, 2 * channels, *x.shape[1:])[:, :channels]
  return rows.reshape(places * channels, *x.shape[1:])


def _renamed(path: str, names: Mapping[str, str]) -> tuple[str, str]:
  layer, _, leaf = path.rpartition("/")
  return names[layer], leaf


def _shapes(network: nn.Module, image_shape: tuple[int, ...]) -> Params:
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  time = jax.ShapeDtypeStruct((1,), jnp.float32)
  label = jax.ShapeDtypeStruct((1,), jnp.int32)
  return jax.eval_shape(network.init, jax.random.key(0), image, time, time, label)["params"]


def _read(
  network: DiT,
  image_shape: tuple[int, ...],
  tensors: Tensors,
  name: Callable[[str], str],
  axes: Axes,
) -> Params:
  """Reads parameters of which one is a convolution's kernel elsewhere."""
  if set(network.conditioning) != {"t", "h"} or network.positions != "sincos":
    raise ValueError(
      "such files hold networks with model.conditioning ('t', 'h') and model.positions 'sincos', "
      f"not {network.conditioning} and {network.positions!r}"
    )
  shapes = _shapes(network, image_shape)
  ours = shapes["patch_embedder"]["kernel"]
  p, channels = network.patch_size, image_shape[-1]
  shapes["patch_embedder"]["kernel"] = jax.ShapeDtypeStruct(
    (p, p, channels, network.width), ours.dtype
  )
  params = read_tensors(shapes, tensors, name, axes)
  params["patch_embedder"]["kernel"] = params["patch_embedder"]["kernel"].reshape(ours.shape)
  return params


def _check_positions(network: DiT, image_shape: tuple[int, ...], theirs: np.ndarray) -> None:
  rows, columns = (side // network.patch_size for side in image_shape[:2])
  ours = sincos_positions(rows, columns, network.width)[None]
  if theirs.shape != ours.shape:
    what = f"has the shape {theirs.shape} instead of {ours.shape}"
  else:
    difference = np.max(np.abs(np.asarray(theirs, np.float32) - ours))
    if difference <= _POSITIONS_TOLERANCE:
      return
    what = f"differs by up to {difference:.2g}"
  raise ValueError(
    f"{POSITIONS} is not the sine-cosine table of {rows} x {columns} positions that this network "
    f"adds: it {what}"
  )
