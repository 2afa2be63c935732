"""What a run would take on machines that are not here: --mode=plan --topology=v5p:4x4x4 [--sweep].

For a TPU slice the real, sharded step is compiled for it, on any CPU; for GPUs, whose compiler
needs one, there is arithmetic. Nothing is written.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent import futures

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from ml_collections import ConfigDict

from meanflow_jax import build
from meanflow_jax.compiled import (
  Compiled,
  Largest,
  Need,
  Roofline,
  compile_step,
  device_bytes,
  largest_batch,
  model_flops,
  scheduled_seconds,
)
from meanflow_jax.models.rematerialisation import REMAT
from meanflow_jax.runtime import topology
from meanflow_jax.runtime.hlo import Traffic
from meanflow_jax.runtime.mesh import DATA, FSDP, make_mesh
from meanflow_jax.runtime.topology import Slice
from meanflow_jax.train_step import TrainStep

# Of the peak that a well-tuned transformer reaches on GPUs; where nothing can be compiled.
ASSUMED_UTILISATION = 0.4
BATCH_FACTORS = (1, 4)  # of a sweep
_GPU_BYTES = """\
Bytes per GPU. Temporaries are what the compiler of this CPU allocates for the step of one GPU's
share, gradients whole: no figure of a GPU's compiler."""
_SWEEP_TIME = """\
Memory and time are those of the form that trains. Time: the cycles that the compiler's schedule
estimates, loops in full, plus what is sent at the bandwidth of the links: good for comparing rows;
the plan without --sweep is finer.
"""
_NO_ESTIMATE = "our roofline, for the compiler gives no estimate"


def run(config: ConfigDict, topology_name: str, sweep: bool) -> None:
  """Prints the plan of a config for a machine, or a table of choices."""
  with build.explaining_mistakes():
    machine = topology.parse(topology_name)
    if machine.chip.platform == "gpu" and sweep:
      raise ValueError(f"--sweep compiles, which takes a TPU's name, not {topology_name!r}")
    make = _sweep if sweep else _gpu_plan if machine.chip.platform == "gpu" else _tpu_plan
    for line in make(config, machine):
      print(line, flush=True)


def _built(config: ConfigDict, devices: Sequence[jax.Device]) -> tuple[TrainStep, Mesh]:
  """The step of a config on some devices.

  Raises:
    ValueError: a mistake in the config, or a batch that does not divide.
  """
  mesh = make_mesh(**config.mesh, devices=list(devices))
  return _step(config, mesh), mesh


def _step(config: ConfigDict, mesh: Mesh) -> TrainStep:
  return build.train_step(config, build.network(config, mesh), build.method(config), mesh)


def _compiled(config: ConfigDict, devices: Sequence[jax.Device]) -> Compiled:
  step, mesh = _built(config, devices)
  return compile_step(step, build.abstract_batch(config, mesh), mesh)


# The plan of a TPU slice.


@dataclasses.dataclass(frozen=True)
class Job:
  """A config on the devices of a slice.

  Attributes:
    config: with all changes.
    machine: the slice.
    devices: of it.
  """

  config: ConfigDict
  machine: Slice
  devices: tuple[jax.Device, ...]

  @classmethod
  def on(cls, config: ConfigDict, machine: Slice) -> "Job":
    """A config on all devices of a TPU slice.

    Raises:
      ValueError: if there is no compiler for it.
    """
    return cls(config, machine, tuple(topology.tpu_devices(machine.name)))

  def changed(self, **changes: object) -> "Job":
    """With other values of keys such as `model__scan`."""
    config = self.config.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return dataclasses.replace(self, config=config)

  def need(self, **changes: object) -> Need:
    """What the compiler says, with other values of keys.

    Raises:
      ValueError: a mistake in the config, or a batch that does not divide.
    """
    job = self.changed(**changes) if changes else self
    return Need.of(lambda: _compiled(job.config, job.devices))

  @property
  def unit(self) -> int:
    """What the batch must be a multiple of."""
    method = build.method(self.config)
    return build.batch_unit(self.config.train.accumulate, len(self.devices), method)

  @property
  def share(self) -> float:
    """Of a chip that a device is: the compiler sees the two cores of some as two."""
    return self.machine.chips / len(self.devices)

  @property
  def memory(self) -> float:
    """Bytes of a device."""
    return self.machine.chip.memory * self.share


