"""What a training step costs: python -m meanflow_jax.benchmark --config=FILE [--topology=NAME].

Runs steps on the devices that are here; or, given a TPU topology such as v5p:2x2x1, compiles the
real step for it on any CPU and prints the compiler's figures, of one chip. The compiler counts the
body of a scan once, so there the layers are unrolled.
"""

import sys
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from meanflow_jax import build, command_line
from meanflow_jax.compiled import DoesNotFitError, compile_step, model_flops
from meanflow_jax.runtime.mesh import make_mesh
from meanflow_jax.runtime.topology import tpu_devices
from meanflow_jax.train_step import TrainStep

CONFIG = command_line.define_config()
BATCH = flags.DEFINE_integer(
  "batch", None, "Images per device; by default, the config's share.", lower_bound=1
)
STEPS = flags.DEFINE_integer("steps", 20, "Steps to time.", lower_bound=1)
TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU slice to compile for, as v5p:2x2x1.")


def main(_: list[str]) -> None:
  """Prints the figures."""
  try:
    with build.explaining_mistakes():
      config, train_step, mesh = prepare()
  except build.UserError as error:
    sys.exit(f"error: {error}")
  device = mesh.devices.flat[0].device_kind
  figures = {
    "batch": f"{config.train.batch_size} on {mesh.size} x {device}",
    "model": f"{model_flops(train_step) / 1e9:.2f} GFLOP/image, "
    f"{train_step.method.forward_passes:g} forward passes",
  }
  measure = compiled_figures if TOPOLOGY.value else measured_figures
  try:
    figures |= measure(config, train_step, mesh)
  except DoesNotFitError as error:
    sys.exit(f"error: {error}")
  for name, value in figures.items():
    print(f"{name:16} {value}")


def prepare() -> tuple[ConfigDict, TrainStep, Mesh]:
  """What the flags ask for.

  Raises:
    ValueError: a mistake in the config, or no such topology.
  """
  config = CONFIG.value
  devices = tpu_devices(TOPOLOGY.value) if TOPOLOGY.value else jax.devices()
  if BATCH.value:
    config.train.batch_size = BATCH.value * len(devices)
  if TOPOLOGY.value:
    config.model.scan = False
  mesh = make_mesh(**config.mesh, devices=devices)
  network, method = build.network(config, mesh), build.method(config)
  return config, build.train_step(config, network, method, mesh), mesh


def measured_figures(config: ConfigDict, train_step: TrainStep, mesh: Mesh) -> dict[str, str]:
  """Times steps on a fixed batch of zeros, which cost what any other does."""
  zeros = lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding)
  state, batch = train_step.new_state(mesh), jax.tree.map(zeros, build.abstract_batch(config, mesh))
  step = train_step.jitted(mesh)
  start = time.perf_counter()
  lowered = step.lower(state, batch)
  traced = time.perf_counter()
  advance = lowered.compile()
  compiled = time.perf_counter()
  state, _ = jax.block_until_ready(advance(state, batch))
  warm = time.perf_counter()
  for _ in range(STEPS.value):
    state, _ = jax.block_until_ready(advance(state, batch))
  rate = STEPS.value / (time.perf_counter() - warm)
  images = rate * config.train.batch_size
  return {
    "trace": f"{traced - start:.2f} s",
    "compile": f"{compiled - traced:.2f} s",
    "steps/s": f"{rate:.3f}",
    "images/s": f"{images:.1f}",
    "model FLOP/s": f"{images * model_flops(train_step) / 1e9:.1f} G",
  }


def compiled_figures(config: ConfigDict, train_step: TrainStep, mesh: Mesh) -> dict[str, str]:
  """The compiler's figures of one chip."""
  figures = compile_step(train_step, build.abstract_batch(config, mesh), mesh)
  images, estimate = figures.images, figures.estimate
  return {
    "compile": f"{figures.seconds:.0f} s",
    "FLOP": f"{figures.flops / images / 1e9:.2f} GFLOP/image",
    "memory traffic": f"{figures.traffic / images / 1e9:.3f} GB/image",
    "state and batch": f"{figures.arguments / 1e9:.2f} GB",
    "temporaries": f"{figures.temporaries / 1e9:.2f} GB",
    "peak memory": f"{figures.peak / 1e9:.2f} GB",
    "estimated time": f"{estimate / images * 1e3:.3f} ms/image" if estimate else "none given",
  }


if __name__ == "__main__":
  app.run(main, flags_parser=command_line.parse)
