"""What computation in bfloat16 changes of u and of du/dt, in a model that was trained.

  python benchmarks/bfloat16_derivative.py --config=configs/digits.py --workdir=runs/digits

At points and times as training draws them, the parameters in float32: root mean squares of the
differences, relative to those of the values in float32. The yardstick of the last row is what is
left when the model is right: the error of u against its target.
"""

import pathlib
import sys

import absl.logging
import jax
import jax.numpy as jnp
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from meanflow_jax import build, command_line, storage
from meanflow_jax.arrays import per_row
from meanflow_jax.methods.meanflow import velocity_and_derivative
from meanflow_jax.runtime.reporting import table
from meanflow_jax.train import host_batches
from meanflow_jax.train_step import model_image, velocity_fn

CONFIG = command_line.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "A trained run.", required=True)
ROWS = 1024


def main(_: list[str]) -> None:
  absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax logs every file it touches
  config = CONFIG.value
  mesh, method = build.mesh(config), build.method(config)
  item = storage.ema_item(config, config.sample.ema)
  network = build.network(config, mesh)
  workdir = pathlib.Path(WORKDIR.value)
  _, items, _ = storage.trained_params(config, workdir, network, mesh, {item})

  config.train.batch_size = ROWS
  rows = next(host_batches(config, build.source(config), mesh, 0))
  x, y = model_image(jnp.asarray(rows["image"])), jnp.asarray(rows["label"])
  draws = method.draw(jax.random.key(0), x, y)
  v = draws.noise - x
  z = x + per_row(draws.t) * v

  def computed(dtype: str) -> tuple[jax.Array, jax.Array]:
    config.model.dtype = dtype
    velocity = velocity_fn(build.network(config, mesh), items[item])
    return jax.jit(lambda: velocity_and_derivative(velocity, z, draws.r, draws.t, y, v))()

  (u, slope), (u_rounded, slope_rounded) = computed("float32"), computed("bfloat16")
  length = per_row(draws.t - draws.r)
  target = v - length * slope
  found = {
    "u": (u_rounded - u, u),
    "du/dt": (slope_rounded - slope, slope),
    "(t - r) du/dt": (length * (slope_rounded - slope), length * slope),
    "target": (length * (slope_rounded - slope), target),
    "(u - target, in float32)": (u - target, target),
  }
  ahead = draws.r < draws.t
  norm = lambda x: float(jnp.sqrt(jnp.mean(x[ahead] ** 2)))
  print(f"{int(ahead.sum())} rows with r < t")
  print(
    table(
      [
        {
          "": name,
          "rms": f"{norm(value):.3f}",
          "relative difference": f"{norm(off) / norm(value):.4f}",
        }
        for name, (off, value) in found.items()
      ]
    )
  )


if __name__ == "__main__":
  app.run(main, flags_parser=command_line.parse)
