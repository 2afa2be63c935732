"""The commands behind the README's tables and pictures."""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT


@pytest.mark.slow
def test_methods_are_compared_from_any_folder(tmp_path):
  command = [sys.executable, ROOT / "benchmarks" / "methods.py", "--seconds=1", "--only=shortcut"]
  variables = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    command, cwd=tmp_path, env=variables, check=True, capture_output=True, text=True
  )
  rows = [line.split() for line in done.stdout.splitlines() if line.startswith("shortcut")]
  assert [row[2] for row in rows] == ["1", "2", "4"]
  assert (tmp_path / "runs" / "methods" / "shortcut").is_dir()
  assert (tmp_path / "runs" / "methods.png").is_file()
