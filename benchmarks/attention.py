"""Times fused attention against attention as XLA compiles it, on the first device of this machine.

  python benchmarks/attention.py [--batch=64] [--heads=16] [--tokens=256,1024] [--sizes=64,72]
    [--dtypes=bfloat16,float32] [--rounds=7] [--chain=10]
  python benchmarks/attention.py --tiny

For each number of tokens, size of a head and type, on three paths (the output; output and
gradients; output and its derivative along a tangent): first the error against double precision on
the host, for two rows, of both forms; then seconds of both, in turns. A time is that of a program
of `chain` such computations, each of what the one before put out, divided by their number: medians
of all rounds, with the fastest and the slowest. Operations are those that the mathematics needs (2,
7 and 6 products of tokens x tokens x size for each head). On NVIDIA GPUs cuDNN's attention is timed
too: it has no derivative along a tangent. Where a form is refused, or does not fit, the reason is
printed; an error that is more than 1.5 times the plain form's is marked.

With --tiny the kernels run in Python, on any machine: it tries the script, and times mean nothing.
"""

import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from meanflow_jax.kernels import forward_mode, plain
from meanflow_jax.kernels.attention import KERNELS, Fused, choose, platform_of
from tests import exact_attention

BATCH = flags.DEFINE_integer("batch", 64, "Rows.", lower_bound=2)
HEADS = flags.DEFINE_integer("heads", 16, "Heads of a row.", lower_bound=1)
TOKENS = flags.DEFINE_list("tokens", ["256", "1024"], "Lengths of sequences.")
SIZES = flags.DEFINE_list("sizes", ["64", "72"], "Sizes of heads.")
DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "Types.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Measurements of each, in turns.", lower_bound=1)
CHAIN = flags.DEFINE_integer("chain", 10, "Computations in a program.", lower_bound=1)
TINY = flags.DEFINE_bool("tiny", False, "Two small cases, with the kernels run in Python.")

