"""Measures images against real ones: --mode=evaluate, and the same at a cadence during training."""

import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from meanflow_jax import build, storage, stream
from meanflow_jax.data.sources import Source, made_elsewhere
from meanflow_jax.evaluator import (
  INCEPTION_ONLY,
  Comparison,
  Evaluator,
  Figures,
  Reference,
  Setting,
  varying,
)
from meanflow_jax.features import Extractor
from meanflow_jax.generate import Generator
from meanflow_jax.methods.method import Method
from meanflow_jax.methods.sampler import time_grid
from meanflow_jax.metrics.summary import FIGURES, HIGHER_IS_BETTER, KEEPING, SPATIAL
from meanflow_jax.runtime import processes, reference_statistics
from meanflow_jax.runtime.plots import plot_lines
from meanflow_jax.runtime.reference_statistics import Statistics
from meanflow_jax.runtime.reporting import table, write_whole
from meanflow_jax.stream import Resumable
from meanflow_jax.train_step import item_name

Row = dict[str, Any]
Shape = tuple[int, ...]
AXES = {
  "nfe": "NFE",
  "ema": "EMA",
  "omega": "guidance scale",
  "t_min": "start of guidance in t",
  "t_max": "end of guidance in t",
}
SourceFn = Callable[[], Source]


def make_evaluator(
  config: ConfigDict, network: nn.Module, method: Method, mesh: Mesh, source: SourceFn
) -> Evaluator | None:
  """The evaluator of `config.evaluate`; None where `evaluate.count` is 0.

  The source is opened only where statistics of its images are not stored.

  Raises:
    ValueError: an impossible setting; weights or statistics that do not fit.
    FileNotFoundError: weights or statistics are missing.
  """
  settings = config.evaluate
  if not settings.count:
    return None
  if settings.count < 2:
    raise ValueError(f"evaluate.count must be 0 or at least 2, got {settings.count}")
  if not settings.nfe:
    raise ValueError("evaluate.nfe is empty: name at least one number of function evaluations")
  generators = _generators(config, network, method, mesh)
  shape = next(iter(generators.values())).output_shape
  comparison = make_comparison(config, mesh, shape, source)
  for figure, least in (("inception_score", 10), ("precision_recall", 4)):
    if figure in settings.figures and settings.count < least:
      raise ValueError(f"{figure} takes at least {least} images: evaluate.count {settings.count}")
  return Evaluator(generators, comparison, settings.count)


def _generators(
  config: ConfigDict, network: nn.Module, method: Method, mesh: Mesh
) -> dict[Setting, Generator]:
  """What makes the images of each row of the table."""
  settings, guidance = config.evaluate, config.sample.guidance
  emas = settings.ema or (config.sample.ema,)
  for ema in emas:
    storage.ema_item(config, ema)
  scales = itertools.product(
    settings.omega or (guidance.omega,),
    settings.t_min or (guidance.t_min,),
    settings.t_max or (guidance.t_max,),
  )
  decoder = build.decoder(config, mesh)
  return {
    Setting(nfe, ema, *scale): build.generator(
      config, network, method, mesh, decoder, time_grid(nfe), *scale
    )
    for nfe, ema, scale in itertools.product(settings.nfe, emas, scales)
  }


def check_best(config: ConfigDict, evaluator: Evaluator | None) -> None:
  """Raises a ValueError if `config.evaluate.best` is no figure of the evaluator."""
  best, names = config.evaluate.best, evaluator.names if evaluator else []
  if best and best not in names:
    raise ValueError(f"evaluate.best must be one of {names}, got {best!r}")


