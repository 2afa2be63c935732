"""Prepared latents: who can open them, how training reads and draws them, and what is refused."""

import dataclasses
import itertools
import os
import pathlib
import pickle
import shutil
import sys
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from meanflow_jax import build, evaluate
from meanflow_jax.data import loader, shards, tfds_builders
from meanflow_jax.data import manifest as manifests
from meanflow_jax.data.latents import DamagedRecordError, Latents
from meanflow_jax.models.autoencoder import SCALE_FACTOR
from meanflow_jax.train_step import Purpose, latent_inputs, stream
from tests.prepared import write_autoencoder
from tests.runs import mesh_of, tiny

COUNT = 23
CLASSES = ("ant", "bee", "cow")
SHAPE = (4, 4, 8)


def arrays(split: str, kind: str = "latents") -> np.ndarray:
  """What is stored in a split: means, then positive deviations; or pixels."""
  rng = np.random.default_rng(len(split))
  if kind == "pixels":
    return rng.integers(256, size=(COUNT, 8, 8, 3), dtype=np.uint8)
  moments = rng.normal(size=(COUNT, *SHAPE))
  moments[..., 4:] = np.abs(moments[..., 4:])
  return moments.astype(np.float16)


def make(folder: pathlib.Path, kind: str = "latents", **changes: Any) -> pathlib.Path:
  """A finished folder of three shards in each split."""
  facts = {
    "kind": kind,
    "shape": arrays("train", kind).shape[1:],
    "image_size": 8,
    "autoencoder": "none",
    "autoencoder_sha256": "0",
    "autoencoder_dtype": "float32",
    "scale_factor": SCALE_FACTOR,
    "splits": ("train", "train_flipped") if kind == "latents" else ("train",),
    "records_per_shard": 9,
    "images": COUNT,
    "class_names": CLASSES,
    "fingerprint": "0",
  }
  recipe = manifests.Recipe(**facts | changes)
  begun = manifests.begin(folder, manifests.Manifest(recipe, "nowhere"))
  names = {split: [recipe.shard_name(split, i) for i in range(3)] for split in recipe.splits}
  for split in recipe.splits:
    stored = arrays(split, kind)
    for i in range(3):
      with shards.ShardWriter(folder, recipe, split, i) as writer:
        for item in recipe.items(i):
          writer.add(item, stored[item], item % 3)
  splits = {s: tuple(shards.describe(folder, name) for name in names[s]) for s in recipe.splits}
  whole = dataclasses.replace(begun, splits=splits, class_histogram=(8, 8, 7))
  tfds_builders.write_metadata(folder, whole)
  manifests.write(folder, whole)
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return make(tmp_path_factory.mktemp("prepared") / "latents")


