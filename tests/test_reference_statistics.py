"""Statistics of real images: ours and published ones are read, others refused."""

import json
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest

from meanflow_jax.metrics.moments import Moments, frechet_distance
from meanflow_jax.metrics.summary import FEATURES, SPATIAL, Summary, compare
from meanflow_jax.runtime import reference_statistics
from meanflow_jax.runtime.reference_statistics import Statistics

RNG = np.random.default_rng(0)
OUTPUTS = {FEATURES: RNG.normal(size=(40, 5)), SPATIAL: RNG.normal(size=(40, 3))}
SHAPE = (32, 32, 3)


def statistics(*, keep: bool = False) -> Statistics:
  summary = Summary.of(40, np.arange(40), OUTPUTS, keep=keep)
  return Statistics(summary, "pixels", SHAPE, 40, "0123")


def read(path: pathlib.Path, **changes: Any) -> Statistics:
  return reference_statistics.read(path, **{"convention": "pixels", "resolution": SHAPE} | changes)


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_written_is_read(tmp_path: pathlib.Path, keep: bool) -> None:
  reference_statistics.write(tmp_path / "real.npz", statistics(keep=keep))
  found = read(tmp_path / "real.npz")
  assert found.record() == statistics().record()
  ours = Summary.of(40, np.arange(40), {k: v + 1 for k, v in OUTPUTS.items()}, keep=True)
  for figure in ("frechet", "sfid", *(("kid", "precision_recall") if keep else ())):
    expected = compare(figure, ours, statistics(keep=keep).summary)
    assert compare(figure, ours, found.summary) == pytest.approx(expected, rel=1e-12)
  if not keep:
    with pytest.raises(ValueError, match="were not kept"):
      compare("kid", ours, found.summary)


def test_a_file_is_never_overwritten(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "real.npz"
  path.write_text("precious")
  with pytest.raises(FileExistsError, match="choose another name"):
    reference_statistics.write(path, statistics())
  assert path.read_text() == "precious"
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("names", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
def test_published_files_are_read_and_say_nothing(
  tmp_path: pathlib.Path, names: tuple[str, str]
) -> None:
  a, b = Moments.of(OUTPUTS[FEATURES]), Moments.of(OUTPUTS[FEATURES] * 2)
  spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
  np.savez(tmp_path / "x.npz", **dict(zip(names, (a.mean, a.covariance), strict=True)), **spatial)
  found = read(tmp_path / "x.npz", convention="any", resolution=(1, 1, 1))
  assert frechet_distance(found.summary.moments[FEATURES], b) == pytest.approx(
    frechet_distance(a, b), rel=1e-12
  )
  np.testing.assert_array_equal(found.summary.moments[SPATIAL].covariance, np.eye(3))
  assert (found.convention, found.resolution, found.count) == ("unstated", None, None)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"convention": "inception"}, ["another convention", "'pixels'", "'inception'"]),
    ({"resolution": (64, 64, 3)}, ["another resolution", "[32, 32, 3]", "[64, 64, 3]"]),
  ],
)
def test_other_statistics_are_refused(
  tmp_path: pathlib.Path, changes: dict[str, Any], words: list[str]
) -> None:
  reference_statistics.write(tmp_path / "real.npz", statistics())
  with pytest.raises(ValueError, match="prepare --statistics") as refusal:
    read(tmp_path / "real.npz", **changes)
  assert all(word in str(refusal.value) for word in words)


def broken_files(folder: pathlib.Path) -> dict[str, str]:
  """Files by name, and what is to be said of them."""
  np.savez(folder / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
  np.savez(folder / "shapes.npz", mu=np.zeros(3), sigma=np.eye(4))
  np.savez(folder / "nan.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
  np.savez(folder / "objects.npz", mu=np.array([{}], object), sigma=np.eye(3))
  np.save(folder / "one.npz", np.eye(3))
  (folder / "one.npz.npy").rename(folder / "one.npz")
  (folder / "text.npz").write_text("statistics")
  (folder / "pickle.npz").write_bytes(pickle.dumps({"mu": 0}))
  (folder / "empty.npz").write_bytes(b"")
  whole = (folder / "shapes.npz").read_bytes()
  (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
  return {
    "images.npz": "holds no statistics",
    "shapes.npz": r"mu is \(3,\) and sigma \(4, 4\)",
    "nan.npz": "not finite",
    "objects.npz": "objects.npz is not an .npz file of plain arrays: Object arrays",
    "one.npz": "not an .npz file",
    "text.npz": "not an .npz file",
    "pickle.npz": "not an .npz file",
    "empty.npz": "not an .npz file",
    "cut.npz": "not an .npz file",
  }


def test_broken_files_are_refused_and_no_pickle_is_loaded(tmp_path: pathlib.Path) -> None:
  for name, message in broken_files(tmp_path).items():
    with pytest.raises(ValueError, match=message):
      read(tmp_path / name)
  with pytest.raises(FileNotFoundError, match="absent"):
    read(tmp_path / "absent.npz")


def test_a_record_is_json(tmp_path: pathlib.Path) -> None:
  reference_statistics.write(tmp_path / "real.npz", statistics())
  with np.load(tmp_path / "real.npz", allow_pickle=False) as stored:
    assert set(stored.files) == {"mu", "sigma", "mu_s", "sigma_s", "record"}
    assert json.loads(str(stored["record"]))["count"] == 40
