"""The in-context DiT's parameters under the names of improved MeanFlow's reference in Flax.

The reference (arXiv 2512.02012) has one tensor per layer, names below "net/", queries, keys and
values apart, and turns neighbouring features of a head by rotary positions. Here the three are one
product, as are the two that enter the perceptron, and the halves of a head are turned: the same
function, with the features of queries and keys in another order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from meanflow_jax.models.in_context_dit import InContextDiT
from meanflow_jax.models.torch_layout import FLAX_AXES, Params, Tensors, read_tensors

STACKS = {"trunk": "shared_blocks", "u_blocks": "u_heads", "v_blocks": "v_heads"}
# Layers of a block, with what is one array here apart.
BLOCK = {
  "q/kernel": "attn/q_proj/_flax_linear/kernel",
  "k/kernel": "attn/k_proj/_flax_linear/kernel",
  "v/kernel": "attn/v_proj/_flax_linear/kernel",
  "q_norm/scale": "attn/q_norm/kernel",
  "k_norm/scale": "attn/k_norm/kernel",
  "attention_out/kernel": "attn/out_proj/_flax_linear/kernel",
  "attention_norm/scale": "norm1/kernel",
  "attention_gate": "attn_scale",
  "gate/kernel": "mlp/w1/_flax_linear/kernel",
  "hidden/kernel": "mlp/w3/_flax_linear/kernel",
  "mlp_out/kernel": "mlp/w2/_flax_linear/kernel",
  "mlp_norm/scale": "norm2/kernel",
  "mlp_gate": "mlp_scale",
}
HEAD_END = "net/v_final_layer/"
JOINED = {"qkv/kernel": ("q", "k", "v"), "mlp_in/kernel": ("gate", "hidden")}
EMBEDDERS = {"omega": "omega", "t_min": "cfg_t_start", "t_max": "cfg_t_end", "h": "h"}
EMBEDDER_LAYERS = {"hidden": "layers_0", "out": "layers_2"}
TOKENS = {"label": "class", "omega": "omega", "t_min": "t_min", "t_max": "t_max", "h": "time"}
ENDS = {
  "patch_embedder/kernel": "x_embedder/proj/kernel",
  "patch_embedder/bias": "x_embedder/proj/bias",
  "label_embedder/embedding": "y_embedder/embedding_table/_flax_embedding/embedding",
}


def from_imeanflow(
  network: InContextDiT,
  image_shape: tuple[int, ...],
  tensors: Tensors,
  initial: Callable[[], Params] | None = None,
) -> Params:
  """The parameters from those of improved MeanFlow's reference, by path ("net/time_tokens").

  Args:
    network: what is to have them.
    image_shape: [H, W, C] of what it sees.
    tensors: theirs.
    initial: makes the parameters before training, of which the auxiliary head takes its own where
      the file is for sampling alone (`lacks_head`).

  Raises:
    ValueError: a tensor is missing, too many or of another shape; lists their names. The network is
      told other times than h, or adds positions, which the reference's does not.
  """
  if tuple(network.conditioning) != ("h",) or network.positions != "none":
    raise ValueError(
      "such files hold networks with model.conditioning ('h',) and model.positions 'none', not "
      f"{network.conditioning} and {network.positions!r}"
    )
  shapes = _shapes(network, image_shape)
  anew: Params = {}
  if initial is not None and lacks_head(tensors):
    before = initial()
    anew = {name: before[name] for name in network.TRAINING_ONLY}
    shapes = {path: x for path, x in shapes.items() if path.partition("/")[0] not in anew}
    tensors = {name: x for name, x in tensors.items() if not name.startswith(HEAD_END)}
  found = read_tensors(_apart(network, shapes, image_shape), tensors, _their_name, FLAX_AXES)
  parts = traverse_util.flatten_dict(found, sep="/")
  size = network.width // network.num_heads
  for path in parts:
    if path.endswith(("/q/kernel", "/k/kernel", "/q_norm/scale", "/k_norm/scale")):
      parts[path] = _halves(parts[path], size)
  params = {path: _joined(path, parts) for path in shapes}
  params["patch_embedder/kernel"] = params["patch_embedder/kernel"].reshape(
    shapes["patch_embedder/kernel"].shape
  )
  return traverse_util.unflatten_dict(params, sep="/") | anew


def lacks_head(tensors: Tensors) -> bool:
  """Whether a file has no blocks of the auxiliary head, only its last layer at most."""
  return not any(name.startswith(f"net/{STACKS['v_blocks']}_") for name in tensors)


def _shapes(network: InContextDiT, image_shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  time = jax.ShapeDtypeStruct((1,), jnp.float32)
  label = jax.ShapeDtypeStruct((1,), jnp.int32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image, time, time, label)["params"]
  return traverse_util.flatten_dict(shapes, sep="/")


def _apart(
  network: InContextDiT, shapes: dict[str, jax.ShapeDtypeStruct], image_shape: tuple[int, ...]
) -> Params:
  """The shapes with what is joined here apart, and the patches' projection as a convolution."""
  apart = {}
  for path, leaf in shapes.items():
    stack, names = _parts(path)
    shape = *leaf.shape[:-1], leaf.shape[-1] // len(names)
    apart |= {f"{stack}{name}": jax.ShapeDtypeStruct(shape, leaf.dtype) for name in names}
  p = network.patch_size
  kernel = (p, p, image_shape[-1], network.width)
  apart["patch_embedder/kernel"] = jax.ShapeDtypeStruct(kernel, jnp.float32)
  return traverse_util.unflatten_dict(apart, sep="/")


def _parts(path: str) -> tuple[str, tuple[str, ...]]:
  """The stack of a parameter, "trunk/", and the layers in it that make it up."""
  stack, _, layer = path.partition("/")
  if stack in STACKS and layer in JOINED:
    return f"{stack}/", tuple(f"{name}/kernel" for name in JOINED[layer])
  return "", (path,)


def _joined(path: str, parts: dict[str, np.ndarray]) -> np.ndarray:
  stack, names = _parts(path)
  return np.concatenate([parts[f"{stack}{name}"] for name in names], axis=-1)


def _halves(x: np.ndarray, size: int) -> np.ndarray:
  """Features 0, 1, 2, ... of each head as 0, 2, ..., 1, 3, ...: neighbours become halves."""
  pairs = x.reshape(*x.shape[:-1], -1, size // 2, 2)
  return pairs.swapaxes(-1, -2).reshape(x.shape)


def _their_name(path: str) -> str:
  """The reference's name of a parameter; "{}" stands for the layer."""
  if path in ENDS:
    return f"net/{ENDS[path]}"
  first, _, rest = path.partition("/")
  if first in STACKS:
    return f"net/{STACKS[first]}_{{}}/{BLOCK[rest]}"
  what, _, kind = first.rpartition("_")
  if kind == "tokens":
    return f"net/{TOKENS[what]}_tokens"
  if kind == "embedder":
    layer, _, leaf = rest.partition("/")
    return f"net/{EMBEDDERS[what]}_embedder/mlp/{EMBEDDER_LAYERS[layer]}/_flax_linear/{leaf}"
  if kind == "norm":
    return f"net/{what}_final_layer/norm/kernel"
  return f"net/{what}_final_layer/linear/_flax_linear/{rest}"
