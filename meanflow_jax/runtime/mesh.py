"""The device mesh, and the one rule by which arrays are spread over it."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

DATA, FSDP = "data", "fsdp"
ROWS = PartitionSpec((DATA, FSDP))


def make_mesh(data: int, fsdp: int, devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh of data x fsdp devices; data = -1 takes all that fsdp leaves.

  Raises:
    ValueError: if the axes do not multiply to the number of devices.
  """
  count = len(devices or jax.devices())
  size = count // fsdp if data == -1 and fsdp > 0 else data
  if size < 1 or fsdp < 1 or size * fsdp != count:
    raise ValueError(f"mesh.data {data} x mesh.fsdp {fsdp} does not match {count} devices")
  auto = (AxisType.Auto,) * 2
  return jax.make_mesh((size, fsdp), (DATA, FSDP), axis_types=auto, devices=devices)


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
  """Keeps activations spread over rows, so that it is the parameters that are gathered."""
  sharding = rows_sharding(mesh)
  return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def parameter_shardings(mesh: Mesh, shapes: PyTree) -> PyTree:
  """The rule: the largest axis that fsdp divides is spread over fsdp, all else is replicated.

  Optimizer states and averages have their parameters' shapes, and so their shardings.
  """
  size = mesh.shape[FSDP]

  def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    divisible = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
    if size == 1 or leaf.ndim < 2 or not divisible:
      return replicated(mesh)
    largest = max(divisible, key=lambda axis: (leaf.shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, FSDP))

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
