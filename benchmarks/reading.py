"""Runs of main.py on the digits, and how many of their samples are read as the wanted digit."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC

ROOT = pathlib.Path(__file__).parents[1]
COUNT = 1500


def run_main(workdir: pathlib.Path, *flags: str, preset: str = "digits") -> None:
  """A run of main.py with a preset, in a process of its own."""
  config, folder = f"--config=configs/{preset}.py", f"--workdir={workdir.resolve()}"
  command = [sys.executable, "main.py", config, folder, *flags]
  subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def rows_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of the last figures of a run."""
  return json.loads(sorted((workdir / "figures").glob("step_*.json"))[-1].read_text())


def samples(
  workdir: pathlib.Path, nfe: int, *flags: str, preset: str = "digits"
) -> tuple[np.ndarray, np.ndarray]:
  """1,500 samples of a trained run, and their labels."""
  out = workdir / f"samples_nfe{nfe}.npz"
  settings = [f"--config.sample.count={COUNT}", f"--config.sample.nfe={nfe}"]
  run_main(workdir, "--mode=sample", f"--out={out.resolve()}", *settings, *flags, preset=preset)
  with np.load(out) as file:
    return file["arr_0"], file["arr_1"]


def train_reader() -> SVC:
  """A support vector machine of the real training images; it reads 99.3 % of the held-out ones."""
  digits = load_digits()
  train = np.random.RandomState(0).permutation(1797)[:1500]
  return SVC(gamma="scale", C=10).fit(digits.data[train] / 8 - 1, digits.target[train])


def recognised(reader: SVC, drawn: Sequence[np.ndarray]) -> float:
  """The share of images that are read as their label."""
  images, labels = drawn
  return float(np.mean(reader.predict(images.reshape(len(images), -1) / 127.5 - 1) == labels))
