"""Tensors of other implementations, PyTorch's above all, as parameters of Flax modules."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

Params = dict[str, Any]
Tensors = Mapping[str, np.ndarray]
Axes = Mapping[int, Sequence[int]]

# Axes of kernels in the order of Flax's, by their number: PyTorch's are (out, in, height, width).
TORCH_AXES: Axes = {2: (1, 0), 4: (2, 3, 1, 0)}
FLAX_AXES: Axes = {}


def renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
  """Tensors with parts of their names replaced."""

  def new(name: str) -> str:
    for old, replacement in names.items():
      name = name.replace(old, replacement)
    return name

  return {new(name): tensor for name, tensor in tensors.items()}


def read_tensors(
  shapes: Params,
  tensors: Tensors,
  their_name: Callable[[str], str],
  kernel_axes: Axes = TORCH_AXES,
) -> Params:
  """Parameters of a network from the tensors of another implementation, in float32.

  Args:
    shapes: the tree of parameters, of anything that has a shape.
    tensors: theirs, by name.
    their_name: from the path of a parameter ("conv/kernel") to their name; a name with "{}" is
      that of each layer of parameters which are stacked along their first axis.
    kernel_axes: the axes of their kernels in the order of ours.

  Raises:
    ValueError: if a tensor is missing, too many or of another shape; lists their names.
  """
  leaves = traverse_util.flatten_dict(shapes, sep="/")
  sources = {
    path: _Source.of(path, tuple(leaf.shape), their_name(path), kernel_axes)
    for path, leaf in leaves.items()
  }
  _check(tensors, {name: s.shape for s in sources.values() for name in s.names})
  params = {path: source.read(tensors) for path, source in sources.items()}
  return traverse_util.unflatten_dict(params, sep="/")


@dataclasses.dataclass(frozen=True)
class _Source:
  """The tensors that make up one parameter.

  Attributes:
    names: theirs, one for each layer of a stacked parameter.
    shape: of each.
    axes: of each, in our order.
    stacked: whether the parameter has a first axis for layers.
  """

  names: tuple[str, ...]
  shape: tuple[int, ...]
  axes: tuple[int, ...]
  stacked: bool

  @classmethod
  def of(cls, path: str, shape: tuple[int, ...], name: str, kernel_axes: Axes) -> "_Source":
    stacked = "{}" in name
    names = tuple(name.format(i) for i in range(shape[0])) if stacked else (name,)
    layer = shape[1:] if stacked else shape
    axes = tuple(range(len(layer)))
    if path.endswith("kernel"):
      axes = tuple(kernel_axes.get(len(layer), axes))
    return cls(names, tuple(layer[axis] for axis in np.argsort(axes)), axes, stacked)

  def read(self, tensors: Tensors) -> np.ndarray:
    layers = [np.asarray(tensors[name], np.float32).transpose(self.axes) for name in self.names]
    return np.stack(layers) if self.stacked else np.ascontiguousarray(layers[0])


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
