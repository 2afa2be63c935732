"""Weights that others published become runs of ours, and ours become a file, without any loss."""

import argparse
import json
import os
import pathlib
import re
import sys
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from meanflow_jax import build, convert, storage
from meanflow_jax.models import dit_layouts, in_context_layouts
from meanflow_jax.models.embeddings import sincos_positions
from meanflow_jax.runtime.mesh import shardings_of
from meanflow_jax.runtime.weights import Weights, read_meanflow, read_safetensors, read_state_dict
from meanflow_jax.train_step import (
  Purpose,
  TrainState,
  from_items,
  sampling_params,
  stream,
  to_items,
)
from tests import golden_check, golden_imeanflow, golden_meanflow, golden_sit
from tests.fill import filled
from tests.runs import (
  ROOT,
  TINY,
  assert_bitwise_equal,
  files_below,
  finish,
  mesh_of,
  start,
  start_program,
  tiny,
  train_step,
)
from tests.tiny import dit, in_context_dit, random_params

GOLDEN = ROOT / "tests" / "golden"
REFERENCE = GOLDEN / "meanflow_checkpoint"
# A run of the network of which the golden files hold parameters.
CHANGES = {
  "data.source": "synthetic",
  "data.channels": 4,
  "model.patch_size": 2,
  "model.depth": 2,
  "model.width": 32,
  "model.num_heads": 4,
  "model.time_frequencies": 256,
  "model.positions": "sincos",
  "train.steps": 1236,
  "evaluate.count": 0,
}
SHAPE = (8, 8, 4)
IMPROVED = {
  "model.name": "in_context_dit",
  "model.depth": 3,
  "model.conditioning": ("h",),
  "model.positions": "none",
  "model.in_context_dit.head_depth": 2,
  "model.in_context_dit.class_tokens": 3,
  "model.in_context_dit.omega_tokens": 2,
  "model.in_context_dit.interval_tokens": 1,
  "model.in_context_dit.time_tokens": 2,
  "method.name": "improved_meanflow",
  "train.steps": 5000,
}


def config_of(changes: dict[str, Any] | None = None) -> ConfigDict:
  return tiny(CHANGES | (changes or {}))


