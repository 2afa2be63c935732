"""Images per second of an evaluation, by part, and how long the devices wait for the host.

  python benchmarks/evaluation.py --config=configs/digits.py [--batches=20]

Parameters are those of a new network: they cost what trained ones do. Times of the parts are of
compiled steps by themselves; that of the whole is the evaluation's own stream, moments included.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from meanflow_jax import build, command_line, stream
from meanflow_jax.generate import Generator
from meanflow_jax.train_step import init_params

CONFIG = command_line.define_config()
BATCHES = flags.DEFINE_integer("batches", 20, "To time, of sample.batch_size.", lower_bound=1)


def main(_: list[str]) -> None:
  config = CONFIG.value
  mesh, method = build.mesh(config), build.method(config)
  network = build.network(config, mesh)
  generator = build.sample_generator(config, network, method, mesh)
  extractors = build.extractors(config, mesh)
  params = jax.jit(lambda: init_params(network, 0, generator.image_shape))()
  seconds = parts(generator, params, extractors)
  count = BATCHES.value * generator.batch_size
  images = stream.GeneratedImages(generator, extractors)
  settings = {"keep": False, "resumable": stream.Resumable(None), "title": "all"}
  run = lambda: images.summaries(params, count, **settings)
  run()  # compiles
  start = time.perf_counter()
  run()
  seconds["all, with moments"] = whole = (time.perf_counter() - start) / BATCHES.value
  for name, value in seconds.items():
    print(f"{name:18} {generator.batch_size / value:10.1f} images/s")
  busy = sum(value for name, value in seconds.items() if name in ("generate", "decode", "extract"))
  print(f"the devices wait   {max(0.0, 1 - busy / whole):10.1%} of the time")


def parts(generator: Generator, params: object, extractors: object) -> dict[str, float]:
  """Seconds per batch of each part by itself."""
  bare = dataclasses.replace(generator, decoder=None)
  generate = jax.jit(lambda params, first: bare(params, None, first)[0])
  images = generate(params, generator.place(0))
  seconds = {"generate": timed(lambda: generate(params, generator.place(0)))}
  if generator.decoder:
    decode, latents = jax.jit(lambda decoder, latents: decoder(latents)), images
    images = decode(generator.decoder, latents)
    seconds["decode"] = timed(lambda: decode(generator.decoder, latents))
  extract = jax.jit(stream.extract)
  levels = jnp.clip(127.5 * (images + 1), 0, 255)
  seconds["extract"] = timed(lambda: extract(extractors, levels))
  return seconds


def timed(run: Callable[[], object]) -> float:
  """Seconds per call, once compiled."""
  jax.block_until_ready(run())
  start = time.perf_counter()
  for _ in range(BATCHES.value):
    jax.block_until_ready(run())
  return (time.perf_counter() - start) / BATCHES.value


if __name__ == "__main__":
  app.run(main, flags_parser=command_line.parse)
