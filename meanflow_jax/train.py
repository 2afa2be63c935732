"""Trains: builds the parts of a run, restores the newest checkpoint, then loops over steps."""

import contextlib
import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from meanflow_jax import build, evaluate, sample
from meanflow_jax.data.loader import batches
from meanflow_jax.data.sources import Source
from meanflow_jax.evaluate import Evaluator
from meanflow_jax.generate import Generator
from meanflow_jax.runtime.checkpoints import Checkpoints
from meanflow_jax.runtime.images import grid, save_png
from meanflow_jax.runtime.interrupts import StoppedError, StopRequest
from meanflow_jax.runtime.mesh import global_batch, local_rows, replicate
from meanflow_jax.runtime.reporting import NonFiniteError, Report, open_writer
from meanflow_jax.train_step import (
  Batch,
  TrainState,
  TrainStep,
  from_items,
  to_items,
)


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Trains to `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

  Raises:
    UserError: a mistake in the config or the data, or a workdir that is not this run's.
    CheckpointError: a checkpoint of another network, or one that could not be written.
    NonFiniteError: a step's loss or gradient is NaN or infinite.
    SystemExit: SIGINT or SIGTERM came, and the state is saved.
  """
  with build.explaining_mistakes():
    mesh = build.mesh(config)
    method = build.method(config)
    network = build.network(config, mesh)
    train_step = build.train_step(config, network, method, mesh)
    generator = build.sample_generator(config, network, method, mesh)
    shown = build.ema_item(config, config.sample.ema)
    source = build.source(config)
    evaluator = evaluate.make_evaluator(config, network, method, mesh, lambda: source)
    evaluate.check_best(config, evaluator)
    claim(workdir)

    checkpoints = build.checkpoints(config, workdir, read_only=False)

  last = config.train.steps
  due = lambda cadence, step: cadence and step % cadence == 0 and step != last
  with checkpoints:
    state = restore_or_init(config, train_step, mesh, checkpoints)
    first = int(state.step)
    announce(config, state, mesh)
    report = make_report(config, workdir, first)
    outputs = Outputs(config, workdir, checkpoints, report, generator, evaluator, shown)
    feed = device_batches(config, source, mesh, first)
    advance = train_step.jitted(mesh)
    with StopRequest() as stop, diagnosing(config, source, mesh, workdir):
      try:
        for step, batch in zip(range(first + 1, last + 1), feed, strict=False):
          with jax.transfer_guard("disallow"):
            state, metrics = advance(state, batch)
          report.push(step, metrics)
          if due(config.train.checkpoint_every, step):
            outputs.save(step, state)
          stop.check()
          if due(config.train.sample_every, step):
            outputs.show(step, state)
          if due(config.train.evaluate_every, step):
            outputs.measure(step, state, stop)
        outputs.save(last, state)
        checkpoints.wait()
        outputs.show(last, state)
        outputs.measure(last, state, stop)
      except StoppedError:
        outputs.save(int(state.step), state)
        outputs.leave(int(state.step), stop)
    outputs.announce_end(last)


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
      found = self.evaluator(items, check=stop.check)
      figures = self.evaluator.tagged(found)
      if jax.process_index() == 0:
        guidance = self.config.method.guidance
        rows = evaluate.rows_of(self.config, step, self.evaluator, found, guidance.to_dict())
        evaluate.write_rows(evaluate.figures_path(self.workdir, step), rows)
        evaluate.plot_history(self.workdir, rows)
      self.report.writer.write_scalars(step, figures)
      if self.config.evaluate.best:
        self.keep_if_best(step, items, figures)

  def keep_if_best(self, step: int, items: dict[str, PyTree], figures: dict[str, float]) -> None:
    """Keeps the parameters of a step whose figure is the best of all until now."""
    name = self.config.evaluate.best
    if not evaluate.is_best(self.workdir, name, figures[name]):
      return
    params = {name: tree for name, tree in items.items() if name != "opt_state"}
    with build.best_checkpoint(self.config, self.workdir, read_only=False) as best:
      best.drop_from(
        step
      )  # of a run that went on from an earlier step, or asked for another figure
      best.save(step, params, self.config.to_dict())
    if jax.process_index() == 0:
      evaluate.note_best(self.workdir, step, name, figures[name])

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

  def grid_path(self, step: int) -> pathlib.Path:
    """Where the grid of a step lies."""
    return self.workdir / "samples" / f"step_{step:07d}.png"


def claim(workdir: pathlib.Path) -> None:
  """Makes the run's folders.

  Raises:
    ValueError: if the folder holds a config.json that is not of this project.
  """
  path = workdir / "config.json"
  if path.exists() and not _is_config(path.read_text()):
    raise ValueError(f"{path} is not a config of this project; choose another --workdir")
  (workdir / "samples").mkdir(parents=True, exist_ok=True)


def _is_config(text: str) -> bool:
  try:
    config = json.loads(text)
  except ValueError:
    return False
  return isinstance(config, dict) and {"model", "method", "train"} <= config.keys()


def restore_or_init(
  config: ConfigDict, train_step: TrainStep, mesh: Mesh, checkpoints: Checkpoints
) -> TrainState:
  """The newest state on disk, or a new one.

  Raises:
    CheckpointError: there is a checkpoint of another network, or none that is intact.
    UserError: it is beyond the last step.
  """
  targets = to_items(train_step.abstract_state(mesh))
  restored = checkpoints.restore(targets, identity=build.identity(config))
  if restored is None:
    return train_step.new_state(mesh)
  step, items = restored
  if step > config.train.steps:
    raise build.UserError(
      f"the checkpoint is at step {step}, beyond train.steps {config.train.steps}"
    )
  return from_items(items, replicate(mesh, np.int32(step)))


def host_batches(
  config: ConfigDict, source: Source, mesh: Mesh, first_step: int
) -> Iterator[dict[str, np.ndarray]]:
  """This host's rows of the batches that follow `first_step` steps."""
  data, batch_size = config.data, config.train.batch_size
  return batches(
    source,
    batch_size=batch_size,
    rows=local_rows(mesh, batch_size),
    seed=config.seed,
    flip=data.flip,
    first_step=first_step,
    num_threads=data.threads,
    prefetch=data.prefetch,
  )


def device_batches(
  config: ConfigDict, source: Source, mesh: Mesh, first_step: int
) -> Iterator[Batch]:
  """The batches that follow `first_step` steps, on the devices."""
  for batch in host_batches(config, source, mesh, first_step):
    yield global_batch(mesh, batch)


def announce(config: ConfigDict, state: TrainState, mesh: Mesh) -> None:
  """Says what is going to run."""
  size = parameter_overview.count_parameters(state.params)
  hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
  if jax.process_index() == 0:
    print(
      f"{size / 1e6:.2f}M parameters on {mesh.size} {jax.default_backend()} device(s){hosts}, "
      f"batch {config.train.batch_size}, steps {int(state.step)} to {config.train.steps}",
      flush=True,
    )


def make_report(config: ConfigDict, workdir: pathlib.Path, first_step: int) -> Report:
  """The writers of this process (the first one alone writes) behind a report."""
  with build.explaining_mistakes():
    writer = open_writer(workdir, config.to_dict(), first_step, config.train.steps, **config.report)
  return Report(
    writer,
    every=config.train.log_every,
    total_steps=config.train.steps,
    batch_size=config.train.batch_size,
  )


@contextlib.contextmanager
def diagnosing(
  config: ConfigDict, source: Source, mesh: Mesh, workdir: pathlib.Path
) -> Iterator[None]:
  """Writes down what reproduces a step that was not finite, and raises.

  The batch and all draws are functions of (seed, step), and the checkpoints before it are good:
  resuming from the last one leads to the same step.
  """
  try:
    yield
  except NonFiniteError as error:
    batch = next(host_batches(config, source, mesh, error.step - 1))
    folder = workdir / f"nonfinite_step_{error.step:07d}"
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"batch_of_process_{jax.process_index()}.npz", **batch)
    facts = {"step": error.step, "not_finite": error.names, "config": config.to_dict()}
    facts["metrics"] = {name: str(value) for name, value in error.scalars.items()}
    (folder / "step.json").write_text(json.dumps(facts, indent=2))
    error.add_note(
      f"its batch and metrics are in {folder}; checkpoints written before it are intact, and the "
      "same command leads from the last one to the same step again"
    )
    raise
