"""Machines that are not here: what is known of their chips, and the compiler of TPU slices."""

import dataclasses
import itertools
import math
import os
import re

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the makers say of one chip; bandwidths in one direction.

  Attributes:
    name: as users write it.
    platform: "tpu" or "gpu".
    flops: peak FLOP/s of bfloat16 matrix products, dense.
    float32_flops: of products of float32 as JAX computes them by default: bfloat16 passes on TPUs,
      TF32 on GPUs.
    memory: bytes of HBM that a program may use; of a TPU, what its compiler says.
    bandwidth: of HBM, bytes/s.
    links: to the other chips of a slice (ICI) or of a node (NVLink), bytes/s.
    per_host: chips of one host.
    clock: of a TPU's cores, Hz: what the compiler's cycles are counted in.
    network: between the nodes of GPUs as they are usually sold, bytes/s per chip.
  """

  name: str
  platform: str
  flops: float
  float32_flops: float
  memory: float
  bandwidth: float
  links: float
  per_host: int
  clock: float = 0.0
  network: float = 0.0


def _tpu(
  name: str, tera_flops: float, gib: float, bandwidth: float, links: float, clock: float
) -> Chip:
  flops = tera_flops * 1e12
  return Chip(name, "tpu", flops, flops, gib * GIB, bandwidth, links, per_host=4, clock=clock)


def _gpu(
  name: str, tera_flops: float, gb: float, bandwidth: float, links: float, network: float
) -> Chip:
  flops = tera_flops * 1e12
  rates = {"bandwidth": bandwidth, "links": links, "network": network}
  return Chip(name, "gpu", flops, flops / 2, gb * 1e9, per_host=8, **rates)


# Data sheets of Google Cloud and NVIDIA (SXM boards); the clocks follow from peak and array sizes.
CHIPS = {
  chip.name: chip
  for chip in (
    _tpu("v4", 275.0, 31.25, 1.228e12, 300e9, 1.05e9),
    _tpu("v5e", 197.0, 15.75, 0.819e12, 200e9, 1.5e9),
    _tpu("v5p", 459.0, 95.74, 2.765e12, 600e9, 1.75e9),
    _tpu("v6e", 918.0, 31.25, 1.638e12, 400e9, 1.75e9),
    _gpu("a100-40gb", 312.0, 40.0, 1.555e12, 300e9, 25e9),
    _gpu("a100-80gb", 312.0, 80.0, 2.039e12, 300e9, 25e9),
    _gpu("h100", 989.0, 80.0, 3.35e12, 450e9, 50e9),
    _gpu("h200", 989.0, 141.0, 4.8e12, 450e9, 50e9),
    _gpu("b200", 2250.0, 180.0, 8e12, 900e9, 50e9),
  )
}

# Slices as they are offered. Larger v4 and v5p ones are cuboids of cubes of 4x4x4.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_SHOWN = 512  # chips: longer lists help nobody
# The largest slice, in chips, and the longest side.
_CUBOIDS = {"v4": (4096, 16), "v5p": (6144, 28)}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A number of chips of one kind.

  Attributes:
    chip: each of them.
    shape: chips along each axis of a TPU's torus; a number of GPUs.
  """

  chip: Chip
  shape: tuple[int, ...]

  @property
  def chips(self) -> int:
    """How many there are."""
    return math.prod(self.shape)

  @property
  def name(self) -> str:
    """As users write it."""
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse(name: str) -> Slice:
  """The machine of a name such as "v5p:4x4x4" or "h200:64".

  Raises:
    ValueError: if there is none; lists those that there are.
  """
  family, _, rest = name.strip().lower().partition(":")
  if family not in CHIPS:
    raise ValueError(
      f"there is no topology {name!r}: it is one of {', '.join(CHIPS)}, a colon, and the shape of "
      "the slice (v5p:4x4x4, v5e:4x4) or the number of GPUs (h200:64)"
    )
  chip = CHIPS[family]
  if not re.fullmatch(r"\d{1,5}(x\d{1,5})*", rest) or not _exists(chip, rest):
    raise ValueError(f"there is no topology {name!r}; {family} comes as {_offers(chip)}")
  return Slice(chip, tuple(map(int, rest.split("x"))))


def shapes(family: str) -> tuple[str, ...]:
  """The slices of a TPU family, smallest first.

  Raises:
    KeyError: no such family.
  """
  if family not in _CUBOIDS:
    return {"v5e": _FLAT, "v6e": _FLAT}[family]
  chips, side = _CUBOIDS[family]
  sides = itertools.combinations_with_replacement(range(4, side + 1, 4), 3)
  cuboids = sorted((s for s in sides if math.prod(s) <= chips), key=lambda s: (math.prod(s), s))
  return (*_SMALL, *("x".join(map(str, s)) for s in cuboids))


def chip_of(device_kind: str) -> Chip | None:
  """The chip that JAX calls a `device_kind`, or None where we know nothing of it."""
  kind = device_kind.lower()
  names = {"tpu v5 lite": "v5e", "tpu v5": "v5p", "tpu v6 lite": "v6e", "tpu v4": "v4"}
  if kind in names:
    return CHIPS[names[kind]]
  if "a100" in kind:
    return CHIPS["a100-80gb" if "80gb" in kind else "a100-40gb"]
  return next((CHIPS[name] for name in ("h100", "h200", "b200") if name in kind), None)


def _exists(chip: Chip, shape: str) -> bool:
  if chip.platform == "tpu":
    return shape in shapes(chip.name)
  return shape.isdecimal() and _whole_nodes(chip, int(shape))


def _whole_nodes(chip: Chip, count: int) -> bool:
  return count > 0 and (count % chip.per_host == 0 or chip.per_host % count == 0)


def _offers(chip: Chip) -> str:
  if chip.platform == "gpu":
    parts = [str(n) for n in range(1, chip.per_host) if chip.per_host % n == 0]
    names = ", ".join(f"{chip.name}:{n}" for n in parts)
    return f"{names} or any multiple of {chip.per_host} (whole nodes), as {chip.name}:64"
  offered = shapes(chip.name)
  shown = [s for s in offered if math.prod(map(int, s.split("x"))) <= _SHOWN]
  more = f", and larger up to {offered[-1]}" if len(shown) < len(offered) else ""
  return ", ".join(f"{chip.name}:{s}" for s in shown) + more


def tpu_devices(name: str) -> list[jax.Device]:
  """The devices of a TPU slice such as "v5p:2x2x1", to compile for; nothing runs on them.

  Needs libtpu (the extra `tpu`), not a TPU.

  Raises:
    ValueError: if there is no libtpu or no such topology.
  """
  slice_ = parse(name)
  if slice_.chip.platform != "tpu":
    raise ValueError(f"only TPUs have a compiler that needs no machine, {name!r} is a GPU's name")
  # The smallest slice is a part of a host, which has four chips otherwise.
  settings = {"chips_per_host_bounds": (1, 1, 1)} if slice_.chips == 1 else {}
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs: others may compile, too
  try:
    return list(topologies.get_topology_desc(slice_.name, platform="tpu", **settings).devices)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    raise ValueError(
      f'cannot compile for {name!r}; it needs pip install -e ".[tpu]", on any CPU: {error}'
    ) from error
