"""Measures generated images against real ones: --mode=evaluate, and the same during training."""

import functools
import json
import operator
import pathlib
from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from meanflow_jax import build
from meanflow_jax.arrays import Image
from meanflow_jax.data.loader import ordered_batches
from meanflow_jax.data.sources import Source
from meanflow_jax.generate import Generator
from meanflow_jax.methods.meanflow import MeanFlow
from meanflow_jax.methods.sampler import time_grid
from meanflow_jax.metrics.moments import Moments, frechet_distance
from meanflow_jax.runtime.reporting import write_whole
from meanflow_jax.train_step import model_image


def pixel_features(images: Image, resolution: int) -> Float[Array, "B F"]:
  """The pixels themselves, clipped to [-1, 1]; larger images are averaged down to a resolution."""
  images = jnp.clip(images, -1, 1)
  batch, height, width, channels = images.shape
  if max(height, width) > resolution:
    shape = (batch, resolution, resolution, channels)
    images = jax.image.resize(images, shape, "linear", antialias=True)
  return images.reshape(batch, -1)


class Evaluator:
  """Compares what some parameters generate with the real images of a source.

  Args:
    generators: by the number of function evaluations.
    source: the real images, read at the first evaluation.
    count: images to generate.
    resolution: of the pixel features.
  """

  def __init__(
    self, generators: dict[int, Generator], source: Source, *, count: int, resolution: int
  ):
    self._generators, self._source, self._count = generators, source, count
    self._features = jax.jit(lambda images: pixel_features(model_image(images), resolution))
    self._reference: Moments | None = None

  def __call__(self, params: PyTree) -> dict[str, float]:
    """The figures of some parameters: name to value."""
    return {
      f"frechet_pixels_nfe{nfe}": frechet_distance(self._generated(params, nfe), self.reference())
      for nfe in self._generators
    }

  def reference(self) -> Moments:
    """The moments of the real images."""
    if self._reference is None:
      batch_size = 500
      batches = ordered_batches(self._source, batch_size)
      total = -(-len(self._source) // batch_size)
      progress = tqdm.tqdm(batches, "reading real images", total, leave=False, disable=None)
      self._reference = self._moments(batch["image"] for batch in progress)
    return self._reference

  def _generated(self, params: PyTree, nfe: int) -> Moments:
    generator = self._generators[nfe]
    total = -(-self._count // generator.batch_size)
    progress = tqdm.tqdm(
      generator.batches(params, self._count), f"{nfe}-step images", total, leave=False, disable=None
    )
    return self._moments(images for images, _ in progress)

  def _moments(self, images: Iterable[np.ndarray]) -> Moments:
    features = (jax.device_get(self._features(batch)) for batch in images)
    return functools.reduce(operator.add, map(Moments.of, features))


def make_evaluator(
  config: ConfigDict, network: nn.Module, method: MeanFlow, mesh: Mesh, source: Source
) -> Evaluator:
  """The evaluator of `config.evaluate`, against all images of a source.

  Raises:
    ValueError: an impossible setting.
  """
  settings = config.evaluate
  if settings.count and not settings.nfe:
    raise ValueError("evaluate.nfe is empty: name at least one number of function evaluations")
  if settings.count == 1 or settings.count < 0 or settings.resolution < 1:
    raise ValueError(
      "evaluate.count must be 0 or at least 2 and evaluate.resolution at least 1, "
      f"got {settings.count} and {settings.resolution}"
    )
  generators = {
    nfe: build.generator(config, network, method, mesh, time_grid(nfe)) for nfe in settings.nfe
  }
  return Evaluator(generators, source, count=settings.count, resolution=settings.resolution)


def write_figures(
  config: ConfigDict, workdir: pathlib.Path, step: int, figures: dict[str, float]
) -> pathlib.Path:
  """Stores the figures of a checkpoint, and how its images were made, as JSON; returns where."""
  path = workdir / "figures" / f"step_{step:07d}.json"
  path.parent.mkdir(exist_ok=True)
  settings = {key: config.sample[key] for key in ("labels", "seed", "ema")}
  record = {"step": step, **figures, "count": config.evaluate.count, **settings}
  write_whole(path, json.dumps(record, indent=2) + "\n")
  return path


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Prints and stores the figures of the newest checkpoint."""
  with build.explaining_mistakes():
    mesh = build.mesh(config)
    method = build.method(config)
    network = build.network(config, mesh)
    evaluate = make_evaluator(config, network, method, mesh, build.source(config))
    if not config.evaluate.count:
      raise ValueError("evaluate.count is 0: there is nothing to evaluate")
    step, params = build.trained_params(config, workdir, network, mesh)
  figures = evaluate(params)
  for name, value in figures.items():
    print(f"{name}  {value:.4f}  (step {step}, {config.evaluate.count} images)")
  if jax.process_index() == 0:
    print(f"stored in {write_figures(config, workdir, step, figures)}")
