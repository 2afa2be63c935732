"""Everything that is worth measuring on an accelerator, by one command, into one file.

  python benchmarks/accelerator.py --out=FILE.md [--batches=64,128] [--tiny]

Runs, each in a process of its own: training steps of B/2 and XL/2 in bfloat16 beside the plain step
(float32, the JVP on all rows), attention with its derivative beside XLA's plain form, and sampling.
What fails leaves its error in the file, and the others go on. FILE.md is written anew after each.
With --tiny everything runs at a size for a CPU: it tries the script, and times mean nothing.
"""

import pathlib
import shlex
import subprocess
import sys
import time

import tqdm
from absl import app, flags

ROOT = pathlib.Path(__file__).parents[1]
OUT = flags.DEFINE_string("out", None, "The file to write.", required=True)
BATCHES = flags.DEFINE_list("batches", ["64", "128"], "Images per device, of training steps.")
LIMIT = flags.DEFINE_integer("limit", 900, "Seconds that each may take.", lower_bound=1)
TINY = flags.DEFINE_bool("tiny", False, "At a size for a CPU.")

GUIDED = ("--config.method.guidance.omega=1", "--config.method.guidance.kappa=0.5")
BFLOAT16 = "--config.model.dtype=bfloat16"


def main(_: list[str]) -> None:
  out = pathlib.Path(OUT.value)
  if out.exists():
    raise app.UsageError(f"{out} exists, and is left as it is: choose another --out")
  sections: list[str] = []
  for command in tqdm.tqdm(tiny_commands() if TINY.value else commands(), disable=None):
    sections.append(section(command))
    out.write_text("\n".join(sections))
  print(f"{len(sections)} sections in {out}")


def commands() -> list[list[str]]:
  """Full size, the most wanted figures first."""
  step = ["-m", "meanflow_jax.benchmark", BFLOAT16, *GUIDED]
  steps = [
    [*step, f"--config=configs/imagenet_{size}.py", f"--batch={batch}"]
    for size in ("b2", "xl2")
    for batch in BATCHES.value
  ]
  sampling = [
    ["benchmarks/sampling.py", f"--config=configs/imagenet_{size}.py", BFLOAT16]
    for size in ("b2", "xl2")
  ]
  return [*steps, ["benchmarks/attention.py"], *sampling]


def tiny_commands() -> list[list[str]]:
  """The same kinds, of digits."""
  digits = ["--config=configs/digits.py", BFLOAT16]
  return [
    ["-m", "meanflow_jax.benchmark", *digits, *GUIDED, "--batch=8", "--steps=1"],
    ["benchmarks/attention.py", "--tiny"],
    ["benchmarks/sampling.py", *digits, "--batches=1", "--rounds=2"],
  ]


def section(command: list[str]) -> str:
  """What a command printed, as Markdown."""
  start = time.perf_counter()
  try:
    done = subprocess.run(
      [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT.value
    )
    failure = f"exit status {done.returncode}\n{done.stderr[-2000:]}" if done.returncode else ""
    text = done.stdout + failure
  except subprocess.TimeoutExpired:
    text = f"not finished after {LIMIT.value} s\n"
  seconds = time.perf_counter() - start
  return f"`python {shlex.join(command)}` ({seconds:.0f} s)\n\n```\n{text}```\n"


if __name__ == "__main__":
  app.run(main)
