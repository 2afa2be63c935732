"""Digits: flow matching for half of the steps and MeanFlow for the other half, against MeanFlow.

  python benchmarks/fine_tuning.py [--workdir=runs/fine_tuning] [--out=runs/fine_tuning.png]

Plots the pixel Frechet distance of one-step samples in the course of training.
"""

import json
import pathlib

from absl import app, flags
from matplotlib.figure import Figure
from reading import run_main

WORKDIR = flags.DEFINE_string("workdir", "runs/fine_tuning", "Where the runs go.")
OUT = flags.DEFINE_string("out", "runs/fine_tuning.png", "The picture.")
EVERY = 95  # steps between figures
HALF = 950
TICKS = (0.5, 1, 2, 5)

Curve = list[tuple[int, float]]


def main(_: list[str]) -> None:
  folder = pathlib.Path(WORKDIR.value)
  often = f"--config.train.evaluate_every={EVERY}", "--config.train.sample_every=0"
  one_step = "--config.evaluate.nfe=1,"
  run_main(folder / "scratch", *often, one_step)
  run_main(folder / "flow", preset="digits_flow")
  start = f"--config.train.start_from={(folder / 'flow').resolve()}"
  run_main(folder / "fine_tuned", *often, one_step, start, preset="digits_fine_tune")
  tuned = [(step + HALF, value) for step, value in curve(folder / "fine_tuned")]
  lines = {"MeanFlow": curve(folder / "scratch"), "flow matching, then MeanFlow": tuned}
  for name, points in lines.items():
    print(f"{name}: {', '.join(f'{step}: {value:.3f}' for step, value in points)}")
  draw(lines)


def curve(workdir: pathlib.Path) -> Curve:
  """Steps and figures of a run."""
  rows = [json.loads(path.read_text())[0] for path in sorted(workdir.glob("figures/step_*.json"))]
  return [(row["step"], row["figures"]["frechet_pixels"]) for row in rows]


def draw(lines: dict[str, Curve]) -> None:
  figure = Figure(figsize=(6, 4), layout="constrained")
  axes = figure.add_subplot(
    title="Digits in one step", xlabel="steps of training", ylabel="Frechet distance of pixels"
  )
  for name, points in lines.items():
    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
  axes.axvspan(0, HALF, color="C1", alpha=0.08, label="flow matching")
  axes.set(yscale="log", yticks=TICKS, yticklabels=TICKS)
  axes.minorticks_off()
  axes.grid(alpha=0.3)
  axes.legend(fontsize="small")
  pathlib.Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(OUT.value, dpi=110)


if __name__ == "__main__":
  app.run(main)
