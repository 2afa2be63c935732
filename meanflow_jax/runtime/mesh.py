"""The device mesh, and the one rule by which arrays are spread over it."""

import itertools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

DATA, FSDP = "data", "fsdp"
ROWS = PartitionSpec((DATA, FSDP))
SMALL = 8  # an array this many times smaller than the largest is whole on every device

_log = logging.getLogger(__name__)


def make_mesh(data: int, fsdp: int, devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh of data x fsdp devices; data = -1 takes all that fsdp leaves.

  Each parameter is gathered over fsdp several times a step and summed over data once, so fsdp lies
  inside islands of fast links (a TPU slice, a GPU node), and data across them.

  Raises:
    ValueError: if the axes do not multiply to the number of devices, or fsdp neither divides an
      island nor is made of whole ones.
  """
  devices = list(devices or jax.devices())
  size = len(devices) // fsdp if data == -1 and fsdp > 0 else data
  if size < 1 or fsdp < 1 or size * fsdp != len(devices):
    raise ValueError(f"mesh.data {data} x mesh.fsdp {fsdp} does not match {len(devices)} devices")
  return Mesh(device_grid(fsdp, devices), (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def device_grid(fsdp: int, devices: list[Any]) -> np.ndarray:
  """Devices [data, fsdp], in each row neighbours on the fastest links that there are.

  An fsdp larger than an island works, at the speed of the links between islands, and is warned of.

  Raises:
    ValueError: if fsdp neither divides an island nor is made of whole ones.
  """
  ordered = sorted(devices, key=_island)
  islands = [list(group) for _, group in itertools.groupby(ordered, key=_island)]
  if all(len(island) % fsdp == 0 for island in islands):
    return np.concatenate([_island_grid(island, fsdp) for island in islands])
  sizes = sorted({len(island) for island in islands})
  if len(sizes) > 1 or fsdp % sizes[0]:
    raise ValueError(
      f"mesh.fsdp {fsdp} does not fit islands (TPU slices, GPU nodes) of {sizes} devices: set it "
      "to a divisor of them"
    )
  _log.warning(
    "mesh.fsdp %d is larger than an island (TPU slice, GPU node) of %d devices: parameters are "
    "gathered over the slow links between them; mesh.fsdp=%d would keep to the fast ones",
    *(fsdp, sizes[0], sizes[0]),
  )
  rows = [_island_grid(island, sizes[0]) for island in islands]
  return np.concatenate(rows).reshape(-1, fsdp)


def _island(device: Any) -> int:
  """Which devices share fast links: those of a TPU slice, or of a GPU node (of a process, if the
  platform does not know slices)."""
  own = 0 if device.platform == "tpu" else device.process_index
  index = getattr(device, "slice_index", None)
  return own if index is None else index


def _island_grid(island: list[Any], fsdp: int) -> np.ndarray:
  """One island's devices [data, fsdp], in the order of the TPU's torus."""
  shape = len(island) // fsdp, fsdp
  return mesh_utils.create_device_mesh(shape, island, allow_split_physical_axes=True)


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: Mesh, arrays: PyTree) -> PyTree:
  """Arrays that every process has, on all devices; nothing is sent between processes."""
  copy = lambda x: jax.make_array_from_process_local_data(replicated(mesh), np.asarray(x))
  return jax.tree.map(copy, arrays)


def rows_sharding(mesh: Mesh) -> NamedSharding:
  """The first axis (rows of a batch) spread over all devices."""
  return NamedSharding(mesh, ROWS)


def constrain_rows(mesh: Mesh) -> Callable[[Array], Array]:
  """Keeps activations spread over rows, so that it is the parameters that are gathered.

  Where these are whole on every device, there is nothing to keep apart.
  """
  if mesh.shape[FSDP] == 1:
    return lambda x: x
  sharding = rows_sharding(mesh)
  return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def parameter_shardings(mesh: Mesh, shapes: PyTree) -> PyTree:
  """The rule: the larger of an array's last two axes is spread over fsdp, small arrays are not.

  These two are a layer's inputs and outputs, if fsdp divides them. The axes before them stay
  whole: a scan gathers one layer at a time, which it could not if its layers lay on different
  devices. Small arrays (biases, embedders, labels, what is not in the layers) would cost a
  collective each, and save next to nothing.

  Optimizer states and averages have their parameters' shapes, and so their shardings.
  """
  size = mesh.shape[FSDP]
  largest = max((leaf.size for leaf in jax.tree.leaves(shapes)), default=0)

  def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    axes = [axis for axis in range(leaf.ndim)[-2:] if leaf.shape[axis] % size == 0]
    if size == 1 or leaf.ndim < 2 or not axes or leaf.size * SMALL < largest:
      return replicated(mesh)
    widest = max(axes, key=lambda axis: (leaf.shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[None] * widest, FSDP))

  return jax.tree.map(sharding, shapes)


def abstract(shapes: PyTree, shardings: PyTree) -> PyTree:
  """Shapes that know their sharding: what a checkpoint is restored onto."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def shardings_of(arrays: PyTree) -> PyTree:
  """The sharding of each array, abstract or not."""
  return jax.tree.map(lambda x: x.sharding, arrays)


def local_rows(mesh: Mesh, batch: int) -> list[int]:
  """The rows of a global batch that this process holds, in order."""
  slices = rows_sharding(mesh).addressable_devices_indices_map((batch,)).values()
  return sorted({row for (rows,) in slices for row in range(*rows.indices(batch))})


def global_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, Array]:
  """Makes global arrays from each process's rows (`local_rows`), on the devices."""
  sharding = rows_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
