"""How fast a generator draws: latency of one image, and images/s of larger batches.

  python benchmarks/sampling.py --config=configs/imagenet_b2.py [--batches=1,64,256] [--rounds=20]

One call is one compiled program, from the seed to 8-bit images: noise, the network (once for each
function evaluation), and the decoder where the model sees latents. Weights are random, of the
published architecture; what they are does not change the time.
"""

import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from meanflow_jax import build, command_line
from meanflow_jax.generate import Decoder, Generator
from meanflow_jax.models import autoencoder
from meanflow_jax.runtime.mesh import replicate
from meanflow_jax.runtime.reporting import table
from meanflow_jax.train_step import init_params

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden"
CONFIG = command_line.define_config()
BATCHES = flags.DEFINE_list("batches", ["1", "64", "256"], "Images per call.")
ROUNDS = flags.DEFINE_integer("rounds", 20, "Calls to time.", lower_bound=1)


def main(_: list[str]) -> None:
  config = CONFIG.value
  mesh = build.mesh(config)
  network, method = build.network(config, mesh), build.method(config)
  shape = build.image_shape(config)
  params = jax.jit(lambda: init_params(network, config.seed, shape))()
  decoder = random_decoder(config) if config.autoencoder.path else None
  options = {"grid": build.grid(config), "omega": config.sample.guidance.omega}
  rows = []
  for batch in map(int, BATCHES.value):
    config.sample.batch_size = batch
    generator = build.generator(config, network, method, mesh, decoder, **options)
    rows.append(measure(generator, replicate(mesh, params)))
  device = mesh.devices.flat[0].device_kind
  print(f"{generator.nfe} NFE, {generator.output_shape} on {mesh.size} x {device}")
  print(table(rows))


def measure(generator: Generator, params) -> dict[str, str]:
  """Times calls whose images are fetched each, and calls in a row."""
  call = lambda first: generator.dispatch(params, first)
  start = time.perf_counter()
  jax.block_until_ready(call(0))
  compiled = time.perf_counter() - start
  latencies = []
  for first in range(ROUNDS.value):
    start = time.perf_counter()
    jax.device_get(call(first))
    latencies.append(time.perf_counter() - start)
  start = time.perf_counter()
  jax.block_until_ready([call(first) for first in range(ROUNDS.value)])
  rate = ROUNDS.value * generator.batch_size / (time.perf_counter() - start)
  return {
    "batch": str(generator.batch_size),
    "first call, s": f"{compiled:.2f}",
    "latency, ms": f"{1e3 * statistics.median(latencies):.3f}",
    "slowest, ms": f"{1e3 * max(latencies):.3f}",
    "images/s": f"{rate:.1f}",
  }


def random_decoder(config: ConfigDict) -> Decoder:
  with np.load(GOLDEN / "autoencoder_sd.npz") as golden:
    published = json.loads(str(golden["meta"]))["config"]
  network = autoencoder.from_config(published, config.autoencoder.dtype)
  latents = jnp.zeros((1, *build.image_shape(config)))
  init = lambda: network.init(jax.random.key(0), latents, method="decode")["params"]
  return Decoder(jax.jit(init)(), network, "random weights")


if __name__ == "__main__":
  app.run(main, flags_parser=command_line.parse)
