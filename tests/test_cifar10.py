"""CIFAR-10's recipe, and a tiny U-Net through all of it on digits: trained, measured, exported."""

import json
import pathlib
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.stats
from ml_collections import ConfigDict

from configs import base, cifar10, cifar10_paper
from meanflow_jax import (
  build,
  command_line,
  convert,
  evaluate,
  networks,
  plan,
  sample,
  storage,
  train,
)
from meanflow_jax.build import UserError
from meanflow_jax.compiled import model_flops
from meanflow_jax.models.unet import params_from_torch
from meanflow_jax.runtime.mesh import global_batch
from tests import golden_check, golden_unet
from tests.fill import filled
from tests.runs import assert_close, devices, logged, mesh_of, tiny, train_step

GOLDEN = pathlib.Path(__file__).parent / "golden" / "unet_cifar.npz"
UNET = {
  "model.name": "unet",
  "model.unet.width": 8,
  "model.unet.multipliers": (1, 2),
  "model.unet.blocks": 1,
  "model.unet.attention_at": (4,),
  "model.unet.time_frequencies": 16,
  "augmentation.probability": 0.12,
  "augmentation.flip": True,
  "data.num_classes": 0,
  "method.guidance.omega": 1.0,
  "method.guidance.kappa": 0.0,
  "method.label_dropout.rate": 0.0,
  "optimizer.learning_rate": 3e-3,
  "ema.decays": (0.9, 0.99),
  "ema.ramp": False,
  "sample.ema": 0.9,
}
ONE_LEVEL = {"model.unet.multipliers": (1,), "model.unet.attention_at": ()}
STEPS = 60


def digits(**changes: Any) -> ConfigDict:
  return tiny(UNET | {key.replace("__", "."): value for key, value in changes.items()})


def run_config(**changes: Any) -> ConfigDict:
  train = {"steps": STEPS, "log_every": 10, "checkpoint_every": 0, "sample_every": 0}
  settings = {f"train__{key}": value for key, value in train.items()}
  return digits(**settings | {"evaluate__count": 0} | changes)


@pytest.fixture(scope="module", autouse=True)
def _one_device() -> Any:
  with devices(1, 1):
    yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("unet") / "run"
  train.run(run_config(), workdir)
  return workdir


# The recipe.

RECIPE = {
  "data.source": "tfds",
  "data.tfds.name": "cifar10",
  "data.image_size": 32,
  "data.channels": 3,
  "data.num_classes": 0,
  "data.flip": True,
  "augmentation.probability": 0.12,
  "augmentation.flip": True,
  "model.name": "unet",
  "model.unet.width": 128,
  "model.unet.multipliers": (2, 2, 2),
  "model.unet.blocks": 4,
  "model.unet.attention_at": (16,),
  "model.unet.num_heads": 1,
  "model.unet.dropout": 0.2,
  "method.times.equal_fraction": 0.25,  # r < t on 75 % (arXiv 2505.13447, appendix A)
  "method.guidance.omega": 1.0,
  "method.guidance.kappa": 0.0,
  "method.weight.p": 0.75,
  "method.weight.c": 1e-3,
  "optimizer.learning_rate": 6e-4,
  "optimizer.schedule": "constant",
  "optimizer.warmup_steps": 10_000,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.999,
  "optimizer.weight_decay": 0.0,
  "ema.decays": (0.9999, 0.99995, 0.9996),
  "ema.ramp": False,
  "train.batch_size": 1024,
  "train.steps": 800_000,
  "evaluate.count": 50_000,
  "evaluate.ema": (0.9999, 0.99995, 0.9996),
  "evaluate.extractors": ("inception",),
  "sample.rounding": "adm",
}


@pytest.mark.parametrize("preset", [cifar10, cifar10_paper])
def test_the_recipe_is_the_published_one(preset):
  config = preset.get_config()
  found = {key: value_at(config, key) for key in RECIPE}
  assert found == RECIPE


