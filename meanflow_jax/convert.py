"""Published weights in, ours out: python -m meanflow_jax.convert [--config=FILE --workdir=DIR] ...

--read=PATH --layout=LAYOUT makes a file's weights the checkpoint of a new run, from which every
mode of main.py starts; the config must describe the file's network. The layouts:

  meanflow     a checkpoint folder of MeanFlow's reference in JAX: params, ema_params, step
  imeanflow    the same of improved MeanFlow's reference; of a file for sampling alone the auxiliary
               head, which only training needs, starts anew
  sit          the PyTorch state dict of a SiT with two time embedders, as .safetensors, .pt or
               .pth: flat, or below the keys `model` and `ema`, or below --key=NAME
  unet         the PyTorch state dict of the published U-Net of CIFAR-10, in the same forms, or of
               its trainer with three averages
  safetensors  a file of our own

With --fine_tune, `sit` is a flow-matching SiT instead, without the second time embedder. Its files
do not tell whether it was trained on pure noise at time 0 (SiT's own code) or at time 1 (REPA's, as
here), so that has to be said: --noise_at=0 or 1. `models/dit_layouts.py` says what of this is exact
and what is not. The optimizer starts anew in all cases.

--write=FILE.safetensors puts the parameters of a checkpoint in DIR, those that --mode=sample takes
(`sample.checkpoint`, `sample.ema`), into one file: a float32 tensor for each, named by its path
("blocks/attention/qkv/kernel", layers stacked along the first axis), and a header with `config`
(JSON), `step` and `average`. --write=FOLDER puts the generator of `config.sample` into a folder
that needs jax (and flatbuffers, for jax.export) to run, with the autoencoder's decoder where the
model is one of latents.

--download=NAME --out=FOLDER fetches published weights (sd-vae-ft-mse, sd-vae-ft-ema, dinov2-large,
inception) and checks their sha256. --inception=FILE.pth --out=FILE.safetensors converts the last of
them, which takes PyTorch, once.
"""

import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import absl.logging
import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from meanflow_jax import build, command_line, storage
from meanflow_jax.export import PLATFORMS, export_generator
from meanflow_jax.models import dit_layouts, in_context_layouts, unet
from meanflow_jax.models.torch_layout import Params, Tensors
from meanflow_jax.runtime import pretrained, weights
from meanflow_jax.runtime.checkpoints import known_keys
from meanflow_jax.runtime.downloads import PUBLISHED, download
from meanflow_jax.runtime.mesh import shardings_of
from meanflow_jax.runtime.weights import Weights
from meanflow_jax.train_step import TrainStep, init_params, item_name

LAYOUTS = ("meanflow", "imeanflow", "sit", "unet", "safetensors")
# The networks whose parameters the layouts of others hold.
NETWORKS = {
  "meanflow": "dit",
  "imeanflow": "in_context_dit",
  "sit": "dit",
  "unet": "unet",
}
ACTIONS = ("read", "write", "download", "inception")


def read(
  config: ConfigDict,
  workdir: pathlib.Path,
  path: pathlib.Path,
  layout: str,
  *,
  key: str | None = None,
  noise_at: int | None = None,
) -> None:
  """Makes a file's weights the first checkpoint of a workdir, and says what went where.

  Args:
    config: of the run to be, and of the file's network.
    workdir: without checkpoints.
    path: the file or folder.
    layout: one of `LAYOUTS`.
    key: `sit`, `unet`: the entry of a PyTorch file that holds the tensors.
    noise_at: `sit`: take it for a flow-matching network (`dit_layouts.from_flow_matching`).

  Raises:
    ValueError: the file does not fit the config, or the workdir holds checkpoints.
    FileNotFoundError, ModuleNotFoundError: there is no such file, or no PyTorch to read it with.
  """
  folder = storage.checkpoints_folder(config, workdir)
  if folder.exists() and any(folder.iterdir()):
    raise ValueError(f"{folder} is not empty, and left as it is: choose another --workdir")
  if config.model.name != NETWORKS.get(layout, config.model.name):
    raise ValueError(
      f"--layout={layout} is of a network {NETWORKS[layout]!r}, and model.name is "
      f"{config.model.name!r}: choose another config, or the layout of its network"
    )
  mesh = build.mesh(config)
  train_step = build.train_step(config, build.network(config, mesh), build.method(config), mesh)
  found = _load(config, path, layout, key)
  chosen = assign(found.sets, [item_name(decay) for decay in (0.0, *config.ema.decays)])
  convert = _converter(train_step, layout, noise_at)
  params = {name: convert(found.sets[name]) for name in sorted(set(chosen.values()))}
  shardings = shardings_of(train_step.abstract_state(mesh))
  items = {item: jax.device_put(params[name], shardings.params) for item, name in chosen.items()}
  start = jax.jit(train_step.optimizer.init, out_shardings=shardings.opt_state)
  items["opt_state"] = start(items["params"])
  with storage.checkpoints(config, workdir, read_only=False) as checkpoints:
    checkpoints.save(found.step, items, config.to_dict())
  print(f"checkpoint {found.step} in {folder}, with a new optimizer, from {path}:")
  print(_report(found, chosen, layout))