Arrays = tuple[jax.Array, ...]
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
PRODUCTS = {"output": 2, "gradient": 7, "tangent": 6}
REFUSALS = (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Case:
  """What is computed, of random numbers."""

  batch: int
  heads: int
  tokens: int
  size: int
  dtype: str

  def arrays(self, batch: int) -> Arrays:
    """q, k, v, their tangents, and a gradient of the output."""
    shape = (batch, self.tokens, self.heads, self.size)
    keys = jax.random.split(jax.random.key(0), 7)
    return tuple(jax.random.normal(key, shape, self.dtype) for key in keys)

  def teraflops(self, path: str) -> float:
    scores = self.batch * self.heads * self.tokens**2
    return 2e-12 * PRODUCTS[path] * scores * self.size


def main(_: list[str]) -> None:
  device = jax.devices()[0]
  platform = platform_of(device)
  if platform not in KERNELS and not TINY.value:
    raise app.UsageError(f"there is no kernel for {device.device_kind}: --tiny tries the script")
  print(f"{device.device_kind}, {platform}, JAX {jax.__version__}; {' '.join(sys.argv[1:])}")
  platform = platform if platform in KERNELS else "cuda"
  forms: dict[str, Attention] = {
    "plain": plain.attention,
    "fused": Fused(interpret=TINY.value, platform=platform),
  }
  for case in cases():
    sizes = {"tokens": case.tokens, "heads": case.heads, "size": case.size, "dtype": case.dtype}
    choose("pallas", platform, **sizes)
  print("\nerrors, relative to double precision (Euclidean norm)")
  print(row("path", "tokens", "size", "dtype", "plain", "fused"))
  for case in cases():
    report_errors(case, forms)
  if platform == "cuda" and not TINY.value:
    forms["cudnn"] = cudnn
  print(f"\nmilliseconds for {cases()[0].batch} rows of {cases()[0].heads} heads")
  head = ("path", "tokens", "size", "dtype", "plain", "fused", "plain/fused", "fused TFLOP/s")
  print(row(*head, "cudnn"))
  for case in cases():
    report_times(case, forms)


def cases() -> list[Case]:
  if TINY.value:
    return [Case(2, 2, 40, 24, dtype) for dtype in ("bfloat16", "float32")]
  return [
    Case(BATCH.value, HEADS.value, int(tokens), int(size), dtype)
    for dtype in DTYPES.value
    for tokens in TOKENS.value
    for size in SIZES.value
  ]


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def paths(attention: Attention, jvp: Callable) -> dict[str, Callable[..., Arrays]]:
  """From q, k, v, their tangents and a gradient, what each path puts out."""

  def gradient(*x: jax.Array) -> Arrays:
    out, transposed = jax.vjp(attention, *x[:3])
    return (out, *transposed(x[6]))

  return {
    "output": lambda *x: (attention(*x[:3]),),
    "gradient": gradient,
    "tangent": lambda *x: jvp(attention, x[:3], x[3:6]),
  }


def jvp_of(form: str) -> Callable:
  return forward_mode.jvp if form == "fused" else jax.jvp


def report_errors(case: Case, forms: dict[str, Attention]) -> None:
  x = case.arrays(batch=2)
  tangent = exact_attention.tangent(x[:3], x[3:6])
  exact = {
    "output": tangent[:1],
    "gradient": (tangent[0], *exact_attention.gradients(x[:3], x[6])),
    "tangent": tangent,
  }
  for path, expected in exact.items():
    errors = [
      exact_attention.error(jax.jit(paths(attention, jvp_of(form))[path])(*x), expected)
      for form, attention in forms.items()
    ]
    mark = "  less exact" if errors[1] > 1.5 * errors[0] else ""
    print(row(path, case.tokens, case.size, case.dtype, *(f"{e:.2e}" for e in errors)) + mark)


def chain() -> int:
  return 2 if TINY.value else CHAIN.value


def chained(path: str, compute: Callable[..., Arrays]) -> Callable[[Arrays], Arrays]:
  """A program of several computations, each of which needs the one before."""
  takes = {"output": [0], "gradient": [6, 0, 1, 2], "tangent": [0, 3]}[path]

  @jax.jit
  def program(x: Arrays) -> Arrays:
    for _ in range(chain()):
      for place, out in zip(takes, compute(*x), strict=True):
        x = (*x[:place], out, *x[place + 1 :])
    return x

  return program


def report_times(case: Case, forms: dict[str, Attention]) -> None:
  x = case.arrays(case.batch)
  for path in PRODUCTS:
    programs = {}
    for form, attention in forms.items():
      if (form, path) == ("cudnn", "tangent"):
        continue
      program = chained(path, paths(attention, jvp_of(form))[path])
      try:
        jax.block_until_ready(program(x))
        programs[form] = program
      except REFUSALS as error:
        if form == "fused":
          raise
        print(f"{form}, {path}: {str(error).splitlines()[0]}")
    seconds = {form: [] for form in programs}
    for _round in range(ROUNDS.value):
      for form, program in programs.items():
        start = time.perf_counter()
        jax.block_until_ready(program(x))
        seconds[form].append((time.perf_counter() - start) / chain())
    print(times_row(case, path, seconds))


def times_row(case: Case, path: str, seconds: dict[str, list[float]]) -> str:
  fused = statistics.median(seconds["fused"])
  ratio = f"{statistics.median(seconds['plain']) / fused:.2f}" if "plain" in seconds else "-"
  rate = f"{case.teraflops(path) / fused:.1f}"
  plain_form, ours, others = (spread(seconds.get(form)) for form in ("plain", "fused", "cudnn"))
  return row(path, case.tokens, case.size, case.dtype, plain_form, ours, ratio, rate, others)


def spread(seconds: list[float] | None) -> str:
  if not seconds:
    return "-"
  median, *ends = (1e3 * x for x in (statistics.median(seconds), min(seconds), max(seconds)))
  return f"{median:.3f} ({ends[0]:.3f} ... {ends[1]:.3f})"


def row(*columns: str | int) -> str:
  widths = (8, 6, 4, 8, 24, 24, 11, 13, 0)
  return "  ".join(f"{c!s:{w}}" for c, w in zip(columns, widths, strict=False)).rstrip()


if __name__ == "__main__":
  app.run(main)
