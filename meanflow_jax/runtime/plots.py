"""Plots, as PNG files."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]


def plot_lines(path: pathlib.Path, x: str, panels: Mapping[str, Mapping[str, Points]]) -> None:
  """One panel for each quantity, with one line for each label; the file appears whole.

  Args:
    path: of the PNG file.
    x: title of the axis that all share.
    panels: quantity -> label -> points (x, y).
  """
  columns = min(3, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure = Figure(figsize=(5 * columns, 3.5 * rows), layout="constrained")
  for place, (quantity, lines) in enumerate(panels.items(), 1):
    axes = figure.add_subplot(rows, columns, place, title=quantity, xlabel=x)
    for label, points in lines.items():
      axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
  partial = path.with_name(f".{path.name}.partial")
  figure.savefig(partial, format="png", dpi=120)
  os.replace(partial, path)