def write(config: ConfigDict, workdir: pathlib.Path, path: pathlib.Path) -> None:
  """Writes a checkpoint's parameters, `config.sample.{checkpoint, ema}`, to a safetensors file.

  Raises:
    ValueError: the file exists.
    FileNotFoundError: there is no checkpoint, or no folder for the file.
    CheckpointError: there is a checkpoint of another network, or only damaged ones.
  """
  mesh, item = build.mesh(config), storage.ema_item(config, config.sample.ema)
  network = build.network(config, mesh)
  step, items, _ = storage.trained_params(config, workdir, network, mesh, {item})
  tensors = {name: np.asarray(x) for name, x in dit_layouts.to_paths(items[item]).items()}
  header = {"config": json.dumps(config.to_dict()), "step": str(step), "average": item}
  weights.write_safetensors(path, tensors, header)
  print(f"{item} of step {step}, {len(tensors)} tensors: {path}")


def write_generator(
  config: ConfigDict, workdir: pathlib.Path, folder: pathlib.Path, platforms: Sequence[str]
) -> None:
  """Writes the generator of `config.sample` as a folder that needs jax alone; see `export.py`.

  Raises:
    ValueError: the folder exists, or a platform is unknown.
    FileNotFoundError: there is no checkpoint, or no weights of the autoencoder.
    CheckpointError: there is a checkpoint of another network, or only damaged ones.
  """
  mesh, method = build.mesh(config), build.method(config)
  config.model.attention = "plain"  # a fused kernel runs on one kind of device
  network = build.network(config, mesh)
  generator = build.sample_generator(config, network, method, mesh)
  item = storage.ema_item(config, config.sample.ema)
  step, items, _ = storage.trained_params(config, workdir, network, mesh, {item})
  record = {"step": step, "average": item, "config": config.to_dict()}
  export_generator(folder, generator, items[item], platforms=platforms, record=record)
  print(f"{item} of step {step}, {generator.nfe} NFE, for {', '.join(platforms)}: {folder}")


def assign(sets: Collection[str], items: Collection[str]) -> dict[str, str]:
  """Which of a file's sets of weights each item of a checkpoint takes; a lone set serves them all.

  Raises:
    ValueError: what an item asks for is not there; lists what is.
  """
  if len(sets) == 1:
    return dict.fromkeys(items, *sets)
  known = {"params", *sets}
  chosen = {item: item if item in known else "ema_params" for item in items}
  if missing := sorted(set(chosen.values()) - set(sets)):
    raise ValueError(
      f"the file has no {' and no '.join(missing)}, but {', '.join(sorted(sets))}; a run without "
      "averages has --config.ema.decays='()' and --config.sample.ema=0"
    )
  return chosen


def _load(config: ConfigDict, path: pathlib.Path, layout: str, key: str | None) -> Weights:
  if layout in ("meanflow", "imeanflow"):
    return weights.read_meanflow(path)
  if layout == "sit":
    return weights.read_state_dict(path, key)
  if layout == "unet":
    found = weights.read_state_dict(path, key)
    parts = [unet.sets_from_torch(tensors, name) for name, tensors in found.sets.items()]
    return dataclasses.replace(found, sets=dict(collections.ChainMap(*parts)))
  tensors, header = weights.read_safetensors(path)
  if not {"config", "step", "average"} <= header.keys():
    raise ValueError(f"{path} was not written by --write: its header has only {sorted(header)}")
  _check_identity(path, json.loads(header["config"]), storage.identity(config))
  return Weights(int(header["step"]), {header["average"]: tensors})


