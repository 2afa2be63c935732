"""The compiler of TPUs, where it is installed."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def uncached() -> Iterator[None]:
  """Without the cache of compiled programs: those of machines that are not here cannot be read."""
  jax.config.update("jax_enable_compilation_cache", False)
  yield
  jax.config.update("jax_enable_compilation_cache", True)
