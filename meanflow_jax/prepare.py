"""Makes what a run reads: python -m meanflow_jax.prepare --statistics --config=FILE --out=FILE.npz.

Reference statistics of real images: all images of `config.data`, or those of --images.
"""

import os
import pathlib
import sys

import jax
from absl import app, flags
from ml_collections import ConfigDict

from meanflow_jax import build, command_line, evaluate
from meanflow_jax.data.sources import made_elsewhere
from meanflow_jax.metrics.summary import KEEPING
from meanflow_jax.runtime import reference_statistics

CONFIG = command_line.define_config()
STATISTICS = flags.DEFINE_bool("statistics", False, "Make reference statistics.")
IMAGES = flags.DEFINE_string("images", None, "A folder or .npz of images, in the data's place.")
OUT = flags.DEFINE_string("out", None, "The .npz file to write.", required=True)


def main(_: list[str]) -> None:
  """Runs; the user's mistakes end it with a message, no traceback."""
  try:
    if not STATISTICS.value:
      raise build.UserError("say what to prepare: --statistics")
    make_statistics(CONFIG.value, pathlib.Path(OUT.value).expanduser(), IMAGES.value)
  except build.UserError as error:
    sys.exit(f"error: {error}")


def make_statistics(config: ConfigDict, out: pathlib.Path, images: str | None) -> None:
  """Writes the statistics of real images for the extractor of `config.evaluate`.

  With the figures kid or precision_recall, the features of all images are part of the file.

  Raises:
    UserError: a mistake in the config or the images; there is such a file already.
  """
  with build.explaining_mistakes():
    if out.exists():
      raise FileExistsError(f"{out} exists; it is left as it is: choose another name")
    if not out.parent.is_dir():
      raise FileNotFoundError(f"--out: there is no folder {out.parent}")
    mesh = build.mesh(config)
    source = made_elsewhere(os.path.expanduser(images)) if images else build.source(config)
    extractors = build.extractors(config, mesh)
    if len(extractors) != 1:
      raise ValueError(
        f"a file holds statistics of one extractor: evaluate.extractors names {len(extractors)}"
      )
    keep = bool(KEEPING & set(config.evaluate.figures))
    (made,) = evaluate.measure_source(config, mesh, extractors, source, keep).values()
    if jax.process_index() == 0:
      reference_statistics.write(out, made)
  print(f"{made.count} images, {made.convention}, fingerprint {made.fingerprint}: {out}")


if __name__ == "__main__":
  app.run(main, flags_parser=command_line.parse)