def _tpu_plan(config: ConfigDict, machine: Slice) -> Iterator[str]:
  """The rows of the plan, each as soon as it is known."""
  job = Job.on(config, machine)
  step, mesh = _built(config, job.devices)
  yield from _heading(job, step, mesh)
  start = config.train.batch_size
  loops = getattr(step.network, "scan", False) or config.train.accumulate > 1
  with futures.ThreadPoolExecutor(1) as second_core:
    unrolled = second_core.submit(_unrolled, job) if loops else None
    need = job.need()
    yield from _memory(job, step, mesh, need)
    search = lambda batch: job.need(train__batch_size=batch)
    state = device_bytes(step.abstract_state(mesh))
    largest = largest_batch(search, {start: need}, unit=job.unit, state=state, limit=job.memory)
    yield _line("largest batch", _largest(largest, len(job.devices)))
    figures = unrolled.result() if unrolled else need.compiled or _unrolled(job)
  if not largest.batch:
    yield "No batch fits: spread the parameters (--config.mesh.fsdp), or take more chips."
  elif figures is None:
    yield "With the layers unrolled no batch fits: neither operations nor time are known."
  else:
    yield from _cost(job, step, figures, need.compiled)


def _heading(job: Job, step: TrainStep, mesh: Mesh) -> Iterator[str]:
  config, machine = job.config, job.machine
  cores = "" if job.share == 1 else f" (as {mesh.size} devices, one of each core)"
  yield _line("topology", f"{machine.name}, {machine.chips} chips{cores}")
  yield _line("mesh", f"data {mesh.shape[DATA]} x fsdp {mesh.shape[FSDP]}")
  rows = config.train.batch_size
  share = f"{rows / mesh.size:g} per device, {config.train.accumulate} microbatches"
  yield _line("batch", f"{rows} ({share})")
  model = config.model
  scan = f", scan {step.network.scan}" if hasattr(step.network, "scan") else ""
  yield _line("model", f"{model.name}, {model.dtype}, remat {model.remat}{scan}")


def _memory(job: Job, step: TrainStep, mesh: Mesh, need: Need) -> Iterator[str]:
  """Bytes by kind, of the form of the layers that the config trains with."""
  available = need.available or job.memory
  peak = _gb(need.peak) if need.peak else "more"
  verdict = f"{peak} of {_gb(available)} per device"
  yield _line("fits", f"yes, {verdict}" if need.fits else f"NO: needs {verdict}")
  state = step.abstract_state(mesh)
  kinds = {"parameters": state.params, "optimizer": state.opt_state, "averages": state.ema}
  sizes = {name: device_bytes(tree) for name, tree in kinds.items()}
  yield from (_line(f"  {name}", _gb(size)) for name, size in sizes.items())
  if figures := need.compiled:
    yield _line("  batch, padding", _gb(figures.arguments - sum(sizes.values())))
    temporaries = figures.peak - figures.arguments - figures.output
    yield _line(
      "  temporaries", f"{_gb(temporaries)} (activations, gradients: what lives at the peak)"
    )
    yield _line("  output", f"{_gb(figures.output)} (results that take no argument's place)")
    yield _line("  compiled in", f"{figures.seconds:.0f} s")
    yield from _collectives(figures.program.collectives)
    if lost := figures.program.uncounted_loops:
      yield f"{lost} loops count as one round: the program does not tell how many they take."


def _collectives(collectives: dict[str, Traffic]) -> Iterator[str]:
  if not collectives:
    yield _line("collectives", "none")
    return
  yield _line(
    "collectives", "per step and device, within the slice, so over ICI; bytes of what goes"
  )
  yield _line("", "in or of what comes out, whichever is larger")
  for kind, traffic in collectives.items():
    yield _line(f"  {kind}", f"{traffic.count}, {_gb(traffic.size)}")


