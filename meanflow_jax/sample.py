"""Draws images from the newest checkpoint: --mode=sample."""

import pathlib

import jax
import numpy as np
import tqdm
from jaxtyping import PyTree
from ml_collections import ConfigDict

from meanflow_jax import build, storage
from meanflow_jax.generate import Generator
from meanflow_jax.runtime.images import grid, save_npz, save_png


def draw(generator: Generator, params: PyTree, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Images 0, ..., count - 1 as uint8 [N, H, W, C], and their labels [N].

  Raises:
    ValueError: if an image is not finite.
  """
  batches = generator.batches(params, count)
  total = -(-count // generator.batch_size)
  images, labels = zip(
    *tqdm.tqdm(batches, "sampling", total, leave=False, disable=None), strict=True
  )
  return np.concatenate(images), np.concatenate(labels)


def run(config: ConfigDict, workdir: pathlib.Path, out: pathlib.Path) -> None:
  """Writes `config.sample.count` images as a grid (.png) or as arrays (.npz)."""
  with build.explaining_mistakes():
    _check_out(out)
    mesh = build.mesh(config)
    method = build.method(config)
    network = build.network(config, mesh)
    generator = build.sample_generator(config, network, method, mesh)
    item = storage.ema_item(config, config.sample.ema)
    step, items, _ = storage.trained_params(config, workdir, network, mesh, {item})
    images, labels = draw(generator, items[item], config.sample.count)
  if jax.process_index() == 0:
    if out.suffix == ".png":
      save_png(out, grid(images, labels))
    else:
      save_npz(out, images, labels)
    print(f"{len(images)} images of step {step}, {generator.nfe} NFE: {out}")


def _check_out(out: pathlib.Path) -> None:
  if out.suffix not in (".png", ".npz"):
    raise ValueError(f"--out must end in .png or .npz, got {str(out)!r}")
  if out.exists():
    raise ValueError(f"{out} exists; it is left as it is: choose another name")
  if not out.parent.is_dir():
    raise FileNotFoundError(f"--out: there is no folder {out.parent}")
