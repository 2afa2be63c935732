"""Presets are what was published, every key is read, and a wrong one is found at once."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from configs import base
from meanflow_jax import build, command_line, networks, storage
from meanflow_jax.evaluate import make_evaluator
from meanflow_jax.methods import registry
from tests.runs import mesh_of

ROOT = pathlib.Path(__file__).parent.parent
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "base")

# arXiv 2505.13447, Tables 1, 2 and 4: depth, width, heads, patch size, millions of parameters;
# epochs, effective scale, omega, kappa, where in t guidance is on.
PUBLISHED = {
  "imagenet_b4": ((12, 768, 12, 4, 131), (80, 1.0, 1.0, 0.0, 0.0, 1.0)),
  "imagenet_b2": ((12, 768, 12, 2, 131), (240, 2.0, 1.0, 0.5, 0.0, 1.0)),
  "imagenet_m2": ((16, 1024, 16, 2, 308), (240, 2.0, 1.0, 0.5, 0.0, 1.0)),
  "imagenet_l2": ((24, 1024, 16, 2, 459), (240, 2.5, 0.2, 0.92, 0.0, 0.8)),
  "imagenet_xl2": ((28, 1152, 16, 2, 676), (240, 2.5, 0.2, 0.92, 0.0, 0.75)),
  "imagenet_xl2_plus": ((28, 1152, 16, 2, 676), (1000, 2.0, 1.0, 0.5, 0.3, 0.8)),
}
# What all of them share.
RECIPE = {
  "train.batch_size": 256,
  "train.accumulate": 1,
  "optimizer.learning_rate": 1e-4,
  "optimizer.schedule": "constant",
  "optimizer.warmup_steps": 0,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.95,
  "optimizer.weight_decay": 0.0,
  "optimizer.clip_norm": 0.0,
  "ema.decays": (0.9999,),
  "ema.ramp": False,
  "sample.ema": 0.9999,
  "method.times.distribution": "logit_normal",
  "method.times.mean": -0.4,
  "method.times.std": 1.0,
  "method.times.r_mean": -0.4,
  "method.times.r_std": 1.0,
  "method.times.pairing": "sorted",
  "method.times.equal_fraction": 0.75,
  "method.label_dropout.rate": 0.1,
  "method.label_dropout.droppable": "equal",
  "method.weight.p": 1.0,
  "method.weight.c": 1e-2,
  "model.conditioning": ("t", "h"),
  "model.time_frequencies": 256,
  "model.positions": "sincos",
  "data.source": "latents",
  "data.image_size": 32,
  "data.channels": 4,
  "data.num_classes": 1000,
  "data.flip": False,
}

# arXiv 2512.02012: depth, width, heads; guidance when sampling in one step.
IMPROVED = {
  "imagenet_imf_b2": ((12, 768, 12), 8.0, 0.4, 0.65),
  "imagenet_imf_m2": ((24, 768, 12), 10.5, 0.4, 0.6),
  "imagenet_imf_l2": ((32, 1024, 16), 10.5, 0.4, 0.6),
  "imagenet_imf_xl2": ((48, 1024, 16), 8.0, 0.42, 0.62),
}
# What differs from the above.
IMPROVED_RECIPE = {
  "train.batch_size": 1024,
  "method.name": "improved_meanflow",
  "method.times.equal_fraction": 0.5,
  "method.improved_meanflow.omega_max": 8.0,
  "method.improved_meanflow.omega_exponent": 1.0,
  "method.improved_meanflow.interval_split": 0.5,
  "model.name": "in_context_dit",
  "model.patch_size": 2,
  "model.conditioning": ("h",),
  "model.positions": "none",
  "model.in_context_dit.head_depth": 8,
  "model.in_context_dit.class_tokens": 8,
  "model.in_context_dit.omega_tokens": 4,
  "model.in_context_dit.interval_tokens": 2,
  "model.in_context_dit.time_tokens": 4,
}


def load(preset: str) -> ConfigDict:
  return importlib.import_module(f"configs.{preset}").get_config()


def flat(config: ConfigDict) -> dict[str, Any]:
  """Values by dotted key."""
  leaves = {}
  for key, value in config.items():
    below = flat(value) if isinstance(value, ConfigDict) else {"": value}
    leaves |= {f"{key}.{rest}".rstrip("."): leaf for rest, leaf in below.items()}
  return leaves


# Presets.


@pytest.mark.parametrize("preset", ["base", *PRESETS])
def test_a_preset_builds(preset):
  config, mesh = load(preset), mesh_of(1, 1)
  network, method = build.network(config, mesh), build.method(config)
  build.train_step(config, network, method, mesh).abstract_state(mesh)
  storage.ema_item(config, config.sample.ema)
  config.data.source = "synthetic"
  if config.autoencoder.path:
    with pytest.raises(FileNotFoundError, match="sd-vae-ft-mse"):
      build.sample_generator(config, network, method, mesh)
    config.autoencoder.path = ""
  config.evaluate.extractors = ("pixels",)
  config.evaluate.figures = ("frechet",)
  build.sample_generator(config, network, method, mesh)
  assert make_evaluator(config, network, method, mesh, lambda: build.source(config))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_changes_values_and_adds_no_keys(preset):
  ours, schema = flat(load(preset)), flat(base.get_config())
  assert ours.keys() == schema.keys()
  assert {key: type(value) for key, value in ours.items()} == {
    key: type(value) for key, value in schema.items()
  }
  assert load(preset).is_locked


def test_every_run_of_the_papers_is_a_preset():
  runs = PUBLISHED.keys() | IMPROVED.keys() | {"imagenet_imf"}  # what the last ones share
  assert {name for name in PRESETS if name.startswith("imagenet_")} == runs


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_network_is_that_of_the_paper(preset):
  *sizes, millions = PUBLISHED[preset][0]
  config, mesh = load(preset), mesh_of(1, 1)
  assert [config.model[key] for key in ("depth", "width", "num_heads", "patch_size")] == sizes
  network = build.network(config, mesh)
  step = build.train_step(config, network, build.method(config), mesh)
  parameters = jax.tree.leaves(step.abstract_state(mesh).params)
  assert round(sum(x.size for x in parameters) / 1e6) == millions


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_recipe_is_that_of_the_paper(preset):
  config = load(preset)
  epochs, scale, *guidance = PUBLISHED[preset][1]
  keys = ("omega", "kappa", "t_start", "t_end")
  assert [config.method.guidance[key] for key in keys] == guidance
  assert guidance[0] / (1 - guidance[1]) == pytest.approx(scale)
  assert config.train.steps * config.train.batch_size / 1_281_167 == pytest.approx(epochs, abs=1e-3)
  found = flat(config)
  assert {key: found[key] for key in RECIPE} == RECIPE


@pytest.mark.parametrize("preset", IMPROVED)
def test_a_published_recipe_of_improved_meanflow_is_that_of_the_paper(preset):
  sizes, omega, *interval = IMPROVED[preset]
  found = flat(load(preset))
  assert tuple(found[f"model.{key}"] for key in ("depth", "width", "num_heads")) == sizes
  guidance = [found[f"sample.guidance.{key}"] for key in ("omega", "t_min", "t_max")]
  assert guidance == [omega, *interval]
  epochs = lambda key: found[key] * 1024 / 1_281_167
  assert epochs("train.steps") == pytest.approx(640, abs=1e-3)
  assert epochs("optimizer.warmup_steps") == pytest.approx(10, abs=1e-3)
  recipe = RECIPE | IMPROVED_RECIPE
  del recipe["optimizer.warmup_steps"]
  assert {key: found[key] for key in recipe} == recipe


# Keys: how the code reads them, from its source.


class Reads(ast.NodeVisitor):
  """The keys of a config that a module reads.

  Follows `config.section`, names that sections are assigned to, `**section` and `to_dict`.
  """

  def __init__(self):
    self.keys: set[str] = set()
    self.splatted: set[str] = set()
    self._aliases: dict[str, str] = {}

  def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
    outer, self._aliases = self._aliases, dict(self._aliases)
    self.generic_visit(node)
    self._aliases = outer

  def visit_Assign(self, node: ast.Assign) -> None:
    self.visit(node.value)
    for target in node.targets:
      for name, value in _pairs(target, node.value):
        self._aliases[name] = self._path(value)

  def visit_Attribute(self, node: ast.Attribute) -> None:
    if isinstance(node.ctx, ast.Load) and (path := self._path(node)):
      self.keys.add(path)
    self.generic_visit(node)

  def visit_Call(self, node: ast.Call) -> None:
    """`section.to_dict()` reads all of it."""
    match node.func:
      case ast.Attribute(value=value, attr="to_dict") if path := self._path(value):
        self.splatted.add(path)
    self.generic_visit(node)

  def visit_keyword(self, node: ast.keyword) -> None:
    if node.arg is None and (path := self._path(node.value)):
      self.splatted.add(path)
    self.generic_visit(node)

  def _path(self, node: ast.AST) -> str | None:
    """The dotted key of an expression: "" for the whole config, None for anything else."""
    match node:
      case ast.Name(id="config") | ast.Attribute(value=ast.Name(id="self"), attr="config"):
        return ""
      case ast.Name(id=name):
        return self._aliases.get(name)
      case ast.Attribute(value=value, attr=attr) if (path := self._path(value)) is not None:
        return f"{path}.{attr}".lstrip(".")
    return None


def _pairs(target: ast.AST, value: ast.AST) -> Iterator[tuple[str, ast.AST]]:
  match target, value:
    case ast.Name(id=name), _:
      yield name, value
    case ast.Tuple(elts=targets), ast.Tuple(elts=values):
      for one, other in zip(targets, values, strict=True):
        yield from _pairs(one, other)


def test_every_key_is_read():
  read, splatted = set(), set()
  for path in (ROOT / "meanflow_jax").rglob("*.py"):
    reads = Reads()
    reads.visit(ast.parse(path.read_text()))
    read |= reads.keys
    splatted |= reads.splatted
  assert splatted >= {"mesh", "method.times", "optimizer"}  # else this test is blind
  schema = base.get_config()
  chosen = {"model": networks.KINDS, "method": registry.known()}
  # Of what is chosen by name, the fields are read, from the keys of the section and its own.
  for section, kinds in chosen.items():
    for name, kind in kinds.items():
      fields = kind.__dataclass_fields__.keys()
      own = flat(schema[section].get(name, ConfigDict())).keys()
      assert own <= fields, f"{section}.{name}"
      source = "".join(inspect.getsource(base) for base in kind.__mro__ if base is not object)
      assert all(re.search(rf"self\.{key}\b", source) for key in own), f"{section}.{name}"
      read |= {f"{section}.{name}.{key}" for key in own} | {f"{section}.{key}" for key in fields}
  dead = {
    key
    for key in flat(schema)
    if key not in read and key.rpartition(".")[0] not in splatted - chosen.keys()
  }
  assert not dead


@pytest.mark.parametrize("source", ["digits", "synthetic"])
def test_a_source_takes_the_keys_of_its_section(source):
  config = base.get_config()
  config.data.source = source
  assert len(build.source(config))


@pytest.mark.parametrize(
  ("source", "message"),
  [("folder", "is not a folder"), ("tfds", "is not prepared"), ("latents", "latents")],
)
def test_a_source_that_finds_nothing_knows_the_keys_of_its_section(source, message, tmp_path):
  """Of a key that it does not know, a TypeError would tell."""
  config = base.get_config()
  config.data.source = source
  config.data.tfds.data_dir = str(tmp_path)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    build.source(config)


# Mistakes.


def parse(*flags: str) -> subprocess.CompletedProcess[str]:
  """What the command line says to some flags."""
  program = (
    "import sys; from meanflow_jax import command_line; config = command_line.define_config();"
    "command_line.parse(sys.argv); print(config.value)"
  )
  command = [sys.executable, "-c", program, "--config=configs/digits.py", *flags]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("optimizer.learing_rate=1", 'Did you mean "learning_rate"'),
    ("optimiser.b1=0.9", 'Did you mean "optimizer"'),
    ("train.steps=many", "--config.train.steps=many"),
    ("data.folder.path=x", "is read only where data.source is 'folder', not 'digits'"),
    ("model.in_context_dit.head_depth=1", "only where model.name is 'in_context_dit', not 'dit'"),
    ("method.improved_meanflow.omega_max=2", "only where method.name is 'improved_meanflow'"),
    ("sample.label=3", "is read only where sample.labels is 'one', not 'balanced'"),
  ],
)
def test_a_wrong_flag_is_named_and_nothing_starts(flag, message):
  done = parse(f"--config.{flag}")
  assert done.returncode != 0
  assert message in done.stderr
  assert "Traceback" not in done.stderr
  assert not done.stdout


def test_every_source_has_a_section_that_only_it_reads():
  config = base.get_config()
  config.data.source = "none"
  for section, keys in config.data.items():
    for key in keys if isinstance(keys, ConfigDict) else ():
      assert command_line.unread(config, [f"data.{section}.{key}"])
      config.data.source = section
      assert not command_line.unread(config, [f"data.{section}.{key}"])
      config.data.source = "none"


def test_every_network_and_method_has_a_section_that_only_it_reads():
  """If any; and what MeanFlow fixes in training, others do not read."""
  config = base.get_config()
  for section, kinds in (("model", networks.KINDS), ("method", registry.known())):
    for name in kinds:
      config[section].name = name
      for other in kinds.keys() & config[section].keys():
        key = f"{section}.{other}.{next(iter(config[section][other]))}"
        assert bool(command_line.unread(config, [key])) == (other != name)
  config.method.name = "improved_meanflow"
  assert command_line.unread(config, ["method.guidance.omega"])


def test_flags_override_every_kind_of_value():
  done = parse(
    "--config.sample.grid=1.0,0.3,0.0",
    "--config.model.conditioning=h",
    "--config.method.guidance.omega=3",
    "--config.data.source=folder",
    "--config.data.folder.path=x",
  )
  assert done.returncode == 0, done.stderr
  for line in ("omega: 3.0", "source: folder", "path: x"):
    assert line in done.stdout


@pytest.mark.parametrize("section", ["", "model", "method.times", "data.folder"])
def test_a_preset_cannot_invent_a_key(section):
  config = base.get_config()
  for part in filter(None, section.split(".")):
    config = config[part]
  with pytest.raises(KeyError, match="invented"):
    config.update(invented=1)
  with pytest.raises(AttributeError, match="invented"):
    config.invented = 1