def make_comparison(config: ConfigDict, mesh: Mesh, shape: Shape, source: SourceFn) -> Comparison:
  """The figures of `config.evaluate`, for images [H, W, C] against stored statistics or a source.

  Raises:
    ValueError: an unknown figure; real images or statistics that do not fit.
    FileNotFoundError: weights or statistics are missing.
  """
  figures = tuple(config.evaluate.figures)
  if not figures or set(figures) - FIGURES.keys():
    raise ValueError(f"evaluate.figures must be some of {sorted(FIGURES)}, got {figures}")
  extractors = build.extractors(config, mesh)
  comparison = Comparison(extractors, figures, None)
  lacking = INCEPTION_ONLY & set(figures)
  if lacking and "inception" not in config.evaluate.extractors:
    raise ValueError(
      f"evaluate.figures {figures}: {' and '.join(sorted(lacking))} take the extractor inception, "
      f"and evaluate.extractors are {tuple(config.evaluate.extractors)}"
    )
  if set(figures) == {"inception_score"}:
    return comparison
  paths = config.evaluate.statistics.to_dict()
  stored = {
    extractor.name: _stored(pathlib.Path(path).expanduser(), extractor, shape, figures)
    for extractor in extractors
    if (path := paths[extractor.name])
  }
  missing = tuple(extractor for extractor in extractors if extractor.name not in stored)
  if not missing:
    return Comparison(extractors, figures, Reference(stored, None))
  real = source()
  _check_source(missing, real, shape)
  make = functools.partial(measure_source, config, mesh, missing, real, comparison.keep)
  return Comparison(extractors, figures, Reference(stored, make))


def _stored(
  path: pathlib.Path, extractor: Extractor, shape: Shape, figures: tuple[str, ...]
) -> Statistics:
  """Statistics from which all figures of an extractor can be computed."""
  found = reference_statistics.read(path, convention=extractor.convention, resolution=shape)
  images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  expected = {name: x.shape[1] for name, x in jax.eval_shape(extractor, images).items()}
  for name, moments in found.summary.moments.items():
    if name in expected and moments.mean.size != expected[name]:
      raise ValueError(
        f"{path} is of {moments.mean.size} {name}, {extractor.name} gives {expected[name]}"
      )
  lacking = [figure for figure in figures if figure in KEEPING and not found.summary.kept]
  if "sfid" in figures and SPATIAL in expected and SPATIAL not in found.summary.moments:
    lacking.append("sfid")
  if lacking:
    raise ValueError(
      f"{path} does not hold what {' and '.join(lacking)} takes: leave evaluate.figures "
      f"{' and '.join(lacking)} out, or make the file with python -m meanflow_jax.prepare "
      "--statistics and the same evaluate.figures"
    )
  return found


def _check_source(missing: tuple[Extractor, ...], real: Source, shape: Shape) -> None:
  found = real[0]["image"].shape
  if found != shape:
    names = ", ".join(f"evaluate.statistics.{extractor.name}" for extractor in missing)
    raise ValueError(
      f"the images to be measured are {shape}, those of the data {found}: the data cannot serve as "
      f"reference. Set {names} to statistics of real images of {shape}, made once by "
      "python -m meanflow_jax.prepare --statistics"
    )


def measure_source(
  config: ConfigDict, mesh: Mesh, extractors: tuple[Extractor, ...], source: Source, keep: bool
) -> dict[str, Statistics]:
  """The statistics of all images of a source, by extractor."""
  summaries, digests = stream.of_source(
    source,
    extractors,
    mesh,
    batch_size=config.sample.batch_size,
    keep=keep,
    num_threads=config.data.threads,
    prefetch=config.data.prefetch,
    title="real images",
  )
  return {
    extractor.name: Statistics(
      summaries[extractor.name],
      convention=extractor.convention,
      resolution=source[0]["image"].shape,
      count=len(source),
      fingerprint=reference_statistics.fingerprint(digests),
    )
    for extractor in extractors
  }


def rows_of(
  config: ConfigDict,
  step: int,
  evaluator: Evaluator,
  figures: Mapping[Setting, Figures],
  guidance: Mapping[str, Any],
) -> list[Row]:
  """The rows of the table, each with all that its figures depend on.

  Args:
    config: of the images.
    step: of the checkpoint.
    evaluator: of the figures.
    figures: by setting.
    guidance: `storage.trained_guidance`.
  """
  common = {
    "count": evaluator.count,
    **{key: config.sample[key] for key in ("labels", "seed", "rounding")},
    "dtype": config.model.dtype,
    "guidance": dict(guidance),
    **evaluator.comparison.record(),
  }
  if config.sample.labels == "one":
    common["label"] = config.sample.label
  decoder = next(iter(evaluator.generators.values())).decoder
  if decoder:
    common["autoencoder"] = decoder.name
  return [
    {"step": step, **vars(setting), "figures": found, **common}
    for setting, found in figures.items()
  ]


