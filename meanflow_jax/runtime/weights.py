"""Files of weights: what is in them, by name, before anybody asks whether it fits.

PyTorch is imported only where one of its own files is read, and nothing is unpickled but tensors.
"""

import argparse
import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from flax import traverse_util

from meanflow_jax.models.torch_layout import Tensors


@dataclasses.dataclass(frozen=True)
class Weights:
  """What a file holds.

  Attributes:
    step: of training; 0 where the file does not say.
    sets: tensors by name, for each set of weights: `params`, `ema_params` or what else there is.
  """

  step: int
  sets: dict[str, Tensors]


def read_meanflow(path: pathlib.Path) -> Weights:
  """A checkpoint of MeanFlow's reference, or the newest (`checkpoint_<step>`) in a folder of them.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: it is no such checkpoint.
  """
  if not path.is_dir():
    raise FileNotFoundError(f"there is no folder {path}")
  steps = {child.name.removeprefix("checkpoint_"): child for child in path.glob("checkpoint_*")}
  numbers = [step for step in steps if step.isdigit()]
  folder = (steps[max(numbers, key=int)] if numbers else path).resolve()
  reader = ocp.PyTreeCheckpointer()
  stored = reader.metadata(folder).item_metadata
  if stored is None or not {"params", "step"} <= stored.tree.keys():
    raise ValueError(f"{folder} is no checkpoint of MeanFlow's reference: no params and step")
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored.tree)
  wanted = dict(stored.tree)
  if "opt_state" in wanted:  # half of the bytes, and not needed
    wanted["opt_state"] = jax.tree.map(lambda _: ocp.PLACEHOLDER, wanted["opt_state"])
  tree = reader.restore(folder, item=wanted, restore_args=as_numpy)
  step = int(tree.pop("step"))
  tree.pop("opt_state", None)
  return Weights(step, {name: traverse_util.flatten_dict(x, sep="/") for name, x in tree.items()})


def read_state_dict(path: pathlib.Path, key: str | None) -> Weights:
  """A PyTorch state dict: flat, or the entries `model` and `ema`, or the one named.

  Raises:
    FileNotFoundError, ModuleNotFoundError: there is no such file, or no PyTorch for a .pt or .pth.
    ValueError: it cannot be read, or it is not clear which of its entries is meant.
  """
  if path.suffix in (".pt", ".pth"):
    return Weights(0, _state_dicts(_load_torch(path), key))
  if path.suffix != ".safetensors":
    raise ValueError(f"a state dict ends in .safetensors, .pt or .pth, not {path.name!r}")
  if key is not None:
    raise ValueError(f"{path.name!r} has no entries of which {key!r} could be one")
  return Weights(0, {"params": read_safetensors(path)[0]})


def read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """All tensors by name, and the header.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is broken.
  """
  _require_file(path)
  try:
    with safetensors.safe_open(path, "np") as file:
      return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def write_safetensors(path: pathlib.Path, tensors: Tensors, header: Mapping[str, str]) -> None:
  """Writes a file that appears whole or not at all.

  Raises:
    ValueError: it exists.
    FileNotFoundError: there is no folder for it.
  """
  if path.exists():
    raise ValueError(f"{path} exists, and is left as it is: choose another name")
  if not path.parent.is_dir():
    raise FileNotFoundError(f"there is no folder {path.parent}")
  partial = path.with_name(f".{path.name}.partial")
  # save_file would make a file that nobody else may read.
  partial.write_bytes(safetensors.numpy.save(dict(tensors), dict(header)))
  os.replace(partial, path)


def _require_file(path: pathlib.Path) -> None:
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {path}")


def _load_torch(path: pathlib.Path) -> dict[str, Any]:
  _require_file(path)
  try:
    import torch
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"reading {path.name} takes PyTorch: pip install torch, or save the tensors as .safetensors"
    ) from error
  # Trainers store their flags beside the weights, in a class that has no code of its own to run.
  with torch.serialization.safe_globals([argparse.Namespace]):
    try:
      # Mapped, the optimizer's state beside the weights takes no memory.
      mapped = zipfile.is_zipfile(path)
      stored = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of many kinds: the file can hold anything
      raise ValueError(f"{path} cannot be read as plain tensors: {error}") from error
  if not isinstance(stored, dict):
    raise ValueError(f"{path} holds no tensors by name, but a {type(stored).__name__}")
  return stored


def _state_dicts(stored: dict[str, Any], key: str | None) -> dict[str, Tensors]:
  """The sets of weights among what a PyTorch file holds."""
  if key is not None:
    candidates = {key: stored.get(key)}
  elif _is_state_dict(stored):
    candidates = {"params": stored}
  else:
    candidates = {"params": stored.get("model"), "ema_params": stored.get("ema")}
  sets = {name: tensors for name, tensors in candidates.items() if _is_state_dict(tensors)}
  if not sets:
    where = "at its top, under 'model' or under 'ema'" if key is None else f"under {key!r}"
    raise ValueError(
      f"the file has no tensors by name {where}, but the entries {list(stored)}: choose by --key"
    )
  as_numpy = lambda tensor: tensor.detach().float().numpy()
  return {name: {k: as_numpy(x) for k, x in tensors.items()} for name, tensors in sets.items()}


def _is_state_dict(entry: Any) -> bool:
  is_tensor = lambda x: hasattr(x, "detach")
  return isinstance(entry, dict) and bool(entry) and all(map(is_tensor, entry.values()))