def restored(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> TrainState:
  """The newest checkpoint, all of it, as training resumes from it."""
  targets = to_items(train_step(config, mesh).abstract_state(mesh))
  with storage.checkpoints(config, workdir, read_only=True) as saved:
    step, items = saved.restore(targets, identity=storage.identity(config))
  return from_items(items, jnp.int32(step))


def flat(tree: Any) -> dict[str, np.ndarray]:
  return {name: np.asarray(x) for name, x in dit_layouts.to_paths(tree).items()}


def assert_same(actual: Any, expected: Any) -> None:
  actual, expected = flat(actual), flat(expected)
  assert actual.keys() == expected.keys()
  for name, x in actual.items():
    assert x.dtype == expected[name].dtype == np.float32
    assert x.tobytes() == expected[name].tobytes(), name


def golden(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  return golden_check.load(GOLDEN / f"{name}.npz")


def reference_params() -> Any:
  return golden_meanflow.params_of(*golden("meanflow_dit_cfg_kappa"), "params")


def sit_tensors() -> dict[str, np.ndarray]:
  arrays, _ = golden("sit_pytorch")
  return filled(json.loads(str(arrays["tensors"])))


def sit_params(tensors: dict[str, np.ndarray]) -> Any:
  return dit_layouts.from_sit(golden_sit.dit(golden("sit_pytorch")[1]), SHAPE, tensors)


def converted(workdir: pathlib.Path, path: pathlib.Path, layout: str, **how: Any) -> TrainState:
  convert.read(config_of(), workdir, path, layout, **how)
  return restored(config_of(), workdir, mesh_of(8, 1))


# The reference's checkpoints.


@pytest.mark.parametrize("path", [REFERENCE, REFERENCE / "checkpoint_1234"], ids=["all", "one"])
def test_the_references_checkpoint_becomes_a_state(tmp_path, path, capsys):
  state = converted(tmp_path, path, "meanflow")
  assert int(state.step) == 1234
  assert_same(state.params, reference_params())
  assert_same(state.ema["0.999"], jax.tree.map(lambda x: x / 2, reference_params()))
  fresh = train_step(config_of(), mesh_of(8, 1)).optimizer.init(state.params)
  assert_bitwise_equal(state.opt_state, fresh)
  text = capsys.readouterr().out
  assert "params from params" in text
  assert "ema_0.999 from ema_params" in text


def test_the_checkpoint_of_improved_meanflow_becomes_a_state(tmp_path):
  config = config_of(IMPROVED)
  convert.read(config, tmp_path, GOLDEN / "imeanflow_checkpoint", "imeanflow")
  state = restored(config, tmp_path, mesh_of(8, 1))
  assert int(state.step) == 4321
  reference = golden_imeanflow.params_of(*golden("imeanflow_dit"), "params")
  assert_same(state.params, reference)
  assert_same(state.ema["0.999"], jax.tree.map(lambda x: x / 2, reference))


def test_a_file_for_sampling_alone_gets_a_new_auxiliary_head():
  arrays, meta = golden("imeanflow_dit")
  tensors = {k.removeprefix("params/"): x for k, x in arrays.items() if k.startswith("params/")}
  alone = {name: x for name, x in tensors.items() if not name.startswith("net/v_heads_")}
  network = golden_imeanflow.network(meta)
  new = random_params(network, SHAPE)
  found = in_context_layouts.from_imeanflow(network, SHAPE, alone, lambda: new)
  assert {name for name in found if found[name] is new[name]} == {*network.TRAINING_ONLY}
  whole = golden_imeanflow.params_of(arrays, meta, "params")
  assert_same(sampling_params(network, found), sampling_params(network, whole))


@pytest.mark.parametrize(
  ("changes", "folder", "layout"),
  [(IMPROVED, "meanflow_checkpoint", "meanflow"), ({}, "imeanflow_checkpoint", "imeanflow")],
)
def test_a_layout_of_another_network_is_refused(tmp_path, changes, folder, layout):
  with pytest.raises(ValueError, match=f"--layout={layout} is of a network "):
    convert.read(config_of(changes), tmp_path / "run", GOLDEN / folder, layout)
  assert not (tmp_path / "run").exists()


def test_what_does_not_fit_the_two_headed_network_is_listed():
  arrays, meta = golden("imeanflow_dit")
  tensors = {k.removeprefix("params/"): x for k, x in arrays.items() if k.startswith("params/")}
  del tensors["net/u_heads_1/attn/k_proj/_flax_linear/kernel"]
  tensors["net/time_tokens"] = np.zeros((3, 32), np.float32)
  with pytest.raises(ValueError, match="not the network's") as caught:
    golden_imeanflow.from_theirs(golden_imeanflow.network(meta), SHAPE, tensors)
  assert str(caught.value).splitlines()[1:] == [
    "  missing: net/u_heads_1/attn/k_proj/_flax_linear/kernel",
    "  misshapen: net/time_tokens (3, 32) instead of (2, 32)",
  ]


def test_the_newest_of_the_references_checkpoints_is_taken(tmp_path):
  for step in (900, 1234):
    (tmp_path / f"checkpoint_{step}").symlink_to(REFERENCE / "checkpoint_1234")
  (tmp_path / "checkpoint_900").unlink()
  (tmp_path / "checkpoint_900").mkdir()
  assert read_meanflow(tmp_path).step == 1234


@pytest.mark.parametrize("fsdp", [1, 8])
def test_a_checkpoint_is_spread_over_the_devices(tmp_path, fsdp):
  config = config_of({"mesh.fsdp": fsdp})
  convert.read(config, tmp_path, REFERENCE, "meanflow")
  assert_same(restored(config, tmp_path, mesh_of(1, 1)).params, reference_params())


def test_without_averages_only_the_parameters_are_taken(tmp_path, capsys):
  config = config_of({"ema.decays": (), "sample.ema": 0.0})
  convert.read(config, tmp_path, REFERENCE, "meanflow")
  assert_same(restored(config, tmp_path, mesh_of(8, 1)).params, reference_params())
  assert "ema_params is left out" in capsys.readouterr().out


def command(workdir: pathlib.Path, *given: str) -> str:
  keys = [f"--config.{key}={value}" for key, value in (TINY | CHANGES).items()]
  program = [sys.executable, "-m", "meanflow_jax.convert", "--config=configs/digits.py"]
  process = start_program(*program, f"--workdir={workdir}", *keys, *given)
  status, output, errors = finish(process)
  assert (status == 0) == (not errors.startswith("error: ")), errors
  return output + errors


@pytest.mark.slow
def test_a_published_checkpoint_is_sampled_and_trained_further(tmp_path):
  workdir, out = tmp_path / "run", tmp_path / "images.npz"
  assert "checkpoint 1234" in command(workdir, f"--read={REFERENCE}", "--layout=meanflow")

  status, _, errors = finish(start(workdir, "--mode=sample", f"--out={out}", changes=CHANGES))
  assert status == 0, errors
  images = np.load(out)["arr_0"]
  noise = lambda i: jax.random.normal(stream(0, Purpose.SAMPLE_NOISE, i), SHAPE)
  z, y, one = np.stack([noise(i) for i in range(20)]), np.arange(20) % 10, np.ones(20, np.float32)
  average = jax.tree.map(lambda x: x / 2, reference_params())
  network = golden_meanflow.network(golden("meanflow_dit_cfg_kappa")[1])
  u = jax.jit(network.apply)({"params": average}, z, one, one, y.astype(np.int32))
  levels = np.clip(np.floor(127.5 * (z - u) + 128), 0, 255)
  assert np.abs(images.astype(int) - levels).max() <= 1  # a pixel may fall on an edge
  assert np.mean(images != levels) < 0.01

  status, output, errors = finish(start(workdir, changes=CHANGES))
  assert status == 0, errors
  assert "steps 1234 to 1236" in output
  state = restored(config_of(), workdir, mesh_of(1, 1))
  assert int(state.step) == 1236
  steps = jax.tree.map(lambda x, y: np.abs(x - y).max(), state.params, reference_params())
  assert 0 < max(jax.tree.leaves(steps)) <= 2.2e-2  # two steps of Adam, of 0.01 at most
  assert "is not empty" in command(workdir, f"--read={REFERENCE}", "--layout=meanflow")


# Our own files.


def saved_run(workdir: pathlib.Path, config: ConfigDict, step: int) -> dict[str, Any]:
  """The items of a checkpoint that could be of any run: all of its numbers differ."""
  mesh = mesh_of(8, 1)
  shapes = to_items(train_step(config, mesh).abstract_state(mesh))

  def random(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
    return np.asarray(100 * rng.normal(size=leaf.shape), leaf.dtype)

  items = jax.tree_util.tree_map_with_path(random, shapes)
  items = jax.device_put(items, shardings_of(shapes))
  with storage.checkpoints(config, workdir, read_only=False) as checkpoints:
    checkpoints.save(step, items, config.to_dict())
  return items


@pytest.mark.parametrize(("ema", "item"), [(0.999, "ema_0.999"), (0.0, "params")])
def test_a_round_trip_loses_nothing(tmp_path, capsys, ema, item):
  """Learned positions and other conditioning are things that only our own layout knows."""
  config = tiny({"sample.ema": ema, "model.conditioning": ("t", "r", "h")})
  items, path = saved_run(tmp_path / "run", config, 7), tmp_path / "ours.safetensors"
  convert.write(config, tmp_path / "run", path)
  convert.read(config, tmp_path / "again", path, "safetensors")
  assert "one set of weights" in capsys.readouterr().out
  state = restored(config, tmp_path / "again", mesh_of(8, 1))
  assert int(state.step) == 7
  assert_same(state.params, items[item])
  assert_same(state.ema["0.999"], items[item])
  convert.write(config, tmp_path / "again", tmp_path / "again.safetensors")
  tensors, header = read_safetensors(path)
  again, _ = read_safetensors(tmp_path / "again.safetensors")
  assert_same(again, tensors)
  assert json.loads(header["config"]) == json.loads(json.dumps(config.to_dict()))
  assert (header["step"], header["average"]) == ("7", item)
  assert tensors["blocks/attention/qkv/kernel"].shape == (1, 16, 48)


def test_a_file_that_exists_is_left_as_it_is(tmp_path):
  saved_run(tmp_path / "run", tiny(), 7)
  path = tmp_path / "ours.safetensors"
  path.write_text("mine")
  with pytest.raises(ValueError, match="exists"):
    convert.write(tiny(), tmp_path / "run", path)
  assert path.read_text() == "mine"
  with pytest.raises(FileNotFoundError, match="nowhere"):
    convert.write(tiny(), tmp_path / "run", tmp_path / "nowhere" / "ours.safetensors")


def test_a_file_of_another_config_is_refused(tmp_path):
  saved_run(tmp_path / "run", tiny(), 7)
  path = tmp_path / "ours.safetensors"
  convert.write(tiny(), tmp_path / "run", path)
  other = tiny({"model.num_heads": 4, "model.remat": "blocks"})
  with pytest.raises(ValueError, match="another config") as caught:
    convert.read(other, tmp_path / "other", path, "safetensors")
  assert str(caught.value).splitlines()[1:] == ["  model.num_heads: file 2, this config 4"]
  assert not (tmp_path / "other").exists()


def test_a_file_of_somebody_else_is_not_taken_for_ours(tmp_path):
  path = tmp_path / "theirs.safetensors"
  safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, path)
  with pytest.raises(ValueError, match="not written by --write"):
    convert.read(tiny(), tmp_path / "run", path, "safetensors")
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ValueError, match="not a whole safetensors file"):
    convert.read(tiny(), tmp_path / "run", path, "safetensors")


# PyTorch's.


def test_a_state_dict_becomes_a_run(tmp_path):
  tensors = sit_tensors() | {"pos_embed": sincos_positions(4, 4, 32)[None]}
  path = tmp_path / "sit.safetensors"
  safetensors.numpy.save_file(tensors, path)
  state = converted(tmp_path / "run", path, "sit")
  assert int(state.step) == 0
  assert_same(state.params, sit_params(sit_tensors()))
  assert_same(state.ema["0.999"], state.params)


def test_half_precision_is_read_as_it_is(tmp_path):
  tensors = {name: x.astype(jnp.bfloat16) for name, x in sit_tensors().items()}
  tensors["pos_embed"] = sincos_positions(4, 4, 32)[None].astype(jnp.bfloat16)
  path = tmp_path / "sit.safetensors"
  safetensors.numpy.save_file(tensors, path)
  read = sit_params(read_state_dict(path, None).sets["params"])
  assert_same(read, sit_params({name: x.astype(np.float32) for name, x in tensors.items()}))


@pytest.mark.parametrize(
  ("positions", "words"),
  [
    (sincos_positions(4, 4, 32)[None, ::-1], "differs by up to"),
    (sincos_positions(2, 8, 32)[None], "differs by up to"),
    (sincos_positions(4, 4, 32)[None] + np.float32("nan"), "differs by up to nan"),
    (sincos_positions(8, 8, 32)[None], "has the shape (1, 64, 32) instead of (1, 16, 32)"),
  ],
)
def test_other_positions_are_refused(positions, words):
  with pytest.raises(ValueError, match="4 x 4 positions") as caught:
    sit_params(sit_tensors() | {"pos_embed": positions})
  assert words in str(caught.value)


def test_pytorch_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  (tmp_path / "sit.pt").touch()
  with pytest.raises(ModuleNotFoundError, match="pip install torch"):
    converted(tmp_path / "run", tmp_path / "sit.pt", "sit")


def average_of(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  return {name: x / 2 for name, x in tensors.items()}


def test_pytorch_files_are_read_in_their_common_forms(tmp_path):
  torch = pytest.importorskip("torch")
  as_torch = lambda tensors: {name: torch.tensor(x) for name, x in tensors.items()}
  model, ema = as_torch(sit_tensors()), as_torch(average_of(sit_tensors()))
  flags_of_theirs = argparse.Namespace(model="SiT-B/2", sizes=[1, 2])
  nested = {"model": model, "ema": ema, "opt": {"state": {}}, "args": flags_of_theirs, "steps": 5}
  for stored, key, expected in [
    (model, None, {"params": sit_tensors()}),
    (nested, None, {"params": sit_tensors(), "ema_params": average_of(sit_tensors())}),
    (nested, "ema", {"ema": average_of(sit_tensors())}),
    ({"state_dict": model}, "state_dict", {"state_dict": sit_tensors()}),
  ]:
    for zipped in (True, False):
      path = tmp_path / f"{len(os.listdir(tmp_path))}.pt"
      torch.save(stored, path, _use_new_zipfile_serialization=zipped)
      found = read_state_dict(path, key)
      assert found.sets.keys() == expected.keys()
      for name, tensors in expected.items():
        assert_same(found.sets[name], tensors)
  with pytest.raises(ValueError, match=r"state_dict.*--key"):
    read_state_dict(path, None)


class Trap:
  """What a pickle could run."""

  def __reduce__(self) -> tuple[Any, ...]:
    return pathlib.Path.touch, (pathlib.Path("sprung"),)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  monkeypatch.chdir(tmp_path)
  torch.save({"model": Trap()}, "sit.pt")
  with pytest.raises(ValueError, match="cannot be read as plain tensors"):
    read_state_dict(tmp_path / "sit.pt", None)
  assert not pathlib.Path("sprung").exists()


# What does not fit.


@pytest.mark.parametrize("layout", ["meanflow", "sit"])
def test_all_that_does_not_fit_is_listed(layout):
  if layout == "meanflow":
    tensors, read = dict(read_meanflow(REFERENCE).sets["params"]), dit_layouts.from_meanflow
  else:
    tensors, read = sit_tensors(), dit_layouts.from_sit
  first, second, last = sorted(tensors)[0], sorted(tensors)[1], sorted(tensors)[-1]
  shape = tensors[second].shape
  del tensors[first], tensors[last]
  tensors[second] = np.zeros((3, 1), np.float32)
  tensors |= {"extra": np.zeros(1), "more": np.zeros(1)}
  with pytest.raises(ValueError, match="not the network's") as caught:
    read(golden_sit.dit(golden("sit_pytorch")[1]), SHAPE, tensors)
  assert str(caught.value).splitlines()[1:] == [
    f"  missing: {first}, {last}",
    "  not of this network: extra, more",
    f"  misshapen: {second} (3, 1) instead of {shape}",
  ]


@pytest.mark.parametrize("changes", [{"positions": "learned"}, {"conditioning": ("t", "r")}])
def test_a_network_that_such_files_do_not_hold_is_refused(changes):
  with pytest.raises(ValueError, match=r"model\.conditioning .* model\.positions"):
    dit_layouts.from_sit(dit(**changes), SHAPE, sit_tensors())


@pytest.mark.parametrize("changes", [{"positions": "learned"}, {"conditioning": ("t", "h")}])
def test_what_the_reference_of_improved_meanflow_has_not_is_refused(changes):
  with pytest.raises(ValueError, match=r"model\.conditioning .* model\.positions"):
    in_context_layouts.from_imeanflow(in_context_dit(**changes), SHAPE, {})


def test_a_mistake_leaves_no_folder(tmp_path):
  with pytest.raises(ValueError, match="not the network's"):
    convert.read(config_of({"model.depth": 1}), tmp_path / "run", REFERENCE, "meanflow")
  assert not (tmp_path / "run").exists()


def test_a_run_with_checkpoints_is_left_as_it_is(tmp_path):
  saved_run(tmp_path, config_of(), 7)
  before = files_below(tmp_path)
  with pytest.raises(ValueError, match="is not empty"):
    convert.read(config_of(), tmp_path, REFERENCE, "meanflow")
  assert files_below(tmp_path) == before


def test_what_is_no_checkpoint_is_refused(tmp_path):
  with pytest.raises(ValueError, match="is no checkpoint of MeanFlow's reference"):
    read_meanflow(tmp_path)
  with pytest.raises(FileNotFoundError, match="nowhere"):
    read_meanflow(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match="nowhere"):
    read_state_dict(tmp_path / "nowhere.pt", None)
  with pytest.raises(ValueError, match=r"\.safetensors, \.pt or \.pth"):
    read_state_dict(tmp_path / "sit.ckpt", None)


@pytest.mark.parametrize("there", [{"params", "ema_0.5", "ema_0.9"}, {"ema_params", "ema_0.5"}])
def test_averages_that_are_not_there_are_not_made_up(there):
  with pytest.raises(ValueError, match=r"no (ema_)?params") as caught:
    convert.assign(there, ["params", "ema_0.999"])
  assert all(name in str(caught.value) for name in there)


def test_a_lone_set_of_weights_serves_all():
  found = Weights(0, {"ema_params": {}})
  chosen = convert.assign(found.sets, ["params", "ema_0.999", "ema_0.9"])
  assert chosen == dict.fromkeys(["params", "ema_0.999", "ema_0.9"], "ema_params")


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ([], "give one of --read, --write, --download, --inception, got 0"),
    (["--read=a", "--layout=sit", "--write=b.safetensors"], "give one of --read"),
    (["--write=b.npz"], "must end in .safetensors"),
    (["--write=b.safetensors", "--layout=sit"], "--layout is not read with --write"),
    (["--read=a", "--layout=sit", "--platforms=cpu"], "--platforms is not read with --read"),
    (["--read=a"], "--read needs --layout"),
    (["--download=inception"], "--download needs --out"),
    (["--inception=a.pth", "--out=b", "--key=ema"], "--key is not read with --inception"),
    (["--read=a", "--layout=meanflow", "--fine_tune", "--noise_at=0"], "for --layout=sit"),
    (["--read=a", "--layout=safetensors", "--key=ema"], "for --layout=sit"),
    (["--read=a", "--layout=sit", "--fine_tune"], "--noise_at=0 or --noise_at=1"),
    (["--read=a", "--layout=sit", "--noise_at=1"], "--fine_tune needs"),
  ],
)
def test_flags_that_do_not_go_together_are_refused(given, words):
  values = flags.FlagValues()
  convert.define_flags(values)
  flags.DEFINE_string("config", None, "", flag_values=values)
  ours = any("--read" in flag or "--write" in flag for flag in given)
  values(["convert", *(["--workdir=run", "--config=file"] if ours else []), *given])
  with pytest.raises(ValueError, match=re.escape(words)):
    convert.check_flags(values)


