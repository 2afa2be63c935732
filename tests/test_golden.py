"""The reference implementation's numbers."""

import pathlib
import shutil

import numpy as np
import pytest

from tests import golden_check

FOLDER = pathlib.Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.npz"))
CHECKPOINT = FOLDER / "meanflow_checkpoint"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path):
  assert golden_check.check(path)


@pytest.mark.parametrize(
  ("folder", "golden"),
  [
    ("meanflow_checkpoint", "meanflow_dit_cfg_kappa.npz"),
    ("imeanflow_checkpoint", "imeanflow_dit.npz"),
  ],
)
def test_a_checkpoint_folder_finds_its_golden_file(folder, golden, capsys):
  assert golden_check.check_folder(FOLDER / folder)
  assert f"({golden})  u" in capsys.readouterr().out


def test_a_checkpoint_folder_takes_the_golden_file_given(tmp_path, capsys):
  folder = shutil.copytree(CHECKPOINT, tmp_path / "checkpoints")
  kappa, other = (str(FOLDER / f"meanflow_dit_{name}.npz") for name in ("cfg_kappa", "cfg_omega2"))
  assert golden_check.main([str(folder), kappa]) == 0
  assert golden_check.main([str(folder), other]) == 1
  assert "FAIL" in capsys.readouterr().out


def test_what_is_no_checkpoint_is_of_unknown_kind(tmp_path, capsys):
  assert not golden_check.check_folder(tmp_path)
  assert "unknown kind" in capsys.readouterr().out


def test_a_checkpoint_of_another_network_is_of_unknown_kind(tmp_path, capsys):
  folder = shutil.copytree(CHECKPOINT, tmp_path / "checkpoints")
  with np.load(FOLDER / "meanflow_dit_cfg_kappa.npz") as file:
    golden = {k: v for k, v in file.items() if "h_embedder" not in k}
  np.savez(tmp_path / "other.npz", **golden)
  assert not golden_check.check_folder(folder)
  assert "unknown kind" in capsys.readouterr().out
