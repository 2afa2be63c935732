"""The exported folder, loaded by a process that can import jax and nothing of ours."""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_jax.export import PLATFORMS, export_generator
from meanflow_jax.generate import ROUNDING, Decoder, Generator, Labels
from meanflow_jax.methods.guidance import GuidanceInput, SamplingGuidance
from meanflow_jax.methods.sampler import sample, time_grid
from meanflow_jax.models.autoencoder import Autoencoder
from meanflow_jax.runtime.mesh import constrain_rows
from meanflow_jax.train_step import velocity_fn
from tests.runs import mesh_of
from tests.tiny import Params, dit, in_context_dit, meanflow, random_params

METHOD = meanflow(equal_fraction=0.5)
RECORD = {"step": 1234, "average": "ema_0.9999", "config": {"model": {"width": 16}}}

# What jax itself needs, and no more: all else is not found, as if it were not installed.
ALONE = """
import sys
ALLOWED = {"jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "flatbuffers"}
ALLOWED |= set(sys.stdlib_module_names)
FINDERS = list(sys.meta_path)
class Alone:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ALLOWED or name.startswith("_sysconfigdata"):
      return next(filter(None, (finder.find_spec(name, path, target) for finder in FINDERS)), None)
sys.meta_path[:] = [Alone()]
for name in ("meanflow_jax", "flax", "safetensors"):
  try:
    __import__(name)
  except ModuleNotFoundError:
    continue
  sys.exit(f"{name} can be imported")
"""

# Goes on where the README's own program ends, with its `generate` and `weights`.
AFTER = """
inputs = np.load(sys.argv[1], allow_pickle=False)
rows = len(inputs["noise"])
made = {str(b): generate(weights, inputs["noise"][:b], inputs["labels"][:b]) for b in (3, rows)}
np.savez(sys.argv[2], example=images, **made)
"""


def generator(decoder: Decoder | None = None, **changes: Any) -> Generator:
  mesh = mesh_of(2, 1)
  settings = {
    "network": dit(depth=1, num_classes=3).clone(constrain=constrain_rows(mesh)),
    "step": METHOD.step,
    "guidance": SamplingGuidance(1.0, 0.0, 1.0, METHOD.null_label),
    "grid": time_grid(2),
    "image_shape": (8, 8, 4),
    "labels": Labels("balanced", 0, 3),
    "seed": 0,
    "batch_size": 2,
    "rounding": "meanflow",
    "mesh": mesh,
    "decoder": decoder,
  }
  return Generator(**settings | changes)


def autoencoder() -> Decoder:
  network = Autoencoder(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_channels=(8, 8),
    layers=1,
    groups=4,
    dtype="float32",
  )
  shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(x.dtype), shapes["params"])
  return Decoder(params=params, network=network, name="tiny")


def params_of(made: Generator) -> Params:
  return random_params(made.network.clone(constrain=lambda x: x), made.image_shape)


