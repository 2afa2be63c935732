"""Runs of several processes, real ones: they find each other, agree, and survive losses."""

import json
import pathlib
import signal
import time

import pytest

from meanflow_jax.runtime import processes
from tests.drill import drill
from tests.runs import (
  assert_close,
  comparable,
  finish,
  logged,
  saved_state,
  start,
  start_together,
  variables_of,
)

ALIKE = {"data.digits.split": "train", "evaluate.count": 64, "evaluate.nfe": (1, 2)}


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({}, False),
    ({"SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_STEP_NUM_TASKS": "4"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
  ],
)
def test_clusters_show_in_the_environment(environment: dict[str, str], expected: bool) -> None:
  assert processes.is_cluster(environment) == expected


@pytest.mark.parametrize(
  ("tasks", "more", "expected"),
  [("2", {}, [0, 1, 2, 3]), ("8", {}, None), ("2", {"JAX_LOCAL_DEVICE_IDS": "1"}, None)],
)
def test_one_slurm_task_on_a_node_takes_all_its_gpus(
  tasks: str, more: dict[str, str], expected: list[int] | None
) -> None:
  counts = {"SLURM_STEP_NUM_TASKS": tasks, "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
  assert processes.local_devices(counts | more) == expected
  assert processes.local_devices({}) is None


@pytest.mark.parametrize(
  ("variables", "said"),
  [
    ({processes.ADDRESS: "host:1234"}, "go together"),
    (variables_of("host", 2, 0), "host:port, got 'host'"),
    (variables_of("host:1234", 2, 2), "got '2' of '2'"),
    (variables_of("host:1234", 2, -1), "got '-1' of '2'"),
  ],
)
def test_a_contradictory_environment_is_refused(
  monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=said):
    processes.join(detect=False, timeout=1)


def test_a_cluster_that_is_none_is_refused(tmp_path: pathlib.Path) -> None:
  status, _, errors = finish(start(tmp_path / "run", "--distributed"))
  assert status == 1
  assert "cannot join the other processes" in errors
  assert processes.ADDRESS in errors


def test_a_workdir_on_an_object_store_is_refused() -> None:
  status, _, errors = finish(start("gs://bucket/run"))
  assert status == 1
  assert "checkpoint.path" in errors


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_stays_alone_says_for_whom_it_waited(
  tmp_path: pathlib.Path, index: int
) -> None:
  address = "localhost:1" if index else "localhost:23457"
  variables = variables_of(address, 2, index)
  began = time.monotonic()
  process = start(tmp_path / "run", "--startup_timeout=3", variables=variables)
  status, _, errors = finish(process)
  assert status == processes.TRY_AGAIN
  assert f"process {index} of 2 waited 3 s at {address}" in errors
  assert ("cannot be reached" in errors) == bool(index)
  assert not (tmp_path / "run").exists()
  assert time.monotonic() - began < 40


@pytest.mark.slow
def test_two_processes_train_evaluate_and_sample_as_one(tmp_path: pathlib.Path) -> None:
  for process in start_together(tmp_path / "two", 2, changes=ALIKE):
    assert finish(process)[0] == 0
  assert finish(start(tmp_path / "one", changes=ALIKE))[0] == 0
  states = [comparable(saved_state(tmp_path / name, 8)) for name in ("two", "one")]
  assert_close(*states, rtol=1e-4)
  ours, theirs = (figures(tmp_path / name) for name in ("two", "one"))
  assert ours == pytest.approx(theirs, rel=1e-3)

  # The same parameters measured by one and by two processes: their sums are exchanged exactly.
  again = start_together(tmp_path / "two", 2, "--mode=evaluate", changes=ALIKE)
  outputs = [finish(process) for process in again]
  assert [status for status, _, _ in outputs] == [0, 0]
  assert "frechet_pixels" in outputs[0][1]
  assert "frechet_pixels" not in outputs[1][1]
  by_two = figures(tmp_path / "two")
  assert finish(start(tmp_path / "two", "--mode=evaluate", changes=ALIKE))[0] == 0
  assert by_two == pytest.approx(figures(tmp_path / "two"), rel=1e-5)

  out = tmp_path / "samples.npz"
  for process in start_together(
    tmp_path / "two", 2, "--mode=sample", f"--out={out}", changes=ALIKE
  ):
    assert finish(process)[0] == 0
  assert out.exists()


def figures(workdir: pathlib.Path) -> dict[str, float]:
  rows = json.loads((workdir / "figures" / "step_0000008.json").read_text())
  return {f"{row['nfe']} {name}": v for row in rows for name, v in row["figures"].items()}


LONG = {
  "train.steps": 100_000,
  "train.log_every": 1,
  "train.checkpoint_every": 100_000,
  "train.sample_every": 0,
}


def wait_for_step(workdir: pathlib.Path, step: int) -> None:
  deadline = time.monotonic() + 120
  while not (workdir / "metrics.jsonl").exists() or len(logged(workdir)) < step:
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_to_one_process_stops_and_saves_all(tmp_path: pathlib.Path, told) -> None:
  life = start_together(tmp_path, 2, changes=LONG)
  wait_for_step(tmp_path, 3)
  life[1].send_signal(told)
  (first, said, _), (second, _, _) = (finish(process) for process in life)
  assert first == 128 + signal.SIGTERM
  assert second == 128 + told
  saved = int(said.split("stopped and saved at step ")[1].split(";")[0])
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(saved)]


@pytest.mark.slow
def test_the_loss_of_a_process_ends_the_others_within_a_minute(tmp_path: pathlib.Path) -> None:
  life = start_together(tmp_path, 2, changes=LONG)
  wait_for_step(tmp_path, 3)
  life[1].kill()
  died = time.monotonic()
  _, errors = life[0].communicate(timeout=120)
  assert time.monotonic() - died < 60
  life[1].communicate()
  # JAX aborts where it notices first, we leave where a step fails first.
  assert life[0].returncode in (-signal.SIGABRT, processes.TRY_AGAIN)
  assert "another" in errors


@pytest.mark.slow
def test_kills_at_any_moment_change_not_one_bit(tmp_path: pathlib.Path) -> None:
  toll = drill(tmp_path, kills=4, processes=(2,), seed=0, steps=100)
  assert toll.kills.total() == 4
  assert toll.bytes_lost == 0
  assert toll.bitwise


@pytest.mark.slow
def test_kills_and_other_numbers_of_processes_change_but_rounding(tmp_path: pathlib.Path) -> None:
  toll = drill(tmp_path, kills=2, processes=(4, 2, 4), seed=5, steps=60)
  assert toll.kills.total() == 2
  assert toll.bytes_lost == 0
  assert toll.difference < 1e-3
