"""Metrics on their way out: read one step late, checked, and handed to writers."""

import contextlib
import json
import math
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import tensorboardX
from jaxtyping import Array

Scalars = Mapping[str, float]
# Sees a step's numbers and lists of numbers; says whether values that are not finite do no harm.
Watch = Callable[[int, Scalars, Mapping[str, np.ndarray]], bool]


@runtime_checkable
class Writer(Protocol):
  """The part of clu's `MetricWriter` that we use; what a subclass leaves out does nothing."""

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    """Records numbers."""

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Records images, uint8 [N, H, W, C]."""

  def flush(self) -> None:
    """Makes everything so far visible to readers."""


class TensorBoardWriter(Writer):
  """TensorBoard event files; a resumed run hides what an earlier one wrote beyond its step."""

  def __init__(self, directory: pathlib.Path, first_step: int):
    self._writer = tensorboardX.SummaryWriter(
      str(directory), purge_step=first_step + 1, flush_secs=10
    )

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    """Records numbers."""
    for name, value in scalars.items():
      self._writer.add_scalar(name, value, step)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Records images, uint8 [N, H, W, C]."""
    for name, batch in images.items():
      self._writer.add_images(name, batch, step, dataformats="NHWC")

  def flush(self) -> None:
    """Closes the event file, as nothing else waits for it; later events go into a new one."""
    self._writer.close()


class JsonLinesWriter(Writer):
  """One JSON object a line, {"step": ..., name: number, ...}: pandas.read_json(lines=True).

  A resumed run drops the lines beyond its step, which it is going to write again.
  """

  def __init__(self, path: pathlib.Path, first_step: int):
    kept = []
    if path.exists():
      kept = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]
    write_whole(path, "".join(f"{line}\n" for line in kept))
    self._path = path

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    """Records numbers."""
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, **scalars}) + "\n")


def write_whole(path: pathlib.Path, text: str) -> None:
  """A kill leaves the old file or the new one, never a part."""
  partial = path.with_name(f"{path.name}.partial")
  partial.write_text(text)
  os.replace(partial, path)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows with the same keys as aligned text, below a line of the keys."""
  text = lambda value: f"{value:.4f}" if isinstance(value, float) else str(value)
  lines = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
  )


def _step_of(line: str) -> float:
  try:
    return float(json.loads(line)["step"])
  except (ValueError, KeyError):
    return math.inf  # a line that a kill cut short


class ConsoleWriter(Writer):
  """Numbers as one line of text, but for some that only plots make legible."""

  def __init__(self, total_steps: int, hidden: Container[str]):
    self._total, self._hidden = total_steps, hidden

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    """Prints the numbers."""
    shown = {name: value for name, value in scalars.items() if name not in self._hidden}
    numbers = "  ".join(f"{name} {_short(name, value)}" for name, value in shown.items())
    print(f"step {step:{len(str(self._total))}d}/{self._total}  {numbers}", flush=True)


def _short(name: str, value: float) -> str:
  if name == "eta":
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
  return f"{value:.0f}" if 1000 <= value < 1e6 else f"{value:.4g}"


class WandbWriter(Writer):
  """Weights & Biases, where it is installed.

  Raises:
    ModuleNotFoundError: if it is not.
  """

  def __init__(self, project: str, config: dict[str, Any], directory: pathlib.Path):
    try:
      import wandb
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError(
        "report.wandb_project is set, but wandb is not installed: pip install wandb"
      ) from error
    self._wandb = wandb
    identity = directory / "wandb_id.txt"
    if not identity.exists():
      identity.write_text(secrets.token_hex(4))
    self._run = wandb.init(
      project=project, config=config, dir=str(directory), id=identity.read_text(), resume="allow"
    )

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    """Records numbers."""
    self._run.log(dict(scalars), step=step)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Records images, uint8 [N, H, W, C]."""
    pictures = {name: [self._wandb.Image(i) for i in batch] for name, batch in images.items()}
    self._run.log(pictures, step=step)