def _largest(found: Largest, devices: int) -> str:
  if not found.batch:
    return "none"
  peak = f", {_gb(found.peak)} at the peak" if found.peak else ""
  limit = f"{found.failing} does not fit" if found.failing else "larger ones may fit"
  return f"{found.batch} ({found.batch // devices} per device){peak}; {limit}"


def _cost(job: Job, step: TrainStep, figures: Compiled, trained: Compiled | None) -> Iterator[str]:
  """Operations, traffic and time.

  Args:
    job: what is planned.
    step: of training.
    figures: of one compilation with the layers unrolled.
    trained: of the form that trains, if it fits.
  """
  config, chip = job.config, job.machine.chip
  rows = round(figures.images * len(job.devices))
  yield _line("unrolled", f"{rows} images, compiled in {figures.seconds:.0f} s: the rest is of it")
  model = model_flops(step) / 1e9
  yield _line(
    "FLOP", f"{figures.flops / figures.images / 1e9:.2f} GFLOP/image, the model's: {model:.2f}"
  )
  yield _line("memory traffic", f"{figures.traffic / figures.images / 1e9:.3f} GB/image")
  roofline = Roofline.of(figures, chip, job.share)
  yield _line("roofline", f"{roofline} per {rows} images")
  seconds = (figures.estimate or roofline.seconds) * config.train.batch_size / rows
  source = "the compiler's estimate" if figures.estimate else _NO_ESTIMATE
  scanned = trained is not None and getattr(step.network, "scan", False)
  if scanned and (ratio := _ratio(job, trained, figures)):
    yield _line(
      "time unrolled", f"{seconds * 1e3:.4g} ms/step (--config.model.scan=False): {source}"
    )
    seconds *= ratio
    source = f"{ratio:.2f} times that, by the cycles of both schedules"
  yield _line("time", f"{seconds * 1e3:.4g} ms/step: {source}")
  yield from _whole_run(seconds, config.train, job.machine.chips)
  images = config.train.batch_size / seconds / job.machine.chips
  used = images * model_flops(step) / chip.flops
  yield _line(
    "utilisation", f"{images:.0f} images/s per chip, {used:.0%} of the peak for the model"
  )


def _ratio(job: Job, scanned: Compiled, unrolled: Compiled) -> float | None:
  """Of the times of a scanned and an unrolled step; None where the schedules state no cycles."""
  if not (scanned.program.cycles and unrolled.program.cycles and job.machine.chip.clock):
    return None
  seconds = lambda x: scheduled_seconds(x, job.machine.chip, job.share) / x.images
  return seconds(scanned) / seconds(unrolled)


def _unrolled(job: Job) -> Compiled | None:
  """Figures without loops, of which one round would be counted: of one microbatch, or, where it
  does not fit, of a half, a quarter, ... of it."""
  job = job.changed(
    model__scan=False,
    train__accumulate=1,
    train__batch_size=job.config.train.batch_size // job.config.train.accumulate,
  )
  rows = job.config.train.batch_size
  while rows >= job.unit:
    if figures := job.need(train__batch_size=rows).compiled:
      return figures
    rows = rows // 2 // job.unit * job.unit
  return None


def _whole_run(seconds: float, train: ConfigDict, chips: int, label: str = "") -> Iterator[str]:
  total = seconds * train.steps
  said = (
    f"{1 / seconds:.2f} steps/s; {train.steps:,} steps: {total / 86400:.2f} days, "
    f"{total / 3600 * chips:,.0f} chip-hours"
  )
  yield _line(label or "whole run", said)


# The sweep.


