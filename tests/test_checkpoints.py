import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meanflow_jax.runtime.checkpoints import CheckpointError, Checkpoints

CONFIG = {"model": {"width": 96, "patch": (2, 2)}, "steps": 10}


class Moments(NamedTuple):
  mu: jax.Array
  empty: None


def mesh_sharding(shape: tuple[int, ...]) -> NamedSharding:
  axes = ("data", "fsdp")[: len(shape)]
  mesh = jax.make_mesh(
    shape, axes, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[: np.prod(shape)]
  )
  return NamedSharding(mesh, PartitionSpec(axes))


def items_at(step: int, shape: tuple[int, ...] = (8,)) -> dict[str, Any]:
  """Three items whose values depend on the step, row-sharded; incompressible, so real files."""
  rows = mesh_sharding(shape)
  whole = NamedSharding(rows.mesh, PartitionSpec())
  kernel = np.random.default_rng(step).normal(size=(16, 256)).astype(np.float32)
  params = {
    "kernel": jax.device_put(kernel, rows),
    "bias": [jax.device_put(jnp.asarray(kernel[0, :8], jnp.bfloat16), rows)],
  }
  return {
    "params": params,
    "ema_0.999": jax.tree.map(lambda x: -x, params),
    "optimizer": (
      Moments(jax.tree.map(lambda x: 2 * x, params), None),
      {"count": jax.device_put(np.int32(step), whole)},
    ),
  }


def targets_of(items: Any, **changes: Any) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), {**items, **changes}
  )


def assert_same(restored: Any, expected: Any) -> None:
  assert jax.tree.structure(restored) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
    assert x.dtype == y.dtype
    assert x.sharding == y.sharding
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def opened(directory: pathlib.Path, **options: Any) -> Checkpoints:
  return Checkpoints(directory, **{"keep_latest": 5, "keep_every": None, **options})


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("originals")
  with opened(path) as checkpoints:
    for step in (10, 20, 30):
      checkpoints.save(step, items_at(step), CONFIG)
  return path


