"""Every mistake gets its message, at once, and costs nothing of what was there."""

import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from meanflow_jax import evaluate, sample, train
from meanflow_jax.build import UserError
from meanflow_jax.runtime.checkpoints import CheckpointError
from tests.runs import assert_bitwise_equal, files_below, finish, saved_state, start, tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The folder of a tiny run, with checkpoints 4 and 8."""
  workdir = tmp_path_factory.mktemp("trained") / "run"
  train.run(tiny(), workdir)
  return workdir


def refusal(run: Callable[[], None], *folders: pathlib.Path) -> str:
  """What the user is told; none of the folders has changed."""
  before = list(map(files_below, folders))
  with pytest.raises((UserError, CheckpointError)) as caught:
    run()
  assert list(map(files_below, folders)) == before
  return str(caught.value)


def assert_mentions(text: str, *words: str) -> None:
  assert [word for word in words if word not in text] == [], text


IMPROVED = {
  "model.name": "in_context_dit",
  "model.in_context_dit.head_depth": 1,
  "method.name": "improved_meanflow",
}
UNGUIDED = {"method.guidance.omega": 1.0, "method.guidance.kappa": 0.0}
PAIRS = ["improved_meanflow with in_context_dit", "; meanflow with dit"]
# Changes to the config, and what their refusal must mention.
MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
  ({"train.batch_size": 12}, ["train.batch_size 12", "8 devices", "16"]),
  ({"train.batch_size": 0}, ["train.batch_size 0"]),
  (
    {"train.batch_size": 24, "method.times.equal_fraction": 0.75},
    ["train.batch_size 24", "groups of 4 rows", "equal_fraction 0.75", "32"],
  ),
  ({"train.accumulate": 2}, ["train.batch_size 16", "train.accumulate 2", "32"]),
  ({"train.accumulate": 0}, ["train.accumulate 0"]),
  ({"train.steps": 0}, ["train.steps", "0"]),
  ({"train.log_every": 0}, ["train.log_every", "0"]),
  ({"train.checkpoint_every": -1}, ["train.checkpoint_every", "-1"]),
  ({"train.steps": 6}, ["checkpoint is at step 8", "train.steps 6"]),
  ({"mesh.data": 3}, ["mesh.data 3", "8 devices"]),
  ({"mesh.fsdp": 3}, ["mesh.fsdp 3", "8 devices"]),
  ({"model.patch_size": 3}, ["data.image_size 8", "model.patch_size 3"]),
  ({"model.num_heads": 3}, ["model.width 16", "model.num_heads 3"]),
  ({"model.dtype": "float16"}, ["model.dtype", "bfloat16", "'float16'"]),
  ({"data.image_size": 16}, ["(8, 8, 1)", "(16, 16, 1)"]),
  ({"data.num_classes": 7}, ["10 classes", "data.num_classes is 7"]),
  ({"data.num_classes": 0}, ["unconditional", "method.guidance.omega", "label_dropout"]),
  ({"data.source": "digit"}, ["data.source", "digits", "'digit'"]),
  ({"data.digits.split": "dev"}, ["'dev'", "train"]),
  ({"data.source": "latents"}, ["data.latents.path is empty"]),
  ({"sample.nfe": 0}, ["nfe = 0"]),
  ({"evaluate.nfe": (1, 0)}, ["nfe = 0"]),
  ({"sample.grid": (1.0, 0.2, 0.5, 0.0)}, ["decrease", "0.2, 0.5"]),
  ({"sample.grid": (1.0, 0.5, 0.5, 0.0)}, ["decrease", "0.5, 0.5"]),
  ({"sample.grid": (0.9, 0.0)}, ["from 1 to 0", "0.9"]),
  ({"sample.grid": (1.0, 0.1)}, ["from 1 to 0", "0.1"]),
  ({"sample.grid": (1.0,)}, ["from 1 to 0"]),
  ({"sample.count": 0}, ["sample.count", "0"]),
  ({"sample.batch_size": 12}, ["sample.batch_size 12", "8 devices"]),
  ({"sample.labels": "one", "sample.label": 10}, ["sample.label", "[0, 10)", "got 10"]),
  ({"sample.labels": "odd"}, ["sample.labels", "balanced", "'odd'"]),
  ({"sample.ema": 0.5}, ["no average 0.5", "sample.ema", "(0.999,)"]),
  ({"sample.rounding": "up"}, ["sample.rounding", "meanflow", "'up'"]),
  ({"sample.guidance.t_min": 0.7, "sample.guidance.t_max": 0.2}, ["t_min 0.7", "t_max 0.2"]),
  (UNGUIDED | {"evaluate.t_min": (0.0, 0.6), "evaluate.t_max": (0.6,)}, ["t_min 0.6", "t_max 0.6"]),
  ({"sample.guidance.omega": float("nan")}, ["sample.guidance.omega", "nan"]),
  (UNGUIDED | {"sample.guidance.omega": 0.5}, ["sample.guidance.omega", "0.5"]),
  ({"sample.guidance.omega": 2.0}, ["fixed in training", "scale of 1.24", "2.0"]),
  ({"evaluate.omega": (1.0, 3.0)}, ["fixed in training", "scale of 1.24", "3.0"]),
  ({"evaluate.t_min": (0.0, 0.3)}, ["fixed in training", "[0.3, 1]"]),
  ({"method.guidance.omega": 0.2}, ["effective scale", "0.4", "omega 0.2"]),
  (IMPROVED | {"sample.guidance.omega": 0.5}, ["sample.guidance.omega", "0.5"]),
  (IMPROVED | {"evaluate.omega": (2.0, 0.0)}, ["evaluate.omega", "0.0"]),
  (
    IMPROVED | {"sample.guidance.t_min": 0.5, "sample.guidance.t_max": 0.5},
    ["t_min 0.5", "t_max 0.5"],
  ),
  (IMPROVED | {"method.improved_meanflow.omega_max": 0.5}, ["omega_max", "0.5"]),
  (IMPROVED | {"method.improved_meanflow.interval_split": 1.0}, ["interval_split", "1.0"]),
  (IMPROVED | {"method.label_dropout.rate": 0.0}, ["label_dropout.rate above 0"]),
  (IMPROVED | {"data.num_classes": 0}, ["unconditional", "omega_max 1", "label_dropout"]),
  (IMPROVED | {"model.in_context_dit.head_depth": 2}, ["head_depth 2", "model.depth 1"]),
  ({"method.name": "improved_meanflow"}, [*PAIRS, "'improved_meanflow' does not fit"]),
  ({"model.name": "in_context_dit"}, [*PAIRS, "'meanflow' does not fit"]),
  ({"method.name": "mean"}, ["method.name", "'mean'", "improved_meanflow"]),
  ({"model.name": "dat"}, ["model.name", "'dat'", "in_context_dit"]),
  ({"autoencoder.path": "absent"}, ["absent/config.json", "sd-vae-ft-mse"]),
  ({"evaluate.nfe": ()}, ["evaluate.nfe is empty"]),
  ({"evaluate.ema": (0.5,)}, ["no average 0.5", "evaluate.ema", "(0.999,)"]),
  ({"evaluate.extractors": ("pixel",)}, ["evaluate.extractors", "pixels", "'pixel'"]),
  ({"evaluate.extractors": ()}, ["evaluate.extractors", "()"]),
  ({"evaluate.figures": ("fid",)}, ["evaluate.figures", "frechet", "'fid'"]),
  ({"evaluate.figures": ("sfid",)}, ["('sfid',)", "('pixels',)"]),
  ({"evaluate.figures": ("frechet", "sfid")}, ["sfid", "inception", "('pixels',)"]),
  ({"evaluate.best": "fid_nfe1"}, ["evaluate.best", "frechet_pixels_nfe1", "'fid_nfe1'"]),
  ({"evaluate.pixels.resolution": 0}, ["evaluate.pixels.resolution", "0"]),
  ({"evaluate.statistics.pixels": "absent.npz"}, ["absent.npz"]),
  ({"evaluate.extractors": ("inception",)}, ["inception-2015-12-05"]),
  ({"evaluate.count": 1}, ["evaluate.count", "1"]),
  ({"method.times.equal_fraction": 1.5}, ["[0, 1]", "1.5"]),
  ({"method.times.equal_fraction": -0.1}, ["[0, 1]", "-0.1"]),
  ({"method.times.pairing": "other"}, ["sorted", "'other'"]),
  ({"method.times.distribution": "normal"}, ["logit_normal", "'normal'"]),
  ({"method.label_dropout.rate": 1.1}, ["[0, 1]", "1.1"]),
  ({"method.label_dropout.rate": 0.6}, ["0.6", "1 of 2", "r = t"]),
  ({"method.guidance.kappa": 1.0}, ["kappa", "1.0"]),
  ({"method.guidance.t_start": 0.7, "method.guidance.t_end": 0.3}, ["t_start 0.7", "t_end 0.3"]),
  ({"method.guidance.t_start": 0.5, "method.guidance.t_end": 0.5}, ["t_start 0.5", "t_end 0.5"]),
  ({"method.weight.c": 0.0}, ["c must be positive", "0.0"]),
  ({"optimizer.warmup_steps": 8}, ["optimizer.warmup_steps 8", "8 steps"]),
  ({"optimizer.schedule": "linear"}, ["optimizer.schedule", "'linear'"]),
  ({"ema.decays": (0.999, 1.0)}, ["EMA", "1.0"]),
  ({"model.width": 32}, ["model.width: checkpoint 16, this run 32"]),
  (
    {"model.depth": 2, "model.conditioning": ("t", "r")},
    ["model.depth: checkpoint 1, this run 2", "model.conditioning.1: checkpoint h, this run r"],
  ),
  ({"ema.decays": (0.999, 0.9)}, ["ema_0.9", "ema_0.999"]),
]


def named(mistake: tuple[dict[str, Any], list[str]]) -> str:
  return ",".join(f"{key}={value}" for key, value in mistake[0].items())


@pytest.mark.parametrize("mistake", MISTAKES, ids=named)
def test_mistakes_are_refused_and_cost_nothing(
  trained: pathlib.Path, mistake: tuple[dict[str, Any], list[str]]
) -> None:
  changes, words = mistake
  assert_mentions(refusal(lambda: train.run(tiny(changes), trained), trained), *words)


def test_only_keys_that_differ_are_listed(trained: pathlib.Path) -> None:
  changes = {"model.width": 32, "optimizer.learning_rate": 0.5, "model.remat": "blocks"}
  text = refusal(lambda: train.run(tiny(changes), trained), trained)
  assert len(text.splitlines()) == 2
  assert "model.width: checkpoint 16, this run 32" in text


@pytest.mark.parametrize("changes", [{"train.batch_size": 12}, {"sample.nfe": 0}], ids=str)
def test_a_mistake_makes_no_folder(tmp_path: pathlib.Path, changes: dict[str, Any]) -> None:
  refusal(lambda: train.run(tiny(changes), tmp_path / "run"), tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_missing_wandb_costs_nothing(
  trained: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setitem(sys.modules, "wandb", None)
  config = tiny({"report.wandb_project": "mine"})
  text = refusal(lambda: train.run(config, trained), trained)
  assert_mentions(text, "report.wandb_project", "pip install wandb")


# The data.


def folder_config(path: pathlib.Path, **changes: Any) -> Any:
  settings = {"data.source": "folder", "data.folder.path": str(path), "data.num_classes": 2}
  return tiny(settings | {f"data.{key}": value for key, value in changes.items()})


@pytest.fixture
def cats_and_dogs(tmp_path: pathlib.Path) -> pathlib.Path:
  """Twelve grey images each."""
  for name in ("cat", "dog"):
    (tmp_path / "images" / name).mkdir(parents=True)
    for index in range(12):
      Image.new("L", (9, 8), 20 * index).save(tmp_path / "images" / name / f"{index:02d}.png")
  return tmp_path / "images"


def test_a_data_folder_that_is_missing_or_empty(tmp_path: pathlib.Path) -> None:
  images, workdir = tmp_path / "images", tmp_path / "run"
  text = refusal(lambda: train.run(folder_config(images), workdir), tmp_path)
  assert_mentions(text, str(images), "is not a folder")
  images.mkdir()
  text = refusal(lambda: train.run(folder_config(images), workdir), tmp_path)
  assert_mentions(text, str(images), "no images")


def test_a_data_folder_of_other_classes(
  cats_and_dogs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = folder_config(cats_and_dogs, num_classes=3)
  text = refusal(lambda: train.run(config, tmp_path / "run"), tmp_path)
  assert_mentions(text, "2 classes", "data.num_classes is 3", "data.num_classes=2")


@pytest.mark.parametrize("name", ["00.png", "07.png"])
def test_an_unreadable_image_is_named(
  cats_and_dogs: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
  broken = cats_and_dogs / "cat" / name
  broken.write_bytes(broken.read_bytes()[:40])
  # The first is found at once, the others when a batch needs them.
  with pytest.raises(Exception, match=r"cannot read .*/cat/" + name):
    train.run(folder_config(cats_and_dogs), tmp_path / "run")


def test_an_unreadable_image_is_skipped_if_a_key_says_so(
  cats_and_dogs: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  (cats_and_dogs / "cat" / "07.png").write_bytes(b"")
  config = folder_config(cats_and_dogs)
  config.data.folder.skip_unreadable = True
  train.run(config, tmp_path / "run")
  assert (tmp_path / "run" / "checkpoints" / "8").is_dir()
  assert "07.png" in caplog.text


# The workdir.


def test_a_workdir_that_is_a_file(tmp_path: pathlib.Path) -> None:
  (tmp_path / "run").write_text("precious")
  assert_mentions(refusal(lambda: train.run(tiny(), tmp_path / "run"), tmp_path), "run")


@pytest.mark.parametrize("content", ['{"name": "another project"}', "[1, 2]", "{", ""])
def test_a_workdir_of_another_project(tmp_path: pathlib.Path, content: str) -> None:
  (tmp_path / "config.json").write_text(content)
  text = refusal(lambda: train.run(tiny(), tmp_path), tmp_path)
  assert_mentions(text, str(tmp_path / "config.json"), "--workdir")


def largest(folder: pathlib.Path) -> pathlib.Path:
  files = (path for path in folder.rglob("*") if path.is_file())
  return max(files, key=lambda path: path.stat().st_size)


def test_a_truncated_checkpoint_gives_way_to_the_one_before(
  trained: pathlib.Path,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  caplog: pytest.LogCaptureFixture,
) -> None:
  workdir = shutil.copytree(trained, tmp_path / "run")
  os.truncate(largest(workdir / "checkpoints" / "8" / "params"), 100)
  train.run(tiny(), workdir)
  assert "steps 4 to 8" in capsys.readouterr().out
  assert_mentions(caplog.text, "checkpoints/8 is damaged", "moved to")
  assert (workdir / "checkpoints_damaged" / "8").is_dir()
  assert_bitwise_equal(saved_state(workdir, 8), saved_state(trained, 8))


def test_readers_pass_a_truncated_checkpoint_over(
  trained: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  workdir = shutil.copytree(trained, tmp_path / "run")
  os.truncate(largest(workdir / "checkpoints" / "8" / "ema_0.999"), 100)
  before = files_below(workdir)
  sample.run(tiny(), workdir, tmp_path / "x.png")
  assert "20 images of step 4" in capsys.readouterr().out
  assert files_below(workdir) == before


def test_no_intact_checkpoint_at_all(trained: pathlib.Path, tmp_path: pathlib.Path) -> None:
  workdir = shutil.copytree(trained, tmp_path / "run")
  for step in ("4", "8"):
    os.truncate(largest(workdir / "checkpoints" / step / "params"), 100)
  with pytest.raises((UserError, CheckpointError), match="no usable checkpoint"):
    train.run(tiny(), workdir)
  assert len(list((workdir / "checkpoints_damaged").iterdir())) == 2


# The other modes.


def test_out_files_that_cannot_be_meant(trained: pathlib.Path, tmp_path: pathlib.Path) -> None:
  (tmp_path / "here.png").write_text("precious")
  for name, words in {
    "here.png": ["here.png", "exists"],
    "x.jpg": [".png or .npz", "x.jpg"],
    "x": [".png or .npz"],
    "absent/x.npz": ["no folder", "absent"],
  }.items():
    text = refusal(lambda name=name: sample.run(tiny(), trained, tmp_path / name), tmp_path)
    assert_mentions(text, *words)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"sample.ema": 0.5}, ["no average 0.5", "(0.999,)"]),
    ({"sample.checkpoint": "last"}, ["sample.checkpoint", "newest", "'last'"]),
    ({"sample.checkpoint": "best"}, ["no checkpoint", "best"]),
    ({"sample.checkpoint": "5"}, ["no checkpoint 5", "[4, 8]"]),
    ({"sample.ema": 0.9, "ema.decays": (0.9,)}, ["ema_0.9", "ema_0.999"]),
    ({"sample.nfe": 0}, ["nfe = 0"]),
    ({"sample.grid": (0.0, 1.0)}, ["from 1 to 0"]),
    ({"model.width": 32}, ["model.width: checkpoint 16, this run 32"]),
  ],
  ids=str,
)
def test_mistakes_when_sampling(
  trained: pathlib.Path, tmp_path: pathlib.Path, changes: dict[str, Any], words: list[str]
) -> None:
  draw = lambda: sample.run(tiny(changes), trained, tmp_path / "x.png")
  assert_mentions(refusal(draw, trained, tmp_path), *words)


def test_without_a_checkpoint_there_is_nothing_to_sample_or_evaluate(
  tmp_path: pathlib.Path,
) -> None:
  workdir = tmp_path / "run"
  for _ in range(2):
    for run in (
      lambda: sample.run(tiny(), workdir, tmp_path / "x.png"),
      lambda: evaluate.run(tiny(), workdir),
    ):
      assert_mentions(refusal(run, tmp_path), "no checkpoint", str(workdir), "train first")
    (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)


def test_an_evaluation_of_nothing_is_refused(trained: pathlib.Path) -> None:
  text = refusal(lambda: evaluate.run(tiny({"evaluate.count": 0}), trained), trained)
  assert_mentions(text, "evaluate.count is 0")


# On the command line.


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--config.trian.steps=9"], ["trian", '"train"']),
    (["--config.train.stepps=9"], ["stepps", '"steps"']),
    (["--config.data.folder.path=/"], ["data.folder.path", "data.source", "'folder'"]),
    (["--config.sample.label=3"], ["sample.label", "sample.labels", "'one'"]),
    (["--mode=sample"], ["--out"]),
    (["--config.evaluate.dinov2.weights=/"], ["evaluate.dinov2.weights", "'dinov2'"]),
    (["--config.train.batch_size=13"], ["train.batch_size 13"]),
    (["--mode=trian"], ["trian", "train"]),
    (["--config.train.steps=many"], ["many"]),
    (["--config=configs/digit.py"], ["configs/digit.py is not a file", "configs/digits.py"]),
  ],
  ids=str,
)
def test_mistakes_on_the_command_line(
  tmp_path: pathlib.Path, flags: list[str], words: list[str]
) -> None:
  status, output, errors = finish(start(tmp_path / "run", *flags))
  assert status not in (0, None)
  assert not output.startswith("0.")  # it never came to announce a run
  assert_mentions(errors + output, *words)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint(trained: pathlib.Path, tmp_path: pathlib.Path) -> None:
  workdir = shutil.copytree(trained, tmp_path / "run")
  intact = saved_state(workdir, 8)
  longer = {"train.steps": 16}
  # Files of at most 20 KiB: enough for all but the arrays.
  process = start(workdir, changes=longer, shell="ulimit -f 20;")
  _, errors = process.communicate(timeout=300)
  assert process.returncode == 1
  _, _, message = errors.partition("\nerror: ")  # what Orbax's threads had to say comes before
  assert_mentions(message, "checkpoint 12 could not be written", "newest intact checkpoint is 8")
  assert "Traceback" not in message
  assert_bitwise_equal(saved_state(workdir, 8), intact)
  status, output, _ = finish(start(workdir, changes=longer))
  assert status == 0
  assert "steps 8 to 16" in output


@pytest.mark.slow
def test_a_run_that_diverges_says_so(tmp_path: pathlib.Path) -> None:
  wild = {"optimizer.learning_rate": 1e20}
  status, output, errors = finish(start(tmp_path / "run", changes=wild))
  assert status not in (0, None)
  assert "error: step 3: " in errors
  assert_mentions(errors, "not finite", str(tmp_path / "run" / "nonfinite_step_0000003"))
  assert np.isfinite(float(output.split("error ")[1].split()[0]))
