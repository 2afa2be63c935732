"""Images per second of our Inception and of pytorch-fid's, in turns, and the memory of a stream.

  pip install torch torchvision pytorch-fid
  python benchmarks/inception.py [--batch=8] [--torch_batch=8] [--size=256] [--rounds=9]

Both get the same 8-bit images and the same random weights, and resize to 299 x 299 themselves. The
memory is the peak of this process after 200 and after 1,000 images whose features are summed up,
before PyTorch is loaded (`--torch_batch=0` leaves PyTorch out).
"""

import json
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import jax
import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from meanflow_jax.metrics.moments import Moments
from meanflow_jax.models import inception
from tests.fill import filled

WEIGHTS = pathlib.Path(__file__).parents[1] / "tests" / "golden" / "inception_fid.npz"
BATCH = flags.DEFINE_integer("batch", 8, "Images per call of ours.", lower_bound=1)
TORCH_BATCH = flags.DEFINE_integer("torch_batch", 8, "Images per call of pytorch-fid.")
SIZE = flags.DEFINE_integer("size", 256, "Side of the images.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 9, "Turns of each.", lower_bound=1)
STREAMS = flags.DEFINE_list("streams", ["200", "1000"], "Images after which to report memory.")

TURN = 96  # images at least; a turn consists of whole batches
Tensors = dict[str, np.ndarray]
Extract = Callable[[np.ndarray], np.ndarray]


def main(_: list[str]) -> None:
  with np.load(WEIGHTS) as golden:
    tensors = filled(json.loads(str(golden["tensors"])))
  ours = our_extractor(tensors)
  print_memory(ours)
  extractors = {"ours": (ours, BATCH.value)}
  if TORCH_BATCH.value:
    extractors["pytorch-fid"] = (torch_extractor(tensors), TORCH_BATCH.value)
  compare(extractors)


def our_extractor(tensors: Tensors) -> Extract:
  params = jax.device_put(inception.params_from_torch(tensors))

  @jax.jit
  def pool3(params: inception.Params, images: jax.Array) -> jax.Array:
    inputs = inception.pytorch_inputs(images)
    return inception.Inception().apply({"params": params}, inputs).pool3

  return lambda images: np.asarray(pool3(params, images))


def torch_extractor(tensors: Tensors) -> Extract:
  """As its command line uses it; its weights would be downloaded, and are put in that place."""
  try:
    import torch
    from pytorch_fid import inception as theirs
  except ImportError as error:
    raise app.UsageError(
      f"{error}: pip install torch torchvision pytorch-fid, or leave it out by --torch_batch=0"
    ) from error
  state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
  with mock.patch.object(theirs, "load_state_dict_from_url", return_value=state):
    network = theirs.InceptionV3().eval()

  @torch.no_grad()
  def extract(images: np.ndarray) -> np.ndarray:
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return network(inputs)[0][:, :, 0, 0].numpy()

  return extract


def drawn_images(count: int, seed: int) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, SIZE.value, SIZE.value, 3), np.uint8)


def print_memory(extract: Extract) -> None:
  """The peak can only rise: images that stayed in memory would show in the later one."""
  moments, done = None, 0
  for count in sorted(map(int, STREAMS.value)):
    while done < count:
      part = Moments.of(extract(drawn_images(BATCH.value, seed=done)))
      moments = part if moments is None else moments + part
      done += BATCH.value
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # from KiB, on Linux
    print(f"ours, {done:5} images: peak memory {peak:.0f} MiB", flush=True)


def compare(extractors: dict[str, tuple[Extract, int]]) -> None:
  seconds = {name: [] for name in extractors}
  for turn in range(ROUNDS.value + 1):
    for name, (extract, batch) in extractors.items():
      duration = timed(extract, batch)
      if turn:  # the first compiles
        seconds[name].append(duration)
  rates = {name: 1 / statistics.median(times) for name, times in seconds.items()}
  for name, (_, batch) in extractors.items():
    spread = f"{1 / max(seconds[name]):.2f} ... {1 / min(seconds[name]):.2f}"
    print(f"{name:11} {rates[name]:6.2f} images/s  ({spread}), batch {batch}")
  if len(extractors) == 2:
    (ours, _), (theirs, _) = extractors.values()
    images = drawn_images(BATCH.value, seed=0)
    expected = theirs(images)
    difference = np.abs(ours(images) - expected).max()
    print(f"ratio       {rates['ours'] / rates['pytorch-fid']:6.2f}")
    print(f"largest difference of features {difference:.2g}, of up to {np.abs(expected).max():.2g}")


def timed(extract: Extract, batch: int) -> float:
  """Seconds per image."""
  images = drawn_images(batch, seed=0)
  calls = -(-TURN // batch)
  start = time.perf_counter()
  for _ in range(calls):
    extract(images)
  return (time.perf_counter() - start) / (calls * batch)


if __name__ == "__main__":
  app.run(main)
