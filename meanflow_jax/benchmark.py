"""What a training step costs: python -m meanflow_jax.benchmark --config=FILE [--topology=NAME].

Times steps on the devices that are here, beside the plain step, and the reading of batches; or,
given a TPU topology such as v5p:2x2x1, compiles the real step for it on any CPU and prints the
compiler's figures, of one chip. The compiler counts the body of a scan once, so there the layers
are unrolled.
"""

import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import tqdm
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from meanflow_jax import build, command_line
from meanflow_jax.compiled import DoesNotFitError, compile_step, model_flops
from meanflow_jax.methods.meanflow import MeanFlow
from meanflow_jax.methods.plain_meanflow import PlainMeanFlow
from meanflow_jax.runtime.mesh import make_mesh
from meanflow_jax.runtime.reporting import table
from meanflow_jax.runtime.topology import chip_of, tpu_devices
from meanflow_jax.train import device_batches
from meanflow_jax.train_step import Batch, TrainState, TrainStep

ROUNDS = 3  # in which each step is timed, in turns
READ = 20  # batches that are read, after as many that may have been read ahead

CONFIG = command_line.define_config()
BATCH = flags.DEFINE_integer(
  "batch", None, "Images per device; by default, the config's share.", lower_bound=1
)
STEPS = flags.DEFINE_integer("steps", 10, f"Steps in each of {ROUNDS} rounds.", lower_bound=1)
PLAIN = flags.DEFINE_bool(
  "plain",
  True,
  "Also time the plain step of MeanFlow: the JVP on all rows, guidance in passes of its own, plain "
  "attention, float32.",
)
TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU slice to compile for, as v5p:2x2x1.")


@dataclasses.dataclass(frozen=True)
class Executable:
  """A compiled step.

  Attributes:
    advance: runs it.
    seconds: of tracing and of compiling.
    memory: bytes on each device that live at once at most.
  """

  advance: jax.stages.Compiled
  seconds: tuple[float, float]
  memory: int

  @classmethod
  def of(cls, train_step: TrainStep, batch: Batch, mesh: Mesh) -> "Executable":
    """Compiles a step for a batch's shapes."""
    start = time.perf_counter()
    lowered = train_step.jitted(mesh).lower(train_step.abstract_state(mesh), batch)
    traced = time.perf_counter()
    advance = lowered.compile()
    seconds = traced - start, time.perf_counter() - traced
    return cls(advance, seconds, advance.memory_analysis().peak_memory_in_bytes)


def main(_: list[str]) -> None:
  """Prints the figures."""
  try:
    with build.explaining_mistakes():
      config, train_step, mesh = prepare()
      device = mesh.devices.flat[0].device_kind
      print(f"{config.train.batch_size} images a step on {mesh.size} x {device}")
      flops = model_flops(train_step)
      passes = flops / train_step.network.forward_flops(train_step.image_shape)
      print(f"{flops / 1e9:.2f} GFLOP/image, {passes:.3g} forward passes")
      if TOPOLOGY.value:
        show_compiled(config, train_step, mesh)
      else:
        show_measured(config, train_step, mesh)
  except (build.UserError, DoesNotFitError) as error:
    sys.exit(f"error: {error}")


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


def plain_step(config: ConfigDict, train_step: TrainStep, mesh: Mesh) -> TrainStep:
  """The step with nothing saved, for the same state."""
  config = config.copy_and_resolve_references()
  config.model.update(dtype="float32", attention="plain")
  method = train_step.method
  fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
  return dataclasses.replace(
    train_step, network=build.network(config, mesh), method=PlainMeanFlow(**fields)
  )


def show_measured(config: ConfigDict, train_step: TrainStep, mesh: Mesh) -> None:
  """Times steps on a fixed batch of zeros, which cost what any other does."""
  zeros = lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding)
  batch = jax.tree.map(zeros, build.abstract_batch(config, mesh))
  steps = {"ours": train_step}
  if PLAIN.value and type(train_step.method) is MeanFlow:
    steps["plain"] = plain_step(config, train_step, mesh)
  executables = compile_all(steps, batch, mesh)
  seconds = time_in_turns(executables, train_step.new_state(mesh), batch)
  images = config.train.batch_size
  rows = [
    _row("trace, s", {name: made.seconds[0] for name, made in executables.items()}),
    _row("compile, s", {name: made.seconds[1] for name, made in executables.items()}),
    _row("peak memory, GB", {name: made.memory / 1e9 for name, made in executables.items()}),
    _row("steps/s", {name: 1 / each for name, each in seconds.items()}),
    _row("images/s", {name: images / each for name, each in seconds.items()}),
  ]
  done = {name: images / each * model_flops(train_step) for name, each in seconds.items()}
  rows.append(_row("model TFLOP/s", {name: rate / 1e12 for name, rate in done.items()}))
  if chip := chip_of(mesh.devices.flat[0].device_kind):
    peak = chip.flops * mesh.size
    rows.append(_row("MFU, %", {name: 100 * rate / peak for name, rate in done.items()}))
    print(f"MFU is of {chip.flops / 1e12:g} TFLOP/s, the peak of one {chip.name} in bfloat16")
  print(table(rows))
  print(input_rate(config, mesh, images / seconds["ours"]))


