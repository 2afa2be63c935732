"""Weights on disk: recognised by their hash, refused where broken, found by their errors."""

import functools
import hashlib
import json
import pathlib
import pickle
import sys
import types
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from meanflow_jax.models import inception
from meanflow_jax.runtime import downloads, pretrained
from meanflow_jax.runtime.downloads import PUBLISHED, RemoteFile
from meanflow_jax.runtime.pretrained import convert_inception, load_inception
from tests.fill import filled

GOLDEN = pathlib.Path(__file__).parent / "golden"


@functools.cache
def inception_tensors() -> dict[str, np.ndarray]:
  """A stand-in for the published weights, of their names and shapes."""
  with np.load(GOLDEN / "inception_fid.npz") as golden:
    tensors = filled(json.loads(str(golden["tensors"])))
  counters = {name.replace("running_mean", "num_batches_tracked") for name in tensors}
  return tensors | {name: np.int64(0)[...] for name in counters - tensors.keys()}


def digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
  """What is published, as far as this test goes: hashes by name."""
  hashes = {"a": digest(b"one"), "b": digest(b"two")}
  files = {k: (RemoteFile("f", "https://x/f", sha256, 3),) for k, sha256 in hashes.items()}
  monkeypatch.setattr(pretrained, "PUBLISHED", PUBLISHED | files)
  return hashes


# Folders.


def test_weights_are_recognised_by_their_hash(tmp_path, known):
  for content, name in ((b"one", "a"), (b"two", "b")):
    (tmp_path / "f").write_bytes(content)
    origin = pretrained.origin(tmp_path / "f")
    assert origin == (known[name], (name,))
    assert origin.known
    assert str(origin) == f"{name} (sha256 {known[name]})"
  (tmp_path / "f").write_bytes(b"three")
  origin = pretrained.origin(tmp_path / "f")
  assert not origin.known
  assert str(origin) == f"unpublished weights (sha256 {digest(b'three')})"


def test_a_hash_that_is_asked_for_is_required(tmp_path):
  weights = tmp_path / pretrained.DINOV2.weights
  safetensors.numpy.save_file({"x": np.arange(3)}, weights)
  (tmp_path / "config.json").write_text("{}")
  load = functools.partial(pretrained.load, tmp_path, pretrained.DINOV2)
  _, tensors = load(sha256=downloads.sha256(weights))
  np.testing.assert_array_equal(tensors["x"], np.arange(3))
  published = PUBLISHED["dinov2-large"][1].sha256
  with pytest.raises(ValueError, match=r"is unpublished weights .*, but dinov2-large .* asked for"):
    load(sha256=published)


@pytest.mark.parametrize("published", [pretrained.AUTOENCODER, pretrained.DINOV2])
def test_a_missing_file_is_named_with_all_there_is_to_know(tmp_path, published):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(FileNotFoundError) as error:
    pretrained.load(tmp_path, published)
  message = str(error.value)
  assert str(tmp_path / published.weights) in message
  for model in published.models:
    config, weights = PUBLISHED[model]
    assert weights.url in message
    assert weights.sha256 in message
    assert config.sha256 not in message
    assert f"python -m meanflow_jax.convert --download={model} --out={tmp_path}" in message


# Inception.


class Tensor:
  """PyTorch's, as far as it is used."""

  def __init__(self, array: np.ndarray):
    self.array = array

  def numpy(self) -> np.ndarray:
    return self.array


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
  """Stands in for PyTorch, which is too large for a test: returns the state that its load reads."""
  state: dict[str, Any] = {name: Tensor(array) for name, array in inception_tensors().items()}

  def load(path: pathlib.Path, *, map_location: str, weights_only: bool) -> Any:
    assert weights_only
    if path.read_bytes() == b"code":
      raise pickle.UnpicklingError("Weights only load failed")
    return state if path.read_bytes() == b"tensors" else [1]

  module = types.SimpleNamespace(load=load, Tensor=Tensor)
  monkeypatch.setitem(sys.modules, "torch", module)
  return state


def write(folder: pathlib.Path, content: bytes = b"tensors") -> tuple[pathlib.Path, pathlib.Path]:
  (folder / "inception.pth").write_bytes(content)
  return folder / "inception.pth", folder / "inception.safetensors"


def test_inception_survives_its_conversion(tmp_path, torch):
  pth, out = write(tmp_path)
  origin = convert_inception(pth, out)
  assert origin == (digest(b"tensors"), ())
  tensors, stored = load_inception(out)
  assert stored == origin
  assert tensors.keys() == inception_tensors().keys()
  for name, tensor in inception_tensors().items():
    assert tensors[name].dtype == tensor.dtype
    np.testing.assert_array_equal(tensors[name], tensor)
  inception.params_from_torch(tensors)
  assert sorted(path.name for path in tmp_path.iterdir()) == [pth.name, out.name]


