"""Published weights on disk: a folder with config.json and a safetensors file.

Neither PyTorch nor pickle is involved, and nothing is downloaded.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Published:
  """What is published, and where.

  Attributes:
    weights: name of the safetensors file.
    models: ids on Hugging Face of what such a folder may hold.
  """

  weights: str
  models: tuple[str, ...]


AUTOENCODER = Published(
  "diffusion_pytorch_model.safetensors", ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema")
)
DINOV2 = Published("model.safetensors", ("facebook/dinov2-large",))


def load(
  folder: pathlib.Path | str, published: Published
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Reads the config, and all tensors by name.

  Raises:
    FileNotFoundError: if one of the two files is missing; says where they are published.
    ValueError: if one is broken.
  """
  folder = pathlib.Path(folder)
  config, weights = folder / CONFIG, folder / published.weights
  for path in (config, weights):
    if not path.is_file():
      raise FileNotFoundError(_missing(path, published))
  try:
    return json.loads(config.read_text()), safetensors.numpy.load_file(weights)
  except json.JSONDecodeError as error:
    raise ValueError(f"{config} is not JSON: {error}") from error
  except safetensors.SafetensorError as error:
    raise ValueError(f"{weights} is not a whole safetensors file: {error}") from error


def sha256(path: pathlib.Path | str) -> str:
  """The hash of a file of any size, in hexadecimal digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _missing(path: pathlib.Path, published: Published) -> str:
  files = f"{CONFIG} {published.weights}"
  return (
    f"{path} does not exist. It is published on Hugging Face as part of "
    f"{' or '.join(published.models)}. Nothing is downloaded by itself: fetch both files, for"
    f" example with `hf download {published.models[0]} {files} --local-dir {path.parent}`."
  )
