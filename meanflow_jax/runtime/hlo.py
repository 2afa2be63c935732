"""Reads a compiled program: what it sends between devices, and how often its loops go round."""

import dataclasses
import re
from collections import Counter, defaultdict

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0}
# Of a computation's header and of an instruction: "%name = type opcode(operands), attributes".
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLS = re.compile(
  r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one kind of collective does on each device in one run of a program.

  Attributes:
    count: how often it runs.
    size: bytes in all; of each, of what goes in or of what comes out, whichever is larger.
  """

  count: int
  size: int


@dataclasses.dataclass(frozen=True)
class Program:
  """What the text of a compiled program says of one run on one device.

  Attributes:
    collectives: by kind, those that run.
    cycles: the compiler's own estimate over all instructions that have one; 0 without any.
    uncounted_loops: loops whose number of rounds the text does not tell; counted as one round.
  """

  collectives: dict[str, Traffic]
  cycles: int
  uncounted_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  opcode: str
  rest: str  # operands and attributes


def read(text: str) -> Program:
  """Reads the text of a compiled module (`Compiled.as_text()`), loops counted as they run.

  A collective that is started in one place and waited for in another counts once, and so does one
  that TPUs split over several fusions, which share its channel and its type.

  Raises:
    ValueError: if this is no such text.
  """
  entry, computations = _parse(text)
  runs, uncounted = _runs(entry, computations)
  traffic: defaultdict[tuple[str, ...], Counter] = defaultdict(Counter)
  cycles = 0
  for name, instructions in computations.items():
    types = {i.name: i.type for i in instructions}
    for i in instructions:
      if cycle := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
        cycles += runs[name] * int(cycle[1])
      kind = i.opcode.removesuffix("-start")
      if kind in COLLECTIVES and runs[name]:
        channel = re.search(r"channel_id=(\d+)", i.rest)
        key = kind, *((channel[1], i.type) if channel else (name, i.name))
        traffic[key][name, _size(i, types)] += runs[name]
  return Program(_by_kind(traffic), cycles, uncounted)


def _by_kind(traffic: dict[tuple[str, ...], Counter]) -> dict[str, Traffic]:
  count, size = Counter(), Counter()
  for (kind, *_), places in traffic.items():
    (_, bytes_), runs = max(places.items(), key=lambda place: place[1])
    count[kind] += runs
    size[kind] += runs * bytes_
  return {kind: Traffic(count[kind], size[kind]) for kind in COLLECTIVES if count[kind]}


def _parse(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
  """The name of the entry, and the instructions of each computation, callees first."""
  entry, here, computations = "", "", defaultdict(list)
  for line in text.splitlines():
    if header := _HEADER.match(line):
      here = header[2]
      entry = here if header[1] else entry
      computations[here] = []
    elif here and (found := _INSTRUCTION.match(line)):
      computations[here].append(_Instruction(*found.groups()))
  if not entry:
    raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
  return entry, computations


def _runs(entry: str, computations: dict[str, list[_Instruction]]) -> tuple[Counter, int]:
  """How often each computation runs, and how many loops there are of unknown rounds."""
  runs, uncounted = Counter({entry: 1}), 0
  for name in reversed(computations):  # callers come after what they call
    for i in computations[name] if runs[name] else ():
      rounds = 1
      if i.opcode == "while":
        rounds = _rounds(i, computations)
        uncounted += rounds is None
      elif i.opcode in ("async-update", "async-done"):  # name again what async-start runs
        continue
      called = _CALLS.findall(i.rest)
      for branches in _BRANCHES.findall(i.rest):
        called += re.findall(r"[\w.\-]+", branches)
      for callee in called:
        runs[callee] += runs[name] * (rounds or 1)
  return runs, uncounted


def _rounds(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
  """Of a loop that says so, or of one that counts up from 0 until a constant."""
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
  instructions = {i.name: i for i in computations.get(condition[1], ())} if condition else {}
  for i in instructions.values():
    if i.opcode == "compare" and "direction=LT" in i.rest:
      for operand in re.findall(r"%([\w.\-]+)", i.rest.split(")")[0]):
        limit = instructions.get(operand)
        if limit and limit.opcode == "constant" and limit.rest.split(")")[0].isdecimal():
          return int(limit.rest.split(")")[0])
  return None


def _size(i: _Instruction, types: dict[str, str]) -> int:
  """Bytes of the operands or of the result, whichever are more."""
  operands = re.findall(r"%([\w.\-]+)", i.rest.split(")")[0])
  taken = sum(_bytes(types.get(operand, "")) for operand in operands)
  if i.opcode.endswith("-start") and i.type.startswith("(") and i.opcode != "all-reduce-start":
    # (operands, results, contexts); an all-reduce has its results alone.
    made = _bytes(i.type) - taken - 4 * len(re.findall(r"u32\[\]", i.type))
  else:
    made = _bytes(i.type)
  return max(taken, made)


def _bytes(type_: str) -> int:
  total = 0
  for dtype, shape in _ARRAY.findall(type_):
    elements = 1
    for length in filter(None, shape.split(",")):
      elements *= int(length)
    total += elements * _bits(dtype) // 8
  return total


def _bits(dtype: str) -> int:
  if dtype in _ITEM_BITS:
    return _ITEM_BITS[dtype]
  digits = re.search(r"\d+", dtype)
  return int(digits[0]) if digits else 0
