"""Where a run keeps its checkpoints, and what is read back of them."""

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from meanflow_jax import build, networks
from meanflow_jax.methods import registry
from meanflow_jax.runtime.checkpoints import Checkpoints
from meanflow_jax.runtime.mesh import abstract, parameter_shardings
from meanflow_jax.train_step import init_params, item_name


def ema_item(config: ConfigDict, ema: float) -> str:
  """Under which name a checkpoint holds an average; 0 stands for the parameters themselves.

  Raises:
    ValueError: if there is no such average.
  """
  if ema and ema not in config.ema.decays:
    raise ValueError(
      f"there is no average {ema} (sample.ema, evaluate.ema) among ema.decays "
      f"{tuple(config.ema.decays)}; 0 takes the parameters themselves"
    )
  return item_name(ema)


def identity(config: ConfigDict) -> dict[str, dict[str, object]]:
  """The keys that shape the parameters: a checkpoint must agree with them."""
  name, free = config.model.name, ("dtype", "scan", "remat", "dropout")
  keys = {key: x for key, x in networks.keys(config).items() if key not in free}
  own = config.model.to_dict().get(name, {}).keys() & keys.keys()
  model = {key: x for key, x in keys.items() if key not in own} | {"name": name}
  if own:
    model[name] = {key: keys[key] for key in own}
  data = {key: config.data[key] for key in ("image_size", "channels", "num_classes")}
  return {"model": model, "data": data}


def checkpoints_folder(config: ConfigDict, workdir: pathlib.Path) -> epath.Path:
  """Where the checkpoints of a workdir lie."""
  return _storage(config, workdir) / "checkpoints"


def best_folder(config: ConfigDict, workdir: pathlib.Path) -> epath.Path:
  """Where the best parameters of a workdir lie."""
  return _storage(config, workdir) / "best"


def checkpoints(config: ConfigDict, workdir: pathlib.Path, *, read_only: bool) -> Checkpoints:
  """The checkpoints of a workdir.

  Raises:
    ValueError: if none would be kept.
  """
  settings = config.checkpoint
  if settings.keep_latest < 1 or settings.keep_every < 0:
    raise ValueError(
      "checkpoint.keep_latest must be at least 1 and checkpoint.keep_every 0 or more, "
      f"got {settings.keep_latest} and {settings.keep_every}"
    )
  return Checkpoints(
    checkpoints_folder(config, workdir),
    keep_latest=settings.keep_latest,
    keep_every=settings.keep_every or None,
    read_only=read_only,
  )


def best_checkpoint(config: ConfigDict, workdir: pathlib.Path, *, read_only: bool) -> Checkpoints:
  """The parameters that were the best by `config.evaluate.best`, and no others."""
  folder = best_folder(config, workdir)
  return Checkpoints(folder, keep_latest=1, keep_every=None, read_only=read_only)


def _storage(config: ConfigDict, workdir: pathlib.Path) -> epath.Path:
  return epath.Path(config.checkpoint.path or workdir).expanduser()


def trained_params(
  config: ConfigDict, workdir: pathlib.Path, network: nn.Module, mesh: Mesh, items: Collection[str]
) -> tuple[int, dict[str, PyTree], dict[str, Any]]:
  """The step of `config.sample.checkpoint`, its parameters by item, and its config.

  The parameters are spread by fsdp.

  Raises:
    FileNotFoundError: there is no checkpoint.
    CheckpointError: there is one of another network, or only damaged ones.
    ValueError: `sample.checkpoint` is neither newest nor best nor a step, or the checkpoint is to
      be sampled in another way than the config says.
  """
  which = config.sample.checkpoint
  if which not in ("newest", "best") and not which.isdecimal():
    raise ValueError(f"sample.checkpoint must be newest, best or a step, got {which!r}")
  folder, opened = checkpoints_folder(config, workdir), checkpoints
  if which == "best":
    folder, opened = best_folder(config, workdir), best_checkpoint
  target = _abstract_params(config, network, mesh)
  if folder.is_dir():
    with opened(config, workdir, read_only=True) as saved:
      restored = saved.restore(
        dict.fromkeys(items, target),
        step=int(which) if which.isdecimal() else None,
        identity=identity(config),
      )
      if restored:
        trained_with = saved.config(restored[0])
        _check_sampling(trained_with, config)
        return *restored, trained_with
  raise FileNotFoundError(f"no checkpoint in {folder}: train first")


def starting_params(
  config: ConfigDict, network: nn.Module, mesh: Mesh
) -> tuple[int, dict[str, PyTree]]:
  """The newest step of the run `config.train.start_from`, and its average `config.sample.ema`.

  Raises:
    FileNotFoundError: there is no checkpoint.
    CheckpointError: there is one of another network, without this average, or only damaged ones.
  """
  other, start = config.copy_and_resolve_references(), config.train.start_from
  other.checkpoint.path = start  # which may lie in the cloud
  item, target = ema_item(config, config.sample.ema), _abstract_params(config, network, mesh)
  folder = checkpoints_folder(other, pathlib.Path())
  if folder.is_dir():
    with checkpoints(other, pathlib.Path(), read_only=True) as saved:
      if restored := saved.restore({item: target}, identity=identity(config)):
        step, items = restored
        return step, items[item]
  raise FileNotFoundError(
    f"no checkpoint in {folder}: train.start_from must name the workdir of a run, or its "
    "checkpoint.path"
  )


def trained_guidance(method: Mapping[str, Any]) -> dict[str, Any]:
  """How guidance was part of a training with a certain `config.method`."""
  name = method.get("name", "meanflow")  # the only one of the first checkpoints
  kind = registry.find(name)
  shared = "guidance" in registry.fields(kind)
  found = dict(method["guidance"]) if shared else {key: method[name][key] for key in kind.GUIDANCE}
  if not found.get("from_step"):
    found.pop("from_step", None)
  return found


def _abstract_params(config: ConfigDict, network: nn.Module, mesh: Mesh) -> PyTree:
  shapes = jax.eval_shape(lambda: init_params(network, config.seed, build.image_shape(config)))
  return abstract(shapes, parameter_shardings(mesh, shapes))


def _check_sampling(trained_with: dict[str, Any], config: ConfigDict) -> None:
  """Refuses a method, and guidance, that are not those of training.

  A model of plain flow matching knows u at r = t only, and is sampled in Euler's steps. What
  guidance does when sampling depends on that of training.
  """
  theirs, ours = trained_with["method"], config.method.to_dict()
  told = "the checkpoint was trained with {}, and this config says {}: "
  if (name := theirs.get("name", "meanflow")) != ours["name"]:
    raise ValueError(
      told.format(f"method.name {name!r}", repr(ours["name"])) + "they are sampled in other ways"
    )
  shares = [method["times"]["equal_fraction"] for method in (theirs, ours)]
  if (shares[0] == 1) != (shares[1] == 1):
    raise ValueError(
      told.format(f"method.times.equal_fraction {shares[0]}", shares[1])
      + "one of them is flow matching, which is sampled in another way; give "
      f"--config.method.times.equal_fraction={shares[0]}"
    )
  guidance = [trained_guidance(method) for method in (theirs, ours)]
  if {config.sample.guidance.omega, *config.evaluate.omega} != {1} and guidance[0] != guidance[1]:
    raise ValueError(
      told.format(f"guidance {guidance[0]}", guidance[1])
      + "what a scale means when sampling depends on it; give the keys of training"
    )
