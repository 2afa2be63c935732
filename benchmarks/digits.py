"""The main job on several seeds: seconds, recognised digits, pixel Frechet distances.

  python benchmarks/digits.py [--seeds=0,1,2] [--workdir=runs/digits_benchmark] [-- overrides]

Each seed is a run of main.py in a new folder, then 1,500 samples; a support vector machine trained
on the real training images reads them.
"""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
from absl import app, flags
from sklearn.datasets import load_digits
from sklearn.svm import SVC

ROOT = pathlib.Path(__file__).parents[1]
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of training and of sampling.")
WORKDIR = flags.DEFINE_string("workdir", "runs/digits_benchmark", "Where the runs go.")


def main(argv: list[str]) -> None:
  reader = train_reader()
  print(
    f"{'seed':>6} {'seconds':>8} {'read as wanted, 1 step':>23} {'2 steps':>8}  Frechet distances"
  )
  for seed in SEEDS.value:
    workdir = pathlib.Path(WORKDIR.value) / f"seed_{seed}"
    start = time.perf_counter()
    run_main(workdir, seed, *argv[1:])
    seconds = time.perf_counter() - start
    read = [recognised(reader, samples(workdir, seed, nfe, argv[1:])) for nfe in (1, 2)]
    rows = json.loads(sorted((workdir / "figures").glob("step_*.json"))[-1].read_text())
    distances = [f"nfe{row['nfe']} {row['figures']['frechet_pixels']:.3f}" for row in rows]
    print(
      f"{seed:>6} {seconds:8.0f} {read[0]:23.2%} {read[1]:8.2%}  {', '.join(distances)}", flush=True
    )


def run_main(workdir: pathlib.Path, seed: str, *options: str) -> None:
  flags_ = [f"--workdir={workdir}", f"--config.seed={seed}", f"--config.sample.seed={seed}"]
  command = [sys.executable, "main.py", "--config=configs/digits.py", *flags_, *options]
  subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def samples(
  workdir: pathlib.Path, seed: str, nfe: int, options: list[str]
) -> tuple[np.ndarray, np.ndarray]:
  out = workdir / f"samples_nfe{nfe}.npz"
  count = ["--config.sample.count=1500", f"--config.sample.nfe={nfe}"]
  run_main(workdir, seed, "--mode=sample", f"--out={out}", *count, *options)
  with np.load(out) as file:
    return file["arr_0"], file["arr_1"]


def train_reader() -> SVC:
  digits = load_digits()
  train = np.random.RandomState(0).permutation(1797)[:1500]
  return SVC(gamma="scale", C=10).fit(digits.data[train] / 8 - 1, digits.target[train])


def recognised(reader: SVC, drawn: tuple[np.ndarray, np.ndarray]) -> float:
  images, labels = drawn
  return float(np.mean(reader.predict(images.reshape(len(images), -1) / 127.5 - 1) == labels))


if __name__ == "__main__":
  app.run(main)
