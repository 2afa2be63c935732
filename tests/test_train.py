"""Runs from end to end: what they leave behind, and that no interruption changes it."""

import contextlib
import itertools
import json
import pathlib
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from meanflow_jax import build, evaluate, sample, storage, train
from meanflow_jax.data.sources import Digits, Source
from meanflow_jax.data.transforms import Example
from meanflow_jax.runtime.reporting import NonFiniteError, Report
from tests.runs import (
  assert_bitwise_equal,
  assert_close,
  comparable,
  devices,
  finish,
  logged,
  mesh_of,
  saved_state,
  start,
  tiny,
)


class Whole(NamedTuple):
  """A run that nothing disturbed: eight steps, saved at 4 and 8."""

  mesh: tuple[int, int]
  workdir: pathlib.Path


MANY, ONE = (2, 4), (1, 1)
on_many = pytest.mark.parametrize("whole", [MANY], indirect=True)


@pytest.fixture(scope="module", params=[MANY, ONE], ids=str)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
  workdir = tmp_path_factory.mktemp("whole") / "run"
  with devices(*request.param):
    train.run(tiny(), workdir)
  return Whole(request.param, workdir)


def names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


@on_many
def test_a_run_leaves_everything_where_others_look_for_it(whole: Whole) -> None:
  assert names(whole.workdir) == [
    ".lock",
    "checkpoints",
    "config.json",
    "figures",
    "metrics.jsonl",
    "samples",
    "tensorboard",
  ]
  assert names(whole.workdir / "checkpoints") == ["4", "8"]
  assert names(whole.workdir / "samples") == ["step_0000004.png", "step_0000008.png"]
  assert json.loads((whole.workdir / "config.json").read_text()) == json.loads(tiny().to_json())
  assert names(whole.workdir / "figures") == ["history.png", "step_0000008.json"]
  (row,) = json.loads((whole.workdir / "figures" / "step_0000008.json").read_text())
  made = {"step": 8, "nfe": 1, "ema": 0.999, "omega": 1.0, "count": 32, "seed": 0}
  assert made.items() <= row.items()
  assert row["labels"] == "balanced"
  assert row["rounding"] == "meanflow"
  assert row["guidance"] == storage.trained_guidance(tiny().method.to_dict())
  assert row["guidance"].keys() == {"omega", "kappa", "t_start", "t_end"}
  assert row["conventions"] == {"pixels": "pixels at most 16 wide"}
  assert row["references"]["pixels"]["count"] == 1500
  assert row["figures"].keys() == {"frechet_pixels"}
  with Image.open(whole.workdir / "samples" / "step_0000008.png") as image:
    assert image.size == (2 * 34, 10 * 34)  # a row per class, 20 images of 32 x 32


@on_many
def test_a_run_logs_all_metrics(whole: Whole) -> None:
  *lines, figures = logged(whole.workdir)
  assert [line["step"] for line in lines] == [2, 4, 6, 8]
  expected = {"step", "loss", "error", "velocity_error", "gradient_norm", "parameter_norm"}
  speeds = {"learning_rate", "steps_per_second", "images_per_second", "eta"}
  assert all(line.keys() == expected | speeds for line in lines)
  assert figures.keys() == {"step", "frechet_pixels_nfe1"}
  # Warm-up is over after 2 steps; the cosine falls to 0 at step 8.
  rates = [5e-3] + [5e-3 * (1 + np.cos(np.pi * (step - 3) / 6)) for step in (4, 6, 8)]
  np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-5)


class CrashError(Exception):
  """Not one that a run could see coming."""


def crash() -> None:
  raise CrashError


@contextlib.contextmanager
def after_step(step: int, action: Callable[[], Any]) -> Iterator[None]:
  """Does something right after a step of a run in this process was dispatched."""
  push = Report.push

  def pushing(report: Report, number: int, metrics: Mapping[str, jax.Array]) -> None:
    push(report, number, metrics)
    if number == step:
      action()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Report, "push", pushing)
    yield


