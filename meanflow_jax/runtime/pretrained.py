"""Published weights on disk, as safetensors: no pickle is read, and nothing is downloaded.

The autoencoder and DINOv2 are published as a folder with config.json and a safetensors file, which
is read as it is. Inception is published as a PyTorch file, which is converted once.
"""

import hashlib
import json
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from meanflow_jax.models import inception
from meanflow_jax.runtime.downloads import COMMAND, PUBLISHED, sha256
from meanflow_jax.runtime.weights import read_safetensors, write_safetensors

CONFIG = "config.json"
CONVERT = "python -m meanflow_jax.convert --inception={pth} --out={out}"

# What the header of a converted file says: the hash of its source, and of its own tensors.
SOURCE, CONTENT = "source_sha256", "tensors_sha256"

Tensors = dict[str, np.ndarray]


class Origin(NamedTuple):
  """Where weights come from.

  Attributes:
    sha256: of the file that they were published as, or else of the one that they are in.
    names: which published weights these are; empty if they are none that is known.
  """

  sha256: str
  names: tuple[str, ...]

  @property
  def known(self) -> bool:
    """Whether figures made with these weights can be compared with others'."""
    return bool(self.names)

  @property
  def short(self) -> str:
    """The name, or else the start of the hash: part of what figures are labelled with."""
    return " or ".join(self.names) if self.known else f"unpublished {self.sha256[:8]}"

  def __str__(self) -> str:
    return f"{' or '.join(self.names) or 'unpublished weights'} (sha256 {self.sha256})"


class Published(NamedTuple):
  """What a folder may hold.

  Attributes:
    weights: name of the safetensors file.
    models: names of what can be downloaded.
  """

  weights: str
  models: tuple[str, ...]


AUTOENCODER = Published("diffusion_pytorch_model.safetensors", ("sd-vae-ft-mse", "sd-vae-ft-ema"))
DINOV2 = Published("model.safetensors", ("dinov2-large",))
INCEPTION = "inception"


def origin(path: pathlib.Path | str) -> Origin:
  """Tells by its hash which published file this is."""
  return _origin(sha256(path))


def _origin(digest: str) -> Origin:
  names = (name for name, files in PUBLISHED.items() if digest in {file.sha256 for file in files})
  return Origin(digest, tuple(names))


# Folders.


def load(
  folder: pathlib.Path | str, published: Published, sha256: str | None = None
) -> tuple[dict[str, Any], Tensors]:
  """Reads the config, and all tensors by name.

  Other weights of the same names and shapes are legitimate (fine-tuned ones, say): which they are,
  `origin` tells.

  Args:
    folder: of the two files.
    published: what they are called.
    sha256: the hash that the weights must have; any if None.

  Raises:
    FileNotFoundError: if one of the two files is missing; says where they are published.
    ValueError: if one is broken, or the weights are others than asked for.
  """
  folder = pathlib.Path(folder)
  config, weights = folder / CONFIG, folder / published.weights
  for path in (config, weights):
    if not path.is_file():
      raise FileNotFoundError(_missing(path, published.models))
  if sha256 and (found := origin(weights)).sha256 != sha256:
    raise ValueError(f"{weights} is {found}, but {_origin(sha256)} is asked for")
  try:
    return json.loads(config.read_text()), read_safetensors(weights)[0]
  except json.JSONDecodeError as error:
    raise ValueError(f"{config} is not JSON: {error}") from error


def _missing(path: pathlib.Path, models: tuple[str, ...]) -> str:
  places = [
    f"  {file.url}\n    sha256 {file.sha256}, fetched by\n"
    f"    {COMMAND.format(name=name, folder=path.parent)}"
    for name in models
    for file in PUBLISHED[name]
    if file.name == path.name
  ]
  return "\n".join(
    [
      f"{path} does not exist. Nothing is downloaded by itself. It is published as",
      *places,
      "Other tools can fetch it as well, such as `hf download`.",
    ]
  )


# Inception.


def load_inception(path: pathlib.Path | str) -> tuple[Tensors, Origin]:
  """Reads the weights of FID's Inception from a safetensors file with the published names.

  Returns:
    The tensors, for `inception.params_from_torch`, and where they come from.

  Raises:
    FileNotFoundError: if it is missing; says where it is published and how to get it.
    ValueError: if it is PyTorch's file, broken, or changed since it was converted.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(_missing_inception(path))
  if path.suffix != ".safetensors":
    raise ValueError(
      f"{path} is not a safetensors file, and PyTorch's are not read here: convert it with "
      f"`{CONVERT.format(pth=path, out=path.with_suffix('.safetensors'))}`"
    )
  tensors, header = read_safetensors(path)
  if SOURCE not in header:
    return tensors, origin(path)
  if header.get(CONTENT) != _content(tensors):
    raise ValueError(f"{path} has been changed since it was converted: convert it again")
  return tensors, _origin(header[SOURCE])


def convert_inception(pth: pathlib.Path | str, out: pathlib.Path | str) -> Origin:
  """Rewrites PyTorch's file of the Inception as safetensors, whole or not at all.

  PyTorch reads it, and nothing but tensors (`weights_only`): no code in it is run.

  Args:
    pth: the file as it is published.
    out: must not exist.

  Returns:
    Where the weights come from: the hash of `pth`, which is written into the header.

  Raises:
    FileNotFoundError: if `pth` is missing; says where it is published.
    ModuleNotFoundError: without PyTorch.
    ValueError: `out` exists or is called otherwise, or `pth` does not hold these weights.
  """
  pth, out = pathlib.Path(pth), pathlib.Path(out)
  if out.suffix != ".safetensors" or out.exists():
    raise ValueError(f"the converted file must be new and end in .safetensors, got {out}")
  if not pth.is_file():
    raise FileNotFoundError(_missing_inception(out, pth))
  found, tensors = origin(pth), _torch_tensors(pth)
  inception.params_from_torch(tensors)
  header = {SOURCE: found.sha256, CONTENT: _content(tensors), "source": pth.name}
  write_safetensors(out, tensors, header)
  return found


def _torch_tensors(pth: pathlib.Path) -> Tensors:
  try:
    import torch
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      f"reading {pth} takes PyTorch, for this command alone: pip install torch"
    ) from error
  try:
    state = torch.load(pth, map_location="cpu", weights_only=True)
  except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
    raise ValueError(f"{pth} is not a PyTorch file of tensors alone: {error}") from error
  if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
    raise ValueError(f"{pth} does not hold tensors by name")
  return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in state.items()}


def _content(tensors: Mapping[str, np.ndarray]) -> str:
  """The hash of names, types, shapes and values; safetensors itself has none."""
  digest = hashlib.sha256()
  for name in sorted(tensors):
    tensor = tensors[name]
    digest.update(f"{name} {tensor.dtype.str} {tensor.shape}\n".encode())
    digest.update(np.ascontiguousarray(tensor).data)
  return digest.hexdigest()


def _missing_inception(path: pathlib.Path, pth: pathlib.Path | None = None) -> str:
  (file,) = PUBLISHED[INCEPTION]
  source = path.parent / file.name
  return (
    f"{pth or path} does not exist. It is made of {file.name} (sha256 {file.sha256}), "
    f"published at\n  {file.url}\nby these commands:\n"
    f"  {COMMAND.format(name=INCEPTION, folder=path.parent)}\n"
    f"  {CONVERT.format(pth=source, out=path)}"
  )