@pytest.fixture
def copy(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return shutil.copytree(folder, tmp_path / "copy")


# Who can open it.


@pytest.mark.filterwarnings("default")
def test_tfds_opens_the_folder(folder):
  for split in ("train", "train_flipped"):
    for data in (
      tfds.builder_from_directory(str(folder)).as_data_source(split),
      tfds.data_source("meanflow_latents", split=split, data_dir=str(folder)),
    ):
      assert len(data) == COUNT
      np.testing.assert_array_equal(np.stack([row["moments"] for row in data]), arrays(split))
      assert [row["label"] for row in data] == [i % 3 for i in range(COUNT)]
      assert data.dataset_info.features["label"].names == list(CLASSES)
  assert "tensorflow" not in sys.modules


@pytest.mark.filterwarnings("default")
def test_tfds_opens_pixels(tmp_path):
  out = make(tmp_path / "pixels", "pixels")
  data = tfds.data_source("meanflow_pixels", split="train[5:]", data_dir=str(out))
  np.testing.assert_array_equal(data[0]["image"], arrays("train", "pixels")[5])
  with pytest.raises(ValueError, match="holds meanflow_pixels, not meanflow_latents"):
    tfds.data_source("meanflow_latents", data_dir=str(out))
  with pytest.raises(FileNotFoundError, match=r"python -m meanflow_jax\.prepare"):
    tfds.builder("meanflow_latents", data_dir=str(tmp_path / "absent"))


def test_grain_opens_the_shards(folder):
  paths = sorted(map(str, folder.glob("meanflow_latents-train.array_record-*")))
  features = tfds_builders.features_of(manifests.read(folder).recipe)
  data = grain.MapDataset.source(ArrayRecordDataSource(paths))
  data = data.map(features.deserialize_example_np)
  np.testing.assert_array_equal(np.stack([row["moments"] for row in data]), arrays("train"))


# How training reads.


def read(source: Any, **changes: Any) -> list[loader.Batch]:
  settings = {
    "batch_size": 8,
    "rows": range(8),
    "seed": 3,
    "flip": False,
    "first_step": 0,
    "num_threads": 2,
    "prefetch": 2,
  }
  return list(itertools.islice(loader.batches(source, **settings | changes), 9))


class InMemory:
  """The same data, without files."""

  num_classes = 3

  def __init__(self, kind: str = "latents"):
    self._kind = kind

  def __len__(self) -> int:
    return COUNT

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": arrays("train", self._kind)[index], "label": np.int32(index % 3)}


class Mirrored(InMemory):
  def mirrored(self, index: int) -> dict[str, Any]:
    return {**self[index], "image": arrays("train_flipped")[index]}


@pytest.mark.parametrize("flip", [False, True])
def test_batches_are_those_of_the_arrays_that_were_stored(flip, folder):
  found, expected = (read(s, flip=flip) for s in (Latents(path=str(folder)), Mirrored()))
  for ours, theirs in zip(found, expected, strict=True):
    assert ours["image"].dtype == np.float16
    np.testing.assert_array_equal(ours["image"], theirs["image"])
    np.testing.assert_array_equal(ours["label"], theirs["label"])


def test_a_flipped_row_is_the_flipped_record_of_the_same_item(folder):
  plain, flipped = (read(Latents(path=str(folder)), flip=flip) for flip in (False, True))
  stored = {split: [a.tobytes() for a in arrays(split)] for split in ("train", "train_flipped")}
  mirrored = []
  for one, other in zip(plain, flipped, strict=True):
    np.testing.assert_array_equal(one["label"], other["label"])
    for a, b in zip(one["image"], other["image"], strict=True):
      item = stored["train"].index(a.tobytes())
      mirrored.append(b.tobytes() == stored["train_flipped"][item])
      assert mirrored[-1] or b.tobytes() == stored["train"][item]
  assert 20 < sum(mirrored) < 52  # of 72 fair coins


def test_pixels_are_mirrored_as_those_of_any_source(tmp_path):
  out = make(tmp_path / "pixels", "pixels")
  found, expected = (read(s, flip=True) for s in (Latents(path=str(out)), InMemory("pixels")))
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_array_equal(ours["image"], theirs["image"])


def test_a_reader_survives_pickling(folder):
  source = pickle.loads(pickle.dumps(Latents(path=str(folder))))
  np.testing.assert_array_equal(source[22]["image"], arrays("train")[22])


# The draw.


def test_latents_are_drawn_from_their_mean_and_deviation():
  moments = arrays("train")
  key = stream(7, Purpose.INPUTS, 3)
  noise = np.asarray(jax.random.normal(key, (COUNT, 4, 4, 4)))
  expected = (np.float32(moments[..., :4]) + np.float32(moments[..., 4:]) * noise) * 0.18215
  drawn, labels = latent_inputs(key, {"image": jnp.asarray(moments), "label": jnp.arange(COUNT)})
  np.testing.assert_allclose(drawn, expected, rtol=1e-5)
  np.testing.assert_array_equal(labels, np.arange(COUNT))


def run_keys(folder: pathlib.Path, vae: pathlib.Path, **changes: Any) -> dict[str, Any]:
  return {
    "data.source": "latents",
    "data.latents.path": str(folder),
    "data.image_size": 4,
    "data.channels": 4,
    "data.num_classes": 3,
    "model.patch_size": 2,
    "autoencoder.path": str(vae),
    **{key.replace("__", "."): value for key, value in changes.items()},
  }


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return write_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def made(vae: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder that says it was made by that autoencoder."""
  sha256 = build.load_autoencoder(tiny({"data.channels": 4, "autoencoder.path": str(vae)}))[
    2
  ].sha256
  return make(tmp_path_factory.mktemp("made") / "latents", autoencoder_sha256=sha256)


def test_a_step_draws_anew_each_time_and_learns_what_numpy_draws(made, vae):
  """The step on moments is that on latents without deviation which its own key has drawn."""
  config, mesh = tiny(run_keys(made, vae)), mesh_of(2, 1)
  network, method = build.network(config, mesh), build.method(config)
  step = build.train_step(config, network, method, mesh)
  batch = next(
    loader.batches(
      build.source(config),
      batch_size=16,
      rows=range(16),
      seed=0,
      flip=False,
      first_step=0,
      num_threads=0,
      prefetch=1,
    )
  )
  abstract = build.abstract_batch(config, mesh)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    k: (v.shape, v.dtype) for k, v in abstract.items()
  }
  moments = np.float32(batch["image"])
  mean, std = np.split(moments, 2, axis=-1)
  advance, state, expected = step.jitted(mesh), step.new_state(mesh), step.new_state(mesh)
  for number in range(3):
    key = stream(config.seed, Purpose.INPUTS, number)
    drawn = mean + std * np.asarray(jax.random.normal(key, mean.shape))
    fixed = np.concatenate([drawn, 0 * std], axis=-1)
    state, metrics = advance(state, {**batch, "image": moments})
    expected, wanted = advance(expected, {**batch, "image": fixed})
    np.testing.assert_allclose(metrics["error"], wanted["error"], rtol=1e-4)
    np.testing.assert_allclose(metrics["gradient_norm"], wanted["gradient_norm"], rtol=1e-3)
  _, stale = advance(expected, {**batch, "image": fixed})  # the draw of the step before
  _, metrics = advance(state, {**batch, "image": moments})
  assert abs(metrics["error"] - stale["error"]) > 1e-3 * stale["error"]


# What is refused.


def test_a_flipped_bit_is_named_with_its_shard_and_record(copy):
  shard = sorted(copy.glob("meanflow_latents-train.*"))[1]
  content = bytearray(shard.read_bytes())
  content[content.find(arrays("train")[11].tobytes()) + 100] ^= 4
  shard.write_bytes(content)
  source = Latents(path=str(copy))
  with pytest.raises(DamagedRecordError, match=rf"record 2 of shard 1 \(.*{shard.name}\)"):
    source[11]
  np.testing.assert_array_equal(source[12]["image"], arrays("train")[12])
  with pytest.raises(DamagedRecordError, match="record 2 of shard 1"):
    read(source)


def test_a_record_that_was_exchanged_is_found_by_its_checksum(copy):
  """ArrayRecord's own hashes are right here: it is another shard, as of another preparation."""
  first, second, _ = sorted(copy.glob("meanflow_latents-train.*"))
  shutil.copyfile(second, first)
  with pytest.raises(DamagedRecordError, match=r"record 0 of shard 0 .*checksum differs"):
    Latents(path=str(copy))[0]


@pytest.mark.parametrize("fault", ["truncated", "missing", "checksums", "manifest", "format"])
def test_files_that_are_not_those_of_the_manifest_are_refused(fault, copy):
  first, second, third = sorted(copy.glob("meanflow_latents-train_flipped.*"))
  if fault == "truncated":
    os.truncate(second, second.stat().st_size - 65536)
    message = f"{second.name} has 65536 bytes instead of 131072"
  elif fault == "missing":
    first.unlink()
    message = f"{first.name} is missing"
  elif fault == "checksums":
    shutil.copyfile(copy / f"checksums/{first.name}.npz", copy / f"checksums/{third.name}.npz")
    message = f"the checksums of {third.name} are missing or changed"
  elif fault == "manifest":
    (copy / "manifest.json").write_text("{}")
    message = "is not a manifest"
  else:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))
    message = "format 2"
  with pytest.raises(ValueError, match=message):
    Latents(path=str(copy))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data__image_size": 8}, r"are \(4, 4, 8\), but .* say \(8, 8, 8\)"),
    ({"data__channels": 3}, r"are \(4, 4, 8\), but .* say \(4, 4, 6\)"),
    ({"data__num_classes": 5}, "has 3 classes, but data.num_classes is 5"),
    ({"autoencoder__path": ""}, "holds latents, and autoencoder.path '' asks for pixels"),
    ({"data__latents.path": ""}, "data.latents.path is empty"),
    ({"data__latents.path": "absent"}, "no prepared examples in 'absent'"),
  ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message, made, vae):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    build.source(tiny(run_keys(made, vae, **changes)))


def test_latents_of_another_autoencoder_are_refused(made, tmp_path):
  other = write_autoencoder(tmp_path / "vae", scale=1.01)
  with pytest.raises(ValueError, match=r"made by none .sha256 .* is unpublished"):
    build.source(tiny(run_keys(made, other)))


def test_flips_take_flipped_latents(tmp_path, vae, made):
  sha256 = manifests.read(made).recipe.autoencoder_sha256
  plain = make(tmp_path / "plain", splits=("train",), autoencoder_sha256=sha256)
  assert len(build.source(tiny(run_keys(made, vae, data__flip=True)))) == COUNT
  with pytest.raises(ValueError, match=r"was prepared without \(prepare.flipped\)"):
    build.source(tiny(run_keys(plain, vae, data__flip=True)))


def test_an_evaluation_takes_statistics_of_images(made, vae):
  config, mesh = tiny(run_keys(made, vae)), mesh_of(1, 1)
  network, method = build.network(config, mesh), build.method(config)
  with pytest.raises(ValueError, match=r"evaluate.statistics.pixels .*prepare --statistics"):
    evaluate.make_evaluator(config, network, method, mesh, lambda: build.source(config))
