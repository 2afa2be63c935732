"""A tiny autoencoder on disk, small photographs, and what is prepared of them."""

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict
from PIL import Image

from tests.fill import filled
from tests.runs import tiny

GOLDEN = pathlib.Path(__file__).parent / "golden" / "autoencoder_tiny.npz"
SIDE = 16  # of the images; their latents are 8 x 8 with 4 channels
CLASSES = ("cat", "dog", "fox")


def write_autoencoder(folder: pathlib.Path, *, scale: float = 1.0) -> pathlib.Path:
  """A tiny autoencoder, as a published one lies on disk; another scale makes other weights."""
  folder.mkdir(parents=True, exist_ok=True)
  with np.load(GOLDEN) as golden:
    meta, shapes = (json.loads(str(golden[key])) for key in ("meta", "tensors"))
  (folder / "config.json").write_text(json.dumps(meta["config"]))
  tensors = {name: np.float32(scale) * tensor for name, tensor in filled(shapes).items()}
  safetensors.numpy.save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
  return folder


def paint(
  folder: pathlib.Path, *, per_class: int, seed: int = 0, classes: tuple[str, ...] = CLASSES
) -> pathlib.Path:
  """Pictures of coloured blobs, in a folder per class."""
  rng = np.random.default_rng(seed)
  for name in classes:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(per_class):
      blobs = Image.fromarray(rng.integers(256, size=(5, 6, 3), dtype=np.uint8))
      blobs.resize((40 + i, 33), Image.Resampling.BICUBIC).save(folder / name / f"{i:02}.png")
  return folder


def keys(images: pathlib.Path, autoencoder: pathlib.Path | None) -> dict[str, Any]:
  """What a tiny preparation of a folder sets; of its pixels without an autoencoder."""
  return {
    "data.source": "folder",
    "data.folder.path": str(images),
    "data.image_size": SIDE // 2 if autoencoder else SIDE,
    "data.channels": 4 if autoencoder else 3,
    "data.num_classes": len(CLASSES),
    "data.threads": 1,
    "data.prefetch": 2,
    "autoencoder.path": str(autoencoder or ""),
    "prepare.records_per_shard": 5,
    "prepare.batch_size": 8,
  }


def config(
  images: pathlib.Path, autoencoder: pathlib.Path | None, changes: dict[str, Any] | None = None
) -> ConfigDict:
  return tiny(keys(images, autoencoder) | (changes or {}))