def stop_and_save(workdir: pathlib.Path, mesh: tuple[int, int], step: int) -> None:
  """Has a run told to stop in the middle."""
  terminate = lambda: signal.raise_signal(signal.SIGTERM)
  with devices(*mesh), after_step(step, terminate), pytest.raises(SystemExit) as caught:
    train.run(tiny(), workdir)
  assert caught.value.code == 143
  assert names(workdir / "checkpoints")[-1] == str(step)


def assert_same_run(workdir: pathlib.Path, whole: Whole) -> None:
  """Nothing shows that a run was interrupted."""
  assert_bitwise_equal(saved_state(workdir, 8), saved_state(whole.workdir, 8))
  timeless = lambda line: {k: v for k, v in line.items() if k != "eta" and "second" not in k}
  assert list(map(timeless, logged(workdir))) == list(map(timeless, logged(whole.workdir)))
  grids = [path / "samples" / "step_0000008.png" for path in (workdir, whole.workdir)]
  assert grids[0].read_bytes() == grids[1].read_bytes()


def test_a_run_that_was_stopped_resumes_bitwise(whole: Whole, tmp_path: pathlib.Path) -> None:
  stop_and_save(tmp_path, whole.mesh, 5)
  with devices(*whole.mesh):
    train.run(tiny(), tmp_path)
  assert_same_run(tmp_path, whole)


def test_a_run_that_crashed_resumes_bitwise(whole: Whole, tmp_path: pathlib.Path) -> None:
  with devices(*whole.mesh):
    with after_step(7, crash), pytest.raises(CrashError):
      train.run(tiny(), tmp_path)
    assert [line["step"] for line in logged(tmp_path)] == [2, 4, 6]
    assert names(tmp_path / "checkpoints") == ["4"]
    train.run(tiny(), tmp_path)
  assert_same_run(tmp_path, whole)


@on_many
def test_a_finished_run_can_be_run_again(whole: Whole, tmp_path: pathlib.Path) -> None:
  workdir = shutil.copytree(whole.workdir, tmp_path / "run")
  with devices(*whole.mesh):
    train.run(tiny(), workdir)
  assert_bitwise_equal(saved_state(workdir, 8), saved_state(whole.workdir, 8))
  assert names(workdir / "checkpoints") == ["4", "8"]


@on_many
def test_a_run_makes_up_for_what_a_stop_left_undone(whole: Whole, tmp_path: pathlib.Path) -> None:
  config = tiny({"train.evaluate_every": 4})
  grid, figures = (
    pathlib.Path(name) for name in ("samples/step_0000004.png", "figures/step_0000004.json")
  )
  with devices(*whole.mesh):
    with after_step(7, crash), pytest.raises(CrashError):
      train.run(config, tmp_path)
    measured = (tmp_path / figures).read_text()
    for path in (grid, figures):
      (tmp_path / path).unlink()
    train.run(config, tmp_path)
  assert (tmp_path / grid).read_bytes() == (whole.workdir / grid).read_bytes()
  assert (tmp_path / figures).read_text() == measured


def test_two_runs_do_not_share_a_workdir(tmp_path: pathlib.Path) -> None:
  with train.claimed(tmp_path), pytest.raises(build.UserError, match="another run is at work in"):
    train.run(tiny(), tmp_path)
  with train.claimed(tmp_path):  # nobody is there any more
    pass


@pytest.mark.slow
def test_checkpoints_may_lie_elsewhere(tmp_path: pathlib.Path) -> None:
  bucket = tmp_path / "bucket"
  config = tiny({"checkpoint.path": str(bucket), "train.guard.action": "record"})
  with devices(*ONE):
    for steps in (4, 6):
      config.train.steps = steps
      train.run(config, tmp_path / "run")
    sample.run(config, tmp_path / "run", tmp_path / "grid.png")
  assert names(bucket / "checkpoints") == ["4", "6"]
  assert "checkpoints" not in names(tmp_path / "run")
  assert saved_state(bucket, 6, config).guard.seen == 6


