"""Where the time of a step goes: --mode=profile."""

import datetime
import pathlib

import jax
from ml_collections import ConfigDict

from meanflow_jax import build, train
from meanflow_jax.runtime import traces
from meanflow_jax.runtime.reporting import MultiWriter, Report, table
from meanflow_jax.runtime.traces import Activity
from meanflow_jax.train_step import SCOPES

WARM_UP = 5
STEPS = 20


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Traces 20 steps of training, of a new state, and prints what they say.

  The trace is written to `workdir`/profile, for TensorBoard and Perfetto. Nothing else is.

  Raises:
    UserError: a mistake in the config or the data.
  """
  with build.explaining_mistakes():
    mesh = build.mesh(config)
    network, method = build.network(config, mesh), build.method(config)
    train_step = build.train_step(config, network, method, mesh)
    source = build.source(config)
  state = train_step.new_state(mesh)
  feed = train.device_batches(config, source, mesh, 0)
  advance = train_step.jitted(mesh).lower(state, next(feed)).compile()
  report = Report(
    MultiWriter([]), every=2 * STEPS, total_steps=2 * STEPS, batch_size=config.train.batch_size
  )

  def take(steps: range) -> None:
    nonlocal state
    for step, batch in zip(steps, feed, strict=False):
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, metrics = advance(state, batch)
        report.push(step, metrics)
    report.settle()
    jax.block_until_ready(state)

  take(range(WARM_UP))
  folder = workdir / "profile" / f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}"
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # tens of thousands of events, which take time themselves
  with jax.profiler.trace(str(folder), create_perfetto_trace=True, profiler_options=options):
    take(range(WARM_UP, WARM_UP + STEPS))
  if jax.process_index() == 0:
    show(folder, advance.as_text())


def show(folder: pathlib.Path, program: str) -> None:
  """Prints what a trace says, and how to look at it."""
  devices = traces.read(next(folder.rglob("*.xplane.pb")))
  print(table([_times(device) for device in devices]))
  print(table(_scopes(devices[0], program)))
  print(
    f"the trace: tensorboard --logdir {folder} (pip install xprof), or open "
    f"{next(folder.rglob('perfetto_trace.json.gz'))} on https://ui.perfetto.dev"
  )


def _times(device: Activity) -> dict[str, str]:
  step = device.seconds / STEPS
  return {
    "device": device.name,
    "ms/step": f"{1e3 * step:.3f}",
    "idle": f"{100 * device.idle / device.seconds:.2f} %",
    "longest gap": f"{100 * device.longest_gap / step:.2f} % of a step",
  }


def _scopes(device: Activity, program: str) -> list[dict[str, str]]:
  seconds = traces.by_scope(device.operations, program, SCOPES)
  total = sum(seconds.values())
  return [
    {"scope": scope, "ms/step": f"{1e3 * each / STEPS:.3f}", "share": f"{100 * each / total:.1f} %"}
    for scope, each in seconds.items()
  ]