def write_rows(path: pathlib.Path, rows: list[Row]) -> None:
  """Stores rows as JSON, in the place of those that were made in the same way."""
  rows = json.loads(json.dumps(rows))  # as they will be read
  made = lambda row: {key: value for key, value in row.items() if key != "figures"}
  kept = [row for row in read_rows(path) if made(row) not in list(map(made, rows))]
  path.parent.mkdir(parents=True, exist_ok=True)
  write_whole(path, json.dumps(kept + rows, indent=2) + "\n")


def read_rows(path: pathlib.Path) -> list[Row]:
  """The rows that are stored in a file, none where there is none."""
  return json.loads(path.read_text()) if path.exists() else []


def figures_path(workdir: pathlib.Path, step: int) -> pathlib.Path:
  """Where the figures of a step are stored."""
  return workdir / "figures" / f"step_{step:07d}.json"


def conditions_of(row: Row) -> Row:
  """What figures must have in common to be compared: all that is the same in a table."""
  shared = {k: v for k, v in row.items() if k not in ("step", "figures", *AXES)}
  return json.loads(json.dumps(shared))  # as it is stored


def conditions_of_all(rows: list[Row]) -> Row:
  """The same with those settings that are alike in all rows of a table, which no name tells."""
  alike = {key: rows[0][key] for key in AXES if key not in varying(rows)}
  return conditions_of(rows[0]) | alike


def is_best(workdir: pathlib.Path, name: str, value: float, conditions: Row) -> bool:
  """Whether a figure is better than that of the checkpoint in `best/`; all hosts agree on it.

  It is, too, where that one was of another kind, or was found under other conditions.
  """
  path = workdir / "best.json"
  known = json.loads(path.read_text()) if path.exists() else {}
  sign = 1 if name.startswith(HIGHER_IS_BETTER) else -1
  alike = (known.get("figure"), known.get("conditions")) == (name, conditions)
  better = not alike or sign * value > sign * known["value"]
  return processes.agreed(better)


def note_best(workdir: pathlib.Path, step: int, name: str, value: float, conditions: Row) -> None:
  """Stores which checkpoint lies in `best/`, and why."""
  record = {"step": step, "figure": name, "value": value, "conditions": conditions}
  write_whole(workdir / "best.json", json.dumps(record) + "\n")


def plot_history(workdir: pathlib.Path, rows: list[Row]) -> None:
  """Draws every figure against the step, up to that of `rows`, from all rows made alike."""
  newest, conditions = rows[-1], conditions_of(rows[-1])
  paths = sorted((workdir / "figures").glob("step_*.json"))
  stored = (row for path in paths for row in read_rows(path) if row["step"] <= newest["step"])
  # The first rows did not tell where guidance is on: everywhere.
  alike = [{"t_min": 0.0, "t_max": 1.0, **x} for x in stored if conditions_of(x) == conditions]
  intervals = {"t_min", "t_max"} & {*worth_a_column(alike)}
  lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
  for row in alike:
    label = f"{row['nfe']} NFE, EMA {row['ema']:g}, guidance {row['omega']:g}"
    label += f" on [{row['t_min']:g}, {row['t_max']:g}]" if intervals else ""
    for name, value in row["figures"].items():
      lines.setdefault(name, {}).setdefault(label, []).append((float(row["step"]), value))
  plot_lines(workdir / "figures" / "history.png", "step", lines)


def plot_sweep(path: pathlib.Path, rows: list[Row]) -> None:
  """Draws every figure of a checkpoint against what varies most among the rows."""
  axis = max(AXES, key=lambda key: len({row[key] for row in rows}))
  named = [key for key in worth_a_column(rows) if key != axis]
  lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
  for row in rows:
    label = ", ".join(f"{key} {row[key]:g}" for key in named)
    for name, value in row["figures"].items():
      lines.setdefault(name, {}).setdefault(label, []).append((float(row[axis]), value))
  plot_lines(path, AXES[axis], lines)