def value_at(config: ConfigDict, key: str) -> Any:
  for part in key.split("."):
    config = config[part]
  return config


def logit_normal(mean: float, std: float) -> Any:
  return lambda time: scipy.stats.norm.cdf(scipy.special.logit(time), mean, std)


def times(preset: Any) -> tuple[np.ndarray, np.ndarray]:
  """r and t of a preset, every fourth row with r = t."""
  r, t = build.method(preset.get_config()).times(jax.random.key(0), 40_000)
  return np.float64(r), np.float64(t)


def assert_distributed(times: np.ndarray, cdf: Any) -> None:
  assert scipy.stats.kstest(times, cdf).pvalue > 0.01


def test_the_times_of_the_paper_are_sorted():
  r, t = times(cifar10_paper)
  one = logit_normal(-2.0, 2.0)
  ahead = np.arange(len(t)) % 4 != 0
  np.testing.assert_array_equal(r[~ahead], t[~ahead])
  assert_distributed(t, lambda time: one(time) ** 2)
  assert_distributed(r[ahead], lambda time: 1 - (1 - one(time)) ** 2)


def test_the_better_times_are_clipped():
  r, t = times(cifar10)
  t_cdf, r_cdf = logit_normal(-0.6, 1.6), logit_normal(-4.0, 1.6)
  ahead = np.arange(len(t)) % 4 != 0
  np.testing.assert_array_equal(r[~ahead], t[~ahead])
  assert_distributed(t, t_cdf)
  assert_distributed(r[ahead], lambda time: 1 - (1 - t_cdf(time)) * (1 - r_cdf(time)))


def test_one_key_makes_it_class_conditional():
  config = cifar10.get_config()
  config.data.num_classes = 10
  step = train_step(config, mesh_of(1, 1))
  assert step.abstract_state(mesh_of(1, 1)).params["label_embedder"]["embedding"].shape[0] == 11


def test_a_step_costs_three_and_three_quarters_forward_passes():
  step = train_step(cifar10.get_config(), mesh_of(1, 1))
  assert model_flops(step) == 3.75 * step.network.forward_flops((32, 32, 3))


# A run.


@pytest.mark.slow
def test_a_small_network_learns_digits(trained):
  lines = logged(trained)
  first, last = (np.mean([line["error"] for line in part]) for part in (lines[:2], lines[-2:]))
  assert last < 0.8 * first


@pytest.mark.slow
def test_each_average_is_measured(trained):
  decays = (0.9, 0.99, 0.0)
  evaluate.run(run_config(evaluate__count=32, evaluate__ema=decays), trained)
  rows = json.loads((trained / "figures" / f"step_{STEPS:07d}.json").read_text())
  assert [row["ema"] for row in rows] == list(decays)
  assert len({row["figures"]["frechet_pixels"] for row in rows}) == len(decays)


@pytest.mark.slow
def test_an_exported_generator_makes_the_images_of_the_run(trained, tmp_path):
  config = run_config(sample__count=16)
  sample.run(config, trained, tmp_path / "images.npz")
  convert.write_generator(config, trained, tmp_path / "generator", ("cpu",))
  with np.load(tmp_path / "images.npz") as file:
    images, labels = file["arr_0"], file["arr_1"]
  assert images.shape == (16, 8, 8, 1)
  assert not labels.any()
  mesh = mesh_of(1, 1)
  generator = build.sample_generator(
    config, build.network(config, mesh), build.method(config), mesh
  )
  noise = jax.vmap(lambda index: generator._noise_and_label(index)[0])(jnp.arange(16))
  program = bytearray((tmp_path / "generator" / "generator.stablehlo").read_bytes())
  with np.load(tmp_path / "generator" / "weights.npz") as file:
    made = jax.export.deserialize(program).call(dict(file), noise, jnp.zeros(16, jnp.int32))
  assert np.abs(np.int32(made) - images).max() <= 1


