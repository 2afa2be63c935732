"""Features stream to the same sums on any devices, in any batches, with or without a break."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_jax import stream
from meanflow_jax.features import Extractor
from meanflow_jax.generate import Generator, Labels, finite
from meanflow_jax.methods.guidance import SamplingGuidance
from meanflow_jax.methods.sampler import time_grid
from meanflow_jax.metrics.summary import FEATURES, LOGITS, SPATIAL, Summary
from meanflow_jax.runtime.mesh import constrain_rows
from meanflow_jax.stream import Resumable
from tests.runs import mesh_of
from tests.tiny import dit, meanflow, random_params

SHAPE = (8, 8, 1)
COUNT = 29
NOWHERE = Resumable(None)
METHOD = meanflow(equal_fraction=0.5)
NETWORK = dit(depth=1, patch_size=4)
PARAMS = random_params(NETWORK, SHAPE)
RNG = np.random.default_rng(0)


def extractor(name: str, sizes: dict[str, int]) -> Extractor:
  params = {key: jnp.asarray(RNG.normal(size=(64, n)) / 64) for key, n in sizes.items()}
  apply = lambda params, levels: {k: levels.reshape(-1, 64) @ w for k, w in params.items()}
  return Extractor(params, apply, name, f"random {name}")


EXTRACTORS = (
  extractor("all", {FEATURES: 5, SPATIAL: 3, LOGITS: 4}),
  extractor("few", {FEATURES: 2}),
)


def generator(shape: tuple[int, int], batch_size: int) -> Generator:
  mesh = mesh_of(*shape)
  return Generator(
    network=NETWORK.clone(constrain=constrain_rows(mesh)),
    step=METHOD.step,
    guidance=SamplingGuidance(1.0, 0.0, 1.0, METHOD.null_label),
    grid=time_grid(1),
    image_shape=SHAPE,
    labels=Labels("random", 0, 3),
    seed=0,
    batch_size=batch_size,
    rounding="meanflow",
    mesh=mesh,
    decoder=None,
  )


def summaries(
  shape: tuple[int, int], batch_size: int, resumable: Resumable = NOWHERE, **changes: Any
) -> dict[str, Summary]:
  images = stream.GeneratedImages(generator(shape, batch_size), EXTRACTORS)
  settings = {
    "params": PARAMS,
    "count": COUNT,
    "keep": True,
    "check": lambda: None,
    "title": "",
  } | changes
  return images.summaries(resumable=resumable, **settings)


def numbers(found: dict[str, Summary]) -> dict[str, np.ndarray]:
  """All sums, and features in the order of the images."""
  arrays = {
    f"{name} {key}": array
    for name, summary in found.items()
    for key, array in summary.to_arrays().items()
    if key not in ("index", "kept")
  }
  return arrays | {f"{name} ordered": summary.ordered() for name, summary in found.items()}


def assert_same(found: dict[str, Summary], expected: dict[str, Summary], rtol: float) -> None:
  ours, theirs = numbers(found), numbers(expected)
  assert ours.keys() == theirs.keys()
  for name, array in theirs.items():
    np.testing.assert_allclose(ours[name], array, rtol=0, atol=rtol * np.abs(array).max())


def test_sums_are_those_of_the_images() -> None:
  made = generator((1, 1), COUNT)
  images = np.concatenate([batch for batch, _ in made.batches(PARAMS, COUNT)]).astype(np.float32)
  found = summaries((1, 1), 8)
  for each in EXTRACTORS:
    outputs = {k: np.asarray(v) for k, v in each(jnp.asarray(images)).items()}
    whole = Summary.of(COUNT, np.arange(COUNT), outputs, keep=True)
    assert_same({"x": found[each.name]}, {"x": whole}, 1e-5)


@pytest.mark.parametrize(("shape", "batch_size"), [((8, 1), 8), ((2, 4), 24), ((8, 1), 64)])
def test_devices_and_batches_make_no_difference(shape: tuple[int, int], batch_size: int) -> None:
  assert_same(summaries(shape, batch_size), summaries((1, 1), 7), 1e-5)


class StoppedError(Exception):
  """In the middle of an evaluation."""


@pytest.mark.parametrize("batch_size", [8, 16])
def test_an_interrupted_evaluation_goes_on(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
  resumable = Resumable(tmp_path / "unfinished" / "sums")
  one_ahead = stream.one_ahead

  def stop_after_two(dispatch: Any, firsts: range) -> Iterator[Any]:
    for number, step in enumerate(one_ahead(dispatch, firsts)):
      if number == 2:
        raise StoppedError
      yield step

  started: list[int] = []

  def watched(dispatch: Any, firsts: range) -> Iterator[Any]:
    started.append(firsts.start)
    return one_ahead(dispatch, firsts)

  monkeypatch.setattr(stream, "one_ahead", stop_after_two)
  with pytest.raises(StoppedError):
    summaries((8, 1), 8, resumable)
  monkeypatch.setattr(stream, "one_ahead", watched)
  found = summaries((1, 1), batch_size, resumable)  # on other devices, too
  assert_same(found, summaries((1, 1), 7), 1e-5)
  assert_same(summaries((1, 1), 8, resumable), found, 0)
  assert started == [16, 0, COUNT]  # the last has nothing left to do
  resumable.discard()
  assert not list(tmp_path.iterdir())


def test_an_interruption_between_extractors_counts_no_image_twice(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  resumable = Resumable(tmp_path / "sums")
  made, of = [], Summary.of

  def stop_in_the_second_batch(*args: Any, **settings: Any) -> Summary:
    made.append(args)
    if len(made) == 4:  # the first extractor's sums of the batch are done
      raise StoppedError
    return of(*args, **settings)

  monkeypatch.setattr(Summary, "of", stop_in_the_second_batch)
  with pytest.raises(StoppedError):
    summaries((1, 1), 8, resumable)
  done, kept = resumable.load()
  assert done == 8
  assert {summary.moments[FEATURES].count for summary in kept.values()} == {8}


def test_infinite_images_are_no_white_ones() -> None:
  images = jnp.ones((3, 2, 2, 1)).at[1, 0, 0].set(jnp.inf).at[2, 1, 1].set(jnp.nan)
  assert finite(images).tolist() == [True, False, False]


def test_parameters_of_any_step_take_one_compilation() -> None:
  images = stream.GeneratedImages(generator((8, 1), 8), EXTRACTORS)
  for scale in (1.0, 0.5):
    params = jax.tree.map(lambda x, scale=scale: scale * x, PARAMS)
    images.summaries(params, COUNT, keep=False, resumable=NOWHERE, check=lambda: None, title="")
  assert images._compiled._cache_size() == 1


def test_sums_are_kept_every_now_and_then(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  kept: list[int] = []
  monkeypatch.setattr(stream, "SAVE_EVERY", 12)
  monkeypatch.setattr(Resumable, "save", lambda self, done, summaries: kept.append(done))
  summaries((1, 1), 5, Resumable(tmp_path / "sums"))
  assert kept == [15, 25, COUNT]


@pytest.mark.parametrize(
  ("theirs", "expected"), [([10, 20], 20), ([5, 10], 10), ([30], 0), ([], 0)]
)
def test_hosts_go_on_from_the_newest_sums_that_all_have(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, theirs: list[int], expected: int
) -> None:
  resumable = Resumable(tmp_path / "sums")
  found = summaries((1, 1), COUNT)
  for done in (5, 10, 15, 20):
    resumable.save(done, {f"after {done}": found[EXTRACTORS[0].name]})
  assert sorted(path.stem for path in (tmp_path / "sums").iterdir()) == ["10", "15", "20"]
  monkeypatch.setattr(stream, "_gathered", lambda data: [data, json.dumps(theirs).encode()])
  done, kept = resumable.load()
  assert (done, list(kept)) == (expected, [f"after {expected}"] if expected else [])


def test_the_wish_to_stop_is_granted_between_batches() -> None:
  asked: list[int] = []

  def check() -> None:
    asked.append(1)
    if len(asked) == 2:
      raise StoppedError

  with pytest.raises(StoppedError):
    summaries((1, 1), 8, check=check)


def test_images_that_are_not_finite_are_counted_and_refused() -> None:
  labels = np.concatenate([y for _, y in generator((1, 1), 8).batches(PARAMS, 8)])
  broken = jax.tree.map(lambda x: x, PARAMS)
  table = broken["label_embedder"]["embedding"]
  broken["label_embedder"] = {"embedding": table.at[1].set(jnp.nan)}
  bad = int((labels == 1).sum())
  assert 0 < bad < 8
  with pytest.raises(ValueError, match=f"{bad} of the 8 images from number 0 on are not finite"):
    summaries((8, 1), 8, params=broken)


class Numbered:
  """Float images, each of one shade."""

  num_classes = 1

  def __init__(self, order: np.ndarray):
    self._order = order

  def __len__(self) -> int:
    return len(self._order)

  def __getitem__(self, index: int) -> dict[str, Any]:
    image = np.full(SHAPE, self._order[index] / 20 - 1, np.float32)
    return {"image": image, "label": np.int32(0)}


def of_source(shape: tuple[int, int], batch_size: int, order: np.ndarray) -> Any:
  settings = {"keep": True, "num_threads": 1, "prefetch": 1, "title": ""}
  mesh = mesh_of(*shape)
  return stream.of_source(Numbered(order), EXTRACTORS, mesh, batch_size=batch_size, **settings)


def test_every_real_image_counts_once_and_is_not_rounded() -> None:
  order = np.arange(COUNT)
  whole, digest = of_source((1, 1), COUNT, order)
  levels = np.stack([127.5 * (Numbered(order)[i]["image"] + 1) for i in order])
  expected = EXTRACTORS[1](jnp.asarray(levels))[FEATURES]
  np.testing.assert_allclose(whole["few"].ordered(), expected, rtol=1e-5, atol=1e-5)
  for shape, batch_size in (((8, 1), 8), ((2, 4), 64)):
    found, same = of_source(shape, batch_size, order)
    assert_same(found, whole, 1e-5)
    assert same == digest


def test_a_fingerprint_is_of_the_images_and_not_of_their_order() -> None:
  order = np.arange(COUNT)
  digests = [of_source((1, 1), 8, x)[1] for x in (order, order[::-1], order + 1, order[1:])]
  assert digests[0] == digests[1]
  assert len(set(digests)) == 3