def compile_all(steps: Mapping[str, TrainStep], batch: Batch, mesh: Mesh) -> dict[str, Executable]:
  """Compiles the steps, and says of the plain one if it does not fit.

  Raises:
    ValueError: ours does not.
  """
  limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
  fitting = {}
  for name in tqdm.tqdm(steps, "compiling", leave=False, disable=None):
    made = Executable.of(steps[name], batch, mesh)
    if made.memory <= limit:
      fitting[name] = made
      continue
    why = f"{name}: {made.memory / 1e9:.1f} GB do not fit into {limit / 1e9:.1f} GB"
    if name == "ours":
      raise ValueError(f"{why}: lower --batch")
    print(why)
  return fitting


def time_in_turns(
  executables: Mapping[str, Executable], state: TrainState, batch: Batch
) -> dict[str, float]:
  """Seconds of one step of each, the median of the rounds."""
  seconds = {name: [] for name in executables}
  for made in executables.values():
    state = advance(made, state, batch, 1)
  for name in tqdm.tqdm([*executables] * ROUNDS, "timing", leave=False, disable=None):
    start = time.perf_counter()
    state = advance(executables[name], state, batch, STEPS.value)
    seconds[name].append((time.perf_counter() - start) / STEPS.value)
  return {name: statistics.median(times) for name, times in seconds.items()}


def advance(made: Executable, state: TrainState, batch: Batch, steps: int) -> TrainState:
  """Takes some steps as training does, which reads metrics one step late."""
  waiting = None
  for _ in range(steps):
    state, metrics = made.advance(state, batch)
    # Steps that queue up on several simulated CPU devices deadlock.
    jax.block_until_ready(metrics if jax.default_backend() == "cpu" else waiting)
    waiting = metrics
  return jax.block_until_ready(state)


def input_rate(config: ConfigDict, mesh: Mesh, needed: float) -> str:
  """Images/s that the config's source brings onto the devices, beside what the steps take."""
  try:
    source = build.source(config)
  except (ValueError, OSError) as error:
    return f"input: not measured, {error}"
  batches = device_batches(config, source, mesh, 0)
  for batch in itertools.islice(batches, READ):
    jax.block_until_ready(batch)
  start = time.perf_counter()
  for batch in itertools.islice(batches, READ):
    jax.block_until_ready(batch)
  rate = READ * config.train.batch_size / (time.perf_counter() - start)
  return f"input: {rate:.0f} images/s, {rate / needed:.1f} times what our steps take"


def show_compiled(config: ConfigDict, train_step: TrainStep, mesh: Mesh) -> None:
  """The compiler's figures of one chip."""
  figures = compile_step(train_step, build.abstract_batch(config, mesh), mesh)
  images, estimate = figures.images, figures.estimate
  rows = {
    "compile": f"{figures.seconds:.0f} s",
    "FLOP": f"{figures.flops / images / 1e9:.2f} GFLOP/image",
    "memory traffic": f"{figures.traffic / images / 1e9:.3f} GB/image",
    "state and batch": f"{figures.arguments / 1e9:.2f} GB",
    "temporaries": f"{figures.temporaries / 1e9:.2f} GB",
    "peak memory": f"{figures.peak / 1e9:.2f} GB",
    "estimated time": f"{estimate / images * 1e3:.3f} ms/image" if estimate else "none given",
  }
  for name, value in rows.items():
    print(f"{name:16} {value}")


def _row(name: str, values: Mapping[str, float]) -> dict[str, str]:
  cells = {column: f"{value:.4g}" for column, value in values.items()}
  if "plain" in values:
    cells["ratio"] = f"{values['ours'] / values['plain']:.2f}"
  return {"": name, **cells}


if __name__ == "__main__":
  app.run(main, flags_parser=command_line.parse)