def test_a_run_resumes_on_other_devices(whole: Whole, tmp_path: pathlib.Path) -> None:
  stop_and_save(tmp_path, ONE if whole.mesh == MANY else MANY, 5)
  with devices(*whole.mesh):
    train.run(tiny(), tmp_path)
  ours, theirs = (comparable(saved_state(path, 8)) for path in (tmp_path, whole.workdir))
  assert_close(ours, theirs, rtol=1e-3)


@on_many
def test_sampling_draws_the_last_grid_of_training(
  whole: Whole, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  with devices(*whole.mesh):
    sample.run(tiny(), whole.workdir, tmp_path / "grid.png")
    sample.run(tiny({"sample.ema": 0.0, "sample.nfe": 2}), whole.workdir, tmp_path / "raw.png")
  assert "20 images of step 8, 1 NFE" in capsys.readouterr().out
  drawn = (tmp_path / "grid.png").read_bytes()
  assert drawn == (whole.workdir / "samples" / "step_0000008.png").read_bytes()
  assert drawn != (tmp_path / "raw.png").read_bytes()


@on_many
@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"method.times.equal_fraction": 1.0}, r"equal_fraction 0.5, .* says 1.0"),
    ({"method.name": "shortcut"}, r"method.name 'meanflow', .* says 'shortcut'"),
    (
      {"sample.guidance.omega": 2.0, "method.guidance.omega": 1.0, "method.guidance.kappa": 0.0},
      r"omega': 0.62.* says .*omega': 1.0.*the keys of training",
    ),
  ],
)
def test_a_checkpoint_is_sampled_by_the_method_that_trained_it(
  whole: Whole, tmp_path: pathlib.Path, changes: dict[str, Any], words: str
) -> None:
  config = tiny(changes)
  with devices(*whole.mesh), pytest.raises(build.UserError, match=words):
    sample.run(config, whole.workdir, tmp_path / "x.png")
  assert not list(tmp_path.iterdir())


FINE = {
  "train.steps": 2,
  "train.checkpoint_every": 1,
  "optimizer.learning_rate": 1e-9,
  "optimizer.warmup_steps": 0,
  "method.guidance.from_step": 1,
}