# Fine-tuning.


def flow_matching_tensors(channels: int = 4) -> dict[str, np.ndarray]:
  """Of a SiT with one time embedder; with 8 channels, the last 4 are those of a variance."""
  tensors = {k: x for k, x in sit_tensors().items() if not k.startswith("r_embedder")}
  if channels == 8:
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
      places = tensors[name].reshape(4, 4, *tensors[name].shape[1:])
      doubled = np.concatenate([places, np.full_like(places, 1e3)], axis=1)
      tensors[name] = doubled.reshape(32, *tensors[name].shape[1:])
  return tensors


def flow_matching_velocity(z: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
  """What that SiT computes: a network with one time embedder, too."""
  params = sit_params(sit_tensors())
  del params["h_embedder"]
  network = golden_sit.dit(golden("sit_pytorch")[1]).clone(conditioning=("t",))
  return jax.jit(network.apply)({"params": params}, z, t, t, y)


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("noise_at", [0, 1])
def test_fine_tuning_starts_from_the_flow_that_was_learned(noise_at, channels):
  network = golden_sit.dit(golden("sit_pytorch")[1])
  initial = random_params(network, SHAPE)
  params = dit_layouts.from_flow_matching(
    network, SHAPE, flow_matching_tensors(channels), noise_at=noise_at, initial=initial
  )
  rng = np.random.default_rng(0)
  z, y = jnp.asarray(rng.normal(size=(6, *SHAPE)), jnp.float32), jnp.arange(6)
  t, h = jnp.linspace(0, 1, 6), jnp.linspace(0, 0.7, 6)
  velocity = flow_matching_velocity
  expected = velocity(z, t, y) if noise_at else -velocity(z, 1 - t, y)
  u = jax.jit(network.apply)({"params": params}, z, t, h, y)
  np.testing.assert_allclose(u, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

  def loss(params: Any) -> jax.Array:
    return (network.apply({"params": params}, z, t, h, y) ** 2).sum()

  gradient = jax.jit(jax.grad(loss))(params)["h_embedder"]["out"]["kernel"]
  assert np.all(np.any(gradient != 0, axis=1))  # every hidden unit can take effect


def test_fine_tuning_starts_as_a_run(tmp_path, capsys):
  """Heads that only training used are left out."""
  path = tmp_path / "sit.safetensors"
  head = {"projectors.0.0.weight": np.zeros((8, 32), np.float32)}
  safetensors.numpy.save_file(flow_matching_tensors() | head, path)
  state = converted(tmp_path / "run", path, "sit", noise_at=1)
  assert "only training used them: projectors.0.0.weight" in capsys.readouterr().out
  assert int(state.step) == 0
  expected = flat(sit_params(sit_tensors()))
  fresh = flat(train_step(config_of(), mesh_of(8, 1)).new_state(mesh_of(8, 1)).params)
  for name, x in flat(state.params).items():
    if name.startswith("h_embedder/hidden"):
      assert x.tobytes() == fresh[name].tobytes()
    elif name.startswith("h_embedder/out"):
      assert not x.any()
    else:
      assert x.tobytes() == expected[name].tobytes()
  step, _, _ = storage.trained_params(
    config_of(),
    tmp_path / "run",
    build.network(config_of(), mesh_of(8, 1)),
    mesh_of(8, 1),
    {"ema_0.999"},
  )
  assert step == 0


def test_a_network_with_two_times_is_no_flow_matching_network():
  network = golden_sit.dit(golden("sit_pytorch")[1])
  initial = random_params(network, SHAPE)
  with pytest.raises(ValueError, match=r"second time embedder.*r_embedder\.mlp\.0\.bias"):
    dit_layouts.from_flow_matching(network, SHAPE, sit_tensors(), noise_at=1, initial=initial)


def test_what_fine_tuning_misses_is_listed():
  network, tensors = golden_sit.dit(golden("sit_pytorch")[1]), flow_matching_tensors()
  del tensors["final_layer.linear.bias"], tensors["t_embedder.mlp.0.weight"]
  initial = random_params(network, SHAPE)
  missing = r"missing: final_layer\.linear\.bias, t_embedder\.mlp\.0\.weight"
  with pytest.raises(ValueError, match=missing):
    dit_layouts.from_flow_matching(network, SHAPE, tensors, noise_at=0, initial=initial)
