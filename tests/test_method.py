"""A method that takes as little as one can, and shares no code with those that are here."""

import dataclasses
from collections.abc import Callable
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from meanflow_jax import build, storage
from meanflow_jax.arrays import Image, Label, NetworkFn, PRNGKey, Scalar, Time, per_row
from meanflow_jax.methods import registry
from meanflow_jax.methods.guidance import SamplingGuidance
from meanflow_jax.methods.method import Method, Metrics, Step
from meanflow_jax.methods.row_groups import RowGroups
from tests.runs import assert_close, mesh_of, stepped, tiny


@no_type_check
class Draws(flax.struct.PyTreeNode):
  noise: Image
  r: Time
  t: Time


@dataclasses.dataclass(frozen=True)
class FlowMatching(Method):
  """Velocities alone, of labels that are never dropped; times end before the noise does."""

  null_label: int
  margin: float = 0.1

  @property
  def rows(self) -> RowGroups:
    return RowGroups(size=1, first=1)

  def draw(self, key: PRNGKey, x: Image, y: Label, step: Step = 0) -> Draws:
    keys = jax.random.split(key)
    t = jax.random.uniform(keys[0], x.shape[:1], maxval=1 - self.margin)
    return Draws(noise=jax.random.normal(keys[1], x.shape), r=t, t=t)

  def objective(
    self, network_fn: NetworkFn, x: Image, y: Label, draws: Draws
  ) -> tuple[Scalar, Metrics]:
    v = draws.noise - x
    u = network_fn(x + per_row(draws.t) * v, draws.r, draws.t, y)
    error = jnp.mean((u - v) ** 2)
    return error, {"error": error}

  def flops(self, forward: Callable[..., float]) -> float:
    return 3 * forward()

  def sampling_guidance(self, omega: float, t_min: float, t_max: float) -> SamplingGuidance:
    return SamplingGuidance(omega, t_min, t_max, self.null_label)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
  methods = registry.known() | {"flow_matching": FlowMatching}
  monkeypatch.setattr(registry, "known", lambda: methods)


def config_of(**changes: Any) -> ConfigDict:
  return tiny({"method.name": "flow_matching", "method.flow_matching.margin": 0.2} | changes)


def test_it_trains_on_any_devices():
  one = stepped(config_of(), mesh_of(1, 1), 3)
  many = stepped(config_of(**{"train.accumulate": 2}), mesh_of(4, 2), 3)
  assert_close(many, one, rtol=1e-4)


def test_its_keys_are_its_own():
  assert build.method(config_of()).margin == 0.2
  assert storage.trained_guidance(config_of().method.to_dict()) == {}


def test_guidance_without_dropped_labels_is_refused():
  config, mesh = config_of(**{"sample.guidance.omega": 2.0}), mesh_of(1, 1)
  with pytest.raises(ValueError, match="no label is dropped in training"):
    build.sample_generator(config, build.network(config, mesh), build.method(config), mesh)
