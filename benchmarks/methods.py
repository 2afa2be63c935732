"""The methods on the digits, each trained for the same time: a table and a picture.

  python benchmarks/methods.py [--seconds=90] [--workdir=runs/methods] [--out=runs/methods.png]
    [--only=NAME,NAME]

How many steps a method gets is found by meanflow_jax.benchmark; then each is a run of main.py.
"flow matching then MeanFlow" spends half of its time on either, and has guidance in the last 3/8;
improved MeanFlow has the batch of the others, for more steps than its preset would get.
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

SECONDS = flags.DEFINE_float("seconds", 90, "Of training, for each method.", lower_bound=1)
WORKDIR = flags.DEFINE_string("workdir", "runs/methods", "Where the runs go.")
ONLY = flags.DEFINE_list("only", [], "Names of methods; all without.")
OUT = flags.DEFINE_string("out", "runs/methods.png", "The picture.")
FEW, MANY = (1, 2, 4), (1, 2, 4, 8, 64)


@dataclasses.dataclass(frozen=True)
class Method:
  """A run of the comparison.

  Attributes:
    preset: of configs/.
    keys: what else is set.
    nfe: with how many steps it is sampled.
    before: the preset that it starts from, each with half of the time.
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
  "improved MeanFlow": Method("digits_imf", {"train.batch_size": 64}),
  "flow matching then MeanFlow": Method("digits", before="digits_flow"),
}


def main(_: list[str]) -> None:
  names, reader = ONLY.value or [*METHODS], train_reader()
  taken = [path for path in map(folder_of, names) if path.exists()]
  if taken or not METHODS.keys() >= {*names}:
    sys.exit(f"error: --only takes some of {[*METHODS]}, and --workdir none of {taken}")
  found = {}
  for name in tqdm.tqdm(names, "training", leave=False, disable=None):
    steps = train(METHODS[name], folder_of(name))
    found[name] = figures(METHODS[name], folder_of(name), reader)
    print(table(rows(name, steps, found[name])), flush=True)
  draw(found)


def folder_of(name: str) -> pathlib.Path:
  return pathlib.Path(WORKDIR.value) / re.sub(r"\W+", "_", name)


def steps_in(seconds: float, preset: str, keys: dict[str, object]) -> int:
  """How many steps fit, by the benchmark."""
  command = ["-m", "meanflow_jax.benchmark", f"--config=configs/{preset}.py", "--noplain"]
  done = subprocess.run(
    [sys.executable, *command, *flags_of(keys)],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  )
  return round(seconds * float(re.search(r"steps/s +([\d.]+)", done.stdout)[1]))


def train(method: Method, workdir: pathlib.Path) -> str:
  """Trains it, and says for how many steps."""
  seconds, more, said = SECONDS.value, {"evaluate.nfe": ",".join(map(str, method.nfe))}, ""
  if method.before:
    seconds, first = seconds / 2, workdir.with_name(workdir.name + "_before")
    before = steps_in(seconds, method.before, {})
    run_main(first, *flags_of(budget(before)), preset=method.before)
    said, more["train.start_from"] = f"{before:,} + ", first.resolve()
  steps = steps_in(seconds, method.preset, method.keys)
  if method.before:
    more["method.guidance.from_step"] = steps // 4
  if method.preset == "digits_alpha_flow":
    more["method.alpha_flow.anneal_to"] = steps
  run_main(workdir, *flags_of(method.keys | budget(steps) | more), preset=method.preset)
  return f"{said}{steps:,}"


def budget(steps: int) -> dict[str, object]:
  warmup = {"optimizer.warmup_steps": min(100, steps // 10)}
  return warmup | {"train.steps": steps, "train.sample_every": 0}


def flags_of(keys: dict[str, object]) -> list[str]:
  return [f"--config.{key}={value}" for key, value in keys.items()]


def figures(
  method: Method, workdir: pathlib.Path, reader: object
) -> dict[int, tuple[float, float]]:
  """By number of steps: the pixel Frechet distance, and the share that is read as wanted."""
  distance = {row["nfe"]: row["figures"]["frechet_pixels"] for row in rows_of(workdir)}
  drawn = lambda nfe: samples(workdir, nfe, *flags_of(method.keys), preset=method.preset)
  return {nfe: (distance[nfe], recognised(reader, drawn(nfe))) for nfe in method.nfe}


def rows(name: str, steps: str, found: dict[int, tuple[float, float]]) -> list[dict[str, str]]:
  return [
    {
      "method": name,
      "steps of training": steps,
      "of sampling": str(nfe),
      "Frechet distance": f"{distance:.3f}",
      "read as wanted": f"{share:.2%}",
    }
    for nfe, (distance, share) in found.items()
  ]


def draw(found: dict[str, dict[int, tuple[float, float]]]) -> None:
  figure = Figure(figsize=(10, 4), layout="constrained")
  titles = "Frechet distance of pixels", "not read as the wanted digit, %"
  panels = figure.subplots(1, 2)
  for place, (axes, title) in enumerate(zip(panels, titles, strict=True)):
    for name, by_nfe in found.items():
      values = [(distance, 100 * (1 - share))[place] for distance, share in by_nfe.values()]
      axes.plot([*by_nfe], values, marker="o", label=name)
    axes.set(title=title, xlabel="steps of sampling (NFE)", xscale="log")
    axes.set_xticks(MANY, labels=MANY)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
  panels[0].set_yscale("log", base=2)
  panels[0].yaxis.set_major_formatter("{x:g}")
  panels[1].legend(fontsize="small")
  pathlib.Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(OUT.value, dpi=110)


if __name__ == "__main__":
  app.run(main)
