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
from meanflow_jax.runtime.mesh import make_mesh, rows_sharding
from meanflow_jax.runtime.topology import tpu_devices
from meanflow_jax.train_step import Batch, TrainStep

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
  for name, value in (figures | measure(config, train_step, mesh)).items():
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
  state, batch = train_step.new_state(mesh), jax.tree.map(zeros, batch_of(config, mesh))
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
  start = time.perf_counter()
  arguments = train_step.abstract_state(mesh), batch_of(config, mesh)
  compiled = train_step.jitted(mesh).lower(*arguments).compile()
  seconds = time.perf_counter() - start
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  images = config.train.batch_size / mesh.size
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  peak = arguments + temporaries + memory.output_size_in_bytes - memory.alias_size_in_bytes
  estimate = cost.get("optimal_seconds", -1.0)
  return {
    "compile": f"{seconds:.0f} s",
    "FLOP": f"{cost['flops'] / images / 1e9:.2f} GFLOP/image",
    "memory traffic": f"{cost['bytes accessed'] / images / 1e9:.3f} GB/image",
    "state and batch": f"{arguments / 1e9:.2f} GB",
    "temporaries": f"{temporaries / 1e9:.2f} GB",
    "peak memory": f"{peak / 1e9:.2f} GB",
    "estimated time": f"{estimate / images * 1e3:.3f} ms/image" if estimate > 0 else "none given",
  }


def model_flops(train_step: TrainStep) -> float:
  """Floating-point operations per image that the mathematics of a step asks for."""
  passes = train_step.method.forward_passes
  return passes * train_step.network.forward_flops(train_step.image_shape)


def batch_of(config: ConfigDict, mesh: Mesh) -> Batch:
  """The shapes of a global batch."""
  rows = config.train.batch_size
  shapes = {
    "image": ((rows, *build.image_shape(config)), jnp.float32),
    "label": ((rows,), jnp.int32),
  }
  return {k: jax.ShapeDtypeStruct(*v, sharding=rows_sharding(mesh)) for k, v in shapes.items()}


if __name__ == "__main__":
  app.run(main, flags_parser=command_line.parse)
