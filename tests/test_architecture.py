"""Dependencies run downwards only: what every module imports, read from its source."""

import ast
import pathlib
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "meanflow_jax"

# A folder counts as one: its modules may import each other.
FLOORS = (
  {"arrays"},
  {"methods", "models", "kernels", "metrics"},
  {"data", "runtime"},
  {
    "guard",
    "train_step",
    "generate",
    "features",
    "stream",
    "evaluator",
    "export",
    "encoding",
    "compiled",
  },
  {
    "networks",
    "build",
    "storage",
    "command_line",
    "train",
    "diagnosis",
    "outputs",
    "sample",
    "evaluate",
    "prepare",
    "convert",
    "plan",
    "benchmark",
    "profiler",
  },
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SIDEWAYS = {
  "methods": {"kernels"},
  "models": {"kernels"},
  "guard": set(),
  "train_step": {"guard"},
  "generate": {"train_step"},
  "features": set(),
  "stream": {"features", "generate"},
  "evaluator": {"features", "generate", "stream", "train_step"},
  "export": {"generate", "train_step"},
  "encoding": {"generate", "train_step"},
  "compiled": {"train_step"},
  "networks": set(),
  "build": {"networks"},
  "storage": {"build", "networks"},
  "command_line": set(),
  "sample": {"build", "storage"},
  "evaluate": {"build", "storage"},
  "diagnosis": {"build"},
  "outputs": {"build", "sample", "evaluate", "storage"},
  "train": {"build", "diagnosis", "evaluate", "outputs", "storage"},
  "prepare": {"build", "command_line", "evaluate"},
  "convert": {"build", "command_line", "storage"},
  "plan": {"build"},
  "profiler": {"build", "train"},
  "benchmark": {"build", "command_line", "train"},
}
# Where mathematics lives, nothing may know of processes, files and configs.
IMPURE = {"absl", "io", "logging", "ml_collections", "os", "pathlib", "shutil", "subprocess", "sys"}
CONFIGS = {"absl", "ml_collections"}
# Heavy and optional: imported inside the class or function that wraps them.
LATE = {
  ("data", "sklearn"),
  ("data", "tensorflow_datasets"),
  ("runtime", "torch"),
  ("runtime", "wandb"),
}

MODULES = sorted((ROOT / PACKAGE).rglob("*.py"))
CODE = sorted(
  path
  for folder in (PACKAGE, "configs", "tests", "benchmarks")
  for path in (ROOT / folder).rglob("*.py")
)


def name_of(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def top(module: str) -> str:
  """The file or folder right below the package that a module belongs to."""
  return module.split(".")[1]


def imported(nodes: Iterator[ast.AST], known: set[str]) -> Iterator[str]:
  """Full names of imported modules; a name taken from a package may be a module of its own."""
  for node in nodes:
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield full if full in known else node.module


def imports(path: pathlib.Path) -> set[str]:
  return set(imported(ast.walk(ast.parse(path.read_text())), set(map(name_of, MODULES))))


def ours(path: pathlib.Path) -> set[str]:
  return {name for name in imports(path) if name.split(".")[0] == PACKAGE}


def outside(path: pathlib.Path) -> set[str]:
  return {name.split(".")[0] for name in imports(path)}


PARTS = [path for path in MODULES if name_of(path) != PACKAGE]
parametrized = pytest.mark.parametrize("path", PARTS, ids=name_of)


@parametrized
def test_imports_go_down(path):
  here = top(name_of(path))
  assert here in FLOOR_OF, f"which floor is {here} on? Say so in FLOORS"
  for name in ours(path):
    assert name != PACKAGE, "import modules, not the package"
    there = top(name)
    assert there == here or FLOOR_OF[there] < FLOOR_OF[here] or there in SIDEWAYS.get(here, ()), (
      f"{name_of(path)} imports {name}"
    )


def test_sideways_imports_have_no_cycles():
  remaining = dict(SIDEWAYS)
  while free := [name for name, needs in remaining.items() if not needs & remaining.keys()]:
    for name in free:
      del remaining[name]
  assert not remaining


@parametrized
def test_the_mathematics_is_pure(path):
  if FLOOR_OF[top(name_of(path))] <= 1:
    assert not outside(path) & IMPURE
    for word in ("process_index", "process_count", "device_count", "open("):
      assert word not in path.read_text()


@parametrized
def test_configs_stop_at_the_runs(path):
  if FLOOR_OF[top(name_of(path))] < FLOOR_OF["build"]:
    assert not outside(path) & CONFIGS
  assert not outside(path) & {"configs", "tests", "benchmarks", "main"}


@parametrized
def test_imports_stand_at_the_top(path):
  functions = [
    node
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
  ]
  late = {
    name.split(".")[0] for function in functions for name in imported(ast.walk(function), set())
  }
  assert {(top(name_of(path)), name) for name in late} <= LATE


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_names_of_files_mean_something(path):
  assert path.stem not in sys.stdlib_module_names
  assert not {"util", "utils", "helpers", "misc", "common"} & set(path.stem.split("_"))