@on_many
def test_a_run_starts_from_the_average_of_another(
  whole: Whole, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """Over any devices, once: what it has saved itself comes first."""
  config = tiny(FINE | {"train.start_from": str(whole.workdir)})
  with devices(*whole.mesh):
    train.run(config, tmp_path / "run")
  assert f"starting from step 8 of {whole.workdir}" in capsys.readouterr().out
  average = saved_state(whole.workdir, 8).ema["0.999"]
  for step in (1, 2):
    state = saved_state(tmp_path / "run", step, config)
    assert_close(state.params, average, rtol=1e-6)
    assert_close(state.ema["0.999"], average, rtol=1e-6)
  config.train.update(steps=3, start_from="nowhere")
  with devices(*whole.mesh):
    train.run(config, tmp_path / "run")
  assert logged(tmp_path / "run")[-1]["step"] == 3


@pytest.mark.parametrize("decays", [(0.999,), (0.5,)])
def test_where_there_is_nothing_to_start_from_nothing_starts(
  tmp_path: pathlib.Path, decays: tuple[float, ...]
) -> None:
  start = {"train.start_from": str(tmp_path / "nowhere"), "sample.ema": decays[0]}
  with pytest.raises(build.UserError, match=r"no checkpoint in .*nowhere.*train.start_from"):
    train.run(tiny(start | {"ema.decays": decays}), tmp_path / "run")
  assert not any(path.is_file() for path in (tmp_path / "run" / "checkpoints").rglob("*"))
  assert "metrics.jsonl" not in names(tmp_path / "run")


@pytest.mark.slow
def test_a_run_starts_from_checkpoints_that_lie_elsewhere(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Given by a relative path, as it may be."""
  monkeypatch.chdir(tmp_path)
  with devices(*ONE):
    train.run(tiny({"train.steps": 3, "checkpoint.path": "store"}), tmp_path / "first")
    start = {"train.start_from": "store", "checkpoint.path": "other"}
    train.run(tiny(FINE | start), tmp_path / "second")
  average, ours = (
    saved_state(tmp_path / folder, step, tiny(FINE))
    for folder, step in (("store", 3), ("other", 1))
  )
  compare = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(compare, ours.params, average.ema["0.999"])


@on_many
def test_a_run_starts_from_no_other_network(whole: Whole, tmp_path: pathlib.Path) -> None:
  config = tiny({"train.start_from": str(whole.workdir), "model.width": 32})
  with devices(*whole.mesh), pytest.raises(build.UserError, match="width"):
    train.run(config, tmp_path / "run")


@on_many
def test_evaluation_finds_the_figures_of_training(
  whole: Whole, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  workdir = shutil.copytree(whole.workdir, tmp_path / "run")
  stored = workdir / "figures" / "step_0000008.json"
  during_training = json.loads(stored.read_text())
  stored.unlink()
  with devices(*whole.mesh):  # how it was trained, the checkpoint knows
    evaluate.run(tiny({"method.guidance.omega": 3.0}), workdir)
  assert json.loads(stored.read_text()) == during_training
  shown = " ".join(capsys.readouterr().out.split())
  figure = during_training[0]["figures"]["frechet_pixels"]
  assert f"step nfe ema omega count frechet_pixels 8 1 0.9990 1.0000 32 {figure:.4f}" in shown


class Poisoned:
  """The digits, one of which is not a number."""

  num_classes = 10

  def __init__(self, poison: np.ndarray):
    self._digits, self._poison = Digits(split="train"), poison

  def __len__(self) -> int:
    return len(self._digits)

  def __getitem__(self, index: int) -> Example:
    example = self._digits[index]
    if (example["image"] == self._poison).all():
      return {**example, "image": np.full_like(example["image"], np.nan)}
    return example


def batch_of_step(step: int) -> dict[str, np.ndarray]:
  source: Source = Digits(split="train")
  batches = train.host_batches(tiny(), source, mesh_of(1, 1), 0)
  return next(itertools.islice(batches, step - 1, None))


@on_many
def test_what_is_not_finite_stops_the_run_and_can_be_reproduced(
  whole: Whole, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  good, expected = batch_of_step(6), batch_of_step(6)
  expected["image"][3] = np.nan
  with devices(*whole.mesh), monkeypatch.context() as patch:
    patch.setattr(build, "source", lambda config: Poisoned(good["image"][3]))
    with pytest.raises(NonFiniteError, match=r"step 6: .*error.*not finite") as caught:
      train.run(tiny(), tmp_path)
  folder = tmp_path / "nonfinite_step_0000006"
  assert str(folder) in caught.value.__notes__[0]
  with np.load(folder / "batch_of_process_0.npz") as batch:
    np.testing.assert_array_equal(batch["image"], expected["image"])
    np.testing.assert_array_equal(batch["label"], expected["label"])
  facts = json.loads((folder / "step.json").read_text())
  assert facts["step"] == 6
  assert {"error", "gradient_norm", "loss"} <= set(facts["not_finite"])
  assert facts["config"] == json.loads(tiny().to_json())
  assert float(facts["metrics"]["parameter_norm"]) > 0
  assert names(tmp_path / "checkpoints") == ["4"]
  with devices(*whole.mesh):
    train.run(tiny(), tmp_path)
  assert_same_run(tmp_path, whole)


# In processes of their own.

LONG = {
  "train.steps": 600,
  "train.log_every": 10,
  "train.checkpoint_every": 25,
  "train.sample_every": 0,
}


class Ended(NamedTuple):
  """How a process ended."""

  status: int
  output: str
  errors: str


def interrupt(workdir: pathlib.Path, number: signal.Signals, step: int) -> Ended:
  """Runs on, and sends a signal at a random moment some time after a step."""
  process = start(workdir, changes=LONG)
  metrics = workdir / "metrics.jsonl"
  while not (metrics.exists() and any(line["step"] >= step for line in finished_lines(metrics))):
    assert process.poll() is None, process.communicate()
    time.sleep(0.005)
  time.sleep(random.uniform(0, 0.1))
  process.send_signal(number)
  return Ended(*finish(process))


def finished_lines(path: pathlib.Path) -> list[dict[str, float]]:
  return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


class Twins(NamedTuple):
  """The same run undisturbed, and interrupted by each signal in turn."""

  whole: pathlib.Path
  interrupted: pathlib.Path
  ends: dict[str, Ended]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
  folder = tmp_path_factory.mktemp("twins")
  undisturbed = start(folder / "whole", changes=LONG)
  ends = {
    "SIGTERM": interrupt(folder / "interrupted", signal.SIGTERM, 50),
    "SIGINT": interrupt(folder / "interrupted", signal.SIGINT, 150),
    "SIGKILL": interrupt(folder / "interrupted", signal.SIGKILL, 250),
    "none": Ended(*finish(start(folder / "interrupted", changes=LONG))),
  }
  ends["undisturbed"] = Ended(*finish(undisturbed))
  return Twins(folder / "whole", folder / "interrupted", ends)


@pytest.mark.slow
def test_signals_end_a_run_as_a_shell_expects(twins: Twins) -> None:
  statuses = {name: end.status for name, end in twins.ends.items()}
  assert statuses == {"SIGTERM": 143, "SIGINT": 130, "SIGKILL": -9, "none": 0, "undisturbed": 0}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "following"), [("SIGTERM", "SIGINT"), ("SIGINT", "SIGKILL")])
def test_a_stopped_run_says_how_to_resume_and_does(twins: Twins, name: str, following: str) -> None:
  said = twins.ends[name].output
  assert f"{name}: stopped and saved at step " in said
  step = said.split("saved at step ")[1].split(";")[0]
  assert "main.py" in said.splitlines()[-1]
  assert f"--workdir={twins.interrupted}" in said.splitlines()[-1]
  assert f"steps {step} to 600" in twins.ends[following].output


@pytest.mark.slow
def test_a_killed_run_continues_from_its_newest_checkpoint(twins: Twins) -> None:
  resumed = int(twins.ends["none"].output.split("steps ")[1].split(" to 600")[0])
  assert resumed % 25 == 0
  assert 200 <= resumed < 600


@pytest.mark.slow
def test_interruptions_change_not_one_bit(twins: Twins) -> None:
  ours, theirs = (saved_state(path, 600) for path in (twins.interrupted, twins.whole))
  assert_bitwise_equal(ours, theirs)
  timeless = lambda line: {k: v for k, v in line.items() if k != "eta" and "second" not in k}
  lines = list(map(timeless, logged(twins.interrupted)))
  assert lines == list(map(timeless, logged(twins.whole)))
  assert [line["step"] for line in lines] == [*range(10, 601, 10), 600]
  assert names(twins.interrupted / "checkpoints") == ["575", "600"]


@pytest.mark.slow
def test_training_learns(twins: Twins) -> None:
  errors = [line["error"] for line in logged(twins.whole) if "error" in line]
  assert np.mean(errors[-10:]) < 0.5 * np.mean(errors[:3])
  last = twins.ends["undisturbed"].output.splitlines()[-1]
  assert str(twins.whole) in last
  assert last.endswith("step_0000600.png")


@pytest.mark.slow
def test_the_other_modes_read_what_training_left(twins: Twins, tmp_path: pathlib.Path) -> None:
  (during_training,) = json.loads((twins.whole / "figures" / "step_0000600.json").read_text())
  evaluation = start(twins.whole, "--mode=evaluate", changes=LONG)
  out = tmp_path / "images.npz"
  sampling = start(twins.whole, "--mode=sample", f"--out={out}", changes=LONG)
  status, output, _ = finish(evaluation)
  assert status == 0
  assert f"{during_training['figures']['frechet_pixels']:.4f}" in output
  status, output, _ = finish(sampling)
  assert status == 0
  assert f"20 images of step 600, 1 NFE: {out}" in output
  with np.load(out, allow_pickle=False) as stored:
    assert (stored["arr_0"].shape, stored["arr_0"].dtype) == ((20, 8, 8, 1), np.uint8)
    assert stored["arr_1"].tolist() == list(range(10)) * 2
