"""Image files: grids to look at, arrays for evaluators."""

import math
import os
import pathlib

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

_SMALLEST_SIDE = 32
_GAP = 1


def grid(
  images: UInt8[np.ndarray, "N H W C"], labels: Int[np.ndarray, "N"]
) -> UInt8[np.ndarray, "h w c"]:
  """Tiles images: one row per class where all classes have as many, else nearly a square.

  Small images are enlarged by whole factors; white lines separate them. Of latents, the first
  three channels are shown.
  """
  classes, counts = np.unique(labels, return_counts=True)
  if len(classes) > 1 and counts[0] > 1 and (counts == counts[0]).all():
    images, columns = images[np.argsort(labels, kind="stable")], int(counts[0])
  else:
    columns = math.ceil(math.sqrt(len(images)))
  images = images[..., : 1 if images.shape[-1] < 3 else 3]
  factor = math.ceil(_SMALLEST_SIDE / images.shape[1])
  images = images.repeat(factor, axis=1).repeat(factor, axis=2)
  blanks = -len(images) % columns
  images = np.pad(images, [(0, blanks), (_GAP, _GAP), (_GAP, _GAP), (0, 0)], constant_values=255)
  count, height, width, channels = images.shape
  tiles = images.reshape(count // columns, columns, height, width, channels).swapaxes(1, 2)
  return tiles.reshape(-1, columns * width, channels)


def save_png(path: pathlib.Path, image: UInt8[np.ndarray, "H W C"]) -> None:
  """Writes a grey or RGB image; the file appears whole or not at all."""
  partial = path.with_name(f".{path.name}.partial")
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(partial, format="png")
  os.replace(partial, path)


def save_npz(
  path: pathlib.Path, images: UInt8[np.ndarray, "N H W C"], labels: Int[np.ndarray, "N"]
) -> None:
  """Writes `arr_0` and `arr_1`, the layout of the ADM evaluators, whole or not at all."""
  partial = path.with_name(f".{path.name}.partial")
  with open(partial, "wb") as file:
    np.savez(file, arr_0=images, arr_1=labels)
  os.replace(partial, path)
