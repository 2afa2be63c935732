"""Fused attention on TPUs, in Pallas: scores live in the chip's own memory alone.

All keys of a head fit there, so that no running softmax is needed, and the backward pass forms the
softmax anew instead of reading its statistics. Each kernel takes one row of the batch and some
heads at a time, reads every array once and writes every result once. Scores are held transposed,
[keys, queries]: maxima and sums over keys are then sums of whole registers, and what belongs to a
query is a row that is broadcast for nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from meanflow_jax.kernels.plain import Layout, Packed

Part = tuple[Packed, int]  # an array and which third of it
SpecOf = Callable[[int], pl.BlockSpec]  # of a third of an array

DTYPES = ("float32", "bfloat16")
LANES = 128
_MOST_QUERIES = 512  # at a time
_MOST_SCORES = 2**18  # queries x keys
_LARGEST_BLOCK = 2**20  # bytes that a step sees of one array, where heads can be grouped so
_VMEM = 64 * 2**20
_NT = (((1,), (1,)), ((), ()))  # a b^T
_NN = (((1,), (0,)), ((), ()))  # a b
_TN = (((0,), (0,)), ((), ()))  # a^T b


def reason_against(tokens: int, heads: int, size: int, dtype: str) -> str | None:
  """Why these kernels cannot take sequences of heads of some size, or None if they can."""
  if dtype not in DTYPES:
    return f"takes {' or '.join(DTYPES)}, not {dtype}"
  if size < 8 or size % 8:
    return f"takes heads whose size is a multiple of 8, not {size}"
  if tokens < 1 or not _Block.of(tokens, heads, size, dtype).fits(packed=False):
    return f"cannot hold {tokens} tokens of {heads} heads of size {size} in the chip"
  return None


def takes_packed(tokens: int, heads: int, size: int, dtype: str) -> bool:
  """Whether the kernels take queries, keys and values in one array.

  Groups of heads must end where lanes do, and all gradients of a row lie in the chip at once.
  """
  block = _Block.of(tokens, heads, size, dtype)
  return block.columns % LANES == 0 and block.fits(packed=True)


class Kernels(Layout):
  """The three kernels for sequences of `heads` heads, in one layout of their arguments."""

  def forward(self, *qkv: Packed) -> Packed:
    """Attention [B, N, K D]."""
    q, k, v = self._parts(qkv)
    return self._call(_forward, 2, (q,), (k, v), outputs=1)[0]

  def tangent(self, *qkv_and_along: Packed) -> tuple[Packed, Packed]:
    """Attention and its derivative, from arguments and their tangents."""
    half = len(qkv_and_along) // 2
    q, k, v = self._parts(qkv_and_along[:half])
    dq, dk, dv = self._parts(qkv_and_along[half:])
    out, tangent = self._call(_tangent, 6, (q, dq), (k, v, dk, dv), outputs=2)
    return out, tangent

  def backward(self, *qkv_and_gradient: Packed) -> tuple[Packed, ...]:
    """The gradients of the arguments, from arguments and the gradient of attention."""
    *qkv, do = qkv_and_gradient
    q, k, v = self._parts(qkv)
    return tuple(self._call(_backward, 5, (q, (do, 0)), (k, v), gradients=qkv))

  def _parts(self, qkv: Sequence[Packed]) -> list[Part]:
    return [(qkv[0], part) for part in range(3)] if self.packed else [(x, 0) for x in qkv]

  def _call(
    self,
    kernel: Callable[..., None],
    products: int,
    by_query: Sequence[Part],
    by_key: Sequence[Part],
    *,
    outputs: int = 0,
    gradients: Sequence[Packed] = (),
  ) -> Sequence[Packed]:
    """Runs a kernel over rows, groups of heads and blocks of queries.

    Args:
      kernel: the kernel.
      products: matrix products [N, N] x D that it computes for each head.
      by_query: of which it sees the block of queries.
      by_key: of which it sees all tokens.
      outputs: results for the block of queries.
      gradients: arguments of which the results are gradients instead.
    """
    first = by_query[0][0]
    batch, tokens, _ = first.shape
    width = self.width(first)
    size = width // self.heads
    block = _Block.of(tokens, self.heads, size, str(first.dtype))
    query, key = block.specs()
    arguments = [x for x, _ in (*by_query, *by_key)]
    results = [jax.ShapeDtypeStruct((batch, tokens, width), first.dtype)] * outputs
    results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in gradients]
    last = "arbitrary" if gradients else "parallel"  # gradients of keys are sums over queries
    return pl.pallas_call(
      functools.partial(kernel, size=size, tokens=tokens),
      grid=(batch, width // block.columns, block.keys // block.queries),
      in_specs=[query(part) for _, part in by_query] + [key(part) for _, part in by_key],
      out_specs=self._gradient_specs(block) if gradients else [query(0)] * outputs,
      out_shape=results,
      scratch_shapes=[pltpu.VMEM((block.keys, block.columns), jnp.float32)] * 2 * bool(gradients),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", last, last), vmem_limit_bytes=_VMEM
      ),
      cost_estimate=_cost(products * size, batch * self.heads * tokens**2, arguments, results),
      interpret=self.interpret,
      name=f"attention{kernel.__name__}",
    )(*arguments)

  def _gradient_specs(self, block: "_Block") -> list[pl.BlockSpec]:
    """Blocks of three arrays, or a whole row of one."""
    query, key = block.specs()
    row = pl.BlockSpec((1, block.keys, 3 * block.width), lambda b, g, i: (b, 0, 0))
    return [row] if self.packed else [query(0), key(0), key(0)]


def _cost(
  columns: int, scores: int, arguments: Sequence[Packed], results: Sequence[jax.ShapeDtypeStruct]
) -> pl.CostEstimate:
  """What a kernel tells the compiler.

  A product [N, D] x [D, N] or [N, N] x [N, D] is 2 N^2 D operations: 2 D for each score, and
  `columns` is D times the number of products. Of what else is done per score the one exponential
  is counted. Blocks of keys stay where they are while those of queries pass, so each argument,
  which may serve in several places, is read once and each result is written once.
  """
  read = {id(x): x for x in arguments}.values()
  return pl.CostEstimate(
    flops=2 * columns * scores,
    transcendentals=scores,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*read, *results)),
  )


@dataclasses.dataclass(frozen=True)
class _Block:
  """What one step of a kernel sees: whole tiles, beyond the end of a sequence too.

  Attributes:
    keys, queries: tokens.
    columns: of a group of heads.
    width: of all heads.
    itemsize: bytes of a number.
  """

  keys: int
  queries: int
  columns: int
  width: int
  itemsize: int

  @classmethod
  def of(cls, tokens: int, heads: int, size: int, dtype: str) -> "_Block":
    """The largest that is of use, of heads that end where lanes do if there are such."""
    itemsize = jnp.dtype(dtype).itemsize
    keys = pl.cdiv(tokens, LANES) * LANES
    most = max(LANES, min(_MOST_QUERIES, _MOST_SCORES // max(1, keys)))
    queries = max((n for n in range(LANES, most + 1, LANES) if keys % n == 0), default=LANES)
    aligned = [n for n in range(1, heads + 1) if heads % n == 0 and n * size % LANES == 0]
    small = [n for n in aligned if keys * n * size * itemsize <= _LARGEST_BLOCK]
    group = max(small, default=min(aligned, default=heads))
    return cls(keys, queries, group * size, heads * size, itemsize)

  def fits(self, *, packed: bool) -> bool:
    """Whether all that the kernels hold at once fits the chip's own memory, about.

    Arguments and results lie there twice, so that one is copied while the other is in use.
    """
    columns = pl.cdiv(self.columns, LANES) * LANES
    keys, queries = self.keys * columns, self.queries * columns
    gradients = 3 * self.keys * self.width if packed else 2 * keys + queries
    tangent = 2 * self.itemsize * (4 * keys + 4 * queries)
    backward = 2 * self.itemsize * (2 * keys + 2 * queries + gradients) + 2 * 4 * keys
    scores = 6 * 4 * self.keys * self.queries
    return max(tangent, backward) + scores + 2 * 4 * queries <= _VMEM

  def specs(self) -> tuple[SpecOf, SpecOf]:
    """How a step (row, group of heads, block of queries) sees queries and keys."""
    groups = self.width // self.columns
    spec = lambda rows, at: (
      lambda part: pl.BlockSpec(
        (1, rows, self.columns), lambda b, g, i: (b, at(i), part * groups + g)
      )
    )
    return spec(self.queries, lambda i: i), spec(self.keys, lambda i: 0)


def _forward(q_ref, k_ref, v_ref, o_ref, *, size: int, tokens: int) -> None:
  outputs = []
  for head in _heads(q_ref, size):
    q, k, v = q_ref[0, :, head], _keys(k_ref, head, tokens), _keys(v_ref, head, tokens)
    p, total = _softmax(q, k, tokens)
    outputs.append(_dot(v, p.astype(v.dtype), _TN) / total)
  o_ref[0] = _by_query(outputs, o_ref)


def _tangent(
  q_ref, dq_ref, k_ref, v_ref, dk_ref, dv_ref, o_ref, t_ref, *, size: int, tokens: int
) -> None:
  """P V, and with the scores' tangent S' = (Q' K^T + Q K'^T) / sqrt(D): P' V + P V'."""
  outputs, tangents = [], []
  for head in _heads(q_ref, size):
    q, dq = q_ref[0, :, head], dq_ref[0, :, head]
    k, v, dk, dv = (_keys(ref, head, tokens) for ref in (k_ref, v_ref, dk_ref, dv_ref))
    p, total = _softmax(q, k, tokens)
    ds = (_dot(k, dq, _NT) + _dot(dk, q, _NT)) * size**-0.5
    mean = jnp.sum(p * ds, axis=0, keepdims=True) / total
    dp = (p * (ds - mean)).astype(v.dtype)
    p = p.astype(v.dtype)
    outputs.append(_dot(v, p, _TN) / total)
    tangents.append((_dot(v, dp, _TN) + _dot(dv, p, _TN)) / total)
  o_ref[0] = _by_query(outputs, o_ref)
  t_ref[0] = _by_query(tangents, t_ref)


def _backward(q_ref, do_ref, k_ref, v_ref, *refs, size: int, tokens: int) -> None:
  """dV = P^T dO, dS = P (dP - rowsum(P dP)) with dP = dO V^T, dQ = dS K, dK = dS^T Q."""
  *gradients, dk_sum, dv_sum = refs
  step, steps = pl.program_id(2), pl.num_programs(2)
  dq_ref, dk_ref, dv_ref = _gradient_refs(gradients, q_ref.shape)

  @pl.when(step == 0)
  def _start() -> None:
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)

  outputs = []
  for head in _heads(q_ref, size):
    k, v = _keys(k_ref, head, tokens), _keys(v_ref, head, tokens)
    q, do = _queries(q_ref, head, tokens), _queries(do_ref, head, tokens)
    p, total = _softmax(q, k, tokens)
    p = p / total
    dp = _dot(v, do, _NT)
    mean = jnp.sum(p * dp, axis=0, keepdims=True)
    ds = (p * (dp - mean) * size**-0.5).astype(q.dtype)
    dv_sum[:, head] += _dot(p.astype(do.dtype), do, _NN)
    dk_sum[:, head] += _dot(ds, q, _NN)
    outputs.append(_dot(k, ds, _TN))
  dq_ref[...] = _by_query(outputs, dq_ref)

  @pl.when(step == steps - 1)
  def _finish() -> None:
    dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
    dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _gradient_refs(refs: Sequence, block: tuple[int, ...]) -> list:
  """Where this step's gradients go: blocks of three arrays, or places in a whole row of one."""
  if len(refs) == 3:
    return [ref.at[0] for ref in refs]
  _, queries, columns = block
  rows = pl.ds(pl.multiple_of(pl.program_id(2) * queries, queries), queries)
  width = refs[0].shape[-1] // 3
  first = pl.program_id(1) * columns
  at = [pl.ds(pl.multiple_of(part * width + first, LANES), columns) for part in range(3)]
  return [refs[0].at[0, rows, at[0]], refs[0].at[0, :, at[1]], refs[0].at[0, :, at[2]]]


