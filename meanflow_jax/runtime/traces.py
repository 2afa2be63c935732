"""Reads a profile of JAX: when each device was at work, and on what."""

import dataclasses
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax

# Of the lines of a profile, those that say what a device does: CUDA's streams, a TPU's operations,
# the threads of the CPU's runtime.
_DEVICES = (("/device:GPU", "Stream"), ("/device:TPU", "XLA Ops"), ("/host:CPU", "tf_XLA"))
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", re.M)
_SCOPE = re.compile(r'metadata=\{.*?op_name="([^"]*)"')
# These last as long as what they call, which is listed itself.
_CALLERS = re.compile(r"%?(while|call|conditional)\b")

Event = tuple[str, float, float]  # instruction, start and end in ns


@dataclasses.dataclass(frozen=True)
class Activity:
  """What one device did.

  Attributes:
    name: of the device.
    seconds: from the first operation's start to the last one's end.
    idle: seconds of these without any operation.
    longest_gap: seconds of the longest time without any.
    operations: seconds by instruction; of several at once, the sum.
  """

  name: str
  seconds: float
  idle: float
  longest_gap: float
  operations: dict[str, float]


def read(path: pathlib.Path) -> list[Activity]:
  """The devices of a profile (`*.xplane.pb`).

  Raises:
    ValueError: if no device did anything.
  """
  planes = jax.profiler.ProfileData.from_file(str(path)).planes
  found = {plane.name: list(_events(plane)) for plane in planes}
  if not any(found.values()):
    raise ValueError(f"{path} holds no operation of a device")
  return [_activity(name, events) for name, events in sorted(found.items()) if events]


def by_scope(
  operations: Mapping[str, float], program: str, scopes: tuple[str, ...]
) -> dict[str, float]:
  """Seconds of each named scope, and of the "rest" of a program.

  Args:
    operations: seconds by instruction; what is none of the program is left out.
    program: text of the compiled module.
    scopes: names given by `jax.named_scope`; the first of these that encloses an instruction.
  """
  paths = {name: _SCOPE.search(rest) for name, rest in _INSTRUCTION.findall(program)}
  patterns = {scope: re.compile(rf"\b{scope}\b") for scope in scopes}
  sums = dict.fromkeys([*scopes, "rest"], 0.0)
  for name in operations.keys() & paths.keys():
    path = paths[name][1] if paths[name] else ""
    scope = next((scope for scope, pattern in patterns.items() if pattern.search(path)), "rest")
    sums[scope] += operations[name]
  return sums


def _events(plane: Any) -> Iterator[Event]:
  for line in plane.lines:
    if any(plane.name.startswith(device) and line.name.startswith(own) for device, own in _DEVICES):
      for event in line.events:
        if event.duration_ns > 0:
          name = dict(event.stats).get("hlo_op", event.name)
          yield str(name), event.start_ns, event.start_ns + event.duration_ns


def _activity(name: str, events: list[Event]) -> Activity:
  start, end = min(e[1] for e in events), max(e[2] for e in events)
  idle = longest = 0.0
  reached = start
  for _, begin, finish in sorted(events, key=lambda event: event[1]):
    gap = max(0.0, begin - reached)
    idle, longest, reached = idle + gap, max(longest, gap), max(reached, finish)
  operations: dict[str, float] = defaultdict(float)
  for instruction, begin, finish in events:
    if not _CALLERS.match(instruction):
      operations[_name_of(instruction)] += (finish - begin) / 1e9
  return Activity(name, (end - start) / 1e9, idle / 1e9, longest / 1e9, operations)


def _name_of(instruction: str) -> str:
  """TPUs name an operation by its whole line, "%fusion.3 = ..."."""
  return instruction.split(" ", 1)[0].lstrip("%")
