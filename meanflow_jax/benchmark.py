"""What a training step costs: python -m meanflow_jax.benchmark --config=FILE [--topology=NAME].

Runs steps on the devices that are here; or, given a TPU topology such as v5p:2x2x1, compiles the
real step for it on any CPU and prints the compiler's figures, of one chip. The compiler counts the
body of a scan once, so there the layers are unrolled.
"""

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
BATCH = flags.DEFINE_integer("batch", None, "Images per device; by default, the config's share.")
STEPS = flags.DEFINE_integer("steps", 20, "Steps to time.", lower_bound=1)
TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU slice to compile for, as v5p:2x2x1.")


def main(_: list[str]) -> None:
  """Prints the figures."""
  config = CONFIG.value
  devices = tpu_devices(TOPOLOGY.value) if TOPOLOGY.value else jax.devices()
  if BATCH.value:
    config.train.batch_size = BATCH.value * len(devices)
  if TOPOLOGY.value:
    config.model.scan = False
  mesh = make_mesh(**config.mesh, devices=devices)
  method, network = build.method(config), build.network(config, mesh)
  train_step = build.train_step(config, network, method, mesh)
  flops = method.forward_passes * network.forward_flops(train_step.image_shape)
  print(f"batch                {config.train.batch_size} on {mesh.size} x {devices[0].device_kind}")
  print(f"model                {flops / 1e9:.2f} GFLOP/image ({method.forward_passes:g} passes)")
  figures = compiled_figures if TOPOLOGY.value else measured_figures
  for name, value in figures(config, train_step, mesh, flops).items():
    print(f"{name:20} {value}")


def measured_figures(
  config: ConfigDict, train_step: TrainStep, mesh: Mesh, flops: float
) -> dict[str, str]:
  """Times steps on a fixed batch; `flops` are the model's per image."""
  batch = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), batch_of(config, mesh)
  )
  state, advance = train_step.new_state(mesh), train_step.jitted(mesh)
  start = time.perf_counter()
  state, metrics = advance(state, batch)
  jax.block_until_ready(metrics)
  compiled = time.perf_counter()
  for _ in range(STEPS.value):
    state, metrics = advance(state, batch)
    jax.block_until_ready(metrics)
  rate = STEPS.value / (time.perf_counter() - compiled)
  images = rate * config.train.batch_size
  return {
    "compile + first step": f"{compiled - start:.1f} s",
    "steps/s": f"{rate:.3f}",
    "images/s": f"{images:.1f}",
    "model FLOP/s": f"{images * flops / 1e9:.1f} G",
  }


def compiled_figures(
  config: ConfigDict, train_step: TrainStep, mesh: Mesh, flops: float
) -> dict[str, str]:
  """The compiler's figures of one chip."""
  start = time.perf_counter()
  lowered = train_step.jitted(mesh).lower(train_step.abstract_state(mesh), batch_of(config, mesh))
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  images = config.train.batch_size / mesh.size
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  estimate = cost.get("optimal_seconds", -1.0)
  return {
    "compile": f"{seconds:.0f} s",
    "FLOP": f"{cost['flops'] / images / 1e9:.2f} GFLOP/image",
    "memory traffic": f"{cost['bytes accessed'] / images / 1e9:.3f} GB/image",
    "peak memory": f"{(arguments + temporaries + outputs) / 1e9:.2f} GB "
    f"(state and batch {arguments / 1e9:.2f}, temporaries {temporaries / 1e9:.2f})",
    "estimated time": f"{estimate / images * 1e3:.3f} ms/image" if estimate > 0 else "none given",
  }


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
