"""A loss spike is found where it happens, written down, and undone as the config asks."""

import collections
import functools
import json
import math
import pathlib
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import base
from meanflow_jax import build, command_line, diagnosis, train
from meanflow_jax.data.sources import Digits
from meanflow_jax.guard import ACTIONS, PATIENCE, Guard, GuardState, part_names, part_norms
from meanflow_jax.methods.meanflow import MeanFlow
from meanflow_jax.runtime.mesh import global_batch
from meanflow_jax.runtime.reporting import NonFiniteError, Report
from meanflow_jax.train_step import TrainState, TrainStep
from tests.runs import (
  assert_bitwise_equal,
  assert_close,
  comparable,
  finish,
  logged,
  mesh_of,
  saved_state,
  start_program,
  tiny,
  train_step,
)
from tests.spiked import (
  FAR_BACK,
  MANY,
  MOMENTS,
  ONE,
  STEPS,
  Affine,
  Spiked,
  config_of,
  trained,
)
from tests.tiny import dit, random_params

# The guard by itself.


def guard(action: str = "record", **changes: Any) -> Guard:
  return Guard(**{"action": action, "factor": 10.0, "window": 20, "steps_back": 1} | changes)


def judged(guard: Guard, values: list[tuple[float, float]]) -> tuple[GuardState, list[bool]]:
  """What it remembers after the values of some steps, and which were spikes."""
  update, state, spikes = jax.jit(guard.update), guard.init(), []
  for value in values:
    state, spike = update(state, *map(jnp.float32, value))
    spikes.append(bool(spike))
  return state, spikes


def test_the_mean_is_plain_over_the_first_window_and_exponential_after_it() -> None:
  values = np.random.default_rng(0).uniform(1, 3, (50, 2))
  expected = values[:20].mean(axis=0)
  state, _ = judged(guard(), values[:20].tolist())
  np.testing.assert_allclose(state.means, expected, rtol=1e-6)
  for value in values[20:]:
    expected += (value - expected) / 20
  state, spikes = judged(guard(), values.tolist())
  np.testing.assert_allclose(state.means, expected, rtol=1e-6)
  assert not any(spikes)


@pytest.mark.parametrize("spike", [(10.1, 1.0), (1.0, 10.1), (1e30, 1.0)])
def test_one_of_both_values_is_enough(spike: tuple[float, float]) -> None:
  _, spikes = judged(guard(), [(1, 1)] * 20 + [spike, (1, 1)])
  assert spikes == [False] * 20 + [True, False]


def test_just_below_the_limit_is_no_spike() -> None:
  _, spikes = judged(guard(), [(1, 1)] * 20 + [(9.9, 9.9)])
  assert not any(spikes)


def test_it_sleeps_until_it_has_seen_a_window() -> None:
  _, spikes = judged(guard(), [(1, 1)] * 19 + [(1e6, 1e6)])
  assert not any(spikes)


def test_a_spike_counts_as_the_limit_only() -> None:
  state, _ = judged(guard(), [(1, 1)] * 20 + [(1e9, 1)])
  np.testing.assert_allclose(state.means, [1 + 9 / 20, 1], rtol=1e-6)


def test_a_lasting_change_of_level_is_learnt() -> None:
  _, spikes = judged(Guard("record", 10.0, 100, 1), [(1, 1)] * 100 + [(100, 100)] * 100)
  assert 20 <= sum(spikes) <= 30
  assert spikes == [False] * 100 + [True] * sum(spikes) + [False] * (100 - sum(spikes))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_a_spike_where_it_can_be_undone(value: float) -> None:
  values = [(1.0, 1.0)] * 3 + [(value, 1.0), (1.0, value)] * PATIENCE + [(1.0, 1.0), (value, 1.0)]
  found = {action: judged(guard(action), values) for action in ("record", "skip", "roll_back")}
  for state, _ in found.values():  # it teaches nothing
    np.testing.assert_array_equal(state.means, [1, 1])
    assert state.seen == 4
  ends = [False, True]
  assert not any(found["record"][1])
  assert found["roll_back"][1] == [False] * 3 + [True] * 2 * PATIENCE + ends
  assert found["skip"][1] == [False] * 3 + [True] * PATIENCE + [False] * PATIENCE + ends


