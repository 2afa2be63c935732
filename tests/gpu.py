"""The compiler of NVIDIA GPUs, where it is installed.

`pip install jax-cuda12-plugin jax-cuda12-pjrt`, in the version of JAX, brings it (or cuda13 does).
It needs neither a GPU nor anything else of CUDA.
"""

import importlib.util

import jax
from jax.experimental import topologies

# Of an H200: what XLA needs to know of a GPU that is not here.
_TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 patch: 2 }
runtime_version { major: 12 minor: 9 }
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 150754820096
  memory_bandwidth: 4800000000000
  runtime_version: "12.9.0"
  driver_version: "12.9.0"
  dnn_version: "9.10.2"
}
"""


def is_installed() -> bool:
  if importlib.util.find_spec("jax_plugins") is None:
    return False
  names = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
  return any(importlib.util.find_spec(name) for name in names)


def gpu_devices(count: int) -> list[jax.Device]:
  """The GPUs of one machine, to be compiled for."""
  topology = topologies.get_topology_desc(
    "h200", platform="cuda", target_config=_TARGET, topology=f"1x1x{count}"
  )
  return list(topology.devices)
