"""Fault drill: kills the processes of a run at bad moments, and counts what that costs.

  python tests/drill.py --kills=20 --processes=4,2,4 --seed=1

Each life of the run is killed (SIGKILL) in start-up, in a step, while a checkpoint is written or
in an evaluation: one process or all at once, and then whatever is left, as a launcher does. The
next life has the next number of processes. In the end the run must be what it is undisturbed.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from tests.runs import comparable, saved_state, start_together

EVALUATE_EVERY = 10
CHANGES = {
  "train.log_every": 1,
  "train.checkpoint_every": 8,
  "train.sample_every": 0,
  "train.evaluate_every": EVALUATE_EVERY,
  "evaluate.count": 640,
}
PHASES = ("start-up", "step", "save", "evaluation")
START_UP = 8.0  # seconds, at most
PATIENCE = 300.0  # seconds for a life to come to its end, or to the moment of its death

Processes = list[subprocess.Popen[str]]
Contents = dict[str, bytes]


@dataclasses.dataclass
class Toll:
  """What the kills cost.

  Attributes:
    steps: of the run.
    kills: by the moment at which they came.
    missed: lives that came to the run's end before their moment.
    steps_repeated: done again, for they were in no checkpoint.
    bytes_lost: of checkpoints that were whole before a kill, and damaged or passed over after it.
    difference: largest of all numbers in the last checkpoint from those of the undisturbed run,
      relative to the largest magnitude in its array.
    bitwise: whether not one bit of them differs.
  """

  steps: int
  kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  missed: int = 0
  steps_repeated: int = 0
  bytes_lost: int = 0
  difference: float = 0.0
  bitwise: bool = True

  def __str__(self) -> str:
    kinds = ", ".join(f"{count} in {phase}" for phase, count in sorted(self.kills.items()))
    return "\n".join(
      [
        f"kills survived               {self.kills.total()} ({kinds})",
        f"ended before their kill      {self.missed}",
        f"steps repeated               {self.steps_repeated} of {self.steps}",
        f"bytes lost                   {self.bytes_lost}",
        f"largest relative difference  {self.difference:.2g}",
        f"bitwise equal                {self.bitwise}",
      ]
    )


def drill(
  folder: pathlib.Path, kills: int, processes: tuple[int, ...], seed: int, steps: int
) -> Toll:
  """Trains undisturbed with the first number of processes, and once more with kills."""
  calm, rough, toll, rng = folder / "calm", folder / "rough", Toll(steps), random.Random(seed)
  live(calm, processes[0], steps)
  counts = itertools.cycle(processes)
  for phase in itertools.islice(itertools.cycle(rng.sample(PHASES, len(PHASES))), kills):
    if live_until(phase, rough, next(counts), rng, toll):
      toll.kills[phase] += 1
    else:
      toll.missed += 1
  before = whole_checkpoints(rough), last_step(rough)
  account(toll, rough, *before, live(rough, next(counts), steps))
  compare(toll, rough, calm)
  return toll


def live(workdir: pathlib.Path, count: int, steps: int) -> str:
  """Lets a run come to its end; what its first process said."""
  life = start_together(workdir, count, changes=CHANGES | {"train.steps": steps})
  ends = [process.communicate(timeout=PATIENCE) for process in life]
  assert {process.returncode for process in life} == {0}, "\n".join(ends[0] + ends[-1])
  return ends[0][0]


def live_until(
  phase: str, workdir: pathlib.Path, count: int, rng: random.Random, toll: Toll
) -> bool:
  """Lets a run live until it is killed in a phase; False if it came to its end before."""
  checkpoints, reached = whole_checkpoints(workdir), last_step(workdir)
  moment = Moment(workdir, max(checkpoints, default=0), rng)
  life = start_together(workdir, count, changes=CHANGES | {"train.steps": toll.steps})
  deadline = time.monotonic() + PATIENCE
  while not moment.has_come(phase) and any(process.poll() is None for process in life):
    assert time.monotonic() < deadline, f"no {phase} within {PATIENCE} s"
    time.sleep(0.002)
  survivors = sum(process.poll() is None for process in life)
  if rng.random() < 0.5:
    rng.choice(life).send_signal(signal.SIGKILL)
    time.sleep(rng.uniform(0, 0.5))
  for process in life:
    process.kill()
  said = [process.communicate(timeout=PATIENCE)[0] for process in life]
  account(toll, workdir, checkpoints, reached, said[0])
  return survivors == count


class Moment:
  """Finds out from the files of a run in which phase it is.

  Args:
    workdir: of the run, before it starts.
    first_step: where it will continue.
    rng: draws how far into a phase it goes.
  """

  def __init__(self, workdir: pathlib.Path, first_step: int, rng: random.Random):
    self._workdir = workdir
    self._delay, self._steps = rng.uniform(0, START_UP), rng.randint(1, 25)
    self._first_step, self._start = first_step, time.monotonic()
    self._metrics = metrics_file(workdir)

  def has_come(self, phase: str) -> bool:
    """Whether the run is in the phase, as deep as was drawn."""
    if phase == "start-up":
      return time.monotonic() - self._start > self._delay
    if metrics_file(self._workdir) == self._metrics:  # each life begins a new one
      return False
    step = last_step(self._workdir)
    if step < self._first_step + self._steps:
      return False
    if phase == "save":
      return any((self._workdir / "checkpoints").glob("*tmp*"))
    figures = self._workdir / "figures" / f"step_{step:07d}.json"
    return phase == "step" or (step % EVALUATE_EVERY == 0 and not figures.exists())


def metrics_file(workdir: pathlib.Path) -> int:
  """Which file the metrics are in, 0 if in none."""
  path = workdir / "metrics.jsonl"
  return path.stat().st_ino if path.exists() else 0


def last_step(workdir: pathlib.Path) -> int:
  """The last step that was logged."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines(True) if path.exists() else []
  return max((int(json.loads(line)["step"]) for line in lines if line.endswith("\n")), default=0)