@dataclasses.dataclass(frozen=True)
class Choice:
  """One row of a sweep.

  Attributes:
    fsdp, remat, batch: what was tried.
    peak: bytes, or None.
    lacking: bytes that are missing, 0 if it fits, None if unknown.
    rate: images/s per chip; 0 if it does not fit.
    mistake: why it could not be tried.
  """

  fsdp: int
  remat: str
  batch: int
  peak: int | None = None
  lacking: float | None = 0.0
  rate: float = 0.0
  mistake: str = ""


def _sweep(config: ConfigDict, machine: Slice) -> Iterator[str]:
  job = Job.on(config, machine)
  choices = [
    Choice(fsdp, remat, config.train.batch_size * factor)
    for fsdp in _fsdp_choices(config, machine, len(job.devices))
    for remat in REMAT
    for factor in BATCH_FACTORS
  ]
  bar = tqdm.tqdm(choices, "compiling", leave=False, disable=None)
  tried = [_try(job, choice) for choice in bar]
  yield f"{machine.name}, {machine.chips} chips. {_SWEEP_TIME}"
  yield f"{'images/s/chip':>13}  {'data x fsdp':>11}  {'remat':8} {'batch':>7}  {'peak':>9}"
  for choice in sorted(tried, key=best_first):
    yield _choice_row(choice, len(job.devices))


def _fsdp_choices(config: ConfigDict, machine: Slice, devices: int) -> list[int]:
  """None, a host's, all, and what the config says."""
  wanted = {1, machine.chip.per_host, devices, config.mesh.fsdp}
  return sorted(n for n in wanted if n >= 1 and devices % n == 0)


def _try(job: Job, choice: Choice) -> Choice:
  """Asks the compiler; a mistake becomes part of the row."""
  try:
    need = job.need(
      mesh__data=-1,
      mesh__fsdp=choice.fsdp,
      model__remat=choice.remat,
      train__batch_size=choice.batch,
    )
  except (ValueError, jax.errors.JaxRuntimeError) as error:
    return dataclasses.replace(choice, mistake=str(error).splitlines()[0])
  if not need.compiled:
    available = need.available or job.memory
    lacking = float(need.peak - available) if need.peak else None
    return dataclasses.replace(choice, peak=need.peak, lacking=lacking)
  seconds = scheduled_seconds(need.compiled, job.machine.chip, job.share)
  rate = choice.batch / seconds / job.machine.chips
  return dataclasses.replace(choice, peak=need.peak, rate=rate)


def best_first(choice: Choice) -> tuple:
  """Sorts: what fits by rate, then what does not by how little is missing, then mistakes."""
  return bool(choice.mistake), -choice.rate, math.inf if choice.lacking is None else choice.lacking


def _choice_row(choice: Choice, devices: int) -> str:
  mesh = f"{devices // choice.fsdp} x {choice.fsdp}"
  rate = f"{choice.rate:.0f}" if choice.rate else "-"
  peak = _gb(choice.peak) if choice.peak else "-"
  note = choice.mistake
  if not choice.rate and not note:
    note = f"lacks {_gb(choice.lacking)}" if choice.lacking else "does not fit"
  row = f"{rate:>13}  {mesh:>11}  {choice.remat:8} {choice.batch:>7}  {peak:>9}  {note}"
  return row.rstrip()


# The plan of GPUs.


def _gpu_plan(config: ConfigDict, machine: Slice) -> Iterator[str]:
  """Arithmetic from shapes, and what the compiler of this CPU allocates."""
  chip, chips = machine.chip, machine.chips
  fsdps = sorted({1, min(chip.per_host, chips), chips, config.mesh.fsdp})
  steps = {n: _stand_in(config, n, chips) for n in fsdps}
  step, mesh = steps[config.mesh.fsdp]
  images = config.train.batch_size / chips
  yield _line("topology", f"{machine.name}, nodes of {min(chip.per_host, chips)}")
  yield _line("batch", f"{config.train.batch_size} ({images:g} per GPU)")
  temporaries = _cpu_temporaries(config, chips)
  yield _GPU_BYTES
  yield f"{'fsdp':>6} {'parameters':>12} {'optimizer':>12} {'averages':>12} {'temporaries':>12}"
  for n, (made, on) in steps.items():
    state = made.abstract_state(on)
    sizes = [device_bytes(tree) for tree in (state.params, state.opt_state, state.ema)]
    sizes.append(temporaries)
    fits = f"{_gb(sum(sizes))} of {_gb(chip.memory)}: {_yes(sum(sizes) <= chip.memory)}"
    yield f"{n:>6} " + " ".join(f"{_gb(size):>12}" for size in sizes) + f"   {fits}"
  yield from _gpu_time(config, machine, step, mesh)