def _heads(ref, size: int) -> list[slice]:
  """The columns of each head in a block."""
  return [slice(start, start + size) for start in range(0, ref.shape[-1], size)]


def _softmax(q: Array, k: Array, tokens: int) -> tuple[Array, Array]:
  """exp(scores - maximum) [keys, queries] and its sum over keys [1, queries], float32."""
  scores = _dot(k, q, _NT) * q.shape[-1] ** -0.5
  if tokens < k.shape[0]:
    within = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0) < tokens
    scores = jnp.where(within, scores, -math.inf)
  exponentials = jnp.exp(scores - jnp.max(scores, axis=0, keepdims=True))
  return exponentials, jnp.sum(exponentials, axis=0, keepdims=True)


def _keys(ref, head: slice, tokens: int) -> Array:
  """A head of all tokens; what lies beyond the end of the sequence is zero."""
  return _within(ref[0, :, head], 0, tokens) if tokens < ref.shape[1] else ref[0, :, head]


def _queries(ref, head: slice, tokens: int) -> Array:
  """A head of the block of queries; what lies beyond the end of the sequence is zero."""
  if tokens % ref.shape[1] == 0:
    return ref[0, :, head]
  return _within(ref[0, :, head], pl.program_id(2) * ref.shape[1], tokens)


def _within(x: Array, first: Array | int, tokens: int) -> Array:
  position = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
  return jnp.where(position < tokens, x, jnp.zeros_like(x))


def _by_query(heads: list[Array], ref) -> Array:
  """Results [D, queries] of each head, side by side as [queries, columns]."""
  return jnp.concatenate(heads, axis=0).T.astype(ref.dtype)


def _dot(a: Array, b: Array, dimensions: tuple) -> Array:
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