def whole_checkpoints(workdir: pathlib.Path) -> dict[int, Contents]:
  """The files of each checkpoint that is whole."""
  folders = (path for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())
  return {
    int(folder.name): {
      str(path.relative_to(folder)): path.read_bytes()
      for path in folder.rglob("*")
      if path.is_file()
    }
    for folder in folders
  }


def account(
  toll: Toll,
  workdir: pathlib.Path,
  checkpoints: dict[int, Contents],
  reached: int,
  said: str,
) -> None:
  """Adds what a life lost of the one before, which left some checkpoints and reached a step."""
  now = whole_checkpoints(workdir)
  for step in checkpoints.keys() & now.keys():
    if checkpoints[step] != now[step]:
      toll.bytes_lost += size(checkpoints[step])
  announced = re.search(r"steps (\d+) to", said)
  if announced is None:  # it was killed before it said where it starts
    return
  first = int(announced.group(1))
  toll.steps_repeated += max(0, reached - first)
  toll.bytes_lost += sum(size(files) for step, files in checkpoints.items() if step > first)


def size(files: Contents) -> int:
  return sum(map(len, files.values()))


def compare(toll: Toll, workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
  """Holds the last checkpoints of two runs against each other."""
  ours, theirs = (saved_state(folder, toll.steps) for folder in (workdir, undisturbed))
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    toll.bitwise &= x.tobytes() == y.tobytes()
  for x, y in zip(*map(jax.tree.leaves, map(comparable, (ours, theirs))), strict=True):
    relative = np.abs(x - y).max() / max(np.abs(y).max(), np.finfo(np.float32).tiny)
    toll.difference = max(toll.difference, float(relative))


def main() -> None:
  parser = argparse.ArgumentParser(description="Kills a run again and again.")
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--processes", default="2", help="of the lives in turn, e.g. 4,2,4")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--steps", type=int, default=120, help="of the run")
  arguments = parser.parse_args()
  counts = tuple(map(int, arguments.processes.split(",")))
  with tempfile.TemporaryDirectory() as folder:
    toll = drill(pathlib.Path(folder), arguments.kills, counts, arguments.seed, arguments.steps)
  print(toll)
  sys.exit(toll.bytes_lost > 0)


if __name__ == "__main__":
  main()
