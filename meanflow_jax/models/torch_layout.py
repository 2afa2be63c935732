"""PyTorch's tensors as parameters of Flax modules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

Params = dict[str, Any]
Tensors = Mapping[str, np.ndarray]

# Axes of PyTorch's kernels (out, in, height, width) in the order of Flax's.
FLAX_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}


def renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
  """Tensors with parts of their names replaced."""

  def new(name: str) -> str:
    for old, replacement in names.items():
      name = name.replace(old, replacement)
    return name

  return {new(name): tensor for name, tensor in tensors.items()}


def read_tensors(shapes: Params, tensors: Tensors, torch_name: Callable[[str], str]) -> Params:
  """Parameters of a network from PyTorch's tensors, in float32.

  Args:
    shapes: the tree of parameters, of anything that has a shape.
    tensors: PyTorch's, by name.
    torch_name: from the path of a parameter ("conv/kernel") to PyTorch's name; a name with "{}" is
      that of each layer of parameters which are stacked along their first axis.

  Raises:
    ValueError: if a tensor is missing, too many or of another shape; lists their names.
  """
  leaves = traverse_util.flatten_dict(shapes, sep="/")
  sources = {path: _sources(torch_name(path), leaf.shape) for path, leaf in leaves.items()}
  _check(tensors, {name: shape for group in sources.values() for name, shape in group.items()})
  params = {}
  for path, group in sources.items():
    layers = [_to_flax(tensors[name]) for name in group]
    params[path] = np.stack(layers) if "{}" in torch_name(path) else layers[0]
  return traverse_util.unflatten_dict(params, sep="/")


def _sources(name: str, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
  """PyTorch's names and shapes of what makes up one parameter."""
  if "{}" in name:
    return {name.format(i): _torch_shape(shape[1:]) for i in range(shape[0])}
  return {name: _torch_shape(shape)}


def _torch_shape(shape: Sequence[int]) -> tuple[int, ...]:
  axes = FLAX_AXES.get(len(shape), range(len(shape)))
  return tuple(shape[axis] for axis in np.argsort(axes))


def _to_flax(tensor: np.ndarray) -> np.ndarray:
  axes = FLAX_AXES.get(tensor.ndim, range(tensor.ndim))
  return np.ascontiguousarray(tensor.transpose(axes), np.float32)


def _check(tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> None:
  both = sorted(tensors.keys() & expected.keys())
  shapes = {name: tuple(tensors[name].shape) for name in both}
  wrong = {
    "missing": sorted(expected.keys() - tensors.keys()),
    "not of this network": sorted(tensors.keys() - expected.keys()),
    "misshapen": [
      f"{name} {shapes[name]} instead of {expected[name]}"
      for name in both
      if shapes[name] != expected[name]
    ],
  }
  if any(wrong.values()):
    lists = [f"\n  {what}: {', '.join(names)}" for what, names in wrong.items() if names]
    raise ValueError("these tensors are not the network's:" + "".join(lists))
