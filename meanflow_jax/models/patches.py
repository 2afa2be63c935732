"""Images as sequences of patches, and back."""

from jaxtyping import Array, Float

from meanflow_jax.arrays import Image

Patches = Float[Array, "B N P"]  # P numbers each: rows, columns, channels


def split_patches(image: Image, size: int) -> Patches:
  """Patches row by row, each flattened.

  Raises:
    ValueError: if the image's sides are not divisible by the size.
  """
  batch, height, width, channels = image.shape
  if height % size or width % size:
    raise ValueError(f"an image of {height} x {width} does not divide into patches of {size}")
  rows, columns = height // size, width // size
  patches = image.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
  return patches.reshape(batch, rows * columns, size * size * channels)


def join_patches(patches: Patches, size: int, shape: tuple) -> Image:
  """Undoes `split_patches`, for images of a shape [B, H, W, C]."""
  batch, height, width, channels = shape
  patches = patches.reshape(batch, height // size, width // size, size, size, channels)
  return patches.swapaxes(2, 3).reshape(shape)
