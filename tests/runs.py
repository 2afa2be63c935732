"""Runs small enough to train in a second, in this process or in one of their own."""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import digits
from meanflow_jax import build
from meanflow_jax.runtime import processes
from meanflow_jax.runtime.checkpoints import Checkpoints
from meanflow_jax.runtime.mesh import global_batch, make_mesh
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


def stepped(config: ConfigDict, mesh: Mesh, count: int) -> TrainState:
  """The state after some steps on random images, of gradient descent: Adam blows up rounding."""
  rng, rows = np.random.default_rng(0), config.train.batch_size
  made = dataclasses.replace(train_step(config, mesh), optimizer=optax.sgd(0.1))
  state, jitted = made.new_state(mesh), made.jitted(mesh)
  for _ in range(count):
    image = rng.integers(256, size=(rows, *made.image_shape), dtype=np.uint8)
    batch = {"image": image, "label": rng.integers(10, size=rows).astype(np.int32)}
    state, _ = jitted(state, global_batch(mesh, batch))
  return jax.tree.map(np.asarray, state)


@contextlib.contextmanager
def devices(data: int, fsdp: int) -> Iterator[None]:
  """What runs meanwhile has a mesh of the first devices."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, "mesh", lambda config: mesh_of(data, fsdp))
    yield


def saved_state(workdir: pathlib.Path, step: int, config: ConfigDict | None = None) -> TrainState:
  """What a checkpoint of a tiny run holds, in numpy arrays."""
  mesh = mesh_of(1, 1)
  targets = to_items(train_step(config or tiny(), mesh).abstract_state(mesh))
  folder = workdir / "checkpoints"
  with Checkpoints(folder, keep_latest=9, keep_every=None, read_only=True) as saved:
    _, items = saved.restore(targets, step=step)
  return jax.tree.map(np.asarray, from_items(items, jax.numpy.int32(step)))


def assert_close(actual: Any, expected: Any, *, rtol: float) -> None:
  """Every array to a tolerance relative to its own largest magnitude."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max())


def assert_bitwise_equal(actual: TrainState, expected: TrainState) -> None:
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert x.dtype == y.dtype
    assert x.tobytes() == y.tobytes()


def comparable(state: TrainState) -> TrainState:
  """Without the biases of the keys: their gradient is but rounding, which Adam blows up."""

  def cut(path: jax.tree_util.KeyPath, x: np.ndarray) -> np.ndarray:
    is_qkv_bias = "'qkv'" in jax.tree_util.keystr(path[:-1]) and x.shape == (1, 48)
    return np.delete(x, np.s_[16:32], axis=1) if is_qkv_bias else x

  return jax.tree_util.tree_map_with_path(cut, state)


def logged(workdir: pathlib.Path) -> list[dict[str, float]]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def files_below(folder: pathlib.Path) -> dict[str, bytes | None]:
  """Every file with its content, every folder with None."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in sorted(folder.rglob("*"))
  }


def start(
  workdir: pathlib.Path | str,
  *flags: str,
  changes: dict[str, Any] | None = None,
  shell: str = "",
  variables: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
  """A tiny run in a process of its own, with one device; and environment variables."""
  keys = [f"--config.{key}={value}" for key, value in (TINY | (changes or {})).items()]
  command = [sys.executable, "main.py", "--config=configs/digits.py", f"--workdir={workdir}"]
  return start_program(
    "bash", "-c", f'{shell} exec "$@"', "bash", *command, *keys, *flags, variables=variables
  )


def start_program(*command: str, variables: dict[str, str] | None = None) -> subprocess.Popen[str]:
  """Any program, where the project lies and without accelerators."""
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | (variables or {}),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_together(
  workdir: pathlib.Path, count: int, *flags: str, changes: dict[str, Any] | None = None
) -> list[subprocess.Popen[str]]:
  """The same tiny run by several processes, of one device each."""
  address = free_address()
  return [
    start(workdir, *flags, changes=changes, variables=variables_of(address, count, index))
    for index in range(count)
  ]


def free_address() -> str:
  """Where a coordinator may listen."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return f"localhost:{free.getsockname()[1]}"


def variables_of(address: str, count: int, index: int) -> dict[str, str]:
  """What tells a process of the others."""
  names = (processes.ADDRESS, processes.COUNT, processes.INDEX)
  return dict(zip(names, (address, str(count), str(index)), strict=True))


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
  """Exit status, standard output and standard error, which never shows a traceback."""
  output, errors = process.communicate(timeout=300)
  assert "Traceback" not in errors, errors
  return process.returncode, output, errors
