"""Plans of machines that are not here: what is printed, and that it follows from the figures."""

import dataclasses
import re

import jax
import pytest

from meanflow_jax import plan
from meanflow_jax.build import UserError
from meanflow_jax.compiled import DoesNotFitError, Largest, compile_step
from meanflow_jax.plan import Choice, best_first
from meanflow_jax.runtime import topology
from tests.runs import finish, mesh_of, start, tiny, train_step
from tests.tpu import uncached


def printed(capsys: pytest.CaptureFixture[str], *arguments) -> dict[str, str]:
  """The lines of a plan by name."""
  plan.run(*arguments)
  lines = capsys.readouterr().out.splitlines()
  return {line[:16].strip(): line[17:] for line in lines if line[:16].strip()}


@pytest.fixture
def four_chips(monkeypatch):
  """Four CPUs in the place of v5e:2x2, on which more than `images` do not fit."""
  compiler = {"images": 80, "compilations": 0}

  def compile_or_refuse(step, batch, mesh):
    if (images := batch["label"].shape[0]) > compiler["images"]:
      size = 15.75 * images / max(1, compiler["images"])
      raise DoesNotFitError(f"for temporaries ({size:.2f}G) exceeds available HBM (15.75G)")
    compiler["compilations"] += 1
    return compile_step(step, batch, mesh)

  monkeypatch.setattr(topology, "tpu_devices", lambda name: jax.devices()[:4])
  monkeypatch.setattr(plan, "compile_step", compile_or_refuse)
  return compiler


def number(text: str) -> float:
  return float(re.search(r"[\d,]*\.?\d+", text)[0].replace(",", ""))


def test_a_plan(four_chips, capsys):
  four_chips["images"] = 16
  rows = printed(capsys, tiny({"model.scan": False}), "v5e:2x2", False)
  assert four_chips["compilations"] == 1  # layers are unrolled in any case
  assert rows["topology"] == "v5e:2x2, 4 chips"
  assert rows["mesh"] == "data 4 x fsdp 1"
  assert rows["batch"] == "16 (4 per device, 1 microbatches)"
  assert rows["fits"].startswith("yes, ")
  assert rows["fits"].endswith("of 16.91 GB per device")
  assert "ICI" in rows["collectives"]
  assert number(rows["all-reduce"]) >= 1
  assert rows["largest batch"].startswith("16 (4 per device), ")
  assert rows["largest batch"].endswith("; 24 does not fit")
  assert "our roofline" in rows["time"]  # a CPU's compiler gives no estimate
  assert number(rows["whole run"]) == pytest.approx(1e3 / number(rows["time"]), rel=0.01)
  assert "; 8 steps: " in rows["whole run"]


def test_days_and_chip_hours_follow_from_the_time():
  config = tiny({"train.steps": 86_400})
  (line,) = plan._whole_run(2.5, config.train, 64)
  assert line.split() == (
    ["whole", "run", "0.40", "steps/s;", "86,400", "steps:", "2.50", "days,", "3,840", "chip-hours"]
  )


@pytest.mark.slow
def test_a_batch_that_does_not_fit(four_chips, capsys):
  rows = printed(capsys, tiny({"train.batch_size": 160}), "v5e:2x2", False)
  assert rows["fits"] == "NO: needs 33.82 GB of 16.91 GB per device"
  assert rows["largest batch"].startswith("80 ")
  assert rows["unrolled"].startswith("80 images")


def test_a_model_that_does_not_fit(four_chips, capsys):
  four_chips["images"] = 0
  plan.run(tiny(), "v5e:2x2", False)
  said = capsys.readouterr().out
  assert "NO: needs 270.58 GB" in said
  assert "none" in said
  assert "--config.mesh.fsdp" in said
  assert "steps/s" not in said


@pytest.mark.slow
def test_microbatches_are_counted_each(four_chips, capsys):
  """The figures are of one microbatch; the time of a step is that of all."""
  four_chips["images"] = 16
  rows = printed(capsys, tiny({"train.accumulate": 2}), "v5e:2x2", False)
  assert rows["unrolled"].startswith("8 images")
  whole = printed(capsys, tiny({"train.batch_size": 8}), "v5e:2x2", False)
  assert number(rows["time"]) == pytest.approx(2 * number(whole["time"]), rel=0.01)


@pytest.mark.slow
def test_a_sweep(four_chips, monkeypatch, capsys):
  four_chips["images"] = 16
  monkeypatch.setattr(plan, "REMAT", ("none", "blocks"))
  plan.run(tiny({"train.batch_size": 16}), "v5e:2x2", True)
  lines = capsys.readouterr().out.splitlines()
  start = next(i for i, line in enumerate(lines) if "images/s/chip" in line) + 1
  rows = [line.split() for line in lines[start:]]
  assert len(rows) == 2 * 2 * 2  # fsdp 1 and 4 (a host's, and all), remat, batches
  fitting, others = rows[:4], rows[4:]
  assert {row[4] for row in fitting} == {"none", "blocks"}
  assert {tuple(row[1:4]) for row in fitting} == {("4", "x", "1"), ("1", "x", "4")}
  rates = [float(row[0]) for row in fitting]
  assert rates == sorted(rates, reverse=True)
  assert {row[5] for row in fitting} == {"16"}
  assert {row[5] for row in others} == {"64"}
  assert all("lacks 50.73 GB" in " ".join(row) for row in others)


