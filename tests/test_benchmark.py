"""The benchmark that users run, in a process of its own."""

import subprocess
import sys

import pytest

from meanflow_jax.runtime.topology import CHIPS, chip_of
from tests.runs import ROOT, TINY


def benchmark(*flags: str) -> subprocess.CompletedProcess[str]:
  keys = [f"--config.{key}={value}" for key, value in TINY.items()]
  command = [sys.executable, "-m", "meanflow_jax.benchmark", "--config=configs/digits.py", *keys]
  return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_it_times_our_step_beside_the_plain_one() -> None:
  done = benchmark("--steps=1")
  assert done.returncode == 0, done.stderr
  head, *lines = done.stdout.splitlines()
  assert head == "16 images a step on 1 x cpu"
  rows = {line.rsplit(maxsplit=3)[0].strip(): line.split()[-3:] for line in lines[2:-1]}
  assert lines[1].split() == ["ours", "plain", "ratio"]
  assert {"compile, s", "peak memory, GB", "images/s", "model TFLOP/s"} <= rows.keys()
  ours, plain, ratio = map(float, rows["images/s"])
  assert ratio == pytest.approx(ours / plain, abs=0.01)
  assert lines[-1].startswith("input: ")
  assert "images/s" in lines[-1]


def test_the_source_need_not_be_there() -> None:
  done = benchmark("--steps=1", "--noplain", "--config.data.source=tfds")
  assert done.returncode == 0, done.stderr
  assert "plain" not in done.stdout
  assert "input: not measured, " in done.stdout


def test_mistakes_have_no_traceback() -> None:
  done = benchmark("--topology=v9:1")
  assert done.returncode == 1
  assert "there is no topology 'v9:1'" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v4", "v4"),
    ("TPU v5", "v5p"),
    ("TPU v5 lite", "v5e"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
    ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA B200", "b200"),
  ],
)
def test_chips_are_known_by_what_jax_calls_them(kind: str, name: str) -> None:
  assert chip_of(kind) is CHIPS[name]


def test_of_other_devices_no_peak_is_known() -> None:
  assert chip_of("cpu") is None