def test_the_parts_of_a_gradient_are_its_layers_and_other_modules() -> None:
  params = random_params(dit(depth=3), (4, 4, 1))
  names, norms = part_names(params), np.asarray(part_norms(params))
  assert names[:3] == ["blocks_0", "blocks_1", "blocks_2"]
  assert {"final", "label_embedder", "patch_embedder"} <= set(names)
  assert part_names(jax.eval_shape(lambda: params)) == names
  found = dict(zip(names, norms, strict=True))
  flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
  second = jax.tree.map(lambda x: x[1], params["blocks"])
  np.testing.assert_allclose(found["blocks_1"], np.linalg.norm(flat(second)), rtol=1e-6)
  table = params["label_embedder"]
  np.testing.assert_allclose(found["label_embedder"], np.linalg.norm(flat(table)), rtol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(norms), np.linalg.norm(flat(params)), rtol=1e-6)


# The config.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"action": "stop"}, r"train.guard.action must be one of .*roll_back.*'stop'"),
    ({"action": "record", "factor": 1.0}, r"train.guard.factor .* 1.0"),
    ({"action": "skip", "factor": math.nan}, r"train.guard.factor .* nan"),
    ({"action": "skip", "window": 0}, r"train.guard.window .* 0"),
    ({"action": "roll_back", "steps_back": 0}, r"train.guard.steps_back .* 0"),
    ({"action": "roll_back", "steps_back": 6}, r"steps_back 6 .*checkpoint_every 4 .*latest 2"),
  ],
)
def test_mistakes_are_refused(changes: dict[str, Any], message: str) -> None:
  config = tiny({f"train.guard.{key}": value for key, value in changes.items()})
  with pytest.raises(ValueError, match=message):
    train_step(config, mesh_of(1, 1))


def test_roll_backs_need_checkpoints() -> None:
  changes = {"train.guard.action": "roll_back", "train.guard.steps_back": 1}
  with pytest.raises(ValueError, match="checkpoint_every 0"):
    build.guard(tiny(changes | {"train.checkpoint_every": 0}))
  assert build.guard(tiny(changes | {"train.guard.steps_back": 5}))
  assert build.guard(tiny(changes | {"train.guard.steps_back": 9, "checkpoint.keep_every": 8}))


@pytest.mark.parametrize("action", ACTIONS)
def test_keys_are_read_where_the_action_says_so(action: str) -> None:
  config = base.get_config()
  config.train.guard.action = action
  unread = command_line.unread(
    config, [f"train.guard.{key}" for key in ("action", "factor", "window", "steps_back")]
  )
  assert len(unread) == {"off": 3, "record": 1, "skip": 1, "roll_back": 0}[action]


# In a run: twelve steps, saved at 4, 8 and 12 (of "skip": at each); the guard wakes after 4.


@pytest.fixture(autouse=True, scope="module")
def small_network() -> Iterator[None]:
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build, "network", lambda config, mesh: Affine())
    yield


def without_guard(state: TrainState) -> TrainState:
  return state.replace(guard=None)


def steps_saved(workdir: pathlib.Path) -> list[int]:
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def lines(workdir: pathlib.Path) -> list[dict[str, float]]:
  timeless = lambda line: {k: v for k, v in line.items() if k != "eta" and "second" not in k}
  return [timeless(line) for line in logged(workdir)]


def values(workdir: pathlib.Path, name: str) -> list[float]:
  return [line[name] for line in lines(workdir)]


