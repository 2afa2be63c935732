"""Parameters are gathered over the fastest links, one layer at a time, and nothing small is."""

import dataclasses
import importlib
import itertools
import logging
import math
import random
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from meanflow_jax import build
from meanflow_jax.runtime.mesh import (
  FSDP,
  device_grid,
  make_mesh,
  parameter_shardings,
  shardings_of,
)
from meanflow_jax.runtime.topology import tpu_devices
from tests.runs import mesh_of, tiny, train_step

PUBLISHED = ("imagenet_b4", "imagenet_b2", "imagenet_m2", "imagenet_l2", "imagenet_xl2")


@dataclasses.dataclass(frozen=True)
class Device:
  """What a device says of its place."""

  id: int
  platform: str
  process_index: int
  slice_index: int | None = None
  coords: tuple[int, ...] = ()
  core_on_chip: int = 0
  device_kind: str = "TPU v5"


def tpu_slices(slices: int, *sides: int) -> list[Device]:
  """TPU slices, each a box of chips, four to a process, in no order."""
  places = itertools.product(range(slices), *map(range, sides))
  devices = [
    Device(i, "tpu", process_index=i // 4, slice_index=at[0], coords=at[1:])
    for i, at in enumerate(places)
  ]
  random.Random(0).shuffle(devices)
  return devices


def gpus(*nodes: int, slice_index: bool = False) -> list[Device]:
  """GPUs of nodes of the given sizes: a process for each node, or, where slices are known, GPU."""
  of_node = [node for node, size in enumerate(nodes) for _ in range(size)]
  return [
    Device(i, "gpu", i if slice_index else node, node if slice_index else None, device_kind="H100")
    for i, node in enumerate(of_node)
  ][::-1]


def islands(grid: np.ndarray) -> list[set[int]]:
  """The islands that each row of a grid touches."""
  place = lambda d: d.process_index if d.slice_index is None else d.slice_index
  return [{place(device) for device in row} for row in grid]


@pytest.mark.parametrize(
  "devices",
  [tpu_slices(2, 2, 2, 2), tpu_slices(2, 2, 4, 1), gpus(8, 8), gpus(8, 8, slice_index=True)],
)
@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_fsdp_stays_on_an_island(devices: list[Device], fsdp: int) -> None:
  grid = device_grid(fsdp, devices)
  assert grid.shape == (16 // fsdp, fsdp)
  assert {d.id for d in grid.flat} == set(range(16))
  assert islands(grid) == [{0}] * (8 // fsdp) + [{1}] * (8 // fsdp)


def test_islands_may_differ_in_size() -> None:
  assert islands(device_grid(4, gpus(8, 4))) == [{0}, {0}, {1}]


def test_one_slice_of_many_hosts_is_one_island() -> None:
  assert device_grid(16, tpu_slices(1, 2, 2, 4)).shape == (1, 16)


@pytest.mark.parametrize("fsdp", [2, 4, 8, 16, 32])
def test_fsdp_is_a_box_of_the_torus(fsdp: int) -> None:
  for row in device_grid(fsdp, tpu_slices(1, 4, 4, 4)):
    places = np.array([device.coords for device in row])
    assert np.prod([len(set(axis)) for axis in places.T]) == fsdp


def test_fsdp_across_islands_takes_whole_ones_and_is_warned_of(
  caplog: pytest.LogCaptureFixture,
) -> None:
  with caplog.at_level(logging.WARNING):
    grid = device_grid(16, gpus(8, 8, 8, 8))
  assert islands(grid) == [{0, 1}, {2, 3}]
  assert "mesh.fsdp 16 is larger than an island" in caplog.text
  assert "mesh.fsdp=8 would keep to the fast ones" in caplog.text


@pytest.mark.parametrize(("fsdp", "nodes"), [(12, (8, 8, 8)), (6, (8, 4)), (12, (8, 4))])
def test_fsdp_across_parts_of_islands_is_refused(fsdp: int, nodes: tuple[int, ...]) -> None:
  with pytest.raises(ValueError, match=rf"mesh.fsdp {fsdp} does not fit .* of \[.*8\] devices"):
    device_grid(fsdp, gpus(*nodes))


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v5p:2x2x2", "v5e:2x4"])
def test_two_real_slices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  devices = topologies.get_topology_desc(name, platform="tpu", num_slices=2).devices
  mesh = make_mesh(-1, 4, list(devices))
  assert mesh.shape == {"data": 4, "fsdp": 4}
  assert [{d.slice_index for d in row} for row in mesh.devices] == [{0}, {0}, {1}, {1}]


def test_simulated_devices_keep_their_order() -> None:
  assert mesh_of(2, 4).devices.ravel().tolist() == jax.devices()


# The rule.


def spec(*shape: int, fsdp: int = 4, beside: tuple[int, ...] = (1,)) -> jax.sharding.PartitionSpec:
  shapes = [jax.ShapeDtypeStruct(x, np.float32) for x in (shape, beside)]
  return parameter_shardings(mesh_of(1, fsdp), shapes)[0].spec


@pytest.mark.parametrize(
  ("shape", "axis"),
  [
    ((12, 768, 3072), 2),
    ((12, 3072, 768), 1),
    ((12, 768, 768), 2),
    ((4, 4, 128, 64), 2),  # a convolution
    ((12, 768, 6), 1),
    ((1024, 6, 8), 2),  # never the layers
    ((1024, 6, 6), None),
    ((1024,), None),
  ],
)
def test_the_larger_of_the_last_two_axes_is_spread(
  shape: tuple[int, ...], axis: int | None
) -> None:
  assert list(spec(*shape)) == ([] if axis is None else [None] * axis + [FSDP])


@pytest.mark.parametrize(("rows", "whole"), [(32, False), (28, True)])
def test_small_arrays_are_whole(rows: int, whole: bool) -> None:
  assert (spec(rows, 8, beside=(256, 8)) == jax.sharding.PartitionSpec()) == whole


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_network_is_spread_but_for_what_is_not_in_its_layers(preset: str) -> None:
  config, mesh = importlib.import_module(f"configs.{preset}").get_config(), mesh_of(1, 8)
  step = build.train_step(config, build.network(config, mesh), build.method(config), mesh)
  state = step.abstract_state(mesh)
  for path, leaf in jax.tree.leaves_with_path(state.params):
    in_layers = "'blocks'" in jax.tree_util.keystr(path) and "kernel" in jax.tree_util.keystr(path)
    assert (FSDP in leaf.sharding.spec) == in_layers, jax.tree_util.keystr(path)
    assert not leaf.sharding.spec or leaf.sharding.spec[0] is None
  leaves = jax.tree.leaves(state)
  here = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
  assert here / sum(x.size for x in leaves) < 0.16


def test_a_width_that_fsdp_does_not_divide_is_refused() -> None:
  with pytest.raises(ValueError, match=r"mesh.fsdp 3 does not divide model.width 16"):
    build.network(tiny(), mesh_of(1, 3))


# The compiled step.

DEPTH, WIDTH = 4, 128
OF_A_LAYER = {"modulation": 6, "qkv": 3, "out": 1, "mlp_in": 4, "mlp_out": 4}  # in WIDTH x WIDTH


def network(**changes: Any) -> ConfigDict:
  """Proportioned as the published ones: nearly all of it is in the layers."""
  settings = {"depth": DEPTH, "width": WIDTH, "num_heads": 4, "patch_size": 1}
  settings |= {"scan": True} | changes
  changes = {f"model.{key}": value for key, value in settings.items()}
  return tiny(changes | {"train.batch_size": 64, "method.times.equal_fraction": 0.5})


def compiled(config: ConfigDict, mesh: Mesh) -> jax.stages.Compiled:
  step = train_step(config, mesh)
  batch = build.abstract_batch(config, mesh)
  return step.jitted(mesh).lower(step.abstract_state(mesh), batch).compile()


class Collective(NamedTuple):
  """One collective of a compiled step: the computation that it is in, and the sizes it makes."""

  kind: str
  place: str
  sizes: list[int]


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


def collectives(text: str) -> list[Collective]:
  found, place = [], ""
  for line in text.splitlines():
    if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
      place = "ENTRY" if header[1] else header[2]
    elif made := re.match(rf"\s+(?:ROOT )?%[\w.\-]+ = (.*?) ({KINDS})(?:-start)?\(", line):
      shapes = re.findall(r"[a-z]+\d+\[([\d,]*)\]", made[1])
      sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
      found.append(Collective(made[2], place, sizes))
  return found


def assert_gathers_a_layer_at_a_time(text: str, fsdp: int) -> None:
  """What is as large as a layer's smallest kernel is one kernel, gathered in a loop."""
  kernels = {times * WIDTH**2 for times in OF_A_LAYER.values()}
  gathered = set()
  for kind, place, sizes in collectives(text):
    if kind == "all-gather" and max(sizes) >= min(kernels):
      assert place != "ENTRY"
      assert len(sizes) == 1
      gathered.add(sizes[0])
    elif kind not in ("all-gather", "all-reduce", "reduce-scatter"):
      assert max(sizes) < min(kernels) // fsdp, (kind, place, sizes)
  assert gathered == kernels
  for shape in ((WIDTH, 6 * WIDTH), (WIDTH, 3 * WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)):
    assert f"[{DEPTH},{shape[0]},{shape[1]}]" not in text  # of all layers
    assert f"[{DEPTH},{shape[1]},{shape[0]}]" not in text


def test_layers_are_gathered_one_at_a_time(capfd: pytest.CaptureFixture[str]) -> None:
  text = compiled(network(), mesh_of(2, 4)).as_text()
  assert_gathers_a_layer_at_a_time(text, fsdp=4)
  assert "rematerialization" not in capfd.readouterr().err  # the partitioner's resharding notes


@pytest.mark.tpu
@pytest.mark.parametrize(
  ("name", "data", "fsdp", "remat"),
  [
    ("v5p:2x2x2", 2, 4, "none"),
    ("v5p:2x2x2", 2, 4, "matmuls"),
    ("v5p:2x2x2", 2, 4, "blocks"),
    ("v5e:2x4", 1, 8, "matmuls"),
  ],
)
def test_a_tpu_gathers_layers_and_scatters_gradients(
  name: str, data: int, fsdp: int, remat: str
) -> None:
  mesh = make_mesh(data, fsdp, tpu_devices(name))
  text = compiled(network(remat=remat), mesh).as_text()
  assert_gathers_a_layer_at_a_time(text, fsdp)
  kernels, scattered = {times * WIDTH**2 for times in OF_A_LAYER.values()}, set()
  parts = {size // fsdp for size in kernels}  # which are summed over data
  for kind, place, sizes in collectives(text):
    if kind == "all-reduce" and "all-reduce-scatter" in place:  # the TPU's reduce-scatter
      scattered |= kernels.intersection(sizes)
    elif kind == "all-reduce" and place != "ENTRY":
      assert not (kernels - parts).intersection(sizes)
  assert scattered == kernels


@pytest.mark.tpu
def test_on_a_whole_slice_of_three_axes_gradients_are_summed_layer_by_layer_and_cut() -> None:
  """The compiler scatters no sums over all chips of such a slice, not even an explicit one."""
  mesh = make_mesh(1, 8, tpu_devices("v5p:2x2x2"))
  text = compiled(network(remat="matmuls"), mesh).as_text()
  assert_gathers_a_layer_at_a_time(text, fsdp=8)  # and nothing holds all layers of a gradient
  kernels = {times * WIDTH**2 for times in OF_A_LAYER.values()}
  biases = {times * WIDTH for times in OF_A_LAYER.values()}
  summed = set()
  for kind, place, sizes in collectives(text):
    assert kind in ("all-gather", "all-reduce", "reduce-scatter")
    if kind != "all-gather" and place != "ENTRY":
      assert kernels | biases >= set(sizes)
      summed |= kernels.intersection(sizes)
  assert summed == kernels
  for width, times in ((WIDTH, 6), (WIDTH, 3), (WIDTH, 4), (WIDTH, 1)):
    assert f"[{DEPTH},{width},{times * WIDTH // 8}]" in text


@pytest.mark.slow
def test_parameters_moments_and_averages_take_an_eighth_of_the_memory() -> None:
  spread, whole = (
    compiled(network(), mesh_of(*shape)).memory_analysis().argument_size_in_bytes
    for shape in ((1, 8), (8, 1))
  )
  assert spread < 0.2 * whole


def test_a_new_state_is_made_where_it_belongs() -> None:
  """Neither results nor temporaries hold all of what is spread."""
  mesh = mesh_of(1, 8)
  step = train_step(network(), mesh)
  shapes = step.abstract_state(mesh)
  init = jax.jit(step.init, out_shardings=shardings_of(shapes)).lower().compile()
  memory = init.memory_analysis()
  here = memory.output_size_in_bytes + memory.temp_size_in_bytes
  assert here < 0.4 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