def expected_images(made: Generator, noise: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """By a way of its own, without jit."""
  network = made.network.clone(constrain=lambda x: x)
  velocity = made.guidance.guided(velocity_fn(network, params_of(made)))
  images = sample(made.step, velocity, jnp.asarray(noise), jnp.asarray(labels), made.grid)
  if made.decoder:
    images = made.decoder(images)
  return np.asarray(ROUNDING[made.rounding](images))


def run_alone(
  folder: pathlib.Path, scratch: pathlib.Path, noise: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
  """What another process makes of noise and labels, by the program in the folder's README."""
  np.savez(scratch / "inputs.npz", noise=noise, labels=labels)
  (program,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
  command = [sys.executable, "-I", "-W", "error", "-c", ALONE + program + AFTER]
  done = subprocess.run(
    [*command, scratch / "inputs.npz", scratch / "outputs.npz"],
    cwd=folder,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  with np.load(scratch / "outputs.npz") as outputs:
    return dict(outputs)


CASES = {
  "pixels": lambda: generator(),
  "latents": lambda: generator(autoencoder(), grid=time_grid(1)),
  "guided": lambda: generator(
    guidance=SamplingGuidance(2.0, 0.0, 0.7, METHOD.null_label), rounding="adm"
  ),
  "guidance as an input": lambda: generator(
    network=in_context_dit().clone(constrain=constrain_rows(mesh_of(2, 1))),
    guidance=GuidanceInput(2.0, 0.3, 0.8),
  ),
  "unconditional": lambda: generator(
    network=dit(depth=1, num_classes=0), labels=Labels("balanced", 0, 0)
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_another_process_makes_the_same_images(tmp_path: pathlib.Path, case: str) -> None:
  made = CASES[case]()
  folder = tmp_path / "exported"
  export_generator(folder, made, params_of(made), platforms=("cpu",), record=RECORD)
  rng = np.random.default_rng(2)
  noise = rng.standard_normal((5, *made.image_shape)).astype(np.float32)
  labels = rng.integers(max(1, made.labels.num_classes), size=5).astype(np.int32)
  outputs = run_alone(folder, tmp_path, noise, labels)
  expected = expected_images(made, noise, labels)
  assert 20 < expected.std() < 120  # neither black nor white throughout
  for batch in (3, 5):
    images = outputs[str(batch)]
    assert images.dtype == np.uint8
    assert images.shape == (batch, *expected.shape[1:])
    assert np.abs(images - expected[:batch]).max() <= 1
    assert (images == expected[:batch]).mean() > 0.99
  assert outputs["example"].shape == (4, *expected.shape[1:])


def test_one_program_serves_all_platforms(tmp_path: pathlib.Path) -> None:
  made = generator(autoencoder(), network=dit(dtype="bfloat16"))
  folder = tmp_path / "exported"
  export_generator(folder, made, params_of(made), platforms=PLATFORMS, record=RECORD)
  exported = jax.export.deserialize(bytearray((folder / "generator.stablehlo").read_bytes()))
  assert exported.platforms == PLATFORMS
  assert exported.nr_devices == 1
  weights, noise, labels = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0]
  assert [str(noise.shape), str(labels.shape)] == ["(b, 8, 8, 4)", "(b,)"]
  assert str(exported.out_avals[0].shape) == "(b, 16, 16, 3)"
  with np.load(folder / "weights.npz", allow_pickle=False) as stored:
    assert set(stored) == set(weights)
    assert "network/blocks/attention/qkv/kernel" in stored
    assert "autoencoder/decoder/conv_in/kernel" in stored
    assert not [name for name in stored if name.startswith(("autoencoder/enc", "autoencoder/qu"))]


def test_the_folder_says_what_it_is(tmp_path: pathlib.Path) -> None:
  made = generator()
  export_generator(tmp_path / "a", made, params_of(made), platforms=("cpu", "tpu"), record=RECORD)
  facts = json.loads((tmp_path / "a" / "config.json").read_text())
  assert facts["record"] == RECORD
  assert (facts["num_classes"], facts["null_label"]) == (3, 3)
  assert facts["grid"] == [1, 0.5, 0]
  assert facts["platforms"] == ["cpu", "tpu"]
  assert (
    facts["calling_convention_version"] >= jax.export.minimum_supported_calling_convention_version
  )
  readme = (tmp_path / "a" / "README.md").read_text()
  for words in ("step: 1234", "average: ema_0.9999", "0 to 2; 3 is no class", "127.5 x + 128"):
    assert words in readme
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_the_program_does_not_tell_where_it_was_made(tmp_path: pathlib.Path) -> None:
  made = generator()
  before = jax.config.jax_hlo_source_file_canonicalization_regex
  export_generator(tmp_path / "a", made, params_of(made), platforms=("cpu",), record=RECORD)
  program = (tmp_path / "a" / "generator.stablehlo").read_bytes()
  assert b"sampler.py" in program
  assert str(pathlib.Path(__file__).parent.parent).encode() not in program
  assert pathlib.Path(jax.__file__).parent.as_posix().encode() not in program
  assert jax.config.jax_hlo_source_file_canonicalization_regex == before


def test_mistakes_are_refused(tmp_path: pathlib.Path) -> None:
  made = generator()
  params = params_of(made)

  def export(name: str, *platforms: str, record: dict[str, Any] = RECORD) -> None:
    export_generator(tmp_path / name, made, params, platforms=platforms, record=record)

  with pytest.raises(ValueError, match=r"platforms.*'cpu', 'cuda', 'rocm', 'tpu'.*got \['gpu'\]"):
    export("a", "gpu", "cpu")
  with pytest.raises(ValueError, match=r"platforms must be some of .* got none"):
    export("a")
  with pytest.raises(FileNotFoundError, match=r"no folder .*missing"):
    export("missing/a", "cpu")
  with pytest.raises(TypeError, match="not JSON serializable"):
    export("a", "cpu", record={"path": tmp_path})
  assert list(tmp_path.iterdir()) == []
  (tmp_path / "a").mkdir()
  with pytest.raises(ValueError, match="a exists; it is left as it is"):
    export("a", "cpu")
  assert list((tmp_path / "a").iterdir()) == []


def test_what_only_training_asks_for_is_left_out(tmp_path: pathlib.Path) -> None:
  made = generator(network=in_context_dit(depth=3), guidance=GuidanceInput(2.0, 0.3, 0.8))
  params = params_of(made)
  export_generator(tmp_path / "exported", made, params, platforms=("cpu",), record=RECORD)
  with np.load(tmp_path / "exported" / "weights.npz") as weights:
    parts = {name.split("/")[1] for name in weights}
  assert parts == params.keys() - {"v_blocks", "v_norm", "v_out"}
