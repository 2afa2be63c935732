"""The methods on the digits, each trained for the same time: a table and a picture.

  python benchmarks/methods.py [--seconds=120] [--workdir=runs/methods] [--out=runs/methods.png]

How many steps a method gets is found first, by meanflow_jax.benchmark; then each is a run of
main.py. "flow matching, then MeanFlow" spends half of its time on either.
"""

import dataclasses
import pathlib
import re
import subprocess
import sys

import tqdm
from absl import app, flags
from matplotlib.figure import Figure
from reading import ROOT, recognised, rows_of, run_main, samples, train_reader

from meanflow_jax.runtime.reporting import table

SECONDS = flags.DEFINE_float("seconds", 120, "Of training, for each method.", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "runs/methods", "Where the runs go.")
OUT = flags.DEFINE_string("out", "runs/methods.png", "The picture.")
FEW, MANY = (1, 2, 4), (1, 2, 4, 8, 64)


@dataclasses.dataclass(frozen=True)
class Method:
  """A run of the comparison.

  Attributes:
    preset: of configs/.
    keys: what else is set.
    nfe: with how many steps it is sampled.
    before: the method whose run it starts from, each with half of the time.
  """

  preset: str
  keys: dict[str, object] = dataclasses.field(default_factory=dict)
  nfe: tuple[int, ...] = FEW
  before: str = ""


METHODS = {
  "flow matching": Method("digits", {"method.times.equal_fraction": 1.0}, MANY),
  "shortcut": Method("digits_shortcut"),
  "alpha-Flow": Method("digits_alpha_flow"),
  "MeanFlow": Method("digits"),
  "improved MeanFlow": Method("digits_imf"),
  "flow matching, then MeanFlow": Method("digits", before="flow matching"),
}


def main(_: list[str]) -> None:
  rates, reader = steps_per_second(), train_reader()
  found = {}
  for name in tqdm.tqdm(METHODS, "training", leave=False, disable=None):
    workdir, steps = (
      pathlib.Path(WORKDIR.value) / name.replace(" ", "_"),
      rates[name] * SECONDS.value,
    )
    train(name, workdir, round(steps), rates)
    found[name] = figures(name, workdir, reader)
    print(table(rows(name, round(steps), found[name])), flush=True)
  draw(found)


def steps_per_second() -> dict[str, float]:
  """Of each method."""
  found = {}
  for name in tqdm.tqdm(METHODS, "timing", leave=False, disable=None):
    method = METHODS[name]
    command = ["-m", "meanflow_jax.benchmark", f"--config=configs/{method.preset}.py", "--noplain"]
    done = subprocess.run(
      [sys.executable, *command, *flags_of(method.keys)],
      cwd=ROOT,
      check=True,
      capture_output=True,
      text=True,
    )
    found[name] = float(re.search(r"steps/s +([\d.]+)", done.stdout)[1])
  return found


def train(name: str, workdir: pathlib.Path, steps: int, rates: dict[str, float]) -> None:
  method, more = METHODS[name], {}
  if method.before:
    first = workdir.with_name(workdir.name + "_before")
    steps //= 2
    train(method.before, first, round(rates[method.before] * SECONDS.value / 2), rates)
    more = {"train.start_from": first.resolve(), "method.guidance.from_step": steps // 4}
  if method.preset == "digits_alpha_flow":
    more["method.alpha_flow.anneal_to"] = steps
  more |= {"train.steps": steps, "train.sample_every": 0}
  keys = method.keys | more | {"optimizer.warmup_steps": min(100, steps // 10)}
  keys["evaluate.nfe"] = ",".join(map(str, method.nfe))
  run_main(workdir, *flags_of(keys), preset=method.preset)


def flags_of(keys: dict[str, object]) -> list[str]:
  return [f"--config.{key}={value}" for key, value in keys.items()]


def figures(name: str, workdir: pathlib.Path, reader: object) -> dict[int, tuple[float, float]]:
  """By number of steps: the pixel Frechet distance, and the share that is read as wanted."""
  method = METHODS[name]
  distance = {row["nfe"]: row["figures"]["frechet_pixels"] for row in rows_of(workdir)}
  drawn = lambda nfe: samples(workdir, nfe, *flags_of(method.keys), preset=method.preset)
  return {nfe: (distance[nfe], recognised(reader, drawn(nfe))) for nfe in method.nfe}


def rows(name: str, steps: int, found: dict[int, tuple[float, float]]) -> list[dict[str, str]]:
  return [
    {
      "method": name,
      "steps of training": f"{steps:,}",
      "of sampling": str(nfe),
      "Frechet distance": f"{distance:.3f}",
      "read as wanted": f"{share:.2%}",
    }
    for nfe, (distance, share) in found.items()
  ]


def draw(found: dict[str, dict[int, tuple[float, float]]]) -> None:
  figure = Figure(figsize=(10, 4), layout="constrained")
  titles = "Frechet distance of pixels", "not read as the wanted digit"
  for place, title in enumerate(titles, 1):
    axes = figure.add_subplot(1, 2, place, title=title, xlabel="steps of sampling (NFE)")
    for name, by_nfe in found.items():
      values = [distance if place == 1 else 1 - share for distance, share in by_nfe.values()]
      axes.plot([*by_nfe], values, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xticks=MANY, xticklabels=MANY)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
  axes.legend(fontsize="small")
  pathlib.Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(OUT.value, dpi=110)


if __name__ == "__main__":
  app.run(main)
