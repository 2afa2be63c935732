"""Fused attention on NVIDIA GPUs, in Pallas by way of Triton: scores live in registers alone.

A program takes a block of queries of one head and passes over its keys, block by block, with a
running softmax P (arXiv 2205.14135, algorithm 1). The output's derivative and the queries' gradient
are covariances under P, of the scores' derivative S' with V and of dP = dO V^T with K:

  O' = P (S' - mean) V + P V',    dQ = P (dP - mean) K / sqrt(D).

Both are running covariances, which move along with the running mean (Welford's method): one pass
suffices, and no two large sums are subtracted. The backward pass takes nothing but the arguments.
Its first kernel leaves the softmax's statistics beside dQ; from these the second, which takes a
block of keys at a time, forms P anew for dK and dV.

Products of float32 arrays are those of TensorFloat-32, as XLA's are on these GPUs, and sums of
three of them where `jax.default_matmul_precision` asks for "highest" or "float32".

JAX calls this way of writing kernels deprecated from version 0.11 on, and warns; a version without
it gets the plain form.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from meanflow_jax.kernels.plain import Layout, Packed

try:
  from jax.experimental.pallas import triton as plgpu
except ImportError:
  plgpu = None

Heads = Float[Array, "B N T K D"]  # T is 3 for queries, keys and values in one array, or else 1
Part = tuple[Array, int]  # such an array and which third of it, or one of a number of each query
Cut = list[Array]  # a block of a head, in pieces whose widths are powers of two

DTYPES = ("float32", "bfloat16")
LONGEST = 4096  # tokens
WIDEST = 256  # columns of a head
_LEAST = 16  # rows and columns of a matrix product
_NT = (((1,), (1,)), ((), ()))  # a b^T
_NN = (((1,), (0,)), ((), ()))  # a b


def reason_against(tokens: int, heads: int, size: int, dtype: str) -> str | None:
  """Why these kernels cannot take sequences of heads of some size, or None if they can."""
  del heads  # any number
  if plgpu is None:
    return f"needs Pallas on Triton, which JAX {jax.__version__} no longer has"
  if str(dtype) not in DTYPES:
    return f"takes {' or '.join(DTYPES)}, not {dtype}"
  if size % 8 or not 0 < size <= WIDEST:
    return f"takes heads whose size is a multiple of 8, of at most {WIDEST}, not {size}"
  if not 0 < tokens <= LONGEST:
    return f"takes 1 to {LONGEST} tokens, not {tokens}"
  return None


def takes_packed(tokens: int, heads: int, size: int, dtype: str) -> bool:
  """Whether the kernels take queries, keys and values in one array: any that they take at all."""
  del tokens, heads, size, dtype
  return True


def takes_turned(tokens: int, heads: int, size: int, dtype: str) -> bool:
  """Whether the kernels normalise and turn queries and keys: they do not."""
  del tokens, heads, size, dtype
  return False


class Kernels(Layout):
  """The three kernels for sequences of `heads` heads, in one layout of their arguments."""

  def forward(self, *qkv: Packed) -> Packed:
    """Attention [B, N, K D]."""
    parts = self._parts(qkv)
    (out,) = self._call(_forward, 2, parts, [self._mixed(parts)])
    return _flat(out)

  def tangent(self, *qkv_and_along: Packed) -> tuple[Packed, Packed]:
    """Attention and its derivative, from arguments and their tangents."""
    half = len(qkv_and_along) // 2
    parts = self._parts(qkv_and_along[:half]) + self._parts(qkv_and_along[half:])
    out, tangent = self._call(_tangent, 6, parts, [self._mixed(parts)] * 2)
    return _flat(out), _flat(tangent)

  def backward(self, *qkv_and_gradient: Packed) -> tuple[Packed, ...]:
    """The gradients of the arguments, from arguments and the gradient of attention."""
    *qkv, do = qkv_and_gradient
    parts = [*self._parts(qkv), (self._by_head(do), 0)]
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in parts[: len(qkv)]]
    of_query = jax.ShapeDtypeStruct((do.shape[0], self.heads, do.shape[1]), jnp.float32)
    dq, lse, mean = self._call(_backward_queries, 4, parts, [like[0], of_query, of_query])
    parts += [(lse, 0), (mean, 0)]
    if self.packed:  # dK and dV take their places beside dQ
      gradients = self._call(_backward_keys, 4, [*parts, (dq, 0)], like, in_place=True)
    else:
      gradients = [dq, *self._call(_backward_keys, 4, parts, like[1:])]
    return tuple(map(_flat, gradients))

  def _parts(self, qkv: Sequence[Packed]) -> list[Part]:
    thirds = 3 if self.packed else 1
    return [(self._by_head(x, thirds), part) for x in qkv for part in range(thirds)]

  def _by_head(self, x: Packed, thirds: int = 1) -> Heads:
    return x.reshape(*x.shape[:2], thirds, self.heads, x.shape[2] // (thirds * self.heads))

  def _mixed(self, parts: list[Part]) -> jax.ShapeDtypeStruct:
    batch, tokens, _, heads, size = parts[0][0].shape
    return jax.ShapeDtypeStruct((batch, tokens, 1, heads, size), parts[0][0].dtype)

  def _call(
    self,
    kernel: Callable[..., None],
    products: int,
    parts: list[Part],
    out: list[jax.ShapeDtypeStruct],
    *,
    in_place: bool = False,
  ) -> Sequence[Array]:
    """Runs a kernel over blocks of tokens, heads and rows.

    Args:
      kernel: the kernel.
      products: matrix products [N, N] x D that it computes for each head.
      parts: what it reads, statistics [B, K, N] among them.
      out: what it writes a third of, or all.
      in_place: the last of `parts` becomes the output, of which two thirds are written.
    """
    first = parts[0][0]
    batch, tokens, *_, size = first.shape
    tiles, blocks, params = _plan(kernel, tokens, size, first.dtype.itemsize)
    rows = pl.cdiv(tokens, max(tiles.queries, tiles.keys)) * max(tiles.queries, tiles.keys)
    of_query = pl.BlockSpec((None, None, rows), lambda i, h, b: (b, h, 0))
    of_head = lambda third, part: pl.BlockSpec(
      (None, rows, third, None, tiles.width), lambda i, h, b: (b, 0, part, h, 0)
    )
    arrays = [*(x for x, _ in parts), *out]
    whole = sum(len(x.shape) == 5 for x in arrays)
    queries = batch * self.heads * tokens
    call = pl.pallas_call(
      functools.partial(kernel, tiles=tiles),
      grid=(blocks, self.heads, batch),
      in_specs=[of_query if x.ndim == 3 else of_head(None, part) for x, part in parts],
      out_specs=[of_query if len(x.shape) == 3 else of_head(x.shape[2], 0) for x in out],
      out_shape=out,
      input_output_aliases={len(parts) - 1: 0} if in_place else {},
      compiler_params=params,
      # Each product [N, D] x [D, N] or [N, N] x [N, D] is 2 N^2 D operations; of what is done per
      # score, the one exponential is counted. The blocks of a head run side by side, so that what
      # several of them read comes from memory once. Of an output that is filled in place two thirds
      # are written, and the third that is there is not read.
      cost_estimate=pl.CostEstimate(
        flops=2 * products * queries * tokens * size,
        transcendentals=queries * tokens,
        bytes_accessed=queries * (whole * size * first.dtype.itemsize + 4 * (len(arrays) - whole)),
      ),
      interpret=self.interpret,
      name=f"attention{kernel.__name__}",
    )
    with self._precision(first.dtype):
      return call(*(x for x, _ in parts))

  def _precision(self, dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """Of products; single ones in float32 would not run on tensor cores, nor fit in registers."""
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32")
    if exact and dtype == jnp.float32 and not self.interpret:
      return jax.default_matmul_precision("TF32_TF32_F32_X3")
    return contextlib.nullcontext()


def _flat(x: Heads) -> Packed:
  return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))


@dataclasses.dataclass(frozen=True)
class _Tiles:
  """What a program sees of a sequence at a time; what lies beyond it is read as zero.

  Attributes:
    tokens: N.
    size: D.
    queries, keys: of one block; powers of two.
  """

  tokens: int
  size: int
  queries: int
  keys: int

  @property
  def columns(self) -> list[tuple[int, int]]:
    """First columns and widths, powers of two, of one or two pieces that cover a head.

    Triton knows no other widths: 72 columns are 64 and 16, instead of 128.
    """
    whole = _power_of_two(self.size)
    half = whole // 2
    rest = _power_of_two(self.size - half)
    return [(0, half), (half, rest)] if half >= _LEAST and rest < half else [(0, whole)]

  @property
  def width(self) -> int:
    return sum(width for _, width in self.columns)

  @property
  def scale(self) -> float:
    return self.size**-0.5

  def load(self, ref: Any, first: Array, rows: int) -> Cut:
    """A block of a head."""
    return [
      _load(
        ref.at[pl.ds(first, rows), pl.ds(start, width)], self._within(first, rows, start, width)
      )
      for start, width in self.columns
    ]

  def store(self, ref: Any, third: int, first: Array, x: Cut) -> None:
    """Writes a block of a head."""
    for (start, width), piece in zip(self.columns, x, strict=True):
      rows = piece.shape[0]
      place = ref.at[pl.ds(first, rows), jnp.int32(third), pl.ds(start, width)]
      mask = self._within(first, rows, start, width)
      plgpu.store(place, piece.astype(ref.dtype), mask=mask)

  def load_statistic(self, ref: Any, first: Array) -> Array:
    """A number of each query of a block."""
    return _load(ref.at[pl.ds(first, self.queries)], self._rows_within(first, self.queries))

  def store_statistic(self, ref: Any, first: Array, x: Array) -> None:
    """Writes a number of each query of a block."""
    mask = self._rows_within(first, self.queries)
    plgpu.store(ref.at[pl.ds(first, self.queries)], x, mask=mask)

  def scores(self, q: Cut, k: Cut, first: Array) -> Array:
    """Scores of a block of queries and one of keys, to the base of two; -inf beyond the end."""
    scores = _scores(q, k) * (self.scale * math.log2(math.e))
    within = self._rows_within(first, self.keys)
    return scores if within is None else jnp.where(within[None, :], scores, -math.inf)

  def zeros(self, rows: int) -> Cut:
    return [jnp.zeros((rows, width), jnp.float32) for _, width in self.columns]

  def _rows_within(self, first: Array, rows: int) -> Array | None:
    """Which of some rows belong to the sequence; None if no block has others."""
    return None if self.tokens % rows == 0 else first + jnp.arange(rows) < self.tokens

  def _within(self, first: Array, rows: int, start: int, width: int) -> Array | None:
    row = self._rows_within(first, rows)
    if start + width <= self.size:
      return None if row is None else row[:, None]
    column = (start + jnp.arange(width) < self.size)[None, :]
    return column if row is None else row[:, None] & column


class _Softmax(NamedTuple):
  """Of each query, over the keys so far: the largest score, and the sum of exponentials."""

  maximum: Array
  total: Array

  def add(self, scores: Array) -> tuple["_Softmax", Array, Array]:
    """Takes a block of keys.

    Returns:
      The softmax; the block's exponentials; and by what sums over earlier keys shrink.
    """
    maximum = jnp.maximum(self.maximum, jnp.max(scores, axis=1))
    kept = jnp.exp2(self.maximum - maximum)
    p = jnp.exp2(scores - maximum[:, None])
    return _Softmax(maximum, self.total * kept + jnp.sum(p, axis=1)), p, kept

  @property
  def log_sum(self) -> Array:
    """To the base of two."""
    return self.maximum + jnp.log2(self.total)


class _Covariance(NamedTuple):
  """Of each query, over the keys so far: of a number w and a row x, weighted by the softmax.

  Attributes:
    softmax: the weights.
    mean: of w.
    sums: of x.
    products: sums of (w - mean) x.
  """

  softmax: _Softmax
  mean: Array
  sums: Cut
  products: Cut

  def add(self, scores: Array, w: Array, x: Cut, scale: float = 1.0) -> tuple["_Covariance", Array]:
    """Takes a block of keys, where w is to be scaled; the second value is its exponentials."""
    softmax, p, kept = self.softmax.add(scores)
    weighted = self.mean * self.softmax.total * kept + jnp.sum(p * w, axis=1) * scale
    mean = weighted / softmax.total
    centred = p * (w * scale - mean[:, None])
    moved = (self.mean - mean)[:, None]
    products = [c + moved * s for c, s in zip(self.products, self.sums, strict=True)]
    return _Covariance(
      softmax,
      mean,
      _add(_shrink(self.sums, kept), p, x),
      _add(_shrink(products, kept), centred, x),
    ), p


def _start(tiles: _Tiles) -> _Covariance:
  none = jnp.zeros(tiles.queries, jnp.float32)
  softmax = _Softmax(none - math.inf, none)
  return _Covariance(softmax, none, tiles.zeros(tiles.queries), tiles.zeros(tiles.queries))


def _forward(q_ref, k_ref, v_ref, o_ref, *, tiles: _Tiles) -> None:
  first = pl.program_id(0) * tiles.queries
  q = tiles.load(q_ref, first, tiles.queries)

  def add(block: Array, carry: tuple[_Softmax, Cut]) -> tuple[_Softmax, Cut]:
    softmax, sums = carry
    at = block * tiles.keys
    k, v = (tiles.load(ref, at, tiles.keys) for ref in (k_ref, v_ref))
    softmax, p, kept = softmax.add(tiles.scores(q, k, at))
    return softmax, _add(_shrink(sums, kept), p, v)

  start = _start(tiles)
  softmax, sums = _over(tiles.tokens, tiles.keys, add, (start.softmax, start.sums))
  tiles.store(o_ref, 0, first, _divide(sums, softmax.total))


def _tangent(q_ref, k_ref, v_ref, dq_ref, dk_ref, dv_ref, o_ref, t_ref, *, tiles: _Tiles) -> None:
  """P V, and with the scores' tangent S' = (Q' K^T + Q K'^T) / sqrt(D): P' V + P V'."""
  first = pl.program_id(0) * tiles.queries
  q, dq = (tiles.load(ref, first, tiles.queries) for ref in (q_ref, dq_ref))

  def add(block: Array, sofar: _Covariance) -> _Covariance:
    at = block * tiles.keys
    k, v, dk, dv = (tiles.load(ref, at, tiles.keys) for ref in (k_ref, v_ref, dk_ref, dv_ref))
    ds = _scores(dq, k) + _scores(q, dk)
    sofar, p = sofar.add(tiles.scores(q, k, at), ds, v, tiles.scale)
    return sofar._replace(products=_add(sofar.products, p, dv))

  end = _over(tiles.tokens, tiles.keys, add, _start(tiles))
  tiles.store(o_ref, 0, first, _divide(end.sums, end.softmax.total))
  tiles.store(t_ref, 0, first, _divide(end.products, end.softmax.total))


def _backward_queries(
  q_ref, k_ref, v_ref, do_ref, dq_ref, lse_ref, mean_ref, *, tiles: _Tiles
) -> None:
  """dQ = P (dP - mean dP) K / sqrt(D) with dP = dO V^T; logarithms of sums, and means of dP."""
  first = pl.program_id(0) * tiles.queries
  q, do = (tiles.load(ref, first, tiles.queries) for ref in (q_ref, do_ref))

  def add(block: Array, sofar: _Covariance) -> _Covariance:
    at = block * tiles.keys
    k, v = (tiles.load(ref, at, tiles.keys) for ref in (k_ref, v_ref))
    return sofar.add(tiles.scores(q, k, at), _scores(do, v), k)[0]

  end = _over(tiles.tokens, tiles.keys, add, _start(tiles))
  dq = _divide(end.products, end.softmax.total)
  tiles.store(dq_ref, 0, first, [x * tiles.scale for x in dq])
  tiles.store_statistic(lse_ref, first, end.softmax.log_sum)
  tiles.store_statistic(mean_ref, first, end.mean)


def _backward_keys(q_ref, k_ref, v_ref, do_ref, lse_ref, mean_ref, *refs, tiles: _Tiles) -> None:
  """dV = P^T dO, dK = dS^T Q with dS = P (dP - mean dP) / sqrt(D); all of it transposed."""
  first = pl.program_id(0) * tiles.keys
  k, v = (tiles.load(ref, first, tiles.keys) for ref in (k_ref, v_ref))
  base = tiles.scale * math.log2(math.e)

  def add(block: Array, carry: tuple[Cut, Cut]) -> tuple[Cut, Cut]:
    dk, dv = carry
    at = block * tiles.queries
    q, do = (tiles.load(ref, at, tiles.queries) for ref in (q_ref, do_ref))
    lse, mean = (tiles.load_statistic(ref, at) for ref in (lse_ref, mean_ref))
    p = jnp.exp2(_scores(k, q) * base - lse[None, :])
    ds = p * (_scores(v, do) - mean[None, :])
    return _add(dk, ds, q), _add(dv, p, do)

  zeros = tiles.zeros(tiles.keys)
  dk, dv = _over(tiles.tokens, tiles.queries, add, (zeros, zeros))
  dk = [x * tiles.scale for x in dk]
  *_, last = refs
  places = [(last, 1), (last, 2)] if last.shape[1] == 3 else [(ref, 0) for ref in refs]
  for (ref, third), x in zip(places, (dk, dv), strict=True):
    tiles.store(ref, third, first, x)


def _over(tokens: int, rows: int, add: Callable[[Array, Any], Any], start: Any) -> Any:
  """Adds up the blocks of a sequence."""
  return jax.lax.fori_loop(0, pl.cdiv(tokens, rows), add, start)


def _scores(a: Cut, b: Cut) -> Array:
  """A B^T."""
  return functools.reduce(jnp.add, [_dot(x, y, _NT) for x, y in zip(a, b, strict=True)])


def _add(sums: Cut, weights: Array, x: Cut) -> Cut:
  """Sums and the products of weights with rows."""
  return [s + _dot(weights.astype(y.dtype), y, _NN) for s, y in zip(sums, x, strict=True)]


def _shrink(sums: Cut, by: Array) -> Cut:
  return [x * by[:, None] for x in sums]


def _divide(sums: Cut, by: Array) -> Cut:
  return [x / by[:, None] for x in sums]


def _dot(a: Array, b: Array, dimensions: tuple) -> Array:
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _load(ref: Any, mask: Array | None) -> Array:
  return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _power_of_two(least: int) -> int:
  """The smallest that is not below, among those that matrix products take."""
  return max(_LEAST, 1 << (least - 1).bit_length())


# Queries and keys at a time, warps and stages of the pipeline, by the bytes of a token of a head.
# Read off what the compiler makes of them for H100 and H200: a program has the 64 rows that the
# instructions of whole warp groups want, two or more programs share a multiprocessor, and registers
# suffice up to 72 columns in bfloat16, or nearly. Up to 72 columns, and by and large beyond, the
# shared memory of GPUs with compute capability 8 suffices as well.
_BLOCKS = {
  _forward: {160: (64, 128, 4, 2), 320: (64, 64, 4, 2), 640: (64, 32, 4, 1), 1024: (32, 32, 4, 1)},
  _tangent: {160: (64, 64, 4, 2), 320: (64, 32, 4, 1), 640: (32, 32, 4, 1), 1024: (16, 16, 4, 1)},
  _backward_queries: {
    160: (64, 64, 4, 2),
    320: (64, 32, 4, 2),
    640: (32, 32, 4, 1),
    1024: (16, 16, 4, 1),
  },
  _backward_keys: {
    160: (64, 64, 4, 2),
    320: (32, 64, 4, 2),
    640: (32, 32, 4, 1),
    1024: (16, 16, 4, 1),
  },
}


def _plan(
  kernel: Callable[..., None], tokens: int, size: int, itemsize: int
) -> tuple[_Tiles, int, Any]:
  """What programs see, how many there are for each head, and how they are compiled."""
  most = _power_of_two(tokens)
  tiles = _Tiles(tokens, size, most, most)
  width = tiles.width * itemsize
  queries, keys, warps, stages = next(row for top, row in _BLOCKS[kernel].items() if width <= top)
  tiles = dataclasses.replace(tiles, queries=min(queries, most), keys=min(keys, most))
  rows = tiles.keys if kernel is _backward_keys else tiles.queries
  params = plgpu.CompilerParams(num_warps=warps, num_stages=stages)
  return tiles, pl.cdiv(tokens, rows), params
