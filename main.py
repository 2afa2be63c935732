"""The one entry point: python main.py --config=FILE --workdir=DIR [--mode=MODE].

MODE is train, sample, evaluate, plan or profile. Any key of the config is a flag:
--config.train.steps=1000.
"""

import logging
import os
import pathlib
import sys
import traceback

import absl.logging
import jax
from absl import app, flags

from meanflow_jax import command_line, evaluate, plan, profiler, sample, train
from meanflow_jax.build import UserError, explaining_mistakes
from meanflow_jax.data.sources import UnreadableImageError
from meanflow_jax.runtime import processes
from meanflow_jax.runtime.checkpoints import CheckpointError
from meanflow_jax.runtime.reporting import NonFiniteError

LESS_MEMORY = (
  "Training takes less with a smaller train.batch_size, train.accumulate above 1, "
  "model.remat=blocks or mesh.fsdp above 1; sampling and evaluation with a smaller "
  "sample.batch_size. --mode=plan says what fits"
)

CONFIG = command_line.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.")
MODE = flags.DEFINE_enum(
  "mode", "train", ["train", "sample", "evaluate", "plan", "profile"], "What to do."
)
IMAGES = flags.DEFINE_string(
  "images", None, "--mode=evaluate: a folder or .npz of images that were made elsewhere."
)
DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Look for the other processes of a cluster that JAX knows."
)
TRACEBACK = flags.DEFINE_bool("traceback", False, "Say of a mistake where it was found.")
STARTUP_TIMEOUT = flags.DEFINE_integer(
  "startup_timeout", 300, "Seconds that the other processes have to come.", lower_bound=1
)
OUT = flags.DEFINE_string("out", None, "--mode=sample: the .png or .npz to write.")
TOPOLOGY = flags.DEFINE_string(
  "topology", None, "--mode=plan: the machine, as v5p:4x4x4, v5e:4x4, v6e:8x8 or h200:64."
)
SWEEP = flags.DEFINE_bool("sweep", False, "--mode=plan: compare meshes, remat and batch sizes.")


def main(_: list[str]) -> None:
  """Runs one mode; the user's mistakes end it with a message, no traceback."""
  # Orbax logs every file it touches.
  absl.logging.set_verbosity(absl.logging.ERROR)
  logging.getLogger("meanflow_jax").setLevel(logging.WARNING)
  # When a save fails, asyncio logs later what Orbax has raised and we have reported.
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  workdir = pathlib.Path(WORKDIR.value or "").expanduser()
  try:
    if IMAGES.value and MODE.value != "evaluate":
      raise UserError(f"--images is read with --mode=evaluate, not with --mode={MODE.value}")
    if OUT.value and MODE.value != "sample":
      raise UserError(f"--out is read with --mode=sample, not with --mode={MODE.value}")
    if (TOPOLOGY.value or SWEEP.value) and MODE.value != "plan":
      raise UserError(f"--topology and --sweep are read with --mode=plan, not {MODE.value}")
    if MODE.value == "plan":
      if not TOPOLOGY.value:
        raise UserError("--mode=plan needs --topology=NAME, as v5p:4x4x4, v5e:4x4 or h200:64")
      plan.run(CONFIG.value, TOPOLOGY.value, sweep=SWEEP.value)
      return
    if "://" in WORKDIR.value:
      raise UserError(
        f"--workdir must be a local or mounted folder, got {WORKDIR.value}; for checkpoints on an "
        "object store set --config.checkpoint.path"
      )
    with explaining_mistakes():
      processes.join(detect=DISTRIBUTED.value, timeout=STARTUP_TIMEOUT.value)
    if MODE.value == "train":
      train.run(CONFIG.value, workdir)
    elif MODE.value == "profile":
      profiler.run(CONFIG.value, workdir)
    elif MODE.value == "evaluate" and IMAGES.value:
      evaluate.run_elsewhere(CONFIG.value, workdir, IMAGES.value)
    elif MODE.value == "evaluate":
      evaluate.run(CONFIG.value, workdir)
    elif OUT.value is None:
      raise UserError("--mode=sample needs --out=FILE, a .png or .npz")
    else:
      sample.run(CONFIG.value, workdir, pathlib.Path(OUT.value).expanduser())
  except (UserError, CheckpointError, NonFiniteError, UnreadableImageError) as error:
    if TRACEBACK.value:
      traceback.print_exc()
    sys.exit("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]))
  except KeyboardInterrupt:
    print("interrupted; the same command goes on or begins again", file=sys.stderr)
    sys.exit(130)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      traceback.print_exc()
      sys.exit(f"error: a device's memory is full. {LESS_MEMORY}")
    if jax.process_count() == 1:
      raise
    # Most likely another process is lost: waiting for it at exit, as JAX does, would be in vain.
    traceback.print_exc()
    print("error: the step failed, or another process did: start all again", file=sys.stderr)
    sys.stderr.flush()
    os._exit(processes.TRY_AGAIN)


if __name__ == "__main__":
  flags.register_multi_flags_validator(
    ["mode", "workdir"],
    lambda given: given["workdir"] is not None or given["mode"] == "plan",
    "--workdir=DIR is missing",
  )
  app.run(main, flags_parser=command_line.parse)