def test_the_published_inception_is_recognised(tmp_path, torch, monkeypatch):
  file = RemoteFile("inception.pth", "https://x/inception.pth", digest(b"tensors"), 7)
  monkeypatch.setattr(pretrained, "PUBLISHED", {"inception": (file,)})
  convert_inception(*write(tmp_path))
  assert load_inception(tmp_path / "inception.safetensors")[1].names == ("inception",)


def test_a_converted_file_that_was_changed_is_refused(tmp_path, torch):
  _, out = write(tmp_path)
  convert_inception(*write(tmp_path))
  content = bytearray(out.read_bytes())
  content[-1] ^= 1
  out.write_bytes(content)
  with pytest.raises(ValueError, match="has been changed since it was converted"):
    load_inception(out)
  out.write_bytes(content[:-1])
  with pytest.raises(ValueError, match="is not a whole safetensors file"):
    load_inception(out)


def test_safetensors_of_another_origin_are_unpublished(tmp_path):
  path = tmp_path / "inception.safetensors"
  safetensors.numpy.save_file(inception_tensors(), path)
  tensors, origin = load_inception(path)
  assert origin == (downloads.sha256(path), ())
  assert tensors.keys() == inception_tensors().keys()


def test_files_of_pytorch_are_only_converted(tmp_path):
  pth, out = write(tmp_path)
  with pytest.raises(ValueError, match="PyTorch's are not read here") as error:
    load_inception(pth)
  assert f"python -m meanflow_jax.convert --inception={pth} --out={out}" in str(error.value)


def test_what_is_missing_is_named_with_the_commands_that_make_it(tmp_path):
  (file,) = PUBLISHED["inception"]
  pth, out = tmp_path / file.name, tmp_path / "inception.safetensors"
  for call, missing in (
    (lambda: load_inception(out), out),
    (lambda: convert_inception(pth, out), pth),
  ):
    with pytest.raises(FileNotFoundError) as error:
      call()
    message = str(error.value)
    assert message.startswith(f"{missing} does not exist")
    for part in (file.url, file.sha256):
      assert part in message
    assert f"python -m meanflow_jax.convert --download=inception --out={tmp_path}\n" in message
    assert f"python -m meanflow_jax.convert --inception={pth} --out={out}" in message


def test_without_pytorch_nothing_is_converted(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(ModuleNotFoundError, match=r"takes PyTorch.*pip install torch"):
    convert_inception(*write(tmp_path))


@pytest.mark.parametrize(
  ("content", "message"),
  [(b"code", "not a PyTorch file of tensors alone"), (b"list", "does not hold tensors by name")],
)
def test_other_files_are_not_converted(tmp_path, torch, content, message):
  pth, out = write(tmp_path, content)
  with pytest.raises(ValueError, match=message):
    convert_inception(pth, out)
  assert list(tmp_path.iterdir()) == [pth]


def test_other_tensors_are_not_converted(tmp_path, torch):
  del torch["fc.bias"]
  torch["extra"] = Tensor(np.zeros(3))
  with pytest.raises(ValueError, match=r"missing: fc.bias; unknown: extra"):
    convert_inception(*write(tmp_path))


@pytest.mark.parametrize("name", ["inception.safetensors", "inception.npz"])
def test_only_new_files_are_written(tmp_path, torch, name):
  pth, out = write(tmp_path)
  out.write_bytes(b"precious")
  with pytest.raises(ValueError, match=r"must be new and end in .safetensors, got .*/inception\."):
    convert_inception(pth, tmp_path / name)
  assert out.read_bytes() == b"precious"


def test_real_pytorch_files_are_read(tmp_path):
  """Where PyTorch is installed: its files come back, and code in them is not run."""
  torch = pytest.importorskip("torch")
  state = {name: torch.from_numpy(np.array(t)) for name, t in inception_tensors().items()}
  torch.save(state, tmp_path / "good.pth")
  convert_inception(tmp_path / "good.pth", tmp_path / "good.safetensors")
  tensors, _ = load_inception(tmp_path / "good.safetensors")
  np.testing.assert_array_equal(tensors["fc.bias"], inception_tensors()["fc.bias"])
  torch.save({"fc.bias": pathlib.PurePosixPath("code")}, tmp_path / "bad.pth")
  with pytest.raises(ValueError, match="not a PyTorch file of tensors alone"):
    convert_inception(tmp_path / "bad.pth", tmp_path / "bad.safetensors")
