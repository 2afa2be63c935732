"""The main job on several seeds: seconds, recognised digits, pixel Frechet distances.

  python benchmarks/digits.py [--seeds=0,1,2] [--workdir=runs/digits_benchmark] [-- overrides]

Each seed is a run of main.py in a new folder, then 1,500 samples; a support vector machine trained
on the real training images reads them.
"""

import pathlib
import time

from absl import app, flags
from reading import recognised, rows_of, run_main, samples, train_reader

SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of training and of sampling.")
WORKDIR = flags.DEFINE_string("workdir", "runs/digits_benchmark", "Where the runs go.")


def main(argv: list[str]) -> None:
  reader = train_reader()
  print(
    f"{'seed':>6} {'seconds':>8} {'read as wanted, 1 step':>23} {'2 steps':>8}  Frechet distances"
  )
  for seed in SEEDS.value:
    workdir = pathlib.Path(WORKDIR.value) / f"seed_{seed}"
    options = [f"--config.seed={seed}", f"--config.sample.seed={seed}", *argv[1:]]
    start = time.perf_counter()
    run_main(workdir, *options)
    seconds = time.perf_counter() - start
    read = [recognised(reader, samples(workdir, nfe, *options)) for nfe in (1, 2)]
    distances = [
      f"nfe{row['nfe']} {row['figures']['frechet_pixels']:.3f}" for row in rows_of(workdir)
    ]
    print(
      f"{seed:>6} {seconds:8.0f} {read[0]:23.2%} {read[1]:8.2%}  {', '.join(distances)}", flush=True
    )


if __name__ == "__main__":
  app.run(main)
