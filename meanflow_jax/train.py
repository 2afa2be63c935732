"""Trains: builds the parts of a run, restores the newest checkpoint, then loops over steps."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from meanflow_jax import build, evaluate, storage
from meanflow_jax.data.loader import batches
from meanflow_jax.data.sources import Source
from meanflow_jax.diagnosis import RollBackError, Scene, Spikes
from meanflow_jax.outputs import Outputs
from meanflow_jax.runtime.checkpoints import Checkpoints
from meanflow_jax.runtime.interrupts import StoppedError, StopRequest
from meanflow_jax.runtime.mesh import global_batch, local_rows, replicate, shardings_of
from meanflow_jax.runtime.reporting import Report, Watch, open_writer, unwatched
from meanflow_jax.train_step import (
  Batch,
  Metrics,
  TrainState,
  TrainStep,
  from_items,
  sampling_params,
  to_items,
)


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Trains to `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

  Raises:
    UserError: a mistake in the config or the data, a workdir that is not this run's, or spikes that
      no roll-back helps against.
    CheckpointError: a checkpoint of another network, or one that could not be written.
    NonFiniteError: a step's loss or gradient is NaN or infinite.
    SystemExit: SIGINT or SIGTERM came, and the state is saved.
  """
  with contextlib.ExitStack() as held:
    with build.explaining_mistakes():
      mesh = build.mesh(config)
      method = build.method(config)
      network = build.network(config, mesh)
      train_step = build.train_step(config, network, method, mesh)
      generator = build.sample_generator(config, network, method, mesh)
      shown = storage.ema_item(config, config.sample.ema)
      source = build.source(config)
      evaluator = evaluate.make_evaluator(config, network, method, mesh, lambda: source)
      evaluate.check_best(config, evaluator)
      held.enter_context(claimed(workdir))
      checkpoints = held.enter_context(storage.checkpoints(config, workdir, read_only=False))

    state = restore_or_init(config, train_step, mesh, checkpoints)
    advance = train_step.jitted(mesh)
    read = lambda number: next(host_batches(config, source, mesh, number))
    with StopRequest() as stop:
      while state is not None:  # once, but for roll-backs
        first, position = int(state.step), int(state.position)
        scene = Scene(config, workdir, mesh, train_step, read, offset=position - first)
        watch = Spikes(scene, checkpoints) if train_step.guard else unwatched
        announce(config, network, state, mesh, len(source))
        report = make_report(config, workdir, first, watch)
        outputs = Outputs(config, workdir, checkpoints, report, generator, evaluator, shown)
        feed = device_batches(config, source, mesh, position)
        with scene.diagnosing():
          back = advance_to_end(config, state, advance, feed, outputs, stop)
        state = roll_back(train_step, mesh, checkpoints, *back) if back else None
    outputs.announce_end(config.train.steps)


def advance_to_end(
  config: ConfigDict,
  state: TrainState,
  advance: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
  feed: Iterator[Batch],
  outputs: Outputs,
  stop: StopRequest,
) -> tuple[int, int] | None:
  """Loops over the steps that are left; returns the step and position to roll back to, if any."""
  first, last = int(state.step), config.train.steps
  due = lambda cadence, step: cadence and step % cadence == 0 and step != last
  try:
    # What a stop right after a checkpoint left undone.
    if first and due(config.train.sample_every, first) and outputs.lacks_grid(first):
      outputs.show(first, state)
    if first and due(config.train.evaluate_every, first) and outputs.lacks_figures(first):
      outputs.measure(first, state, stop)
    for step, batch in zip(range(first + 1, last + 1), feed, strict=False):
      with jax.transfer_guard("disallow"):
        state, metrics = advance(state, batch)
      outputs.report.push(step, metrics)
      if due(config.train.checkpoint_every, step):
        outputs.save(step, state)
      stop.check()
      if due(config.train.sample_every, step):
        outputs.show(step, state)
      if due(config.train.evaluate_every, step):
        outputs.measure(step, state, stop)
    outputs.save(last, state)
    outputs.checkpoints.wait()
    outputs.show(last, state)
    outputs.measure(last, state, stop)
  except StoppedError:
    # If the last step was a spike, it comes again when the run resumes from the checkpoint before.
    with contextlib.suppress(RollBackError):
      outputs.save(int(state.step), state)
    outputs.leave(outputs.checkpoints.latest_step(), stop)
  except RollBackError as error:
    outputs.report.writer.flush()
    return error.step, error.position
  return None


