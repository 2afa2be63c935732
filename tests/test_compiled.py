"""A compiler's figures of a step, and the search for the largest batch that it accepts."""

import jax
import numpy as np
import pytest

from meanflow_jax import build
from meanflow_jax.compiled import (
  Compiled,
  DoesNotFitError,
  Need,
  Roofline,
  compile_step,
  device_bytes,
  largest_batch,
  scheduled_seconds,
)
from meanflow_jax.runtime import hlo, topology
from meanflow_jax.runtime.hlo import Traffic
from meanflow_jax.runtime.mesh import make_mesh
from tests.runs import mesh_of, tiny, train_step
from tests.tpu import uncached


@pytest.fixture(scope="module")
def figures() -> Compiled:
  """Of a tiny step, its batch of 16 spread over eight devices."""
  config, mesh = tiny(), mesh_of(8, 1)
  return compile_step(train_step(config, mesh), build.abstract_batch(config, mesh), mesh)


def test_figures_are_those_of_one_device(figures):
  config, mesh = tiny(), mesh_of(8, 1)
  state = train_step(config, mesh).abstract_state(mesh)
  images, labels = 2 * 8 * 8 * 4, 2 * 4
  assert figures.images == 2
  assert figures.arguments == device_bytes(state) + images + labels
  assert figures.peak >= figures.arguments
  assert figures.temporaries > 0
  assert 0 <= figures.output < 1000  # the metrics; the state takes the arguments' place
  assert figures.flops > 0
  assert figures.traffic > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_summed_over_the_devices_once(accumulate):
  """Not those of rows with r = t, of rows with r < t and of microbatches each by themselves."""
  config, mesh = tiny({"train.accumulate": accumulate, "train.batch_size": 32}), mesh_of(8, 1)
  step = train_step(config, mesh)
  figures = compile_step(step, build.abstract_batch(config, mesh), mesh)
  gradients, metrics = device_bytes(step.abstract_state(mesh).params), 100
  # The last biases of both time embedders have the same gradient, and the compiler may know.
  alike = 4 * config.model.width
  assert figures.program.collectives.keys() == {"all-reduce"}
  size = figures.program.collectives["all-reduce"].size
  assert gradients - alike <= size <= gradients + metrics


def test_microbatches_add_to_one_gradient():
  """Of scanned layers there is no second one, in which a microbatch's own gradient would lie."""
  wide = {"model.width": 256, "model.depth": 4, "model.num_heads": 4, "model.scan": True}
  mesh = mesh_of(1, 1)

  def temporaries(accumulate: int) -> int:
    config = tiny(wide | {"train.accumulate": accumulate, "train.batch_size": 4 * accumulate})
    step = train_step(config, mesh)
    return compile_step(step, build.abstract_batch(config, mesh), mesh).temporaries

  gradient = device_bytes(train_step(tiny(wide), mesh).abstract_state(mesh).params)
  assert temporaries(4) - temporaries(1) < gradient / 4


def test_bytes_are_those_of_a_shard():
  whole, spread = (
    device_bytes(train_step(tiny(), mesh).abstract_state(mesh).params)
    for mesh in (mesh_of(8, 1), mesh_of(1, 8))
  )
  mesh = mesh_of(1, 8)
  params = train_step(tiny(), mesh).abstract_state(mesh).params
  assert whole == 4 * sum(x.size for x in jax.tree.leaves(params))
  assert spread == sum(
    4 * np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params)
  )
  assert spread < whole


@pytest.mark.parametrize(
  ("message", "needed", "available"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
      "temporaries (27.5G) exceeds available HBM (15.75G).",
      27.5 * 2**30,
      15.75 * 2**30,
    ),
    ("RESOURCE_EXHAUSTED: Used 512.00M of 0.25G hbm. Exceeded", 2**29, 2**28),
    ("RESOURCE_EXHAUSTED: out of something else", None, None),
  ],
)
def test_what_the_compiler_says_is_missing(message, needed, available):
  error = DoesNotFitError(message)
  assert (error.needed, error.available) == (needed, available)


def refuse() -> Compiled:
  raise DoesNotFitError("Used 3G of 2G hbm")


def test_needs(figures):
  assert Need.of(lambda: figures) == Need(True, figures.peak, figures)
  assert Need.of(refuse) == Need(False, 3 * 2**30, None, 2 * 2**30)


LIMIT = 1000.0
STATE = 100


