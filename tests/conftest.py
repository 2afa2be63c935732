"""Every test runs with eight simulated devices, and where ranks are promoted silently it fails."""

import importlib.util
import os
from collections.abc import Iterator

import jax
import pytest

# Most of the time goes to compiling programs that run for a moment.
FLAGS = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11, 1):  # which knows other emitters; later XLA ends at the flag
  FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_runtest_setup(item: pytest.Item) -> None:
  """Without their compiler, tests of what is compiled for TPUs are left out."""
  if item.get_closest_marker("tpu") and importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed (extra tpu)")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
  """What one test has compiled, no other compiles again, nor do the processes that it starts."""
  folder = tmp_path_factory.mktemp("compiled")
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture
def float64() -> Iterator[None]:
  """Double precision, for what holds exactly."""
  jax.config.update("jax_enable_x64", True)
  yield
  jax.config.update("jax_enable_x64", False)
