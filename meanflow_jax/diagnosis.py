"""What a run writes down of a step that went wrong, and how it goes on after a loss spike."""

import collections
import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from meanflow_jax import build
from meanflow_jax.guard import WATCHED, part_names
from meanflow_jax.runtime.checkpoints import Checkpoints
from meanflow_jax.runtime.mesh import local_rows
from meanflow_jax.runtime.plots import plot_lines
from meanflow_jax.runtime.reporting import NonFiniteError, Scalars, write_whole
from meanflow_jax.train_step import TrainStep

MOST = 100  # spikes of a workdir that get files
TRIES = 3  # roll-backs to one checkpoint

Rows = dict[str, np.ndarray]


class RollBackError(Exception):
  """A spike: training is to go on from an earlier checkpoint, with the batches after the spike.

  Attributes:
    step: of the checkpoint.
    position: the number of the next batch and its draws.
  """

  def __init__(self, step: int, position: int):
    self.step, self.position = step, position
    super().__init__(f"roll back to step {step}")


@dataclasses.dataclass(frozen=True)
class Scene:
  """A stretch of a run, in which the batch of a step is a function of the step.

  Attributes:
    config, workdir, mesh, train_step: of the run.
    read: this host's rows of the batch of a number.
    offset: what the number of a batch is ahead of the step's, counted from 0.
  """

  config: ConfigDict
  workdir: pathlib.Path
  mesh: Mesh
  train_step: TrainStep
  read: Callable[[int], Rows]
  offset: int

  def rows(self, step: int) -> Rows:
    """This host's rows of a step, counted from 1: their numbers, images, labels, r and t."""
    number, size = step - 1 + self.offset, self.config.train.batch_size
    r, t = self.train_step.times(number, size)
    own = np.array(local_rows(self.mesh, size))
    return {"row": own, **self.read(number), "r": np.asarray(r)[own], "t": np.asarray(t)[own]}

  def facts(self, step: int, scalars: Scalars) -> dict[str, object]:
    """What is known of a step, as JSON."""
    metrics = {name: _plain(value) for name, value in scalars.items()}
    config = self.config.to_dict()
    return {"step": step, "batch": step - 1 + self.offset, "metrics": metrics, "config": config}

  @contextlib.contextmanager
  def diagnosing(self) -> Iterator[None]:
    """Writes down what reproduces a step that was not finite, and raises.

    The batch and all draws are functions of (seed, number), and the checkpoints before it are good:
    resuming from the last one leads to the same step.
    """
    try:
      yield
    except NonFiniteError as error:
      folder = self.workdir / f"nonfinite_step_{error.step:07d}"
      folder.mkdir(exist_ok=True)
      rows = self.rows(error.step)
      np.savez(folder / f"batch_of_process_{jax.process_index()}.npz", **rows)
      facts = self.facts(error.step, error.scalars) | {"not_finite": error.names}
      if jax.process_index() == 0:
        write_whole(folder / "step.json", json.dumps(facts, indent=2))
      error.add_note(
        f"its batch and metrics are in {folder}; checkpoints written before it are intact, and the "
        "same command leads from the last one to the same step again"
      )
      raise


class Spikes:
  """Looks at every step that a guard has judged: writes a diagnosis of a spike, and rolls back.

  Args:
    scene: the stretch of the run.
    checkpoints: of the run; they know how often it was rolled back to which of them.
  """

  def __init__(self, scene: Scene, checkpoints: Checkpoints):
    self._scene, self._checkpoints = scene, checkpoints
    self._guard = scene.train_step.guard
    params = scene.train_step.abstract_state(scene.mesh).params
    self._parts = part_names(params)
    self._recent = collections.deque(maxlen=scene.config.train.guard.window)
    self._folder = scene.workdir / "spikes"

  def __call__(self, step: int, scalars: Scalars, lists: Mapping[str, np.ndarray]) -> bool:
    """Takes a step's metrics; says whether values that are not finite have done no harm.

    Raises:
      RollBackError: the step is to be forgotten.
      UserError: it is, but that was tried often enough.
    """
    self._recent.append((float(step), *(scalars[name] for name in WATCHED)))
    if not scalars["spike"]:
      return False
    target = self._target(step) if self._guard.action == "roll_back" else None
    last_try = target is not None and self._checkpoints.returns(target)[0] >= TRIES
    outcome = "the run ends" if last_try else self._outcome(target)
    where = self._write(step, scalars, lists, outcome)
    if jax.process_index() == 0:
      seen = ", ".join(
        f"{name} {scalars[name]:.4g} (limit {limit:.4g})"
        for name, limit in zip(WATCHED, lists["limits"], strict=True)
      )
      print(f"warning: step {step} is a spike: {seen}: {outcome}; {where}", flush=True)
    if target is None:
      return self._guard.action == "skip"
    if last_try:
      raise build.UserError(
        f"step {step} is a spike, after {TRIES} roll-backs to step {target}, each with other data: "
        f"this is not a matter of single batches; {where}"
      )
    raise RollBackError(target, step + self._scene.offset)

  def _target(self, step: int) -> int | None:
    """The newest checkpoint that is old enough."""
    self._checkpoints.wait()
    old = [saved for saved in self._checkpoints.steps() if saved <= step - self._guard.steps_back]
    return max(old, default=None)

  def _outcome(self, target: int | None) -> str:
    """What is done about it."""
    if self._guard.action == "record":
      return "its update stays"
    if self._guard.action == "skip":
      return "its update is left out"
    if target is None:
      return f"its update stays, as no checkpoint is {self._guard.steps_back} steps older"
    return f"back to step {target}, and on with other data"

  def _write(
    self, step: int, scalars: Scalars, lists: Mapping[str, np.ndarray], outcome: str
  ) -> str:
    """The files of a spike; says where they are."""
    name = f"step_{step:07d}"
    if len(list(self._folder.glob("*.json"))) >= MOST:
      return f"{self._folder} holds {MOST} others and takes no more"
    self._folder.mkdir(exist_ok=True)
    rows = self._scene.rows(step)
    del rows["image"]  # large, and a function of the batch's number
    np.savez(self._folder / f"{name}_rows_of_process_{jax.process_index()}.npz", **rows)
    facts = self._scene.facts(step, scalars) | {
      "action": self._guard.action,
      "outcome": outcome,
      "limits": _named(WATCHED, lists["limits"]),
      "gradient_norms": _named(self._parts, lists["gradient_norms"]),
    }
    if jax.process_index() == 0:
      write_whole(self._folder / f"{name}.json", json.dumps(facts, indent=2))
      self._plot(self._folder / f"{name}.png")
    return f"see {self._folder / name}.json"

  def _plot(self, path: pathlib.Path) -> None:
    """How it came to the spike."""
    steps, *series = zip(*self._recent, strict=True)
    panels = {}
    for name, values in zip(WATCHED, series, strict=True):
      finite = [point for point in zip(steps, values, strict=True) if math.isfinite(point[1])]
      panels |= {name: {"each step": finite}} if finite else {}
    if panels:
      plot_lines(path, "step", panels)


def _plain(value: float) -> float | str:
  return value if math.isfinite(value) else str(value)  # JSON has no other


def _named(names: list[str] | tuple[str, ...], values: np.ndarray) -> dict[str, float | str]:
  return {name: _plain(float(value)) for name, value in zip(names, values, strict=True)}
