"""What a compiler says of a training step, before it has run."""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from meanflow_jax.runtime import hlo
from meanflow_jax.runtime.hlo import Traffic
from meanflow_jax.runtime.topology import Chip
from meanflow_jax.train_step import TrainStep

_TRIES = 16  # compilations in search of the largest batch
_BEYOND = 6  # times what one size alone lets expect
_FINENESS = 32  # to which part of itself it is found, where that is more than a unit
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([BKMGT]?)"
# "... required for HLO temporaries (27.64G) exceeds available HBM (15.75G)" means all that lives at
# the peak; "Used 18.05G of 15.48G hbm" is the other wording.
_TOO_MUCH = (
  re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
  re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)


class DoesNotFitError(Exception):
  """A step needs more memory than a device has.

  Attributes:
    needed, available: bytes, as far as the compiler says.
  """

  def __init__(self, message: str):
    super().__init__(message)
    found = next(filter(None, (pattern.search(message) for pattern in _TOO_MUCH)), None)
    self.needed = _bytes(found[1], found[2]) if found else None
    self.available = _bytes(found[3], found[4]) if found else None


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiler's figures of one step on one device.

  Attributes:
    seconds: that compiling took.
    images: rows of the batch on this device.
    flops, traffic: floating-point operations, bytes read and written; of loops, one round.
    estimate: seconds of a step, or None where the compiler gives none; of loops, one round.
    arguments: bytes of state and batch.
    peak: bytes that live at once at most, arguments included.
    temporaries: bytes of everything else that is allocated, reused or not.
    output: bytes of results that take no argument's place.
    program: what its text says, loops counted in full.
  """

  seconds: float
  images: float
  flops: float
  traffic: float
  estimate: float | None
  arguments: int
  peak: int
  temporaries: int
  output: int
  program: hlo.Program


def compile_step(
  train_step: TrainStep, batch: dict[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> Compiled:
  """Compiles the step for the devices of a mesh, which need not be here.

  Raises:
    DoesNotFitError: the compiler finds no way to fit the step into the devices' memory.
  """
  lowered = train_step.jitted(mesh).lower(train_step.abstract_state(mesh), batch)
  start = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise DoesNotFitError(str(error)) from error
  seconds = time.perf_counter() - start
  cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
  estimate = cost.get("optimal_seconds", -1.0)
  return Compiled(
    seconds=seconds,
    images=batch["label"].shape[0] / mesh.size,
    flops=cost["flops"],
    traffic=cost["bytes accessed"],
    estimate=estimate if estimate > 0 else None,
    arguments=memory.argument_size_in_bytes,
    peak=memory.peak_memory_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    output=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    program=hlo.read(compiled.as_text()),
  )


def model_flops(train_step: TrainStep) -> float:
  """Floating-point operations per image that the mathematics of a step asks for."""
  forward = functools.partial(train_step.network.forward_flops, train_step.image_shape)
  return train_step.method.flops(forward)


def device_bytes(arrays: PyTree) -> int:
  """Bytes on each device of a tree of shapes that know their sharding."""
  return sum(
    x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(arrays)
  )


def _bytes(number: str, unit: str) -> int:
  return round(float(number) * _UNITS[unit])


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds that a step takes at least of each of three resources.

  Attributes:
    compute: at the chip's peak FLOP/s.
    memory: at the bandwidth of its HBM.
    network: of its links; an all-reduce passes them twice.
  """

  compute: float
  memory: float
  network: float

  @classmethod
  def of(cls, figures: Compiled, chip: Chip, share: float = 1.0) -> "Roofline":
    """Of a compiled step on a device that is a share of a chip."""
    sent = wire_bytes(figures.program.collectives)
    return cls(
      figures.flops / (chip.flops * share),
      figures.traffic / (chip.bandwidth * share),
      sent / (chip.links * share),
    )

  @property
  def seconds(self) -> float:
    """Arithmetic and memory overlap, collectives are taken not to."""
    return max(self.compute, self.memory) + self.network

  def __str__(self) -> str:
    parts = {"FLOP": self.compute, "HBM": self.memory, "links": self.network}
    return ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in parts.items())


