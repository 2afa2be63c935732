"""Times our training step against the plain formula in the same network, in one run.

  python benchmarks/plain_step.py [--config=configs/imagenet_b4.py] [--batch=16] [--rounds=5]

The plain formula (tests/plain.py) evaluates the JVP on all rows and guidance in separate passes.
Guidance is on, with omega 1 and kappa 0.5, unless flags say otherwise.
"""

import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from meanflow_jax import build, command_line
from meanflow_jax.methods.meanflow import MeanFlow
from meanflow_jax.runtime.mesh import global_batch
from tests.plain import plain_objective

CONFIG = command_line.define_config()
BATCH = flags.DEFINE_integer("batch", 16, "Images per step.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Steps of each kind to time, in turns.")


class PlainMeanFlow(MeanFlow):
  """MeanFlow with nothing saved."""

  objective = plain_objective


def main(_: list[str]) -> None:
  config = CONFIG.value
  config.train.batch_size = BATCH.value
  method = build.method(config)
  if not method.guidance.is_on:
    config.method.guidance.update(omega=1.0, kappa=0.5)
    method = build.method(config)
  fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
  runners = {"plain": runner(config, PlainMeanFlow(**fields)), "ours": runner(config, method)}
  seconds = {name: [] for name in runners}
  for _round in range(ROUNDS.value):
    for name, run in runners.items():
      seconds[name].append(run())
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  for name, median in medians.items():
    spread = f"{min(seconds[name]):.3f} ... {max(seconds[name]):.3f}"
    print(f"{name:6} {median:.3f} s/step  ({spread})  {BATCH.value / median:.2f} images/s")
  print(f"ratio  {medians['plain'] / medians['ours']:.2f}")


def runner(config, method: MeanFlow) -> Callable[[], float]:
  """Compiles a step; each call runs it once and returns its seconds."""
  mesh = build.mesh(config)
  step = build.train_step(config, build.network(config, mesh), method, mesh)
  shape = (BATCH.value, *build.image_shape(config))
  rng = np.random.default_rng(0)
  image = rng.standard_normal(shape).astype(np.float32)
  batch = global_batch(mesh, {"image": image, "label": np.zeros(BATCH.value, np.int32)})
  advance, state = step.jitted(mesh), step.new_state(mesh)

  def run() -> float:
    nonlocal state
    start = time.perf_counter()
    state, metrics = advance(state, batch)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start

  run()
  return run


if __name__ == "__main__":
  app.run(main, flags_parser=command_line.parse)
