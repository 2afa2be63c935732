"""What a run leaves behind: checkpoints, grids of images, figures, and its last words."""

import dataclasses
import pathlib
import shlex
import sys
from typing import NoReturn

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from meanflow_jax import build, evaluate, sample, storage
from meanflow_jax.evaluate import Evaluator
from meanflow_jax.generate import Generator
from meanflow_jax.runtime import processes
from meanflow_jax.runtime.checkpoints import Checkpoints
from meanflow_jax.runtime.images import grid, save_png
from meanflow_jax.runtime.interrupts import StopRequest
from meanflow_jax.runtime.reporting import Report
from meanflow_jax.train_step import TrainState, to_items


@dataclasses.dataclass(frozen=True)
class Outputs:
  """What a run leaves behind at a step; the clock of its report stands still meanwhile.

  Attributes:
    config, workdir: of the run.
    checkpoints, report: where states and metrics go.
    generator, evaluator: of the grids and of the figures, if any.
    shown: the item of the checkpoint whose parameters make the grids.
  """

  config: ConfigDict
  workdir: pathlib.Path
  checkpoints: Checkpoints
  report: Report
  generator: Generator
  evaluator: Evaluator | None
  shown: str

  def save(self, step: int, state: TrainState) -> None:
    """Starts to write a checkpoint, of a state that is known to be finite."""
    with self.report.paused():
      self.checkpoints.save(step, to_items(state), self.config.to_dict())

  def show(self, step: int, state: TrainState) -> None:
    """Writes a grid of images."""
    with self.report.paused():
      params = to_items(state)[self.shown]
      with build.explaining_mistakes():
        images, labels = sample.draw(self.generator, params, self.config.sample.count)
      if jax.process_index() == 0:
        picture = grid(images, labels)
        save_png(self.grid_path(step), picture)
        self.report.writer.write_images(step, {"samples": picture[None]})

  def measure(self, step: int, state: TrainState, stop: StopRequest) -> None:
    """Computes and stores the figures, unless `stop` is granted meanwhile."""
    if self.evaluator is None:
      return
    with self.report.paused():
      items = to_items(state)
      with build.explaining_mistakes():
        found = self.evaluator(items, check=stop.check)
      figures = self.evaluator.tagged(found)
      guidance = storage.trained_guidance(self.config.method.to_dict())
      rows = evaluate.rows_of(self.config, step, self.evaluator, found, guidance)
      if jax.process_index() == 0:
        evaluate.write_rows(evaluate.figures_path(self.workdir, step), rows)
        evaluate.plot_history(self.workdir, rows)
      self.report.writer.write_scalars(step, figures)
      if self.config.evaluate.best:
        value = figures[self.config.evaluate.best]
        self.keep_if_best(step, items, value, evaluate.conditions_of_all(rows))

  def keep_if_best(
    self, step: int, items: dict[str, PyTree], value: float, conditions: evaluate.Row
  ) -> None:
    """Keeps the parameters of a step whose figure is the best of all until now."""
    name = self.config.evaluate.best
    if not evaluate.is_best(self.workdir, name, value, conditions):
      return
    params = {name: tree for name, tree in items.items() if name not in ("opt_state", "guard")}
    with storage.best_checkpoint(self.config, self.workdir, read_only=False) as best:
      # Of a run that went on from an earlier step, or asked for another figure.
      best.drop_from(step)
      best.save(step, params, self.config.to_dict())
    if jax.process_index() == 0:
      evaluate.note_best(self.workdir, step, name, value, conditions)

  def leave(self, step: int, stop: StopRequest) -> NoReturn:
    """Ends the process once the checkpoint is on disk."""
    self.checkpoints.wait()
    self.report.writer.flush()
    if jax.process_index() == 0:
      print(f"{stop.signal.name}: stopped and saved at step {step}; to resume, run again:")
      print(f"  python {shlex.join(sys.argv)}", flush=True)
    raise SystemExit(stop.exit_status)

  def announce_end(self, step: int) -> None:
    """Says where everything is."""
    self.report.writer.flush()
    if jax.process_index() == 0:
      print(
        f"done: {step} steps. checkpoints, samples, figures, metrics.jsonl and tensorboard are in "
        f"{self.workdir}; the final grid is {self.grid_path(step)}"
      )

  def lacks_grid(self, step: int) -> bool:
    """Whether process 0 finds no grid of a step."""
    return processes.agreed(not self.grid_path(step).exists())

  def lacks_figures(self, step: int) -> bool:
    """Whether process 0 finds no figures of a step, of which there should be some."""
    path = evaluate.figures_path(self.workdir, step)
    return processes.agreed(self.evaluator is not None and not path.exists())

  def grid_path(self, step: int) -> pathlib.Path:
    """Where the grid of a step lies."""
    return self.workdir / "samples" / f"step_{step:07d}.png"
