"""Preparation: what it makes, what it survives, and what it refuses."""

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from meanflow_jax import build, prepare, train
from meanflow_jax.data import manifest as manifests
from meanflow_jax.data import transforms
from meanflow_jax.data.latents import Latents
from meanflow_jax.models import autoencoder
from meanflow_jax.runtime import pretrained
from tests.prepared import CLASSES, SIDE, config, keys, paint, write_autoencoder
from tests.runs import ROOT, files_below, logged

# 12 images in shards of 5, 5 and 2, encoded 8 at a time on 8 devices.
PER_CLASS = 4
COUNT = PER_CLASS * len(CLASSES)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return write_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return paint(tmp_path_factory.mktemp("images"), per_class=PER_CLASS)


@pytest.fixture(scope="module")
def whole(
  vae: pathlib.Path, images: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
  """An undisturbed preparation; not to be changed."""
  out = tmp_path_factory.mktemp("prepared") / "latents"
  prepare.prepare(config(images, vae), out, 0, 1)
  return out


@pytest.fixture
def copy(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """The same, to be changed."""
  return shutil.copytree(whole, tmp_path / "copy")


def encode(vae: pathlib.Path, pixels: np.ndarray) -> np.ndarray:
  """Mean and std, side by side, without any of what is tested here."""
  published, tensors = pretrained.load(vae, pretrained.AUTOENCODER)
  network = autoencoder.from_config(published, "float32")
  params = autoencoder.params_from_torch(network, tensors)
  x = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
  return np.concatenate(network.apply({"params": params}, x, method="encode"), axis=-1)


def pixels_of(images: pathlib.Path) -> np.ndarray:
  """All images of a folder, by the source that training would read."""
  source = build.source(config(images, None))
  return np.stack([source[i]["image"] for i in range(len(source))])


# What is made.


def test_records_are_the_moments_of_images_and_of_mirrored_images(vae, images, whole):
  found, pixels = Latents(path=str(whole)), pixels_of(images)
  plain = np.stack([found[i]["image"] for i in range(COUNT)])
  mirrored = np.stack([found.mirrored(i)["image"] for i in range(COUNT)])
  assert plain.shape == (COUNT, SIDE // 2, SIDE // 2, 8)
  assert plain.dtype == mirrored.dtype == np.float16
  np.testing.assert_allclose(plain, encode(vae, pixels), rtol=2e-3, atol=2e-3)
  np.testing.assert_allclose(mirrored, encode(vae, pixels[:, :, ::-1]), rtol=2e-3, atol=2e-3)
  assert np.abs(plain - mirrored[:, :, ::-1]).max() > 0.02  # not the mirrored latents
  assert [int(found[i]["label"]) for i in range(COUNT)] == sorted([0, 1, 2] * PER_CLASS)
  assert [int(found.mirrored(i)["label"]) for i in range(COUNT)] == sorted([0, 1, 2] * PER_CLASS)


def test_the_manifest_says_what_there_is(vae, images, whole):
  made = manifests.read(whole)
  assert made.recipe.class_names == CLASSES
  assert made.class_histogram == (PER_CLASS,) * 3
  assert (
    made.recipe.autoencoder_sha256 == pretrained.origin(vae / pretrained.AUTOENCODER.weights).sha256
  )
  assert (made.recipe.image_size, made.recipe.scale_factor) == (SIDE, 0.18215)
  assert str(images) in made.source
  for split in ("train", "train_flipped"):
    assert [shard.records for shard in made.splits[split]] == [5, 5, 2]
    for shard in made.splits[split]:
      assert (whole / shard.name).stat().st_size == shard.bytes
  assert not [name for name in files_below(whole) if "partial" in name]


def test_pixels_are_kept_as_they_are(images, tmp_path):
  out = tmp_path / "pixels"
  prepare.prepare(config(images, None), out, 0, 1)
  found = Latents(path=str(out))
  read = np.stack([found[i]["image"] for i in range(COUNT)])
  np.testing.assert_array_equal(read, pixels_of(images))
  np.testing.assert_array_equal(found.mirrored(3)["image"], read[3][:, ::-1])
  assert manifests.read(out).splits.keys() == {"train"}
  prepare.check(out, config(images, None), 8)


def test_hosts_make_whole_shards_of_their_own_and_the_same_bytes(vae, images, whole, tmp_path):
  out = tmp_path / "latents"
  prepare.prepare(config(images, vae), out, 0, 2)
  assert not manifests.read(out).complete
  shards = {name for name in files_below(out) if name.startswith("meanflow_latents-train.")}
  assert {name[-14:-9] for name in shards} == {"00000", "00002"}
  with pytest.raises(ValueError, match="not finished"):
    Latents(path=str(out))
  prepare.prepare(config(images, vae), out, 1, 2)
  assert files_below(out) == files_below(whole)


def test_worker_processes_make_the_same_bytes(vae, images, whole, tmp_path):
  out = tmp_path / "latents"
  process = start(vae, images, out, "--config.prepare.workers=1")
  finish(process)
  assert files_below(out) == files_below(whole)


class Photographs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """The images of a folder, in its order."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, images: pathlib.Path, **settings: Any):
    self._images = images
    super().__init__(file_format="array_record", **settings)

  def _info(self) -> tfds.core.DatasetInfo:
    label = tfds.features.ClassLabel(names=list(CLASSES))
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label})
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, path in enumerate(sorted(self._images.rglob("*.png"))):
      yield number, {"image": os.fspath(path), "label": path.parent.name}


@pytest.mark.slow
def test_a_dataset_of_tfds_is_prepared_as_a_folder_is_and_trained_on(vae, images, whole, tmp_path):
  Photographs(images, data_dir=str(tmp_path / "tfds")).download_and_prepare()
  out, source = tmp_path / "latents", "--source=tfds:photographs"
  finish(start(vae, images, out, source, f"--config.data.tfds.data_dir={tmp_path / 'tfds'}"))
  found, expected = files_below(out), files_below(whole)
  records = [name for name in expected if name.startswith(("meanflow_latents", "checksums"))]
  assert len(records) == 1 + 2 * 6  # of each split three shards, and the folder of checksums
  for name in records:
    assert found[name] == expected[name], name
  assert manifests.read(out).source == "tfds photographs train"

  settings = {"data.source": "tfds", "data.tfds.name": "photographs"}
  settings |= {"data.tfds.data_dir": str(tmp_path / "tfds")}
  prepare.check(out, config(images, vae, settings), 8)
  settings = {"data.source": "latents", "data.latents.path": str(out)}
  settings |= {"train.steps": 2, "train.log_every": 1, "optimizer.warmup_steps": 0}
  settings |= {"evaluate.count": 0, "model.patch_size": 2}
  train.run(config(images, vae, settings), tmp_path / "run")
  assert all(np.isfinite(line["error"]) for line in logged(tmp_path / "run"))
  assert [line["step"] for line in logged(tmp_path / "run")] == [1, 2]


# Strange images.


def test_images_of_every_kind_are_prepared_or_named(images, tmp_path, capfd):
  strange = tmp_path / "strange"
  shutil.copytree(images, strange)
  noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8))
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees
  noise.save(strange / "cat" / "turned.jpg", exif=exif)
  noise.convert("CMYK").save(strange / "cat" / "cmyk.jpg")
  noise.resize((1, 1)).save(strange / "dog" / "dot.png")
  Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(strange / "dog" / "deep.png")
  noise.save(strange / "fox" / "moving.gif", save_all=True, append_images=[noise.rotate(90)])
  (strange / "fox" / "broken.png").write_bytes(b"\x89PNG no more")
  cut = strange / "cat" / "zcut.jpg"
  noise.save(cut)
  cut.write_bytes(cut.read_bytes()[:-200])

  out = tmp_path / "out"
  with pytest.raises(build.UserError, match=r"cannot read .*(zcut\.jpg|broken\.png)"):
    prepare.prepare(config(strange, None), out, 0, 1)
  capfd.readouterr()
  skipping = config(strange, None, {"data.folder.skip_unreadable": True})
  prepare.prepare(skipping, out, 0, 1)
  made, printed = manifests.read(out), capfd.readouterr().out
  assert made.class_histogram == (6, 6, 5)
  assert len(made.unreadable) == 2
  assert "2 images left out" in printed
  for name in ("zcut.jpg", "broken.png"):
    assert any(name in reason for reason in made.unreadable)
    assert name in printed
  found = Latents(path=str(out))
  stored = {found[i]["image"].tobytes() for i in range(len(found))}
  source = build.source(skipping)
  expected = {source[i]["image"].tobytes() for i in range(len(source))}  # with substitutes
  assert stored == expected
  with Image.open(strange / "cat" / "turned.jpg") as image:
    square = functools.partial(transforms.square, size=SIDE, channels=3)
    np.testing.assert_array_equal(found[5]["image"], square(image))
    assert (found[5]["image"] != square(ImageOps.exif_transpose(image))).any()
  prepare.check(out, skipping, 100)


def test_a_folder_of_nothing_readable_is_an_error(tmp_path):
  (tmp_path / "x.png").touch()
  changes = {"data.num_classes": 0, "data.folder.skip_unreadable": True}
  with pytest.raises(build.UserError, match="none of the 1 images"):
    prepare.prepare(config(tmp_path, None, changes), tmp_path / "out", 0, 1)


# Interruptions.


def start(
  vae: pathlib.Path,
  images: pathlib.Path,
  out: pathlib.Path,
  *flags: str,
  shell: str = "",
) -> subprocess.Popen[str]:
  """The preparation in a process of its own."""
  settings = {k: v for k, v in keys(images, vae).items() if k not in ("data.source",)}
  del settings["data.folder.path"]
  command = [sys.executable, "-m", "meanflow_jax.prepare", "--config=configs/digits.py"]
  command += [f"--config.{key}={value}" for key, value in settings.items()]
  command += [f"--source=folder:{images}", f"--out={out}", *flags]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
  }
  return subprocess.Popen(
    ["bash", "-c", f'{shell} exec "$@"', "bash", *command],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
  output, errors = process.communicate(timeout=200)
  assert process.returncode == status, errors
  assert "Traceback" not in errors
  return output + errors


def test_a_killed_preparation_goes_on_and_makes_the_same_bytes(vae, images, whole, tmp_path):
  out = tmp_path / "latents"
  process = start(vae, images, out)
  deadline = time.monotonic() + 150
  finished = out / "checksums"
  while not (finished.is_dir() and any(finished.glob("[!.]*"))):
    assert time.monotonic() < deadline
    assert process.poll() is None, process.communicate()
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert not manifests.read(out).complete
  kept = {path.name: path.stat().st_mtime_ns for path in out.glob("meanflow*")}
  before = {name for name in kept if (finished / f"{name}.npz").exists()}
  output = finish(start(vae, images, out))
  assert re.search(r"[0-2] of them done", output)
  assert files_below(out) == files_below(whole)
  done = [name for name in before if name.replace("train_flipped", "train") in before]
  pairs = {name.replace("train.", "train_flipped.") for name in done} & before
  for name in pairs:  # both splits of a shard were there: it is not made again
    assert (out / name).stat().st_mtime_ns == kept[name]


def test_a_full_disk_stops_the_preparation_which_then_goes_on(vae, images, whole, tmp_path):
  out = tmp_path / "latents"
  # A limit on the size of a file fails as a full disk does, in the midst of a shard.
  errors = finish(start(vae, images, out, shell="ulimit -f 4;"), status=1)
  assert f"no space is left for {out}" in errors
  assert "the same command goes on" in errors
  assert not list(out.glob("meanflow*"))
  finish(start(vae, images, out))
  assert files_below(out) == files_below(whole)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_device_without_space_is_told_as_a_full_disk(images, tmp_path):
  out, settings = tmp_path / "pixels", config(images, None)
  preparation, ours = prepare.plan(settings, out)
  manifests.begin(out, ours)
  name = preparation.recipe.shard_name("train", 1)
  (out / f".{name}.partial").symlink_to("/dev/full")
  with pytest.raises(
    build.UserError, match=f"no space is left for {out} .*No space left on device"
  ):
    prepare.prepare(settings, out, 0, 1)
  assert sorted(path.name for path in out.glob("*train*")) == [
    preparation.recipe.shard_name("train", 0)
  ]
  prepare.prepare(settings, out, 0, 1)
  assert len(Latents(path=str(out))) == COUNT


def test_a_damaged_shard_is_made_again_and_no_other(vae, images, copy, whole, capfd):
  second = sorted(copy.glob("meanflow_latents-train.*"))[1]
  times = {path.name: path.stat().st_mtime_ns for path in copy.glob("meanflow*")}
  array = Latents(path=str(copy))[5]["image"]  # the first of the second shard
  flip_bit(second, place_of(second, array.tobytes()))
  prepare.prepare(config(images, vae), copy, 0, 1)
  assert "shard 1 is made again" in capfd.readouterr().out
  assert files_below(copy) == files_below(whole)
  changed = {p.name for p in copy.glob("meanflow*") if p.stat().st_mtime_ns != times[p.name]}
  assert {name[-14:-9] for name in changed} == {"00001"}


# --check.


def flip_bit(path: pathlib.Path, place: int) -> None:
  content = bytearray(path.read_bytes())
  content[place] ^= 1
  path.write_bytes(bytes(content))


def place_of(path: pathlib.Path, record: bytes) -> int:
  """Where the bytes of an array lie in a shard, which is not compressed."""
  place = path.read_bytes().find(record[:64])
  assert place > 0
  return place


def test_check_finds_a_flipped_bit_and_names_it(vae, images, copy):
  prepare.check(copy, config(images, vae), 4)
  shard = sorted(copy.glob("meanflow_latents-train_flipped.*"))[1]
  array = Latents(path=str(copy)).mirrored(7)["image"]  # the third of the second shard
  flip_bit(shard, place_of(shard, array.tobytes()) + 5)
  with pytest.raises(build.UserError) as caught:
    prepare.check(copy, None, 0)
  assert "1 faults" in str(caught.value)
  assert f"train_flipped, shard 1: {shard.name}, record 2: " in str(caught.value)


def test_check_finds_a_truncated_shard_and_changed_checksums(copy):
  first, second, _ = sorted(copy.glob("meanflow_latents-train.*"))
  os.truncate(first, first.stat().st_size // 2)
  flip_bit(copy / "checksums" / f"{second.name}.npz", 200)
  with pytest.raises(build.UserError) as caught:
    prepare.check(copy, None, 0)
  assert f"train, shard 0: {first.name} has" in str(caught.value)
  assert f"train, shard 1: the checksums of {second.name} are missing or changed" in str(
    caught.value
  )


def test_check_encodes_anew(vae, images, copy, capfd):
  prepare.check(copy, config(images, vae), 5)
  assert "24 records are what was written; 5 images encoded anew agree" in capfd.readouterr().out
  # The source changes behind an unchanged fingerprint's back: all is whole, but not what it was.
  made = manifests.read(copy)
  other = paint(copy.parent / "other", per_class=PER_CLASS, seed=1)
  preparation, ours = prepare.plan(config(other, vae), copy)
  assert ours.recipe.fingerprint != made.recipe.fingerprint
  _, wrong = preparation.compare(Latents(path=str(copy)), 5)
  assert len(wrong) == 10
  assert "train_flipped, example 0: what item 0" in "\n".join(wrong)


# Refusals.


@pytest.mark.parametrize("what", ["autoencoder", "size", "source", "shards", "kind"])
def test_a_folder_made_otherwise_is_refused_and_left_alone(what, vae, images, whole, tmp_path):
  before = files_below(whole)
  first = config(images, vae)
  if what == "autoencoder":
    other = config(images, write_autoencoder(tmp_path / "vae", scale=1.01))
    theirs, ours = (build.load_autoencoder(c)[2].sha256 for c in (first, other))
  elif what == "size":
    other = config(images, vae, {"data.image_size": 16})
    theirs, ours = "image_size: 16 there", "32 now"
  elif what == "source":
    other = config(paint(tmp_path / "images", per_class=PER_CLASS, seed=1), vae)
    theirs, ours = str(images), str(tmp_path / "images")
  elif what == "shards":
    other = config(images, vae, {"prepare.records_per_shard": 6})
    theirs, ours = "records_per_shard: 5 there", "6 now"
  else:
    other = config(images, None)
    theirs, ours = "kind: 'latents' there", "'pixels' now"
  with pytest.raises(build.UserError, match="was made otherwise") as caught:
    prepare.prepare(other, whole, 0, 1)
  assert theirs in str(caught.value)
  assert ours in str(caught.value)
  assert files_below(whole) == before


def test_a_folder_of_other_files_is_refused(vae, images, tmp_path):
  (tmp_path / "thesis.tex").touch()
  with pytest.raises(build.UserError, match="holds other files"):
    prepare.prepare(config(images, vae), tmp_path, 0, 1)
  assert list(files_below(tmp_path)) == ["thesis.tex"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data.source": "latents"}, "--source=folder:PATH"),
    ({"data.num_classes": 7}, "has 3 classes, but data.num_classes is 7"),
    ({"prepare.batch_size": 12}, "12 is not divisible by 8 devices"),
    ({"prepare.records_per_shard": 0}, "at least 1"),
    ({"data.channels": 3}, "decodes 4 channels, but data.channels is 3"),
  ],
)
def test_impossible_settings_are_refused(changes, message, vae, images, tmp_path):
  with pytest.raises(build.UserError, match=message):
    prepare.prepare(config(images, vae, changes), tmp_path / "out", 0, 1)
  assert not (tmp_path / "out").exists()


def test_pixels_that_are_no_bytes_are_refused(images, tmp_path):
  changes = {"data.source": "digits", "data.image_size": 8, "data.channels": 1}
  changes["data.num_classes"] = 10
  with pytest.raises(build.UserError, match="those of digits are float32"):
    prepare.prepare(config(images, None, changes), tmp_path / "out", 0, 1)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--source=zip:x", "--out=x"], "--source must be folder:PATH, tfds:NAME or config"),
    (["--source=config"], "--out is missing"),
    ([], "say what to prepare"),
    (["--source=folder:absent", "--out=x", "--config.data.folder.skip_unreadable=True"], "absent"),
  ],
)
def test_wrong_flags_are_said(flags, message, tmp_path):
  command = [sys.executable, "-m", "meanflow_jax.prepare", f"--config={ROOT}/configs/folder.py"]
  done = subprocess.run(
    [*command, *flags],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert message in done.stderr
  assert "Traceback" not in done.stderr
  assert not list(tmp_path.iterdir())


# Statistics at the end.


def test_statistics_end_a_preparation(vae, images, tmp_path):
  out = tmp_path / "latents"
  finish(start(vae, images, out, "--statistics", "--config.sample.batch_size=8"))
  with np.load(out / "pixels_statistics.npz") as stored:
    record = json.loads(str(stored["record"]))
  assert record["count"] == COUNT
  assert record["resolution"] == [SIDE, SIDE, 3]
  assert Latents(path=str(out))


def test_latents_are_no_images_to_make_statistics_of(vae, images, whole, tmp_path):
  changes = {"data.source": "latents", "data.latents.path": str(whole)}
  with pytest.raises(build.UserError, match="statistics are of images"):
    prepare.make_statistics(config(images, vae, changes), tmp_path / "x.npz", None)
  assert jax.process_count() == 1
