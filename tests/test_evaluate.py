"""Figures from the entry point: the same of one set of images, by whichever way they come."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from meanflow_jax import evaluate, prepare, sample, storage, stream, train
from meanflow_jax.build import UserError
from meanflow_jax.runtime.reference_statistics import read
from tests.fill import filled
from tests.runs import devices, files_below, tiny

GOLDEN = pathlib.Path(__file__).parent / "golden"
DECODED = (16, 16, 3)  # of latents of 8 x 8, by the tiny autoencoder
Rows = list[dict[str, Any]]
ALL = ("frechet", "kid", "precision_recall")
FREE = {"method.guidance.omega": 1.0, "method.guidance.kappa": 0.0}  # for it when sampling


@pytest.fixture(scope="module", autouse=True)
def _one_device() -> Any:
  with devices(1, 1):
    yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  workdir = tmp_path_factory.mktemp("trained") / "run"
  train.run(tiny(FREE | {"evaluate.count": 0}), workdir)
  return workdir


@pytest.fixture
def workdir(trained: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return shutil.copytree(trained, tmp_path / "run")


def evaluated(workdir: pathlib.Path, **changes: Any) -> Rows:
  """The rows that an evaluation stores, of changes to the section `evaluate`."""
  evaluate.run(tiny(FREE | {f"evaluate.{k}": value for k, value in changes.items()}), workdir)
  return json.loads((workdir / "figures" / "step_0000008.json").read_text())


@pytest.mark.slow
def test_a_sweep_has_a_row_for_each_setting(
  workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  sweep = {"nfe": (1, 3), "ema": (0.0, 0.999), "omega": (1.0, 2.0)}
  rows = evaluated(workdir, **sweep, figures=ALL)
  settings = [(row["nfe"], row["ema"], row["omega"]) for row in rows]
  assert settings == [(n, e, o) for n in (1, 3) for e in (0.0, 0.999) for o in (1.0, 2.0)]
  distances = [row["figures"]["frechet_pixels"] for row in rows]
  assert len(set(distances)) == 8
  named = {"frechet_pixels", "kid_pixels", "kid_std_pixels", "precision_pixels", "recall_pixels"}
  assert rows[0]["figures"].keys() == named
  table = capsys.readouterr().out
  assert all(f"{distance:.4f}" in table for distance in distances)
  assert "pixels at most 16 wide, against 1500 images" in table
  with Image.open(workdir / "figures" / "step_0000008.png") as plot:
    assert min(plot.size) > 300
  # Another evaluation takes the place of the rows that it repeats, and leaves the others.
  (*kept, last) = evaluated(workdir, nfe=(1,), figures=ALL)
  assert last == rows[2]
  assert kept == rows[:2] + rows[3:]


@pytest.mark.slow
def test_a_sweep_over_where_guidance_is_on(
  workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """In two steps, from 1 to 1/2 and on to 0: on in both, in the first alone, in none."""
  on = {"nfe": (2,), "omega": (3.0,)}
  rows = evaluated(workdir, **on, t_min=(0.0, 0.7), t_max=(0.9, 1.0))
  assert [(row["t_min"], row["t_max"]) for row in rows] == [(0, 0.9), (0, 1), (0.7, 0.9), (0.7, 1)]
  assert "t_min" in capsys.readouterr().out.splitlines()[0]
  assert len({row["figures"]["frechet_pixels"] for row in rows}) == 4
  (*_, without) = evaluated(workdir, nfe=(2,), omega=(1.0,))
  assert without["figures"] == rows[2]["figures"]
  assert "t_max 1.0" in capsys.readouterr().out


def test_images_written_and_scored_have_the_figures_of_the_evaluation(
  workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  (row,) = evaluated(workdir, figures=ALL, count=20)
  sample.run(tiny({"sample.count": 20}), workdir, tmp_path / "images.npz")
  changes = {"evaluate.figures": ALL}
  evaluate.run_elsewhere(tiny(changes), workdir, str(tmp_path / "images.npz"))
  (scored,) = json.loads((workdir / "figures" / "images_images.json").read_text())
  assert scored["figures"] == pytest.approx(row["figures"], rel=1e-9)
  assert scored["count"] == 20
  assert scored["conventions"] == row["conventions"]


def save_folder(folder: pathlib.Path, images: np.ndarray) -> None:
  folder.mkdir()
  for number, image in enumerate(images):
    Image.fromarray(image).save(folder / f"{number:03d}.png")


def test_a_folder_is_scored_as_an_npz_file(tmp_path: pathlib.Path) -> None:
  rng = np.random.default_rng(0)
  real, made = rng.integers(256, size=(2, 30, 8, 8, 3), dtype=np.uint8)
  save_folder(tmp_path / "made", made[:25])
  np.savez(tmp_path / "made.npz", arr_0=made[:25])
  save_folder(tmp_path / "real", real)
  prepare.make_statistics(tiny(), tmp_path / "real.npz", str(tmp_path / "real"))
  config = tiny({"evaluate.statistics.pixels": str(tmp_path / "real.npz")})
  for name in ("made", "made.npz"):
    evaluate.run_elsewhere(config, tmp_path / "run", str(tmp_path / name))
  first, second = json.loads((tmp_path / "run" / "figures" / "images_made.json").read_text())
  assert first["figures"] == second["figures"]
  assert first["fingerprint"] == second["fingerprint"]
  assert first["references"]["pixels"]["count"] == 30
  deviation = lambda images: images.reshape(len(images), -1) / 127.5 - 1
  shift = deviation(made[:25]).mean(0) - deviation(real).mean(0)
  assert first["figures"]["frechet_pixels"] > np.sum(shift**2)


@pytest.mark.parametrize("figures", [("frechet",), ALL])
def test_statistics_stand_in_for_the_images(
  workdir: pathlib.Path, tmp_path: pathlib.Path, figures: tuple[str, ...]
) -> None:
  out = tmp_path / "real.npz"
  prepare.make_statistics(tiny({"evaluate.figures": figures}), out, None)
  (row,) = evaluated(workdir, figures=figures)
  (workdir / "figures" / "step_0000008.json").unlink()
  (again,) = evaluated(workdir, figures=figures, **{"statistics.pixels": str(out)})
  assert again["figures"] == pytest.approx(row["figures"], rel=1e-9)
  assert again["references"] == row["references"]
  assert read(out, convention="pixels at most 16 wide", resolution=(8, 8, 1)).count == 1500
  with pytest.raises(UserError, match="exists"):
    prepare.make_statistics(tiny(), out, None)


def test_an_evaluation_that_was_interrupted_goes_on(
  workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  prepare.make_statistics(tiny(), workdir / "real.npz", None)
  settings = {"nfe": (1, 2), "statistics.pixels": str(workdir / "real.npz")}
  expected = evaluated(workdir, **settings)
  (workdir / "figures" / "step_0000008.json").unlink()
  one_ahead, dispatched = stream.one_ahead, []

  def watched(dispatch: Any, firsts: range) -> Any:
    for step in one_ahead(dispatch, firsts):
      dispatched.append(step[0])
      if len(dispatched) == 4:  # the second of the second row
        raise KeyboardInterrupt
      yield step

  monkeypatch.setattr(stream, "one_ahead", watched)
  with pytest.raises(KeyboardInterrupt):
    evaluated(workdir, **settings)
  assert len(list((workdir / "figures" / "unfinished").iterdir())) == 2
  dispatched.clear()
  assert evaluated(workdir, **settings) == expected
  assert dispatched == [16]  # all that was missing
  assert not (workdir / "figures" / "unfinished").exists()


def test_the_best_checkpoint_is_kept_and_sampled(tmp_path: pathlib.Path) -> None:
  name = "frechet_pixels_nfe1"
  config = tiny({"train.evaluate_every": 2, "evaluate.best": name})
  train.run(config, tmp_path / "run")
  figures = {
    path.stem: json.loads(path.read_text())[0]["figures"]["frechet_pixels"]
    for path in (tmp_path / "run" / "figures").glob("step_*.json")
  }
  assert len(figures) == 4
  best = min(figures, key=figures.__getitem__)
  noted = json.loads((tmp_path / "run" / "best.json").read_text())
  step = int(best.removeprefix("step_"))
  conditions = noted.pop("conditions")
  assert (conditions["count"], conditions["omega"], conditions["t_min"]) == (32, 1.0, 0.0)
  assert noted == {"step": step, "figure": name, "value": figures[best]}
  with storage.best_checkpoint(config, tmp_path / "run", read_only=True) as saved:
    assert saved.steps() == [step]
  sample.run(tiny({"sample.checkpoint": "best"}), tmp_path / "run", tmp_path / "best.npz")
  assert (tmp_path / "run" / "figures" / "history.png").stat().st_size > 5_000


@pytest.mark.parametrize(
  ("name", "worse", "better"),
  [
    ("fid_nfe1", 9.0, 3.0),
    ("kid_pixels_nfe2", 0.2, -0.1),
    ("precision_pixels_nfe1", 0.5, 0.9),
    ("inception_score_nfe1", 20.0, 90.0),
    ("recall_dinov2_nfe1_ema0.9", 0.1, 0.3),
  ],
)
def test_the_better_figure_is_that_of_the_better_images(
  tmp_path: pathlib.Path, name: str, worse: float, better: float
) -> None:
  alike = {"count": 50, "rounding": "adm"}
  assert evaluate.is_best(tmp_path, name, worse, alike)
  evaluate.note_best(tmp_path, 1, name, worse, alike)
  assert evaluate.is_best(tmp_path, name, better, alike)
  assert not evaluate.is_best(tmp_path, name, worse, alike)
  evaluate.note_best(tmp_path, 2, name, better, alike)
  assert not evaluate.is_best(tmp_path, name, worse, alike)
  assert evaluate.is_best(tmp_path, "another_nfe1", worse, alike)
  assert evaluate.is_best(tmp_path, name, worse, alike | {"count": 500})


def row(step: int, value: float, **setting: float) -> evaluate.Row:
  plain = {"nfe": 1, "ema": 0.9, "omega": 2.0, "t_min": 0.0, "t_max": 1.0}
  return {"step": step, **plain, **setting, "figures": {"frechet_pixels": value}, "count": 50}


def test_each_setting_has_a_line_in_the_history(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  drawn: list[Any] = []
  monkeypatch.setattr(evaluate, "plot_lines", lambda _, x, lines: drawn.append((x, lines)))
  for step in (4, 8):
    rows = [row(step, step), row(step, step / 2, t_min=0.3)]
    evaluate.write_rows(evaluate.figures_path(tmp_path, step), rows)
  evaluate.plot_history(tmp_path, rows)
  name = "1 NFE, EMA 0.9, guidance 2 on"
  lines = {f"{name} [0, 1]": [(4, 4), (8, 8)], f"{name} [0.3, 1]": [(4, 2), (8, 4)]}
  assert drawn == [("step", {"frechet_pixels": lines})]


def test_rows_of_before_guidance_had_an_interval_are_drawn(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  drawn: list[Any] = []
  monkeypatch.setattr(evaluate, "plot_lines", lambda _, x, lines: drawn.append(lines))
  old = {key: value for key, value in row(4, 4).items() if key not in ("t_min", "t_max")}
  evaluate.write_rows(evaluate.figures_path(tmp_path, 4), [old])
  evaluate.write_rows(evaluate.figures_path(tmp_path, 8), [row(8, 8)])
  evaluate.plot_history(tmp_path, [row(8, 8)])
  assert drawn == [{"frechet_pixels": {"1 NFE, EMA 0.9, guidance 2": [(4, 4), (8, 8)]}}]


def test_other_guidance_is_no_better_or_worse() -> None:
  """Where it is the same in all rows, so that no name tells it."""
  one, other = ([row(4, 1.0, nfe=nfe, omega=omega) for nfe in (1, 2)] for omega in (1.0, 2.0))
  assert evaluate.conditions_of_all(one) != evaluate.conditions_of_all(other)
  assert "nfe" not in evaluate.conditions_of_all(one)


def test_a_best_checkpoint_of_a_later_step_gives_way(tmp_path: pathlib.Path) -> None:
  """As after resuming from before it, or with another figure."""
  config = tiny({"train.evaluate_every": 4, "evaluate.best": "frechet_pixels_nfe1"})
  train.run(config, tmp_path / "run")
  best = json.loads((tmp_path / "run" / "best.json").read_text())
  evaluate.note_best(tmp_path / "run", 9, best["figure"], 1e9, best["conditions"])
  train.run(config, tmp_path / "run")  # measures the last step again
  with storage.best_checkpoint(config, tmp_path / "run", read_only=True) as saved:
    assert saved.steps() == [8]


def test_rows_of_other_images_do_not_take_each_others_place(workdir: pathlib.Path) -> None:
  for label in (3, 7):
    evaluate.run(tiny({"sample.labels": "one", "sample.label": label}), workdir)
  rows = json.loads((workdir / "figures" / "step_0000008.json").read_text())
  assert [row["label"] for row in rows] == [3, 7]


def test_statistics_that_cannot_serve_are_refused_at_start(
  workdir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  prepare.make_statistics(tiny(), tmp_path / "real.npz", None)
  np.savez(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5))
  for name, figures, words in (
    ("real.npz", ("frechet", "kid"), ["real.npz", "what kid takes", "prepare --statistics"]),
    ("wide.npz", ("frechet",), ["wide.npz", "of 5 features, pixels gives 64"]),
    ("absent.npz", ("frechet",), ["absent.npz does not exist", "prepare --statistics"]),
  ):
    with pytest.raises(UserError) as refusal:
      evaluated(workdir, figures=figures, **{"statistics.pixels": str(tmp_path / name)})
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
  with pytest.raises(UserError, match="precision_recall takes at least 4 images"):
    evaluated(workdir, figures=("precision_recall",), count=3)
  with pytest.raises(UserError, match="no folder"):
    prepare.make_statistics(tiny(), tmp_path / "absent" / "real.npz", None)


def test_few_images_for_many_features_are_remarked_upon(
  workdir: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  evaluated(workdir, count=30)
  assert "30 images for 64 pixels features" in caplog.text
  assert "too large" in caplog.text
  caplog.clear()
  evaluated(workdir, count=80)
  assert "images for" not in caplog.text


@pytest.mark.parametrize(
  ("images", "words"),
  [
    ("absent", ["absent", "neither a folder nor an .npz"]),
    ("absent.npz", ["absent.npz"]),
    ("empty", ["no images in"]),
    ("sizes", ["(9, 8)", "(8, 8)", "of one size"]),
    ("floats.npz", ["uint8", "float64"]),
    ("other.npz", ["(4, 4, 1)", "(8, 8, 1)", "evaluate.statistics.pixels"]),
  ],
)
def test_images_that_cannot_be_scored(
  tmp_path: pathlib.Path, images: str, words: list[str]
) -> None:
  (tmp_path / "empty").mkdir()
  save_folder(tmp_path / "sizes", np.zeros((2, 8, 8, 3), np.uint8))
  Image.new("RGB", (8, 9)).save(tmp_path / "sizes" / "zzz.png")
  np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 8, 8, 1)))
  np.savez(tmp_path / "other.npz", arr_0=np.zeros((2, 4, 4, 1), np.uint8))
  np.savez(tmp_path / "real.npz", mu=np.zeros(192), sigma=np.eye(192))
  changes = {"evaluate.statistics.pixels": str(tmp_path / "real.npz")} if images == "sizes" else {}
  before = files_below(tmp_path)
  with pytest.raises(UserError) as refusal:
    evaluate.run_elsewhere(tiny(changes), tmp_path / "run", str(tmp_path / images))
  assert all(word in str(refusal.value) for word in words), str(refusal.value)
  assert files_below(tmp_path) == before


def test_devices_make_no_difference(workdir: pathlib.Path) -> None:
  (row,) = evaluated(workdir, count=70)
  (workdir / "figures" / "step_0000008.json").unlink()
  with devices(2, 4):
    assert len(jax.devices()) == 8
    (again,) = evaluated(workdir, count=70)
  assert again["figures"] == pytest.approx(row["figures"], rel=1e-5)


@pytest.fixture(scope="module")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A tiny autoencoder, as a published one lies on disk."""
  folder = tmp_path_factory.mktemp("autoencoder")
  with np.load(GOLDEN / "autoencoder_tiny.npz") as golden:
    meta, tensors = (json.loads(str(golden[name])) for name in ("meta", "tensors"))
  (folder / "config.json").write_text(json.dumps(meta["config"]))
  weights = folder / "diffusion_pytorch_model.safetensors"
  safetensors.numpy.save_file(filled(tensors), weights)
  return folder