@contextlib.contextmanager
def claimed(workdir: pathlib.Path) -> Iterator[None]:
  """Makes the run's folders, and keeps other runs out of them.

  Raises:
    ValueError: if the folder holds a config.json that is not of this project, or another run is
      at work in it.
  """
  path = workdir / "config.json"
  if path.exists() and not _is_config(path.read_text()):
    raise ValueError(f"{path} is not a config of this project; choose another --workdir")
  (workdir / "samples").mkdir(parents=True, exist_ok=True)
  if jax.process_index() != 0:
    yield
    return
  with (workdir / ".lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"another run is at work in {workdir}; choose another --workdir") from error
    except OSError:  # a file system without locks
      pass
    yield


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
  restored = checkpoints.restore(targets, identity=storage.identity(config), optional={"guard"})
  if restored is None:
    return new_state(config, train_step, mesh)
  step, items = restored
  if step > config.train.steps:
    raise build.UserError(
      f"the checkpoint is at step {step}, beyond train.steps {config.train.steps}"
    )
  return state_of(train_step, mesh, checkpoints, step, items)


def new_state(config: ConfigDict, train_step: TrainStep, mesh: Mesh) -> TrainState:
  """The state before the first step, with the parameters of `config.train.start_from`, if any.

  Raises:
    UserError: that run has no checkpoint, or none of this network.
  """
  if not config.train.start_from:
    return train_step.new_state(mesh)
  with build.explaining_mistakes():
    step, params = storage.starting_params(config, train_step.network, mesh)
  if jax.process_index() == 0:
    print(f"starting from step {step} of {config.train.start_from}", flush=True)
  state = train_step.new_state(mesh)
  averages = jax.jit(train_step.averages.init, out_shardings=shardings_of(state.ema))
  return state.replace(params=params, ema=averages(params))


def roll_back(
  train_step: TrainStep, mesh: Mesh, checkpoints: Checkpoints, step: int, position: int
) -> TrainState:
  """The state of a checkpoint, with other data ahead; younger checkpoints are deleted.

  A run that is killed in here either meets the same spike again, or goes on as this one would.

  Raises:
    CheckpointError: it is damaged.
  """
  targets = to_items(train_step.abstract_state(mesh))
  _, items = checkpoints.restore(targets, step=step, optional={"guard"})
  checkpoints.go_back(step, position)
  return state_of(train_step, mesh, checkpoints, step, items)


def state_of(
  train_step: TrainStep, mesh: Mesh, checkpoints: Checkpoints, step: int, items: dict[str, PyTree]
) -> TrainState:
  """The state of a checkpoint; where it lacks a guard's memory, that begins anew."""
  state = from_items(items, replicate(mesh, np.int32(step)))
  if train_step.guard is None:
    return state
  guard = state.guard or replicate(mesh, train_step.guard.init())
  returns, position = checkpoints.returns(step)
  if returns:  # after this state was saved, so that it does not know
    guard = guard.replace(offset=replicate(mesh, np.int32(position - step)))
  return state.replace(guard=guard)


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
  with build.explaining_mistakes():
    for batch in host_batches(config, source, mesh, first_step):
      yield global_batch(mesh, batch)


def announce(
  config: ConfigDict, network: nn.Module, state: TrainState, mesh: Mesh, examples: int
) -> None:
  """Says what is going to run."""
  epochs = config.train.steps * config.train.batch_size / examples
  used = sampling_params(network, state.params)
  size, more = (parameter_overview.count_parameters(x) for x in (used, state.params))
  heads = f" (in training {more / 1e6:.2f}M)" if more > size else ""
  hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
  if jax.process_index() == 0:
    print(
      f"{size / 1e6:.2f}M parameters{heads} on {mesh.size} {jax.default_backend()} device(s)"
      f"{hosts}, batch {config.train.batch_size}, steps {int(state.step)} to {config.train.steps} "
      f"({epochs:.3g} epochs of {examples} images)",
      flush=True,
    )


def make_report(config: ConfigDict, workdir: pathlib.Path, first_step: int, watch: Watch) -> Report:
  """The writers of this process (the first one alone writes) behind a report."""
  with build.explaining_mistakes():
    writer = open_writer(workdir, config.to_dict(), first_step, config.train.steps, **config.report)
  return Report(
    writer,
    every=config.train.log_every,
    total_steps=config.train.steps,
    batch_size=config.train.batch_size,
    watch=watch,
  )