def _gpu_time(config: ConfigDict, machine: Slice, step: TrainStep, mesh: Mesh) -> Iterator[str]:
  chip, chips = machine.chip, machine.chips
  flops = model_flops(step)
  is_half = config.model.dtype == "bfloat16"
  peak = chip.flops if is_half else chip.float32_flops
  yield _line("FLOP", f"{flops / 1e9:.2f} GFLOP/image that the model asks for, nothing recomputed")
  state = step.abstract_state(mesh)
  gradients = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
  link, where = slowest_link(machine)
  least = Roofline(
    compute=config.train.batch_size / chips * flops / peak,
    memory=2 * device_bytes(state) / chip.bandwidth,
    network=2 * (chips - 1) / chips * gradients / link,
  )
  yield _line("roofline", f"{least} per step:")
  yield f"  products at {peak / 1e12:.0f} TFLOP/s ({'bfloat16' if is_half else 'TF32'}),"
  yield f"  the state read and written once at {chip.bandwidth / 1e12:.2f} TB/s,"
  yield f"  an all-reduce of the gradients in rings over {where}, {link / 1e9:.0f} GB/s per GPU"
  alone = max(least.compute, least.memory, least.network)
  yield from _whole_run(alone, config.train, chips, "at least")
  assumed = dataclasses.replace(least, compute=least.compute / ASSUMED_UTILISATION)
  yield from _whole_run(assumed.seconds, config.train, chips, "more likely")
  yield f"  at {ASSUMED_UTILISATION:.0%} of the peak (assumed), and idle while gradients travel"


def slowest_link(machine: Slice) -> tuple[float, str]:
  """Bytes/s per GPU of an all-reduce over all: each node's rings share its network adapters."""
  chip = machine.chip
  if machine.chips <= chip.per_host:
    return chip.links, "NVLink"
  network = chip.network * chip.per_host
  if network < chip.links:
    return network, "the nodes' network"
  return chip.links, "NVLink and the nodes' network"


def _stand_in(config: ConfigDict, fsdp: int, chips: int) -> tuple[TrainStep, Mesh]:
  """The step on a mesh of so many devices, of which one stands for all: for shapes only.

  Raises:
    ValueError: a mistake in the config, or axes that do not match.
  """
  if fsdp < 1 or chips % fsdp:
    raise ValueError(f"mesh.fsdp {fsdp} does not divide {chips} GPUs")
  if config.mesh.data not in (-1, chips // config.mesh.fsdp):
    raise ValueError(
      f"mesh.data {config.mesh.data} x mesh.fsdp {config.mesh.fsdp} does not match {chips} GPUs"
    )
  cpu = jax.devices("cpu")[0]
  mesh = Mesh(np.full((chips // fsdp, fsdp), cpu), (DATA, FSDP))
  return _step(config, mesh), mesh


def _cpu_temporaries(config: ConfigDict, chips: int) -> int:
  """Bytes beside state and batch of one GPU's share of the step, compiled for a CPU."""
  share = config.copy_and_resolve_references()
  share.train.batch_size = config.train.batch_size // chips
  share.mesh.update(data=1, fsdp=1)
  figures = _compiled(share, jax.devices("cpu")[:1])
  return figures.temporaries


def _yes(fits: bool) -> str:
  return "fits" if fits else "does NOT fit"


def _line(name: str, value: str) -> str:
  return f"{name:16} {value}"


def _gb(size: int | float) -> str:
  return f"{size / 1e9:.2f} GB"
