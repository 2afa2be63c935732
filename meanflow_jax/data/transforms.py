"""From a decoded picture of any kind to the array a network learns from, and its mirror image."""

from typing import Any

import numpy as np
from PIL import Image

Example = dict[str, Any]
"""One item: "image" [H, W, C], see `data.sources.Source`, and "label", an int32 scalar."""

_MODES = {1: "L", 3: "RGB"}


def convert(image: Image.Image, channels: int) -> Image.Image:
  """The first frame of an image of any mode as 8-bit grey (1 channel) or RGB (3 channels).

  16-bit greys keep their upper byte and transparency lies on white. The orientation that a camera
  notes beside the pixels (EXIF) is not applied, as in every published ImageNet pipeline.

  Raises:
    ValueError: other numbers of channels, or a floating-point image, whose range is unknown.
  """
  if channels not in _MODES:
    raise ValueError(f"channels must be 1 or 3, not {channels}")
  if image.mode == "F":
    raise ValueError("a floating-point image has no known range to map to 8 bits")
  if image.mode.startswith("I"):
    upper_byte = np.clip(np.asarray(image), 0, 0xFFFF) >> 8
    image = Image.fromarray(upper_byte.astype(np.uint8))
  elif image.has_transparency_data:
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
  return image.convert(_MODES[channels])


def center_crop(image: Image.Image, size: int) -> Image.Image:
  """The central square, `size` pixels wide, resampled as in ADM (guided-diffusion).

  Box halvings while the short side is at least twice the size, one bicubic step to the size, then
  the cut: FID is sensitive to all three. Expects "L" or "RGB": Pillow never interpolates palettes.
  """
  while min(image.size) >= 2 * size:
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
  scale = size / min(image.size)
  width, height = round(image.width * scale), round(image.height * scale)
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = (width - size) // 2, (height - size) // 2
  return image.crop((left, top, left + size, top + size))


def to_array(image: Image.Image, channels: int) -> np.ndarray:
  """The pixels of an image of any mode, uint8 [H, W, channels]; see `convert`."""
  pixels = np.asarray(convert(image, channels))
  return pixels.reshape(image.height, image.width, channels)


def square(image: Image.Image, *, size: int, channels: int) -> np.ndarray:
  """An image of any mode and shape as uint8 [size, size, channels]: convert, then centre crop."""
  return to_array(center_crop(convert(image, channels), size), channels)


def mirror(example: Example) -> Example:
  """The example with its image mirrored, left to right."""
  return {**example, "image": example["image"][:, ::-1]}
