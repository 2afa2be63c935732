"""TPU slices that are not here: their compiler is."""

import os

import jax
from jax.experimental import topologies


def tpu_devices(name: str) -> list[jax.Device]:
  """The devices of a TPU slice such as "v5p:2x2x1", to compile for; nothing runs on them.

  Needs libtpu (the extra `tpu`), not a TPU.

  Raises:
    ValueError: if there is no libtpu or no such topology.
  """
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  try:
    return list(topologies.get_topology_desc(name, platform="tpu").devices)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    raise ValueError(
      f"cannot compile for the topology {name!r} (such as v5p:2x2x1, v5e:4x4, v6e:4x4; needs "
      f'pip install -e ".[tpu]"): {error}'
    ) from error
