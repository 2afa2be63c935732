"""What a run reports: on time, checked, and legible to a notebook and to TensorBoard."""

import io
import json
import math
import pathlib
import struct
import sys
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from meanflow_jax.runtime import reporting
from meanflow_jax.runtime.reporting import (
  ConsoleWriter,
  JsonLinesWriter,
  MultiWriter,
  NonFiniteError,
  Report,
  TensorBoardWriter,
  Writer,
  open_writer,
)


class Recorder:
  """A writer that remembers."""

  def __init__(self):
    self.scalars: list[tuple[int, dict[str, float]]] = []

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    self.scalars.append((step, dict(scalars)))

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    raise AssertionError

  def flush(self) -> None:
    raise AssertionError

  @property
  def steps(self) -> list[int]:
    return [step for step, _ in self.scalars]


class Reads:
  """Remembers of which steps the metrics left the devices."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch):
    self.steps: list[int] = []
    self._device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", self)

  def __call__(self, metrics: Mapping[str, Any]) -> Any:
    self.steps.append(int(metrics["step_itself"]))
    return self._device_get(metrics)


def metrics(step: int, **values: float) -> dict[str, jax.Array]:
  return {name: jnp.float32(value) for name, value in {"step_itself": step, **values}.items()}


def make_report(writer: Recorder, **changes: int) -> Report:
  settings = {"every": 1, "total_steps": 100, "batch_size": 16}
  return Report(writer, **settings | changes)


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
  """Several simulated devices would have each step waited for."""
  monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.usefixtures("one_device")
def test_metrics_are_read_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
  reads, writer = Reads(monkeypatch), Recorder()
  report = make_report(writer)
  for step in (1, 2, 3):
    report.push(step, metrics(step))
    assert reads.steps == writer.steps == list(range(1, step))
  report.settle()
  assert reads.steps == writer.steps == [1, 2, 3]
  report.settle()
  assert reads.steps == [1, 2, 3]


@pytest.mark.usefixtures("one_device")
def test_a_pause_settles_first(monkeypatch: pytest.MonkeyPatch) -> None:
  reads = Reads(monkeypatch)
  report = make_report(Recorder())
  report.push(1, metrics(1))
  with report.paused():
    assert reads.steps == [1]


def test_on_several_cpu_devices_each_step_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
  reads = Reads(monkeypatch)
  make_report(Recorder()).push(1, metrics(1))
  assert reads.steps == [1]


def test_only_some_steps_are_written_and_always_the_last() -> None:
  writer = Recorder()
  report = make_report(writer, every=4, total_steps=10)
  for step in range(3, 11):
    report.push(step, metrics(step, loss=step / 2))
  assert writer.steps == [4, 8, 10]
  assert [scalars["loss"] for _, scalars in writer.scalars] == [2, 4, 5]


class Clock:
  """Time that passes only when it is told to."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch):
    self.now = 1000.0
    monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_speed_and_time_left_do_not_count_compilation_and_pauses(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  clock, writer = Clock(monkeypatch), Recorder()
  report = make_report(writer, every=10, total_steps=60)
  for step in range(21, 41):
    clock.now += 1000 if step == 21 else 0.5 if step <= 30 else 0.25
    report.push(step, metrics(step))
    if step in (25, 30, 39):
      with report.paused():
        clock.now += 1000
  speeds = [(s["steps_per_second"], s["images_per_second"], s["eta"]) for _, s in writer.scalars]
  assert writer.steps == [30, 40]
  np.testing.assert_allclose(speeds, [(2, 32, 15), (4, 64, 5)])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("every", [1, 100])
def test_what_is_not_finite_stops_at_its_step(value: float, every: int) -> None:
  writer = Recorder()
  report = make_report(writer, every=every)
  report.push(6, metrics(6, loss=1.0))
  with pytest.raises(NonFiniteError, match="step 7: error, gradient_norm not finite") as caught:
    report.push(7, metrics(7, loss=1.0, gradient_norm=value, error=value))
  assert (caught.value.step, caught.value.names) == (7, ["error", "gradient_norm"])
  assert caught.value.scalars["loss"] == 1
  assert writer.steps in ([], [6])


@pytest.mark.usefixtures("one_device")
def test_a_step_that_is_not_finite_is_found_before_anything_is_saved() -> None:
  report, entered = make_report(Recorder()), False
  report.push(1, metrics(1, loss=math.nan))
  with pytest.raises(NonFiniteError), report.paused():
    entered = True
  assert not entered


# The writers.


def test_writers_have_the_interface_of_clu(tmp_path: pathlib.Path) -> None:
  lines = JsonLinesWriter(tmp_path / "metrics.jsonl", 0)
  board = TensorBoardWriter(tmp_path / "tensorboard", 0)
  for writer in (lines, board, ConsoleWriter(9, ()), MultiWriter([])):
    assert isinstance(writer, Writer)


def read_lines(path: pathlib.Path) -> list[dict[str, float]]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "metrics.jsonl"
  writer = JsonLinesWriter(path, 0)
  for step in (10, 20):
    writer.write_scalars(step, {"loss": step / 7, "error": 0.5})
    writer.write_images(step, {"samples": np.zeros((1, 2, 2, 1), np.uint8)})
    assert read_lines(path)[-1] == {"step": step, "loss": step / 7, "error": 0.5}
  assert len(read_lines(path)) == 2


@pytest.mark.parametrize("cut", ["", '{"step": 30, "lo', '{"step": 3', "{", '{"loss": 1}\n'])
def test_a_resumed_run_drops_what_it_will_write_again(tmp_path: pathlib.Path, cut: str) -> None:
  path = tmp_path / "metrics.jsonl"
  writer = JsonLinesWriter(path, 0)
  for step in (5, 10, 15, 20, 25):
    writer.write_scalars(step, {"loss": 0.0})
  with path.open("a") as file:
    file.write(cut)
  resumed = JsonLinesWriter(path, 15)
  assert [line["step"] for line in read_lines(path)] == [5, 10, 15]
  resumed.write_scalars(20, {"loss": 1.0})
  assert [line["step"] for line in read_lines(path)] == [5, 10, 15, 20]
  assert read_lines(path)[-1]["loss"] == 1
  assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def events(folder: pathlib.Path) -> Iterator[Event]:
  """The events of all files in a TensorBoard folder, oldest file first."""
  for path in sorted(folder.glob("events.out.tfevents.*")):
    stream = io.BytesIO(path.read_bytes())
    while header := stream.read(12):
      (length,) = struct.unpack("<Q", header[:8])
      yield Event.FromString(stream.read(length))
      stream.read(4)


def written(writer: Writer, folder: pathlib.Path, count: int) -> list[Event]:
  """All events, as soon as there are so many: tensorboardX writes in a thread."""
  deadline = time.monotonic() + 10
  while len(found := list(events(folder))) < count and time.monotonic() < deadline:
    writer.flush()
    time.sleep(0.01)
  return found


def test_tensorboard_holds_numbers_and_pictures(tmp_path: pathlib.Path) -> None:
  writer = TensorBoardWriter(tmp_path, 0)
  writer.write_scalars(3, {"loss": 0.25, "error": 2.0})
  pictures = np.random.default_rng(0).integers(256, size=(1, 5, 7, 3), dtype=np.uint8)
  writer.write_images(4, {"samples": pictures})
  found = written(writer, tmp_path, 6)
  values = [(event.step, value) for event in found for value in event.summary.value]
  numbers = {(step, v.tag): v.simple_value for step, v in values if v.HasField("simple_value")}
  assert numbers == {(3, "loss"): 0.25, (3, "error"): 2.0}
  ((step, shown),) = [(step, v) for step, v in values if v.HasField("image")]
  assert (step, shown.tag.split("/")[0]) == (4, "samples")
  with Image.open(io.BytesIO(shown.image.encoded_image_string)) as image:
    np.testing.assert_array_equal(np.asarray(image), pictures[0])


def test_a_resumed_run_tells_tensorboard_where_it_starts(tmp_path: pathlib.Path) -> None:
  found = written(TensorBoardWriter(tmp_path, 15), tmp_path, 3)
  starts = [event.step for event in found if event.HasField("session_log")]
  assert starts == [16]  # TensorBoard hides earlier events of this step and later ones


def test_the_console_shows_a_line(capsys: pytest.CaptureFixture[str]) -> None:
  writer = ConsoleWriter(3_000, ("learning_rate",))
  scalars = {"error": 0.123456, "learning_rate": 1e-3, "images_per_second": 12345.6, "eta": 3725.4}
  writer.write_scalars(20, scalars)
  assert capsys.readouterr().out == (
    "step   20/3000  error 0.1235  images_per_second 12346  eta 1:02:05\n"
  )
  writer.write_images(20, {"samples": np.zeros((1, 2, 2, 1), np.uint8)})
  assert not capsys.readouterr().out


def test_a_run_has_all_writers_and_its_config(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  writer = open_writer(tmp_path, {"train": {"steps": 9}}, 0, 9, wandb_project="")
  writer.write_scalars(4, {"loss": 1.0, "parameter_norm": 3.0})
  assert capsys.readouterr().out == "step 4/9  loss 1\n"
  assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 4, "loss": 1.0, "parameter_norm": 3.0}]
  found = written(writer, tmp_path / "tensorboard", 5)
  assert sum(len(event.summary.value) for event in found) == 2
  assert json.loads((tmp_path / "config.json").read_text()) == {"train": {"steps": 9}}


