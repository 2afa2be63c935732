"""The methods by name: one file in this folder each, that ends with `METHOD = its class`."""

import dataclasses
import functools
import importlib
import pkgutil
from typing import Any

from meanflow_jax import methods
from meanflow_jax.methods.method import Method


@functools.cache
def known() -> dict[str, type[Method]]:
  """All methods, by the names of their files."""
  names = [module.name for module in pkgutil.iter_modules(methods.__path__)]
  modules = {name: importlib.import_module(f"{methods.__name__}.{name}") for name in names}
  return {name: module.METHOD for name, module in modules.items() if hasattr(module, "METHOD")}


def find(name: str) -> type[Method]:
  """The method of a name.

  Raises:
    ValueError: there is none.
  """
  if name not in known():
    raise ValueError(f"method.name must be one of {sorted(known())}, got {name!r}")
  return known()[name]


def fields(method: type[Method]) -> set[str]:
  """The sections and keys of a config that a method takes."""
  return {field.name for field in dataclasses.fields(method)}


def sections() -> dict[str, dict[str, Any]]:
  """The keys of each method's own, with their defaults."""
  return {name: own for name, method in known().items() if (own := _defaults(method))}


def _defaults(method: type[Method]) -> dict[str, Any]:
  fields = dataclasses.fields(method)
  return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