def spiked_steps(workdir: pathlib.Path) -> list[int]:
  return [int(line["step"]) for line in logged(workdir) if line["spike"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
  """Runs by action and device mesh, with a spike at step 7."""
  folder = tmp_path_factory.mktemp("runs")

  @functools.cache
  def run(action: str, mesh: tuple[int, int] = ONE, factor: float = 1e3) -> pathlib.Path:
    workdir = folder / f"{action}_{mesh[0]}_{factor}"
    return trained(workdir, config_of(action), spikes=(6,), factor=factor, mesh=mesh)

  return run


def test_to_record_a_spike_changes_nothing(runs: Any) -> None:
  plain, watched = runs("off"), runs("record")
  ours, theirs = (saved_state(path, STEPS, config_of("off")) for path in (watched, plain))
  assert_bitwise_equal(ours, theirs)
  assert spiked_steps(watched) == [7]
  extra = [{k: v for k, v in line.items() if k != "spike"} for line in lines(watched)]
  assert extra == lines(plain)
  assert not (plain / "spikes").exists()


def test_the_diagnosis_tells_what_happened(runs: Any) -> None:
  workdir = runs("record")
  folder = workdir / "spikes"
  names = ["step_0000007.json", "step_0000007.png", "step_0000007_rows_of_process_0.npz"]
  assert sorted(path.name for path in folder.iterdir()) == names
  facts = json.loads((folder / names[0]).read_text())
  line = logged(workdir)[6]
  assert (facts["step"], facts["batch"]) == (7, 6)
  assert facts["action"] == "record"
  assert facts["config"] == json.loads(config_of("record").to_json())
  for name in ("gradient_norm", "error", "loss"):
    assert facts["metrics"][name] == line[name]
  assert facts["metrics"]["error"] > facts["limits"]["error"] > 0
  total = math.hypot(*facts["gradient_norms"].values())
  assert list(facts["gradient_norms"]) == ["blocks_0", "blocks_1", "label_embedder", "times"]
  np.testing.assert_allclose(total, facts["metrics"]["gradient_norm"], rtol=1e-5)
  # The limits are those of the four or more steps before.
  means = np.mean(values(workdir, "error")[:4])
  for error in values(workdir, "error")[4:6]:
    means += (error - means) / 4
  np.testing.assert_allclose(facts["limits"]["error"], 10 * means, rtol=1e-5)
  with Image.open(folder / names[1]) as image:
    assert image.size[0] > 100


def test_the_rows_of_the_diagnosis_are_those_of_the_step(runs: Any) -> None:
  with np.load(runs("record") / "spikes" / "step_0000007_rows_of_process_0.npz") as rows:
    assert set(rows) == {"row", "label", "r", "t"}
    np.testing.assert_array_equal(rows["row"], range(16))
    batch = next(train.host_batches(tiny(), Digits(split="train"), mesh_of(1, 1), 6))
    np.testing.assert_array_equal(rows["label"], batch["label"])
    drawn = draws_of_step(train_step(config_of("record"), mesh_of(1, 1)), 6, batch)
    for name in ("r", "t"):
      np.testing.assert_array_equal(rows[name], drawn[name])
    assert np.ptp(rows["t"]) > 0.1


def draws_of_step(step: TrainStep, number: int, batch: dict[str, np.ndarray]) -> dict[str, Any]:
  """What a step hands to the objective."""
  told = lambda *args: (jnp.zeros(()), {"error": jnp.zeros(()), "r": args[-1].r, "t": args[-1].t})
  state = jax.eval_shape(step.init)
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(MeanFlow, "objective", told)
    return jax.jit(step)(state.replace(step=jnp.int32(number)), batch)[1]


@pytest.mark.parametrize("mesh", [ONE, MANY])
def test_to_skip_leaves_the_parameters_as_they_were(runs: Any, mesh: tuple[int, int]) -> None:
  config, workdir = config_of("skip"), runs("skip", mesh)
  before, after, next_ = (saved_state(workdir, step, config) for step in (6, 7, 8))
  for name in ("params", "ema", "opt_state"):
    assert_bitwise_equal(getattr(after, name), getattr(before, name))
    with pytest.raises(AssertionError):
      assert_bitwise_equal(getattr(next_, name), getattr(after, name))
  assert after.guard.seen == 4
  assert (after.guard.means > before.guard.means).any()
  assert spiked_steps(workdir) == [7]
  errors = values(workdir, "error")
  assert max(errors[7:]) < 2 * max(errors[:6]) < errors[6]


@pytest.mark.parametrize("action", ["skip", "roll_back"])
def test_any_number_of_devices_finds_and_does_the_same(runs: Any, action: str) -> None:
  one, many = runs(action, ONE), runs(action, MANY)
  config = config_of(action)
  ours, theirs = (comparable(saved_state(path, STEPS, config)) for path in (many, one))
  assert_close(ours, theirs, rtol=1e-3)
  assert ours.guard.offset == theirs.guard.offset == {"skip": 0, "roll_back": 3}[action]
  assert spiked_steps(many) == spiked_steps(one)


def test_a_gradient_that_is_not_finite_is_skipped(runs: Any) -> None:
  workdir, config = runs("skip", ONE, math.nan), config_of("skip")
  state = saved_state(workdir, STEPS, config)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
  assert spiked_steps(workdir) == [7]
  assert "error" not in logged(workdir)[6]
  facts = json.loads((workdir / "spikes" / "step_0000007.json").read_text())
  assert not math.isfinite(float(facts["metrics"]["error"]))


def test_what_is_not_finite_for_long_stops_the_run(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr("meanflow_jax.guard.PATIENCE", 3)
  config = config_of("skip")
  with pytest.raises(NonFiniteError, match="step 9:"):
    trained(tmp_path, config, spikes=tuple(range(5, 10)), factor=math.nan)
  assert (tmp_path / "nonfinite_step_0000009" / "step.json").exists()
  finite = jax.tree.map(np.isfinite, saved_state(tmp_path, 8, config))
  assert all(x.all() for x in jax.tree.leaves(finite))


@pytest.mark.parametrize("factor", [1e3, math.nan])
def test_a_roll_back_goes_on_from_the_checkpoint_with_the_batches_after_the_spike(
  runs: Any, factor: float, tmp_path: pathlib.Path
) -> None:
  workdir, config = runs("roll_back", ONE, factor), config_of("roll_back")
  assert steps_saved(workdir) == [4, 8, 12]
  state = saved_state(workdir, STEPS, config)
  assert state.guard.offset == 3  # back from step 7 to 4, whose next batch was that of number 4
  assert spiked_steps(workdir) == []  # what was undone is not in the curve either
  assert [line["step"] for line in logged(workdir)] == [*range(1, STEPS + 1)]
  facts = json.loads((workdir / "spikes" / "step_0000007.json").read_text())
  assert facts["outcome"] == "back to step 4, and on with other data"
  # The same without the loop: from the checkpoint, the batches and draws 7, 8, ..., 14.
  expected = walked(
    train_step(config, mesh_of(*ONE)), saved_state(workdir, 4, config), range(7, 15)
  )
  assert_bitwise_equal(without_guard(state), without_guard(expected))


def walked(step: TrainStep, state: TrainState, numbers: range) -> TrainState:
  """Steps with the batches of the given numbers, and their draws."""
  mesh = mesh_of(*ONE)
  offset = np.int32(numbers[0] - state.step)
  shardings = jax.tree.map(lambda x: x.sharding, step.abstract_state(mesh))
  state = jax.device_put(state.replace(guard=state.guard.replace(offset=offset)), shardings)
  advance, feed = step.jitted(mesh), Spiked(set(), 1.0)
  for number in numbers:
    batch = next(train.host_batches(tiny(), feed, mesh, number))
    state, _ = advance(state, global_batch(mesh, batch))
  assert advance._cache_size() == 1
  return jax.tree.map(np.asarray, state)


def stopped_after(step: int, times: int = 1) -> pytest.MonkeyPatch:
  """Sends SIGTERM once, right after a step was dispatched for the given time; to be undone."""
  push, seen = Report.push, collections.Counter()

  def pushing(report: Report, number: int, metrics: Mapping[str, jax.Array]) -> None:
    push(report, number, metrics)
    seen[number] += 1
    if number == step and seen[step] == times:
      signal.raise_signal(signal.SIGTERM)

  patch = pytest.MonkeyPatch()
  patch.setattr(Report, "push", pushing)
  return patch


# Before the spike; in its step, before that is known; in a step that came twice.
@pytest.mark.parametrize(("step", "times", "saved"), [(6, 1, 6), (7, 1, 4), (5, 2, 5)])
def test_a_run_that_is_stopped_around_a_roll_back_resumes_bitwise(
  runs: Any,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  step: int,
  times: int,
  saved: int,
) -> None:
  whole, config = runs("roll_back"), config_of("roll_back")
  monkeypatch.setattr(jax, "device_count", lambda: 1)  # each step is read while the next one runs
  patch = stopped_after(step, times)
  with pytest.raises(SystemExit):
    trained(tmp_path, config, spikes=(6,))
  patch.undo()
  assert steps_saved(tmp_path)[-1] == saved
  trained(tmp_path, config, spikes=(6,))
  assert steps_saved(tmp_path)[-2:] == [8, 12]
  assert_bitwise_equal(saved_state(tmp_path, STEPS, config), saved_state(whole, STEPS, config))
  assert lines(tmp_path) == lines(whole)


def test_without_a_checkpoint_that_is_old_enough_the_run_goes_on(
  runs: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  config = config_of("roll_back", **{"train.guard.steps_back": 4})
  trained(tmp_path, config, spikes=(6,))
  assert "no checkpoint is 4 steps older" in capsys.readouterr().out
  ours = saved_state(tmp_path, STEPS, config)
  theirs = saved_state(runs("record"), STEPS, config_of("record"))
  assert_bitwise_equal(ours, theirs)


def test_without_one_what_is_not_finite_stops_the_run(tmp_path: pathlib.Path) -> None:
  config = config_of("roll_back", **{"train.guard.steps_back": 4})
  with pytest.raises(NonFiniteError, match="step 7:"):
    trained(tmp_path, config, spikes=(6,), factor=math.nan)


def test_the_same_place_is_rolled_back_to_a_few_times_only(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """However often the run is started again."""
  returned, roll_back = [], train.roll_back
  monkeypatch.setattr(train, "roll_back", lambda *args: returned.append(1) or roll_back(*args))
  for _ in range(2):
    with pytest.raises(build.UserError, match="after 3 roll-backs to step 4") as caught:
      trained(tmp_path, config_of("roll_back"), spikes=tuple(range(6, 60)))
    assert "spikes" in str(caught.value)
    assert steps_saved(tmp_path) == [4]
    assert len(returned) == 3
  facts = json.loads((tmp_path / "spikes" / "step_0000006.json").read_text())
  assert facts["outcome"] == "the run ends"


def test_memory_and_roll_backs_are_found_where_the_checkpoints_lie(
  runs: Any, tmp_path: pathlib.Path
) -> None:
  config = config_of("roll_back", **{"checkpoint.path": str(tmp_path / "elsewhere")})
  patch = stopped_after(5, times=2)  # after the roll-back from step 7
  with pytest.raises(SystemExit):
    trained(tmp_path / "run", config, spikes=(6,))
  patch.undo()
  trained(tmp_path / "run", config, spikes=(6,))
  states = (
    saved_state(path, STEPS, config) for path in (tmp_path / "elsewhere", runs("roll_back"))
  )
  assert_bitwise_equal(*states)


def live(workdir: pathlib.Path, *moment: str) -> tuple[int, str]:
  """A run with a spike in a process of its own, perhaps killed; exit status and what it said."""
  process = start_program(sys.executable, "-m", "tests.spiked", str(workdir), *moment)
  status, output, errors = finish(process)
  return status, output + errors


@pytest.mark.slow
def test_kills_around_a_roll_back_change_not_one_bit(tmp_path: pathlib.Path) -> None:
  calm, rough = tmp_path / "calm", tmp_path / "rough"
  status, said = live(calm)
  assert status == 0, said
  assert said.count("is a spike") == 1
  starts, spikes = {}, {}
  for moment in MOMENTS:
    status, said = live(rough, moment)
    assert status == -signal.SIGKILL, (moment, said)
    starts[moment] = int(said.split("steps ")[1].split()[0])
    spikes[moment] = said.count("is a spike")
  # Until the roll-back is noted each life meets the spike, and from then on none does.
  noted = list(MOMENTS).index("after the roll-back")
  assert list(starts.values()) == [0, 10, 10, 8, 8, 4, 4, 4]
  assert list(spikes.values()) == [1] * (noted + 1) + [0] * (len(MOMENTS) - noted - 1)
  status, said = live(rough)
  assert status == 0, said
  assert "is a spike" not in said
  config = config_of("roll_back", **FAR_BACK)
  assert steps_saved(rough) == steps_saved(calm) == [2, 4, 6, 8, 10, 12]
  for step in steps_saved(calm):
    assert_bitwise_equal(*(saved_state(workdir, step, config) for workdir in (rough, calm)))
  note = json.loads((rough / "checkpoints" / "4" / "returns.json").read_text())
  assert note == {"times": 1, "position": 11}
  assert lines(rough) == lines(calm)
  assert [path.name for path in (rough / "checkpoints_damaged").iterdir()] == ["10"]


def test_files_are_written_of_a_limited_number_of_spikes(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  monkeypatch.setattr(diagnosis, "MOST", 1)
  trained(tmp_path, config_of("skip"), spikes=(6, 9))
  assert spiked_steps(tmp_path) == [7, 10]
  assert len(list((tmp_path / "spikes").glob("*.json"))) == 1
  output = capsys.readouterr().out
  first, second = [line for line in output.splitlines() if line.startswith("warning")]
  for words in ("step 7 is a spike", "gradient_norm", "limit", "left out", "step_0000007.json"):
    assert words in first
  assert "takes no more" in second
  assert "gradient_norms" not in output
  assert output.count("spike 0") == STEPS - 2


def test_a_guard_can_be_turned_on_and_off(tmp_path: pathlib.Path) -> None:
  patch = stopped_after(6)
  with pytest.raises(SystemExit):
    trained(tmp_path, config_of("off"), spikes=(8,))
  patch.undo()
  on = config_of("roll_back", **{"train.guard.window": 1, "train.guard.steps_back": 3})
  trained(tmp_path, on, spikes=(8,))  # rolls back to a checkpoint that knows of no guard
  assert saved_state(tmp_path, STEPS, on).guard.offset == 3
  trained(tmp_path, config_of("off"), spikes=(8,))
  assert steps_saved(tmp_path)[-1] == STEPS


# What it costs.


def lowered(action: str, mesh: tuple[int, int] = ONE) -> Any:
  config, mesh = config_of(action), mesh_of(*mesh)
  step = train_step(config, mesh)
  return step.jitted(mesh).lower(step.abstract_state(mesh), build.abstract_batch(config, mesh))


def test_without_a_guard_nothing_is_computed_for_it() -> None:
  names = lambda lowered: set(lowered.out_info[1])
  guarded, plain = lowered("record"), lowered("off")
  assert names(guarded) - names(plain) == {"spike", "limits", "gradient_norms"}
  leaves = lambda lowered: len(jax.tree.leaves(lowered.out_info[0]))
  assert leaves(guarded) - leaves(plain) == len(jax.tree.leaves(guard().init()))
  assert "is_finite" not in plain.as_text()
  assert "is_finite" in guarded.as_text()


def test_a_guarded_step_is_compiled_once_and_donates_its_state() -> None:
  config, mesh = config_of("skip"), mesh_of(*MANY)
  step = train_step(config, mesh)
  advance, state = step.jitted(mesh), step.new_state(mesh)
  feed = train.device_batches(config, Digits(split="train"), mesh, 0)
  for _ in range(3):
    old = state
    with jax.transfer_guard("disallow"):
      state, metrics = advance(old, next(feed))
    jax.block_until_ready(metrics)
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
  assert advance._cache_size() == 1