@pytest.fixture
def directory(originals: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """Where checkpoints 10, 20 and 30 lie."""
  return shutil.copytree(originals, tmp_path / "checkpoints")


def test_a_key_that_a_checkpoint_does_not_know_says_nothing_of_it(directory: pathlib.Path) -> None:
  younger = {"model": CONFIG["model"] | {"name": "dit"}, "method": {"name": "meanflow"}}
  with opened(directory) as checkpoints:
    step, _ = checkpoints.restore(targets_of(items_at(0)), identity=younger)
  assert step == 30


def test_nothing_to_restore_is_not_an_error(tmp_path: pathlib.Path) -> None:
  with opened(tmp_path / "checkpoints") as checkpoints:
    assert checkpoints.latest_step() is None
    assert checkpoints.restore(targets_of(items_at(0))) is None


def test_round_trip_is_bitwise(directory: pathlib.Path) -> None:
  with opened(directory) as checkpoints:
    step, items = checkpoints.restore(targets_of(items_at(0)), identity={"model": CONFIG["model"]})
    assert (step, checkpoints.steps()) == (30, [10, 20, 30])
    assert_same(items, items_at(30))
    assert_same(checkpoints.restore(targets_of(items_at(0)), step=10)[1], items_at(10))


@pytest.mark.parametrize("shape", [(2, 4), (2,), (1,)])
def test_restores_onto_any_mesh(directory: pathlib.Path, shape: tuple[int, ...]) -> None:
  with opened(directory) as checkpoints:
    assert_same(checkpoints.restore(targets_of(items_at(0, shape)))[1], items_at(30, shape))


def test_restoring_one_item_reads_no_other(directory: pathlib.Path) -> None:
  for item in ("params", "optimizer"):
    (directory / "30" / item / "manifest.ocdbt").unlink()
  ema = {"ema_0.999": items_at(30)["ema_0.999"]}
  with opened(directory) as checkpoints:
    step, items = checkpoints.restore(targets_of(ema))
  assert step == 30
  assert_same(items, ema)


def test_a_relative_directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  with opened(pathlib.Path("checkpoints")) as checkpoints:
    checkpoints.save(1, items_at(1), CONFIG)
  assert (tmp_path / "checkpoints" / "1" / "manifest.json").exists()


def test_keeps_the_latest_and_every_nth(tmp_path: pathlib.Path) -> None:
  with opened(tmp_path, keep_latest=2, keep_every=4) as checkpoints:
    for step in range(1, 8):
      checkpoints.save(step, {"params": items_at(step)["params"]}, CONFIG)
  with opened(tmp_path) as checkpoints:
    assert checkpoints.steps() == [4, 6, 7]


def test_a_save_owns_its_arrays(tmp_path: pathlib.Path) -> None:
  overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
  items = items_at(1)
  with opened(tmp_path) as checkpoints:
    checkpoints.save(1, items, CONFIG)
    jax.block_until_ready(overwrite(items))
    assert_same(checkpoints.restore(targets_of(items_at(0)))[1], items_at(1))


def test_the_same_step_saves_once_and_an_older_one_not_at_all(directory: pathlib.Path) -> None:
  with opened(directory) as checkpoints:
    checkpoints.restore(targets_of(items_at(0)))
    checkpoints.save(30, items_at(30), CONFIG)
    checkpoints.save(40, items_at(40), CONFIG)
    checkpoints.save(40, items_at(41), CONFIG)
    assert_same(checkpoints.restore(targets_of(items_at(0)))[1], items_at(40))
    checkpoints.restore(targets_of(items_at(0)), step=20)
    for step in (30, 40):  # they exist, but with a state other than this run's
      with pytest.raises(CheckpointError, match=rf"takes no checkpoint {step}: it has .*40\]"):
        checkpoints.save(step, items_at(step), CONFIG)


def largest(folder: pathlib.Path) -> pathlib.Path:
  files = (path for path in folder.rglob("*") if path.is_file())
  return max(files, key=lambda path: path.stat().st_size)


def overwrite_end(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-100] + bytes(100))