def test_a_mistake_is_a_row_of_its_own(four_chips, capsys):
  """18 images do not divide by four devices and groups of two rows, 72 do."""
  four_chips["images"] = 0
  plan.run(tiny({"train.batch_size": 18}), "v5e:2x2", True)
  lines = capsys.readouterr().out.splitlines()
  assert all("train.batch_size 18 is not divisible by 8" in line for line in lines[-6:])
  assert all(" 72 " in line and "lacks" in line for line in lines[-12:-6])


def test_rows_are_sorted_best_first():
  choice = Choice(1, "none", 8)
  ranked = [
    dataclasses.replace(choice, rate=20.0),
    dataclasses.replace(choice, rate=10.0),
    dataclasses.replace(choice, lacking=1e9),
    dataclasses.replace(choice, lacking=5e9),
    dataclasses.replace(choice, lacking=None),
    dataclasses.replace(choice, mistake="no such mesh"),
  ]
  assert sorted([*ranked[3:], *ranked[:3]], key=best_first) == ranked


def test_the_arithmetic_of_gpus_by_hand(capsys):
  """Tiny steps on 16 H100 (two nodes): 1 image per GPU, TF32 at 494.5 TFLOP/s."""
  config = tiny({"train.batch_size": 32, "train.steps": 10**9})
  rows = printed(capsys, config, "h100:16", False)
  mesh = mesh_of(1, 1)
  step = train_step(config, mesh)
  flops = step.method.flops(lambda: step.network.forward_flops((8, 8, 1)))
  params = 4 * sum(x.size for x in jax.tree.leaves(step.abstract_state(mesh).params))
  # Parameters, two moments and one average, and two counters, read and written.
  state = 4 * params
  compute, memory = 2 * flops / 494.5e12, 2 * state / 3.35e12
  # Eight adapters of 50 GB/s per node against NVLink's 450 GB/s; 15 of 16 parts, there and back.
  network = 2 * 15 / 16 * params / 400e9
  assert rows["FLOP"].startswith(f"{flops / 1e9:.2f} GFLOP/image")
  assert number(rows["at least"]) == pytest.approx(1 / max(compute, memory, network), rel=0.01)
  likely = 1 / (max(compute / 0.4, memory) + network)
  assert number(rows["more likely"]) == pytest.approx(likely, rel=0.01)
  assert number(rows["at least"].split("steps: ")[1]) == pytest.approx(
    1e9 * max(compute, memory, network) / 86400, abs=0.01
  )


def test_gpus_share_parameters_by_fsdp(capsys):
  big = {"model.width": 1024, "model.num_heads": 16, "model.depth": 4}
  plan.run(tiny({"train.batch_size": 16, **big}), "h200:8", False)
  lines = capsys.readouterr().out.splitlines()
  table = {line.split()[0]: line for line in lines if " GB of 141.00 GB" in line}
  assert list(table) == ["1", "8"]
  whole, spread = (number(line.split()[1]) for line in table.values())
  assert spread < 0.2 * whole
  assert all(line.endswith("fits") for line in table.values())


@pytest.mark.parametrize(
  ("changes", "name", "sweep", "words"),
  [
    ({}, "v5e:3x3", False, ["no topology 'v5e:3x3'", "v5e:2x2", "v5e:16x16"]),
    ({}, "tpu", True, ["no topology 'tpu'", "v5p", "h200"]),
    ({}, "h200:8", True, ["--sweep", "'h200:8'"]),
    ({"mesh.fsdp": 3}, "h200:8", False, ["mesh.fsdp 3", "8 GPUs"]),
    ({"mesh.data": 3}, "h200:8", False, ["mesh.data 3", "8 GPUs"]),
    ({}, "h200:64", False, ["train.batch_size 16", "64 devices"]),
    ({"model.patch_size": 3}, "h200:8", False, ["model.patch_size 3"]),
  ],
)
def test_mistakes(changes, name, sweep, words):
  with pytest.raises(UserError) as caught:
    plan.run(tiny(changes), name, sweep)
  assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.slow
def test_the_command(tmp_path):
  """From the shell: no folder is needed, none is made, and mistakes are told."""
  workdir = tmp_path / "run"
  commands = [
    (["--mode=plan", "--topology=h100:8"], 0, "GFLOP/image", ""),
    (["--mode=plan", "--topology=v5e:3x3"], 1, "", "v5e:1x1, v5e:2x2"),
    (["--mode=plan"], 1, "", "--topology"),
    (["--sweep"], 1, "", "--mode=plan"),
  ]
  processes = [start(workdir, *flags) for flags, *_ in commands]
  for process, (_, status, output, errors) in zip(processes, commands, strict=True):
    code, said, complained = finish(process)
    assert code == status, complained
    assert output in said
    assert errors in complained
  assert not workdir.exists()


@pytest.mark.tpu
def test_a_plan_by_the_compiler_of_tpus(monkeypatch, capsys):
  monkeypatch.setattr(plan, "largest_batch", lambda *_, **__: Largest(16, 1, 24))
  with uncached():
    rows = printed(capsys, tiny({"model.scan": True}), "v5p:2x2x1", False)
  assert rows["fits"].endswith(" of 102.80 GB per device")
  assert number(rows["all-reduce"]) >= 1
  assert rows["largest batch"].startswith("16 (4 per device), ")
  assert "--config.model.scan=False" in rows["time unrolled"]
  ratio = float(rows["time"].partition("ms/step: ")[2].partition(" times")[0])
  assert 0.5 < ratio < 5
  assert number(rows["time"]) == pytest.approx(ratio * number(rows["time unrolled"]), rel=0.02)
  assert number(rows["whole run"]) == pytest.approx(1e3 / number(rows["time"]), rel=0.01)