def _check_identity(path: pathlib.Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
  theirs, ours = known_keys(theirs, ours)
  differences = [
    f"\n  {section}.{name}: file {theirs[section][name]}, this config {value}"
    for section, keys in ours.items()
    for name, value in keys.items()
    if theirs[section][name] != value
  ]
  if differences:
    raise ValueError(f"{path} is of another config:" + "".join(differences))


def _converter(
  train_step: TrainStep, layout: str, noise_at: int | None
) -> Callable[[Tensors], Params]:
  """From a set of a file's tensors to our parameters."""
  network, shape = train_step.network, train_step.image_shape
  initial = jax.jit(lambda: init_params(network, train_step.seed, shape))
  if noise_at is not None:
    return lambda tensors: dit_layouts.from_flow_matching(
      network, shape, tensors, noise_at=noise_at, initial=initial()
    )
  if layout == "imeanflow":
    return lambda tensors: in_context_layouts.from_imeanflow(network, shape, tensors, initial)
  convert = {
    "meanflow": dit_layouts.from_meanflow,
    "sit": dit_layouts.from_sit,
    "unet": unet.params_from_torch,
    "safetensors": dit_layouts.from_paths,
  }
  return lambda tensors: convert[layout](network, shape, tensors)


def _report(found: Weights, chosen: dict[str, str], layout: str) -> str:
  lines = [f"  {item} from {name}" for item, name in chosen.items()]
  if len(found.sets) == 1:
    lines.append("  (the file has one set of weights, which all of them take)")
  lines += [f"  {name} is left out" for name in sorted(found.sets.keys() - chosen.values())]
  if layout == "imeanflow" and any(map(in_context_layouts.lacks_head, found.sets.values())):
    lines.append("  (the file has no auxiliary head: that starts anew)")
  names = {name for tensors in found.sets.values() for name in tensors}
  if heads := sorted(name for name in names if name.startswith(dit_layouts.TRAINING_ONLY)):
    lines.append(f"  left out, for only training used them: {', '.join(heads)}")
  return "\n".join(lines)


def define_flags(values: flags.FlagValues) -> None:
  """The flags beside --config; not at import, where they would meet those of other commands."""
  text = lambda name, help: flags.DEFINE_string(name, None, help, flag_values=values)
  text("workdir", "--read, --write: the folder of the run.")
  text("read", "The file or folder to make a checkpoint of.")
  text("key", "--layout=sit or unet: the entry of a .pt file that holds the tensors.")
  text("write", "The .safetensors file to write, or the folder of a generator.")
  text("inception", "The published .pth file of FID's Inception.")
  text("out", "--download: the folder; --inception: the .safetensors file.")
  enum = lambda name, of, help: flags.DEFINE_enum(name, None, of, help, flag_values=values)
  enum("layout", LAYOUTS, "--read: whose it is.")
  enum("noise_at", ["0", "1"], "--fine_tune: the time of pure noise.")
  enum("download", sorted(PUBLISHED), "What to fetch.")
  flags.DEFINE_bool("fine_tune", False, "sit: a flow-matching network.", flag_values=values)
  flags.DEFINE_list(
    "platforms", None, "--write=FOLDER: what the generator is for.", flag_values=values
  )


def check_flags(given: flags.FlagValues) -> None:
  """Raises a ValueError if flags are missing, or would not be read."""
  actions = [name for name in ACTIONS if getattr(given, name) is not None]
  if len(actions) != 1:
    raise ValueError(f"give one of --{', --'.join(ACTIONS)}, got {len(actions)}")
  needs = {"read": {"config", "workdir", "layout"}, "write": {"config", "workdir"}}
  for name in needs.get(actions[0], {"out"}):
    if getattr(given, name) is None:
      raise ValueError(f"--{actions[0]} needs --{name}")
  reads = {
    "read": {"config", "workdir", "layout", "key", "noise_at"},
    "write": {"config", "workdir", "platforms"},
  }
  for name in ("config", "workdir", "layout", "key", "noise_at", "platforms", "out"):
    if getattr(given, name) is not None and name not in reads.get(actions[0], {"out"}):
      raise ValueError(f"--{name} is not read with --{actions[0]}")
  if given.write is not None and pathlib.Path(given.write).suffix not in ("", ".safetensors"):
    raise ValueError(f"--write must end in .safetensors, or name a folder; got {given.write!r}")
  if given.key is not None and given.layout not in ("sit", "unet"):
    raise ValueError("--key is for --layout=sit and --layout=unet")
  if given.fine_tune and given.layout != "sit":
    raise ValueError("--fine_tune is for --layout=sit")
  if given.fine_tune != (given.noise_at is not None):
    raise ValueError(
      "--fine_tune needs --noise_at=0 or --noise_at=1, and nothing else does: the time at which "
      "the file's network was trained on pure noise (0 in SiT's own code, 1 in REPA's)"
    )


def main(_: list[str]) -> None:
  """Converts in one direction; the user's mistakes end it with a message, no traceback."""
  absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax logs every file it touches
  given = flags.FLAGS
  try:
    with build.explaining_mistakes():
      check_flags(given)
      convert(given)
  except build.UserError as error:
    sys.exit(f"error: {error}")


def convert(given: flags.FlagValues) -> None:
  """Does what the flags say."""
  path_of = lambda name: pathlib.Path(getattr(given, name)).expanduser()
  if given.download is not None:
    for path in download(given.download, path_of("out")):
      print(path)
  elif given.inception is not None:
    origin = pretrained.convert_inception(path_of("inception"), path_of("out"))
    print(f"{path_of('out')}, from {origin}")
  elif given.read is not None:
    noise_at = None if given.noise_at is None else int(given.noise_at)
    settings = {"key": given.key, "noise_at": noise_at}
    read(given.config, path_of("workdir"), path_of("read"), given.layout, **settings)
  elif given.write.endswith(".safetensors"):
    write(given.config, path_of("workdir"), path_of("write"))
  else:
    platforms = given.platforms or list(PLATFORMS)
    write_generator(given.config, path_of("workdir"), path_of("write"), platforms)


if __name__ == "__main__":
  command_line.define_config(required=False)
  define_flags(flags.FLAGS)
  app.run(main, flags_parser=command_line.parse)
