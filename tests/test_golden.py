"""The reference implementation's numbers."""

import pathlib

import pytest

from tests import golden_check

FILES = sorted((pathlib.Path(__file__).parent / "golden").glob("*.npz"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path):
  assert golden_check.check(path)