def worth_a_column(rows: list[Row]) -> list[str]:
  """The settings that a table shows of each row: where guidance is on, if that varies."""
  return [key for key in AXES if key not in ("t_min", "t_max") or key in varying(rows)]


def show(rows: list[Row]) -> None:
  """Prints a table, and below it what all rows have in common."""
  names = "step", *worth_a_column(rows), "images", "count"
  settings = [key for key in names if key in rows[0]]
  print(table([{key: row[key] for key in settings} | row["figures"] for row in rows]))
  common = ("labels", "label", "seed", "rounding", "dtype", "autoencoder", "guidance")
  common = {*common, "t_min", "t_max"} - {*settings}
  print("; ".join(f"{key} {value}" for key, value in rows[0].items() if key in common))
  for name, convention in rows[0]["conventions"].items():
    reference = rows[0].get("references", {}).get(name)
    against = f", against {reference['count']} images" if reference else ""
    print(f"{name}: {convention}{against}")


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Prints and stores the figures of a checkpoint, resuming an evaluation that was interrupted."""
  with build.explaining_mistakes():
    mesh = build.mesh(config)
    method = build.method(config)
    network = build.network(config, mesh)
    evaluator = make_evaluator(config, network, method, mesh, lambda: build.source(config))
    if evaluator is None:
      raise ValueError("evaluate.count is 0: there is nothing to evaluate")
    step, items, trained = storage.trained_params(config, workdir, network, mesh, evaluator.items)
    guidance = storage.trained_guidance(trained["method"])
    resumable = functools.partial(_resumable, config, workdir, step, evaluator, items)
    rows = rows_of(config, step, evaluator, evaluator(items, resumable), guidance)
  if jax.process_index() == 0:
    path = figures_path(workdir, step)
    write_rows(path, rows)
    plot_history(workdir, rows)
    show(rows)
    if len(rows) > 1:
      plot_sweep(path.with_suffix(".png"), rows)
    print(f"stored in {path}")
  for setting in evaluator.generators:
    resumable(setting).discard()


def _resumable(
  config: ConfigDict,
  workdir: pathlib.Path,
  step: int,
  evaluator: Evaluator,
  items: Mapping[str, PyTree],
  setting: Setting,
) -> Resumable:
  """The folder of a row, named after all that its sums depend on, the parameters included."""
  # One program: on CPUs the sums of several at a time may wait for one another for ever.
  norm = float(jax.jit(optax.tree.norm)(items[item_name(setting.ema)]))
  (row,) = rows_of(config, step, evaluator, {setting: {}}, {})
  processes = f"{jax.process_index()} of {jax.process_count()}"
  facts = [row, norm, evaluator.comparison.keep, processes]
  name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
  return Resumable(workdir / "figures" / "unfinished" / name[:16])


def run_elsewhere(config: ConfigDict, workdir: pathlib.Path, images: str) -> None:
  """Prints and stores the figures of images that were made elsewhere: a folder, or an .npz file."""
  with build.explaining_mistakes():
    mesh = build.mesh(config)
    source = made_elsewhere(os.path.expanduser(images))
    shape = source[0]["image"].shape
    comparison = make_comparison(config, mesh, shape, lambda: build.source(config))
    made = stream.of_source(
      source,
      comparison.extractors,
      mesh,
      batch_size=config.sample.batch_size,
      keep=comparison.keep,
      num_threads=config.data.threads,
      prefetch=config.data.prefetch,
      title=images,
    )
    row = {
      "images": images,
      "fingerprint": reference_statistics.fingerprint(made[1]),
      "count": len(source),
      "figures": comparison(made[0]),
      **comparison.record(),
    }
  if jax.process_index() == 0:
    path = workdir / "figures" / f"images_{pathlib.Path(images).stem}.json"
    write_rows(path, [row])
    show([row])
    print(f"stored in {path}")
