"""The weights of golden files that do not store them."""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np


def filled(tensors: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
  """A stand-in for a published file of weights, from its tensors' names and shapes."""
  return {name: fill(name, tuple(shape)) for name, shape in tensors.items()}


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """One tensor, by the rule that comes with the golden files: it follows from the name alone."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  noise = rng.standard_normal(shape).astype(np.float32)
  if len(shape) >= 2:
    return noise * np.float32(1.4 / np.sqrt(np.prod(shape[1:])))
  match name.rsplit(".", 1)[-1]:
    case "running_var":
      return np.float32(1) + np.float32(0.1) * np.abs(noise)
    case "weight":
      return np.float32(1) + np.float32(0.1) * noise
    case _:
      return np.float32(0.1) * noise
