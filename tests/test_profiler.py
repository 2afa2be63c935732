"""Profiles: what a trace says of a device, and the mode that makes one."""

import pathlib
import re
from types import SimpleNamespace

import pytest

from meanflow_jax.runtime import traces
from meanflow_jax.train_step import SCOPES
from tests.runs import finish, start

MS = 1e6  # in ns


def plane(name: str, **lines: list[tuple[str, float, float]]) -> SimpleNamespace:
  """A profile's plane: events by line, each with its name, start and duration in ms."""
  event = lambda name, start, length: SimpleNamespace(
    name=name, start_ns=start * MS, duration_ns=length * MS, stats=[]
  )
  made = [
    SimpleNamespace(name=line.replace("_", " "), events=[event(*e) for e in events])
    for line, events in lines.items()
  ]
  return SimpleNamespace(name=name, lines=made)


def activities(monkeypatch: pytest.MonkeyPatch, *planes: SimpleNamespace) -> list[traces.Activity]:
  data = SimpleNamespace(from_file=lambda path: SimpleNamespace(planes=planes))
  monkeypatch.setattr(traces.jax.profiler, "ProfileData", data)
  return traces.read(pathlib.Path("x.xplane.pb"))


def test_a_device_is_idle_where_no_stream_has_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
  first = [("a", 10, 10), ("b", 25, 5)]
  second = [("copy", 12, 10), ("a", 31, 9)]
  other = [("Steps", 0, 100)]
  gpu = plane("/device:GPU:0", Stream_1=first, Stream_2=second, Steps=other)
  host = plane("/host:metadata", Stream_1=first)
  (found,) = activities(monkeypatch, gpu, host)
  assert found.name == "/device:GPU:0"
  assert found.seconds == pytest.approx(0.030)
  assert found.idle == pytest.approx(0.004)  # 22 to 25 and 30 to 31
  assert found.longest_gap == pytest.approx(0.003)
  assert found.operations == pytest.approx({"a": 0.019, "b": 0.005, "copy": 0.010})


def test_a_loop_does_not_count_beside_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
  operations = [("%while.2 = (f32[]) while(...)", 0, 10), ("%fusion.1 = f32[] fusion()", 1, 8)]
  (found,) = activities(monkeypatch, plane("/device:TPU:0", XLA_Ops=operations))
  assert found.operations == pytest.approx({"fusion.1": 0.008})
  assert found.idle == 0


def test_a_trace_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
  with pytest.raises(ValueError, match=r"x.xplane.pb holds no operation of a device"):
    activities(monkeypatch, plane("/device:GPU:0", Steps=[("a", 0, 1)]))


def test_the_first_scope_that_encloses_an_instruction_has_it() -> None:
  program = """
ENTRY %main (x: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %a = f32[] add(%x, %x), metadata={op_name="jit(step)/guidance/network/add"}
  %b.1 = f32[] add(%a, %x), metadata={op_name="jit(step)/transpose(jvp(network))/add"}
  ROOT c = f32[] add(%b.1, %x), metadata={source_file="x"}
}"""
  seconds = {"a": 1.0, "b.1": 2.0, "c": 4.0, "none of it": 8.0}
  found = traces.by_scope(seconds, program, ("guidance", "network"))
  assert found == {"guidance": 1.0, "network": 2.0, "rest": 4.0}


def test_a_run_is_profiled(tmp_path: pathlib.Path) -> None:
  status, output, errors = finish(start(tmp_path / "run", "--mode=profile"))
  assert status == 0, errors
  rows = {line.split()[0]: line.split()[1:] for line in output.splitlines()}
  assert float(rows["/host:CPU"][0]) > 0
  shares = {scope: float(rows[scope][1]) for scope in (*SCOPES, "rest")}
  assert sum(shares.values()) == pytest.approx(100, abs=0.5)
  assert shares["rest"] < 30
  assert all(shares[scope] > 0 for scope in ("network", "jvp_du_dt", "guidance", "optimizer"))
  trace = pathlib.Path(re.search(r"open (\S+)", output)[1])
  assert trace.name == "perfetto_trace.json.gz"
  assert trace.is_file()
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["profile"]