DAMAGE: dict[str, Callable[[pathlib.Path], Any]] = {
  "largest file cut": lambda folder: os.truncate(largest(folder), 1000),
  "largest file empty": lambda folder: os.truncate(largest(folder), 0),
  "largest file gone": lambda folder: largest(folder).unlink(),
  "largest file ends in zeros": lambda folder: overwrite_end(largest(folder)),
  "names gone": lambda folder: (folder / "params" / "_METADATA").unlink(),
  "names empty": lambda folder: os.truncate(folder / "params" / "_METADATA", 0),
  "index gone": lambda folder: (folder / "params" / "manifest.ocdbt").unlink(),
  "shapes empty": lambda folder: os.truncate(folder / "params/array_metadatas/process_0", 0),
  "config empty": lambda folder: os.truncate(folder / "config" / "metadata", 0),
  "item gone": lambda folder: (folder / "params").rename(folder.parent / "elsewhere"),
  "manifest gone": lambda folder: (folder / "manifest.json").unlink(),
  "manifest cut": lambda folder: os.truncate(folder / "manifest.json", 30),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_falls_back_and_moves_aside(
  directory: pathlib.Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
  DAMAGE[kind](directory / "30")
  with opened(directory) as checkpoints:
    step, items = checkpoints.restore(targets_of(items_at(0)))
    assert (step, checkpoints.steps()) == (20, [10, 20])
    assert_same(items, items_at(20))
    aside = directory.with_name("checkpoints_damaged") / "30"
    assert aside.is_dir()
    assert any(str(aside) in record.getMessage() for record in caplog.records)
    checkpoints.save(30, items_at(31), CONFIG)
    step, items = checkpoints.restore(targets_of(items_at(0)))
  assert step == 30
  assert_same(items, items_at(31))


def test_the_same_step_can_be_damaged_twice(directory: pathlib.Path) -> None:
  with opened(directory) as checkpoints:
    for _ in range(2):
      largest(directory / "30").unlink()
      assert checkpoints.restore(targets_of(items_at(0)))[0] == 20
      save_now(checkpoints, 30)
  aside = directory.with_name("checkpoints_damaged")
  assert sorted(path.name for path in aside.iterdir()) == ["30", "30-2"]


def test_all_damaged_is_an_error_that_says_why(directory: pathlib.Path) -> None:
  for step in ("10", "20", "30"):
    largest(directory / step).unlink()
  with opened(directory) as checkpoints:
    with pytest.raises(CheckpointError, match=r"no usable(.|\n)*30: .*missing(.|\n)*10: .*missing"):
      checkpoints.restore(targets_of(items_at(0)))
    assert checkpoints.steps() == []


def test_a_named_step_is_not_replaced_by_another(directory: pathlib.Path) -> None:
  with opened(directory) as checkpoints:
    with pytest.raises(CheckpointError, match=r"no checkpoint 25, but \[10, 20, 30\]"):
      checkpoints.restore(targets_of(items_at(0)), step=25)
    largest(directory / "20").unlink()
    with pytest.raises(CheckpointError, match="no usable"):
      checkpoints.restore(targets_of(items_at(0)), step=20)
    assert checkpoints.steps() == [10, 30]


def test_a_reader_passes_over_damage_and_changes_nothing(directory: pathlib.Path) -> None:
  largest(directory / "30").unlink()
  unfinished = directory / "40.orbax-checkpoint-tmp"
  unfinished.mkdir()
  before = sorted(directory.parent.rglob("*"))
  with opened(directory, read_only=True) as checkpoints:
    assert checkpoints.restore(targets_of(items_at(0)))[0] == 20
    with pytest.raises(CheckpointError, match="reading only"):
      checkpoints.save(50, items_at(50), CONFIG)
  assert sorted(directory.parent.rglob("*")) == before


def refusal(directory: pathlib.Path, targets: Any, **options: Any) -> str:
  """What `restore` says, having moved nothing."""
  with opened(directory) as checkpoints:
    with pytest.raises(CheckpointError) as caught:
      checkpoints.restore(targets, **options)
    assert checkpoints.steps() == [10, 20, 30]
  assert not directory.with_name("checkpoints_damaged").exists()
  return str(caught.value)


def test_an_absent_item_is_no_damage(directory: pathlib.Path) -> None:
  text = refusal(directory, targets_of({"ema_0.5": items_at(0)["params"]}))
  assert "no ['ema_0.5'], but ['ema_0.999', 'optimizer', 'params']" in text


def test_an_optional_item_may_be_absent(directory: pathlib.Path) -> None:
  targets = targets_of(items_at(0)) | {"ema_0.5": targets_of(items_at(0))["params"]}
  with opened(directory) as checkpoints:
    step, items = checkpoints.restore(targets, optional=("ema_0.5", "ema_0.999"))
  assert step == 30
  assert_same(items, items_at(30))


def test_a_way_back_is_noted_as_long_as_its_checkpoint_lasts(directory: pathlib.Path) -> None:
  with opened(directory) as checkpoints:
    checkpoints.go_back(20, 34)
    checkpoints.go_back(20, 47)
    assert checkpoints.steps() == [10, 20]
  with opened(directory) as checkpoints:
    assert checkpoints.returns(20) == (2, 47)
    assert checkpoints.returns(10) == (0, 0)
    assert_same(checkpoints.restore(targets_of(items_at(0)))[1], items_at(20))
    checkpoints.go_back(10, 50)
    checkpoints.save(20, items_at(40), CONFIG)
    assert checkpoints.steps() == [10, 20]
    assert checkpoints.returns(20) == (0, 0)


def test_another_config_is_listed_key_by_key(directory: pathlib.Path) -> None:
  ours = {"model": {"width": 128, "patch": (2, 2), "depth": 12}}
  text = refusal(directory, targets_of(items_at(0)), identity=ours)
  assert "model.width: checkpoint 96, this run 128" in text
  assert "model.depth" not in text  # which the checkpoint does not know
  assert "patch" not in text
  assert "steps" not in text


def test_other_arrays_are_listed_name_by_name(directory: pathlib.Path) -> None:
  items = items_at(0)
  params = {
    "kernel": jnp.zeros((16, 128)),
    "bias": [jnp.zeros(8, jnp.float32)],
    "scale": jnp.zeros(3),
  }
  text = refusal(directory, targets_of(items, params=params))
  assert "kernel: checkpoint float32[16, 256], this run float32[16, 128]" in text
  assert "bias.0: checkpoint bfloat16[8], this run float32[8]" in text
  assert "scale: checkpoint None, this run float32[3]" in text
  assert len(text.splitlines()) == 4


# The writes that TensorStore still has in hand when the first one fails find their loop closed.
unraisable_in_tensorstore = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
  """A disk that fills up: writing further into any file fails with an OSError."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_now(checkpoints: Checkpoints, step: int) -> None:
  checkpoints.save(step, items_at(step), CONFIG)
  checkpoints.wait()


@unraisable_in_tensorstore
@pytest.mark.parametrize("size", [8_000, 100])
def test_a_full_disk_is_reported_and_costs_no_checkpoint(
  directory: pathlib.Path, size: int
) -> None:
  report = r"checkpoint 40 could not be written(.|\n)*newest intact checkpoint is 30"
  with opened(directory, keep_latest=3) as checkpoints:
    with files_no_larger_than(size), pytest.raises(CheckpointError, match=report):
      save_now(checkpoints, 40)
    assert checkpoints.steps() == [10, 20, 30]
    assert_same(checkpoints.restore(targets_of(items_at(0)))[1], items_at(30))
    save_now(checkpoints, 50)
    assert_same(checkpoints.restore(targets_of(items_at(0)))[1], items_at(50))
    assert checkpoints.steps() == [20, 30, 50]


@unraisable_in_tensorstore
def test_the_next_save_reports_a_failed_one(directory: pathlib.Path) -> None:
  with opened(directory) as checkpoints:
    with files_no_larger_than(8_000):
      checkpoints.save(40, items_at(40), CONFIG)
      time.sleep(0.5)
    with pytest.raises(CheckpointError, match="checkpoint 40 could not be written"):
      checkpoints.save(50, items_at(50), CONFIG)
    save_now(checkpoints, 50)
    assert checkpoints.steps() == [10, 20, 30, 50]


ENDLESS_SAVES = """
import sys, jax, jax.numpy as jnp
from meanflow_jax.runtime.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep_latest=2, keep_every=None)
noise = jax.random.normal(jax.random.key(0), (64, 4096))
for step in range(1, 10**6):
  checkpoints.save(step, {"params": [noise + step] * 4}, {})
  if step == 2: print("saving", flush=True)
"""


def test_a_kill_while_saving_leaves_a_usable_checkpoint(tmp_path: pathlib.Path) -> None:
  directories = [tmp_path / str(index) for index in range(3)]
  processes = [
    subprocess.Popen([sys.executable, "-c", ENDLESS_SAVES, path], stdout=subprocess.PIPE)
    for path in directories
  ]
  for process in processes:
    assert process.stdout.readline() == b"saving\n"
    time.sleep(random.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.communicate()
  noise = jax.random.normal(jax.random.key(0), (64, 4096))
  for path in directories:
    with opened(path) as checkpoints:
      newest = checkpoints.latest_step()
      step, items = checkpoints.restore(targets_of({"params": [noise] * 4}))
    assert step == newest >= 1
    assert_same(items, {"params": [noise + step] * 4})
    assert not list(path.glob("*.orbax-checkpoint-tmp"))


def test_the_config_on_disk_is_plain_json(directory: pathlib.Path) -> None:
  stored = json.loads((directory / "30" / "config" / "metadata").read_text())
  assert stored == {"model": {"width": 96, "patch": [2, 2]}, "steps": 10}