@pytest.mark.slow
def test_any_mesh_trains_the_same():
  """Rows are augmented, and units dropped, alike wherever they are."""
  config, images = digits(**{k.replace(".", "__"): v for k, v in ONE_LEVEL.items()}), digit_batch()
  ends = []
  for shape in ((1, 1), (8, 1), (2, 4)):
    mesh = mesh_of(*shape)
    step = train_step(config, mesh)
    state, jitted = step.new_state(mesh), step.jitted(mesh)
    for _ in range(3):
      state, metrics = jax.block_until_ready(jitted(state, global_batch(mesh, images)))
    ends.append(jax.tree.map(np.asarray, (metrics, state.params)))
  (metrics, params), *others = ends
  norm = lambda tree: np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(tree)))
  for theirs in others:
    assert_close(theirs[0], metrics, rtol=1e-4)
    # Where a gradient is rounding alone (of biases before a norm), Adam makes steps of it: so the
    # parameters are compared all together.
    difference = jax.tree.map(lambda a, b: a - b, theirs[1], params)
    assert norm(difference) < 1e-3 * norm(params)


def digit_batch() -> dict[str, np.ndarray]:
  config = digits()
  return next(train.host_batches(config, build.source(config), mesh_of(1, 1), 0))


@pytest.mark.slow
def test_a_plan_knows_the_network(capsys):
  plan.run(digits(), "h200:8", False)
  flops = model_flops(train_step(digits(), mesh_of(1, 1))) / 1e9
  assert f"{flops:.2f} GFLOP/image" in capsys.readouterr().out


# Published weights, and our own files.


def sizes_of(meta: dict[str, Any]) -> dict[str, Any]:
  """The keys of a config that tell of a golden file's network."""
  config = meta["config"]
  sizes = {
    "width": config["model_channels"],
    "multipliers": tuple(config["channel_mult"]),
    "blocks": config["num_blocks"],
    "attention_at": tuple(config["attn_resolutions"]),
    "time_frequencies": 2 * config["model_channels"],
  }
  return {f"model__unet__{key}": value for key, value in sizes.items()}


def test_weights_of_the_published_layout_become_a_run(tmp_path):
  """Of the golden file's network, whose values these weights have."""
  golden, meta = golden_check.load(GOLDEN)
  tensors = filled(json.loads(str(golden["tensors"])))
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  config = run_config(data__image_size=16, data__channels=3, sample__count=2, **sizes_of(meta))
  convert.read(config, tmp_path / "run", tmp_path / "model.safetensors", "unet")
  convert.write(config, tmp_path / "run", tmp_path / "ours.safetensors")
  convert.read(config, tmp_path / "again", tmp_path / "ours.safetensors", "safetensors")
  expected = params_from_torch(golden_unet.unet(meta["config"]), (16, 16, 3), tensors)
  mesh = mesh_of(1, 1)
  network = build.network(config, mesh)
  for name in ("run", "again"):
    _, items, _ = storage.trained_params(config, tmp_path / name, network, mesh, {"ema_0.9"})
    assert_close(jax.tree.map(np.asarray, items["ema_0.9"]), expected, rtol=0)


def test_the_published_trainers_file_has_four_sets(tmp_path):
  """The network, its averages, and buffers that are no weights; only what is asked for is taken."""
  golden, meta = golden_check.load(GOLDEN)
  tensors = filled(json.loads(str(golden["tensors"])))
  prefixes = {"net": 1, "net_ema": 2, "net_ema1": 3, "net_ema2": 4}
  stored = {f"{p}.{name}": k * x for p, k in prefixes.items() for name, x in tensors.items()}
  stored |= {"num_updates": np.zeros((), np.int32), "net.enc.conv.resample_filter": np.ones((1, 1))}
  safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
  decays = {"ema__decays": (0.9999, 0.9996), "sample__ema": 0.9996}
  config = run_config(
    data__image_size=16, data__channels=3, sample__count=2, **decays, **sizes_of(meta)
  )
  convert.read(config, tmp_path / "run", tmp_path / "model.safetensors", "unet")
  mesh, items = mesh_of(1, 1), {"params": 1, "ema_0.9999": 2, "ema_0.9996": 4}
  network = build.network(config, mesh)
  _, found, _ = storage.trained_params(config, tmp_path / "run", network, mesh, items.keys())
  expected = params_from_torch(golden_unet.unet(meta["config"]), (16, 16, 3), tensors)
  for item, factor in items.items():
    scaled = jax.tree.map(lambda x, factor=factor: factor * x, expected)
    assert_close(jax.tree.map(np.asarray, found[item]), scaled, rtol=0)