class MultiWriter(Writer):
  """Several writers as one."""

  def __init__(self, writers: list[Writer]):
    self._writers = writers

  def write_scalars(self, step: int, scalars: Scalars) -> None:
    """Records numbers."""
    for writer in self._writers:
      writer.write_scalars(step, scalars)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Records images, uint8 [N, H, W, C]."""
    for writer in self._writers:
      writer.write_images(step, images)

  def flush(self) -> None:
    """Flushes all."""
    for writer in self._writers:
      writer.flush()


_ONLY_IN_PLOTS = ("learning_rate", "parameter_norm", "steps_per_second")


def open_writer(
  workdir: pathlib.Path,
  config: dict[str, Any],
  first_step: int,
  total_steps: int,
  *,
  wandb_project: str,
) -> Writer:
  """All writers of a run; none but in the first process.

  Also stores the config as `config.json`.
  """
  if jax.process_index() != 0:
    return MultiWriter([])
  # First what may fail, so that it leaves everything as it was.
  writers: list[Writer] = []
  if wandb_project:
    writers.append(WandbWriter(wandb_project, config, workdir))
  write_whole(workdir / "config.json", json.dumps(config, indent=2) + "\n")
  writers.append(ConsoleWriter(total_steps, _ONLY_IN_PLOTS))
  writers.append(JsonLinesWriter(workdir / "metrics.jsonl", first_step))
  writers.append(TensorBoardWriter(workdir / "tensorboard", first_step))
  return MultiWriter(writers)


class NonFiniteError(RuntimeError):
  """A metric of a step is NaN or infinite.

  Attributes:
    step: the step that went wrong, counted from 1.
    scalars: its metrics.
    names: those that are not finite.
  """

  def __init__(self, step: int, scalars: Scalars):
    self.step, self.scalars = step, scalars
    self.names = sorted(name for name, value in scalars.items() if not math.isfinite(value))
    super().__init__(f"step {step}: {', '.join(self.names)} not finite")


def unwatched(step: int, scalars: Scalars, lists: Mapping[str, np.ndarray]) -> bool:
  """Sees nothing; no value that is not finite is harmless."""
  del step, scalars, lists
  return False


class Report:
  """Reads each step's metrics while the next step runs, and writes some of them.

  Args:
    writer: where they go.
    every: steps between two written ones.
    total_steps: of the run, for the time that is left.
    batch_size: images per step, for the speed.
    watch: sees every step, and alone sees what is no single number; what it raises, `push`,
      `settle` and `paused` raise.
  """

  def __init__(
    self,
    writer: Writer,
    *,
    every: int,
    total_steps: int,
    batch_size: int,
    watch: Watch = unwatched,
  ):
    self.writer, self._every = writer, every
    # Steps that queue up on several simulated CPU devices deadlock.
    self._one_by_one = jax.default_backend() == "cpu" and jax.device_count() > 1
    self._total_steps, self._batch_size, self._watch = total_steps, batch_size, watch
    self._pending: tuple[int, Mapping[str, Array]] | None = None
    # Of the step from which the speed counts: not the first, which waits for the compiler.
    self._since: tuple[int, float] | None = None

  def push(self, step: int, metrics: Mapping[str, Array]) -> None:
    """Takes the metrics of a step that was just dispatched, and settles those before it."""
    self.settle()
    self._pending = step, metrics
    if self._one_by_one:
      self.settle()

  def settle(self) -> None:
    """Waits for the last step's metrics; after this the state is known to be good.

    Raises:
      NonFiniteError: if one is NaN or infinite, and `watch` does not call that harmless.
    """
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = dict(sorted(jax.device_get(metrics).items()))
    scalars = {name: float(value) for name, value in values.items() if np.ndim(value) == 0}
    lists = {name: value for name, value in values.items() if np.ndim(value) > 0}
    harmless = self._watch(step, scalars, lists)
    finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
    if finite != scalars and not harmless:
      raise NonFiniteError(step, scalars)
    if step % self._every == 0 or step == self._total_steps:
      self.writer.write_scalars(step, finite | self._speed(step))
    elif self._since is None:
      self._speed(step)

  def _speed(self, step: int) -> Scalars:
    """Since it was last asked for; nothing after the first step."""
    before, self._since = self._since, (step, time.perf_counter())
    if before is None:
      return {}
    rate = (step - before[0]) / (self._since[1] - before[1])
    left = (self._total_steps - step) / rate
    return {"steps_per_second": rate, "images_per_second": rate * self._batch_size, "eta": left}

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Settles, and stops the clock for something that is not training."""
    self.settle()
    start = time.perf_counter()
    yield
    if self._since is not None:
      step, since = self._since
      self._since = step, since + time.perf_counter() - start
