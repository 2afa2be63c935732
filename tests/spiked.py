"""Tiny runs with loss spikes, in this process or in one of their own that is killed.

python -m tests.spiked WORKDIR [MOMENT]
"""

import functools
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from meanflow_jax import build, train
from meanflow_jax.data.sources import Digits
from meanflow_jax.data.transforms import Example
from meanflow_jax.outputs import Outputs
from meanflow_jax.runtime.checkpoints import Checkpoints
from meanflow_jax.runtime.reporting import Report
from tests.runs import devices, mesh_of, tiny

STEPS = 12
ONE, MANY = (1, 1), (2, 4)


class Affine(nn.Module):
  """A network of two layers that compiles in no time."""

  @nn.compact
  def __call__(self, z: jax.Array, t: jax.Array, h: jax.Array, y: jax.Array) -> jax.Array:
    layers = self.param("blocks", nn.initializers.normal(0.3), (2, *z.shape[1:]))
    times = self.param("times", nn.initializers.normal(), (2,))
    table = self.param("label_embedder", nn.initializers.normal(), (11,))
    shift = times[0] * t + times[1] * h + table[y]
    return z * (1 + layers[0])[None] * layers[1][None] + shift[:, None, None, None]


def config_of(action: str, **changes: Any) -> Any:
  settings = {
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.sample_every": 0,
    "evaluate.count": 0,
    "train.checkpoint_every": 1 if action == "skip" else 4,
    "checkpoint.keep_latest": 12 if action == "skip" else 3,
  }
  if action != "off":
    guard = {"action": action, "window": 4, "steps_back": 2}
    settings |= {f"train.guard.{key}": value for key, value in guard.items()}
  return tiny(settings | changes)


class Spiked:
  """The digits; the images of some are far too large."""

  num_classes = 10

  def __init__(self, indices: set[int], factor: float):
    self._digits, self._indices, self._factor = Digits(split="train"), indices, factor

  def __len__(self) -> int:
    return len(self._digits)

  def __getitem__(self, index: int) -> Example:
    example = self._digits[index]
    if index not in self._indices:
      return example
    return {**example, "image": example["image"] * np.float32(self._factor)}


class Numbered:
  """As many items as there are digits, whose image says which it is."""

  num_classes = 10

  def __len__(self) -> int:
    return len(Digits(split="train"))

  def __getitem__(self, index: int) -> Example:
    return {"image": np.full((8, 8, 1), index, np.float32), "label": np.int32(0)}


@functools.cache
def items_of(number: int) -> frozenset[int]:
  """Which items make the batch of a number."""
  batch = next(train.host_batches(tiny(), Numbered(), mesh_of(1, 1), number))
  return frozenset(batch["image"][:, 0, 0, 0].astype(int).tolist())


def trained(
  workdir: pathlib.Path,
  config: Any,
  *,
  spikes: tuple[int, ...] = (),
  factor: float = 1e3,
  mesh: tuple[int, int] = ONE,
) -> pathlib.Path:
  """Trains; the batches of some numbers hold images that are much too large."""
  indices = {index for number in spikes for index in items_of(number)}
  with devices(*mesh), pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, "network", lambda config, mesh: Affine())
    patch.setattr(build, "source", lambda config: Spiked(indices, factor))
    patch.setattr(Outputs, "show", lambda *_: None)  # grids take longer than all else
    train.run(config, workdir)
  return workdir


# In a process of its own: a spike at step 11, which leads back to step 4, past 6, 8 and 10.

FAR_BACK = {"train.checkpoint_every": 2, "checkpoint.keep_latest": 6, "train.guard.steps_back": 6}


def die(*_: object) -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def then_die(function: Callable[..., object]) -> Callable[..., None]:
  def dying(*args: Any, **kwargs: Any) -> None:
    function(*args, **kwargs)
    die()

  return dying


def delete_half(manager: ocp.CheckpointManager, step: int) -> None:
  (manager.directory / str(step) / "manifest.json").unlink()
  die()


# In the order in which a run meets them.
MOMENTS = {
  "before the restore": (train, "roll_back", die),
  "after the restore": (Checkpoints, "go_back", die),
  "in a deletion": (ocp.CheckpointManager, "delete", delete_half),
  "between deletions": (ocp.CheckpointManager, "delete", then_die(ocp.CheckpointManager.delete)),
  "after the deletions": (Checkpoints, "drop_from", then_die(Checkpoints.drop_from)),
  "after the roll-back": (Checkpoints, "go_back", then_die(Checkpoints.go_back)),
  "in a step with other data": (Report, "push", then_die(Report.push)),
  "in the next save": (Outputs, "save", then_die(Outputs.save)),
}


def main() -> None:
  workdir, *moments = sys.argv[1:]
  for moment in moments:
    setattr(*MOMENTS[moment])
  trained(pathlib.Path(workdir), config_of("roll_back", **FAR_BACK), spikes=(10,))


if __name__ == "__main__":
  main()