@pytest.mark.parametrize(("layout", "name"), [("unet", "dit"), ("sit", "unet")])
def test_a_layout_is_of_one_network(layout, name, tmp_path):
  config = base.get_config()
  config.model.name = name
  with pytest.raises(ValueError, match=rf"--layout={layout} is of .* model.name is '{name}'"):
    convert.read(config, tmp_path, tmp_path / "x.safetensors", layout)


# Mistakes.


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model.name": "vit"}, ["model.name", "'dit', 'in_context_dit', 'unet'", "'vit'"]),
    ({"model.name": "dit"}, ["augmented", "'dit'", "'unet'", "augmentation.probability"]),
    ({"augmentation.probability": 2.0}, ["augmentation.probability", "2.0"]),
    ({"autoencoder.path": "weights"}, ["augmentation", "latents", "autoencoder.path"]),
    ({"model.unet.multipliers": (1, 1, 1, 1, 1)}, ["8 x 8", "16", "5 levels"]),
    ({"model.unet.dropout": 1.0}, ["model.unet.dropout", "1.0"]),
    ({"mesh.fsdp": 3, "mesh.data": 1}, ["mesh.fsdp 3", "model.unet.width 8"]),
    ({"sample.labels": "one"}, ["sample.labels 'one'", "unconditional"]),
    ({"sample.guidance.omega": 2.0}, ["guidance of 2.0", "takes classes"]),
  ],
  ids=str,
)
def test_mistakes(changes, words, tmp_path):
  config = run_config(**{key.replace(".", "__"): value for key, value in changes.items()})
  shape = (config.mesh.data, config.mesh.fsdp) if config.mesh.fsdp > 1 else (1, 1)
  with devices(*shape), pytest.raises(UserError) as caught:
    train.run(config, tmp_path / "run")
  assert [word for word in words if word not in str(caught.value)] == []
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_network_is_refused(trained, tmp_path):
  for changes, words in (
    ({"model__unet__width": 16}, "model.unet.width: checkpoint 8, this run 16"),
    ({"model__unet__blocks": 2}, "model.unet.blocks: checkpoint 1, this run 2"),
    (
      {"model__name": "dit", "augmentation__probability": 0.0, "augmentation__flip": False},
      "model.name: checkpoint unet, this run dit",
    ),
  ):
    with pytest.raises(UserError, match=words):
      sample.run(run_config(**changes), trained, tmp_path / "x.npz")


@pytest.mark.slow
def test_what_is_free_to_change_may_change(trained, tmp_path):
  def drawn(name, **changes):
    sample.run(run_config(**changes, sample__count=4), trained, tmp_path / f"{name}.npz")
    return np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int)

  images = drawn("as_trained")
  same = drawn("same", model__unet__dropout=0.0, model__remat="none")
  np.testing.assert_array_equal(same, images)  # sampling drops nothing
  rounded = drawn("rounded", model__dtype="bfloat16")
  assert 0 < np.abs(rounded - images).max() < 30


def test_keys_of_the_other_network_are_refused():
  dit, unet = base.get_config(), cifar10.get_config()
  for key in ("model.unet.width", "augmentation.flip"):
    assert command_line.unread(dit, [key])
    assert not command_line.unread(unet, [key])
  for key in networks.keys(dit):
    shared = key in ("dtype", "remat")
    assert not command_line.unread(dit, [f"model.{key}"])
    assert bool(command_line.unread(unet, [f"model.{key}"])) != shared, key