def test_other_processes_write_nothing(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  writer = open_writer(tmp_path, {}, 0, 9, wandb_project="mine")
  writer.write_scalars(4, {"loss": 1.0})
  writer.flush()
  assert not list(tmp_path.iterdir())
  assert not capsys.readouterr().out


def test_a_missing_wandb_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ModuleNotFoundError, match=r"report\.wandb_project .* pip install wandb"):
    open_writer(tmp_path, {}, 0, 9, wandb_project="mine")


class FakeRun:
  def __init__(self):
    self.logged: list[tuple[int, dict[str, Any]]] = []

  def log(self, values: dict[str, Any], step: int) -> None:
    self.logged.append((step, values))


def test_wandb_continues_a_resumed_run(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  starts, run = [], FakeRun()
  fake = types.ModuleType("wandb")
  fake.init = lambda **settings: starts.append(settings) or run
  fake.Image = lambda array: array.shape
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for first_step in (0, 5):
    writer = open_writer(tmp_path, {"seed": 1}, first_step, 9, wandb_project="mine")
    writer.write_scalars(first_step + 1, {"loss": 1.0})
    writer.write_images(first_step + 1, {"samples": np.zeros((1, 2, 3, 1), np.uint8)})
  first, second = (start["id"] for start in starts)
  assert first == second
  assert first
  assert all(start["project"] == "mine" and start["config"] == {"seed": 1} for start in starts)
  expected = [({"loss": 1.0}), {"samples": [(2, 3, 1)]}]
  assert run.logged == [(step, values) for step in (1, 6) for values in expected]


def test_numbers_go_to_every_writer() -> None:
  writers = [Recorder(), Recorder()]
  reporting.MultiWriter(writers).write_scalars(3, {"loss": 1.0})
  assert [writer.scalars for writer in writers] == [[(3, {"loss": 1.0})]] * 2
