"""Names of machines that are not here: those that exist, and what is said of the others."""

import math

import pytest

from meanflow_jax.runtime import topology

TPUS = [name for name, chip in topology.CHIPS.items() if chip.platform == "tpu"]


@pytest.mark.parametrize(
  ("name", "chips", "canonical"),
  [
    ("v5p:4x4x4", 64, "v5p:4x4x4"),
    ("v5e:16x16", 256, "v5e:16x16"),
    (" V6E:8x8 ", 64, "v6e:8x8"),
    ("v4:2x2x1", 4, "v4:2x2x1"),
    ("h200:64", 64, "h200:64"),
    ("a100-40gb:1", 1, "a100-40gb:1"),
  ],
)
def test_names(name, chips, canonical):
  machine = topology.parse(name)
  assert (machine.chips, machine.name) == (chips, canonical)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("v5e:3x3", ["'v5e:3x3'", "v5e:1x1, v5e:2x2, v5e:2x4, v5e:4x4", "v5e:16x16"]),
    ("v6e:32x32", ["'v6e:32x32'", "v6e:16x16"]),
    ("v5p:4x4", ["'v5p:4x4'", "v5p:2x2x1", "v5p:4x4x4", "up to 16x16x24"]),
    ("v5p:5x5x5", ["v5p:4x4x4"]),
    ("v5p:8x4x4", ["v5p:4x4x8"]),
    ("v4:4x4x20", ["v4:4x4x16"]),
    ("v5e", ["'v5e'", "v5e:2x4"]),
    ("v5e:", ["v5e:2x4"]),
    ("v5e:4x4x", ["v5e:2x4"]),
    ("v5e:-4x4", ["v5e:2x4"]),
    ("h200:0", ["'h200:0'", "h200:1, h200:2, h200:4 or any multiple of 8", "h200:64"]),
    ("h200:12", ["multiple of 8"]),
    ("h200:2x4", ["multiple of 8"]),
    ("v7:4x4", ["'v7:4x4'", "v4, v5e, v5p, v6e", "h100, h200, b200"]),
    ("", ["v5p:4x4x4", "h200:64"]),
  ],
)
def test_names_that_do_not_exist(name, words):
  with pytest.raises(ValueError, match="there is no topology") as caught:
    topology.parse(name)
  assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("family", TPUS)
def test_slices_are_listed_smallest_first(family):
  shapes = topology.shapes(family)
  sizes = [math.prod(map(int, shape.split("x"))) for shape in shapes]
  assert sizes == sorted(sizes)
  assert len(set(shapes)) == len(shapes)
  assert [topology.parse(f"{family}:{shape}").chips for shape in shapes] == sizes


def test_gpus_have_no_compiler():
  with pytest.raises(ValueError, match="'h200:8' is a GPU's name"):
    topology.tpu_devices("h200:8")


@pytest.mark.tpu
@pytest.mark.parametrize("family", TPUS)
def test_the_compiler_knows_the_slices(family):
  for shape in topology.shapes(family)[:16]:
    machine = topology.parse(f"{family}:{shape}")
    devices = topology.tpu_devices(machine.name)
    assert len(devices) % machine.chips == 0
    # Of v4 the compiler sees both cores of each chip.
    assert len(devices) // machine.chips == (2 if family == "v4" else 1)


@pytest.mark.parametrize("chip", topology.CHIPS.values(), ids=topology.CHIPS)
def test_facts_are_in_their_units(chip):
  assert 1e14 < chip.float32_flops <= chip.flops < 1e16
  assert 1e10 < chip.memory < 1e12
  assert 5e11 < chip.bandwidth < 1e13
  assert 1e11 < chip.links < 1e12
  assert (chip.clock > 1e9) == (chip.platform == "tpu")
  assert (chip.network > 1e10) == (chip.platform == "gpu")