def wire_bytes(collectives: dict[str, Traffic]) -> int:
  """Bytes that a device sends, in rings of many devices."""
  return sum(t.size * (2 if kind == "all-reduce" else 1) for kind, t in collectives.items())


def scheduled_seconds(figures: Compiled, chip: Chip, share: float = 1.0) -> float:
  """Seconds of a step whose layers are scanned.

  Of loops, `cost_analysis` counts one round, but each instruction of the program has an estimate of
  its own; where there are none, the roofline of one round is all there is.
  """
  program = figures.program
  if not program.cycles or not chip.clock:
    return Roofline.of(figures, chip, share).seconds
  sent = wire_bytes(program.collectives) / (chip.links * share)
  return program.cycles / chip.clock + sent


@dataclasses.dataclass(frozen=True)
class Need:
  """What a step needs of each device.

  Attributes:
    fits: whether it compiled.
    peak: bytes at the peak; None if the compiler does not say.
    compiled: all figures, if it fits.
    available: bytes that the compiler grants, if it says so.
  """

  fits: bool
  peak: int | None
  compiled: Compiled | None = None
  available: int | None = None

  @classmethod
  def of(cls, compile_: Callable[[], Compiled]) -> "Need":
    """Asks the compiler."""
    try:
      figures = compile_()
    except DoesNotFitError as error:
      return cls(False, error.needed, available=error.available)
    return cls(True, figures.peak, figures)


@dataclasses.dataclass(frozen=True)
class Largest:
  """The result of a search.

  Attributes:
    batch: that fits; 0 if none does.
    peak: bytes that it needs.
    failing: the smallest batch that was seen not to fit, if any.
  """

  batch: int
  peak: int | None
  failing: int | None


def largest_batch(
  need: Callable[[int], Need],
  known: dict[int, Need],
  *,
  unit: int,
  state: int,
  limit: float,
) -> Largest:
  """Searches the largest multiple of `unit` that fits, to one unit or 3 % of it.

  Memory is nearly linear in the batch, so that a line through two sizes says what to try next; and
  what does not fit is refused in a tenth of the time that compiling takes, so that a line is better
  followed to a little beyond where it crosses the limit.

  Args:
    need: compiles one batch.
    known: what is known already, by batch.
    unit: of batches.
    state: bytes of a batch of none, about.
    limit: bytes of a device.
  """
  known = {0: Need(True, state)} | known
  for _ in range(_TRIES):
    fitting, failing = _bracket(known)
    if failing is not None and failing - fitting <= max(unit, failing // _FINENESS):
      break
    guess = _guess(known, fitting, failing, unit, limit)
    known[guess] = need(guess)
  fitting, failing = _bracket(known)
  return Largest(fitting, known[fitting].peak, failing)


def _bracket(known: dict[int, Need]) -> tuple[int, int | None]:
  """The largest batch that fits, and the smallest that does not."""
  fitting = max(batch for batch, found in known.items() if found.fits)
  return fitting, min((batch for batch, found in known.items() if not found.fits), default=None)


def _guess(
  known: dict[int, Need], fitting: int, failing: int | None, unit: int, limit: float
) -> int:
  """The next batch to try, above what fits and below what does not."""
  below = max((batch for batch in known if batch < fitting), default=None)
  first, second = (below, fitting) if failing is None else (fitting, failing)
  crossing = None
  if first is not None and known[first].peak and known[second].peak:
    slope = (known[second].peak - known[first].peak) / (second - first)
    crossing = first + (limit - known[first].peak) / slope if slope > 0 else None
  if failing is None:
    # Far enough to be refused, for a second point; a tiny model might never be.
    target = min(crossing * _BEYOND, 4096 * fitting) if crossing else 2 * fitting
    return max(fitting + unit, math.ceil(target / unit) * unit)
  # After the first tries a line that misleads takes turns with halving, of the ratio.
  if crossing is None or (len(known) > _TRIES // 4 and len(known) % 2):
    crossing = math.sqrt(max(fitting, unit) * failing)
  return min(max(math.ceil(crossing / unit) * unit, fitting + unit), failing - unit)
