"""The whole way of ImageNet on a miniature of it: photographs, latents, two processes, figures."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.prepared import keys, paint, write_autoencoder
from tests.runs import ROOT, finish, free_address, logged, start, start_together, variables_of

IMAGES, CLASSES = 64, ("bird", "cat", "dog", "fox")


def prepare_together(count: int, *arguments: str) -> str:
  """Runs the preparation in several processes; what the first one said."""
  address = free_address()
  life = [
    subprocess.Popen(
      [sys.executable, "-m", "meanflow_jax.prepare", "--config=configs/digits.py", *arguments],
      cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"} | variables_of(address, count, index),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]
  ends = [finish(process) for process in life]
  assert [status for status, _, _ in ends] == [0] * count, ends
  return ends[0][1]


@pytest.mark.slow
def test_from_a_folder_of_photographs_to_figures(tmp_path: pathlib.Path) -> None:
  images = paint(tmp_path / "images", per_class=IMAGES // len(CLASSES), classes=CLASSES)
  settings = keys(images, write_autoencoder(tmp_path / "autoencoder"))
  settings |= {"data.num_classes": len(CLASSES), "prepare.records_per_shard": 16}
  prepared = tmp_path / "latents"
  said = prepare_together(
    2,
    f"--source=folder:{images}",
    f"--out={prepared}",
    "--statistics",
    *(f"--config.{key}={value}" for key, value in settings.items() if "folder" not in key),
  )
  assert f"{IMAGES} images" in said

  changes = {k: v for k, v in settings.items() if not k.startswith(("prepare", "data.folder"))} | {
    "data.source": "latents",
    "data.latents.path": prepared,
    "evaluate.statistics.pixels": prepared / "pixels_statistics.npz",
    "evaluate.count": IMAGES,
    "model.patch_size": 2,
    "train.steps": 50,
    "train.log_every": 1,
    "train.checkpoint_every": 20,
    "train.sample_every": 0,
  }
  workdir = tmp_path / "run"
  life = start_together(workdir, 2, changes=changes)
  while not (workdir / "metrics.jsonl").exists() or len(logged(workdir)) < 5:
    assert all(process.poll() is None for process in life), life[0].communicate()
    time.sleep(0.05)
  life[1].send_signal(signal.SIGTERM)
  assert [finish(process)[0] for process in life] == [143, 143]
  stopped = logged(workdir)[-1]["step"]

  ends = [finish(process) for process in start_together(workdir, 2, changes=changes)]
  assert [status for status, _, _ in ends] == [0, 0]
  assert f"steps {stopped} to 50" in ends[0][1]
  assert [line["step"] for line in logged(workdir) if "loss" in line] == [*range(1, 51)]
  (row,) = json.loads((workdir / "figures" / "step_0000050.json").read_text())
  assert row["count"] == row["references"]["pixels"]["count"] == IMAGES
  assert row["figures"]["frechet_pixels"] > 0

  out = tmp_path / "grid.png"
  assert finish(start(workdir, "--mode=sample", f"--out={out}", changes=changes))[0] == 0
  assert out.exists()