def search(memory, *, says=True, start=16, unit=8) -> tuple[int, list[int]]:
  """The largest batch by a function of it, and the batches that had to be compiled in full."""
  compiled = []

  def need(batch: int) -> Need:
    assert batch > 0
    assert batch % unit == 0
    fits = memory(batch) <= LIMIT
    if fits:
      compiled.append(batch)
    return Need(fits, round(memory(batch)) if says else None)

  found = largest_batch(need, {start: need(start)}, unit=unit, state=STATE, limit=LIMIT)
  assert found.failing - found.batch <= max(unit, found.failing // 32)
  assert memory(found.failing) > LIMIT
  return found.batch, compiled


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("start", [8, 16, 88, 4096])
@pytest.mark.parametrize(
  ("memory", "largest"),
  [
    (lambda n: STATE + 9.99 * n, 88),
    (lambda n: STATE + 9.99 * n + 200, 64),
    (lambda n: STATE + 0.11 * n**2, 88),
    (lambda n: STATE + 95 * n**0.5, 88),
    # Where memory is short the compiler finds ways to save some.
    (lambda n: STATE + (9 * n if n < 64 else 6 * n), 144),
    (lambda n: STATE + 250 * (n // 24), 88),
    (lambda n: STATE + 200 * n, 0),
  ],
)
def test_the_largest_batch_is_found(memory, largest, start, says):
  assert search(memory, start=start, says=says)[0] == largest


def test_a_straight_line_takes_few_compilations():
  largest, compiled = search(lambda n: STATE + 0.1 * n)
  assert 8700 <= largest <= 9000
  assert len(compiled) <= 3  # the first, and next to none but the one that is found


def test_a_model_that_always_fits_ends_the_search():
  found = largest_batch(
    lambda batch: Need(True, STATE), {8: Need(True, STATE)}, unit=8, state=STATE, limit=LIMIT
  )
  assert found.batch > 8
  assert found.failing is None


CHIP = topology.CHIPS["v5p"]


def fake(**changes) -> Compiled:
  program = hlo.Program(
    {"all-reduce": Traffic(3, 6 * 10**8), "all-gather": Traffic(1, 10**8)}, 0, 0
  )
  settings = {
    "seconds": 1.0,
    "images": 4.0,
    "flops": 4.59e12,
    "traffic": 2.765e10,
    "estimate": None,
    "arguments": 1,
    "peak": 1,
    "temporaries": 1,
    "output": 0,
    "program": program,
  }
  return Compiled(**settings | changes)


def test_a_roofline_by_hand():
  """4.59 TFLOP at 459 TFLOP/s, 27.65 GB at 2765 GB/s; 1.3 GB pass the links at 600 GB/s."""
  roofline = Roofline.of(fake(), CHIP)
  sent = 1.3e9 / 600e9
  np.testing.assert_allclose(
    [roofline.compute, roofline.memory, roofline.network], [0.01, 0.01, sent]
  )
  np.testing.assert_allclose(roofline.seconds, 0.01 + sent)
  half = Roofline.of(fake(), CHIP, share=0.5)
  np.testing.assert_allclose(half.seconds, 2 * roofline.seconds)


def test_scheduled_cycles_win_over_the_roofline():
  program = hlo.Program({"all-reduce": Traffic(1, 3 * 10**8)}, 35 * 10**6, 0)
  seconds = scheduled_seconds(fake(program=program), CHIP)
  np.testing.assert_allclose(seconds, 35e6 / 1.75e9 + 6e8 / 600e9)
  assert scheduled_seconds(fake(), CHIP) == Roofline.of(fake(), CHIP).seconds


@pytest.mark.tpu
def test_the_compiler_of_tpus():
  """Its figures of tiny steps, and its refusal of a gigantic one."""
  devices = topology.tpu_devices("v5e:2x2")
  mesh, alone = make_mesh(2, 2, devices), make_mesh(4, 1, devices)
  config = tiny({"data.image_size": 16, "model.patch_size": 2})
  step = train_step(config, mesh)
  with uncached():
    figures = compile_step(step, build.abstract_batch(config, mesh), mesh)
  state = step.abstract_state(mesh)
  assert figures.images == 4
  assert device_bytes(state) < figures.arguments < figures.peak
  assert figures.program.collectives["all-reduce"].size > 0
  assert figures.program.cycles > 0
  assert figures.program.uncounted_loops == 0

  step = train_step(config, alone)
  with uncached():
    figures = compile_step(step, build.abstract_batch(config, alone), alone)
  gradients = device_bytes(step.abstract_state(alone).params)
  assert figures.program.collectives["all-reduce"].size == pytest.approx(gradients, rel=0.01)

  config.train.batch_size = 2**24
  with uncached(), pytest.raises(DoesNotFitError, match="memory") as caught:
    compile_step(step, build.abstract_batch(config, mesh), mesh)
  assert caught.value.needed > caught.value.available
  assert caught.value.available == topology.CHIPS["v5e"].memory


@pytest.mark.tpu
def test_gradients_of_unrolled_layers_are_not_put_off():
  """What they are products of would lie beside what the forward pass keeps."""
  rows, layers, width = 16, 6, 128
  model = {"width": width, "depth": layers, "num_heads": 2, "patch_size": 2, "scan": False}
  sizes = {f"model.{key}": size for key, size in model.items()} | {"train.batch_size": rows}
  config = tiny(sizes | {"data.image_size": 32, "model.dtype": "bfloat16"})
  mesh = make_mesh(1, 1, topology.tpu_devices("v5e:2x2")[:1])
  with uncached():
    figures = compile_step(train_step(config, mesh), build.abstract_batch(config, mesh), mesh)
  products = 3 + 1 + 1 + 4 + 1  # qkv, what attention mixes, its projection, the perceptron's two
  assert figures.temporaries < layers * products * rows * 256 * width * 2
