"""Runs small enough to train in a second, in this process or in one of their own."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import digits
from meanflow_jax import build, train
from meanflow_jax.runtime.checkpoints import Checkpoints
from meanflow_jax.runtime.mesh import make_mesh
from meanflow_jax.train_step import TrainState, TrainStep, from_items, to_items

ROOT = pathlib.Path(__file__).parent.parent

TINY = {
  "data.threads": 1,
  "data.prefetch": 2,
  "model.patch_size": 4,
  "model.depth": 1,
  "model.width": 16,
  "model.num_heads": 2,
  "model.time_frequencies": 16,
  "optimizer.learning_rate": 1e-2,
  "optimizer.warmup_steps": 2,
  "train.batch_size": 16,
  "train.steps": 8,
  "train.log_every": 2,
  "train.checkpoint_every": 4,
  "train.sample_every": 4,
  "sample.count": 20,
  "sample.batch_size": 16,
  "evaluate.count": 32,
  "evaluate.nfe": (1,),
}


def tiny(changes: dict[str, Any] | None = None) -> ConfigDict:
  """The preset of the digits, with a tiny network, for eight steps of a batch of 16."""
  config = digits.get_config()
  config.update_from_flattened_dict(TINY | (changes or {}))
  return config


def mesh_of(data: int, fsdp: int) -> Mesh:
  """A mesh of the first devices."""
  return make_mesh(data, fsdp, jax.devices()[: data * fsdp])


def train_step(config: ConfigDict, mesh: Mesh) -> TrainStep:
  network = build.network(config, mesh)
  return build.train_step(config, network, build.method(config), mesh)


def saved_state(config: ConfigDict, workdir: pathlib.Path, step: int) -> TrainState:
  """What a checkpoint holds, on one device."""
  mesh = mesh_of(1, 1)
  targets = to_items(train_step(config, mesh).abstract_state(mesh))
  with Checkpoints(
    workdir / "checkpoints", keep_latest=9, keep_every=None, read_only=True
  ) as saved:
    found, items = saved.restore(targets, step=step)
  return from_items(items, jax.device_put(np.int32(found)))


def logged(workdir: pathlib.Path) -> list[dict[str, float]]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def files_below(folder: pathlib.Path) -> dict[str, bytes | None]:
  """Every file with its content, every folder with None."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in sorted(folder.rglob("*"))
  }


def command(workdir: pathlib.Path, changes: dict[str, Any] | None = None, **flags: Any) -> list[str]:
  """The command line of a tiny run."""
  config = TINY | (changes or {})
  return [
    sys.executable,
    "main.py",
    "--config=configs/digits.py",
    f"--workdir={workdir}",
    *(f"--{name}={value}" for name, value in flags.items()),
    *(f"--config.{key}={value}" for key, value in config.items()),
  ]