@pytest.mark.slow
def test_a_model_of_latents_is_shown_measured_and_scored_as_images(
  autoencoder_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  real = np.random.default_rng(0).integers(256, size=(40, *DECODED), dtype=np.uint8)
  np.savez(tmp_path / "real.npz", arr_0=real)
  prepare.make_statistics(tiny(), tmp_path / "statistics.npz", str(tmp_path / "real.npz"))
  latents = {
    "data.source": "synthetic",
    "data.channels": 4,
    "autoencoder.path": str(autoencoder_folder),
    "evaluate.statistics.pixels": str(tmp_path / "statistics.npz"),
  }
  train.run(tiny(latents), tmp_path / "run")
  with Image.open(tmp_path / "run" / "samples" / "step_0000008.png") as grid:
    assert grid.mode == "RGB"
    assert grid.size[0] % (2 * DECODED[1] + 2) == 0  # small images are enlarged
  sample.run(tiny(latents | {"sample.count": 32}), tmp_path / "run", tmp_path / "made.npz")
  with np.load(tmp_path / "made.npz") as made:
    assert made["arr_0"].shape == (32, *DECODED)
  (row,) = json.loads((tmp_path / "run" / "figures" / "step_0000008.json").read_text())
  assert row["autoencoder"].startswith("unpublished")
  unread = {"data.source": "latents"}  # with statistics, the data need not be there
  evaluate.run(tiny(latents | unread), tmp_path / "run")
  evaluate.run_elsewhere(tiny(latents | unread), tmp_path / "run", str(tmp_path / "made.npz"))
  (scored,) = json.loads((tmp_path / "run" / "figures" / "images_made.json").read_text())
  assert scored["figures"] == pytest.approx(row["figures"], rel=1e-6)
  with pytest.raises(UserError, match=r"decodes 4 channels, but data.channels is 1"):
    train.run(tiny({"autoencoder.path": str(autoencoder_folder)}), tmp_path / "other")
  with pytest.raises(UserError, match=r"evaluate\.statistics\.pixels"):
    train.run(tiny(latents | {"evaluate.statistics.pixels": ""}), tmp_path / "other")
  assert not (tmp_path / "other").exists()
