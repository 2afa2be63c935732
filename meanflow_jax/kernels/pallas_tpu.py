"""Fused attention on TPUs, in Pallas: scores live in the chip's own memory alone.

All keys of a head fit there, so that no running softmax is needed, and the backward pass forms the
softmax anew instead of reading its statistics. Each kernel takes one row of the batch and some
heads at a time, reads every array once and writes every result once. Scores are held transposed,
[keys, queries]: maxima and sums over keys are then sums of whole registers, and what belongs to a
query is a row that is broadcast for nothing.

Where queries and keys are normalised and turned first (`rotary`), that is done with tokens last,
[heads, features, tokens]: sums over features, and their halves, are then whole registers, too.
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

from meanflow_jax.kernels import rotary
from meanflow_jax.kernels.plain import Layout, Packed
from meanflow_jax.kernels.rotary import Scales

Part = tuple[Packed, int]  # an array and which third of it
SpecOf = Callable[[int], pl.BlockSpec]  # of a third of an array

DTYPES = ("float32", "bfloat16")
LANES, SUBLANES = 128, 8
_MOST_QUERIES = 512  # at a time
_MOST_SCORES = 2**18  # queries x keys
_LARGEST_BLOCK = 2**20  # bytes that a step sees of one array, where heads can be grouped so
_VMEM = 64 * 2**20
_TURNING = 12  # operations for each number that is normalised and turned, or turned back
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


def takes_turned(tokens: int, heads: int, size: int, dtype: str) -> bool:
  """Whether the kernels normalise and turn queries and keys, which they take in one array.

  The halves of a head must be whole tiles.
  """
  if size % (2 * SUBLANES) or not takes_packed(tokens, heads, size, dtype):
    return False
  return _Block.of(tokens, heads, size, dtype).fits(packed=True, turned=True)


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
    gradients: Sequence[Array] = (),
    scales: Sequence[Scales] = (),
  ) -> Sequence[Array]:
    """Runs a kernel over rows, groups of heads and blocks of queries.

    Args:
      kernel: the kernel.
      products: matrix products [N, N] x D that it computes for each head.
      by_query: of which it sees the block of queries.
      by_key: of which it sees all tokens.
      outputs: results for the block of queries.
      gradients: arguments of which the results are gradients instead.
      scales: what queries and keys are scaled by, if they are turned, and its tangent.
    """
    first = by_query[0][0]
    batch, tokens, _ = first.shape
    width = self.width(first)
    size = width // self.heads
    block = _Block.of(tokens, self.heads, size, str(first.dtype))
    query, key = block.specs()
    arguments = [x for x, _ in (*by_query, *by_key)]
    specs = [query(part) for _, part in by_query] + [key(part) for _, part in by_key]
    scratch = [pltpu.VMEM((block.keys, block.columns), jnp.float32)] * 2 * bool(gradients)
    if scales:
      table = jnp.asarray(rotary.table(block.keys, size))
      arguments += [*scales, table, table]
      specs += [block.scales(size)] * len(scales) + block.tables(size)
      rows = block.queries, block.keys
      copies = [pltpu.VMEM((1, n, block.columns), first.dtype) for n in rows]
      scratch = copies * len(scales) + scratch
    results = [jax.ShapeDtypeStruct((batch, tokens, width), first.dtype)] * outputs
    results += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in gradients]
    # Gradients of keys are sums over queries, those of scales over heads, too; and keys are turned
    # once for all queries.
    scores = batch * self.heads * tokens**2
    turned = 2 * batch * tokens * width * (len(scales) + bool(gradients and scales))
    groups = "arbitrary" if gradients else "parallel"
    blocks = "arbitrary" if gradients or scales else "parallel"
    return pl.pallas_call(
      functools.partial(kernel, size=size, tokens=tokens),
      grid=(batch, width // block.columns, block.keys // block.queries),
      in_specs=specs,
      out_specs=self._gradient_specs(block) if gradients else [query(0)] * outputs,
      out_shape=results,
      scratch_shapes=scratch,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", groups, blocks), vmem_limit_bytes=_VMEM
      ),
      cost_estimate=_cost(products * size, scores, turned, arguments, results),
      interpret=self.interpret,
      name=f"attention{kernel.__name__}",
    )(*arguments)

  def _gradient_specs(self, block: "_Block") -> list[pl.BlockSpec]:
    """Blocks of three arrays, or a whole row of one."""
    query, key = block.specs()
    row = pl.BlockSpec((1, block.keys, 3 * block.width), lambda b, g, i: (b, 0, 0))
    return [row] if self.packed else [query(0), key(0), key(0)]


class TurnedKernels(Kernels):
  """The same for queries and keys that are normalised and turned first, all in one array.

  Their second argument is what they are scaled by [B, 2, D].
  """

  def forward(self, qkv: Packed, scales: Scales) -> Packed:
    """Attention [B, N, K D]."""
    q, k, v = self._parts([qkv])
    return self._call(_turned_forward, 2, (q,), (k, v), outputs=1, scales=[scales])[0]

  def tangent(
    self, qkv: Packed, scales: Scales, qkv_along: Packed, scales_along: Scales
  ) -> tuple[Packed, Packed]:
    """Attention and its derivative, from arguments and their tangents."""
    (q, k, v), (dq, dk, dv) = self._parts([qkv]), self._parts([qkv_along])
    out, tangent = self._call(
      _turned_tangent,
      6,
      (q, dq),
      (k, v, dk, dv),
      outputs=2,
      scales=[scales, scales_along],
    )
    return out, tangent

  def backward(self, qkv: Packed, scales: Scales, do: Packed) -> tuple[Packed, Scales]:
    """The gradients of the arguments, from arguments and the gradient of attention."""
    q, k, v = self._parts([qkv])
    of_qkv, of_scales = self._call(
      _turned_backward, 5, (q, (do, 0)), (k, v), gradients=[qkv, scales], scales=[scales]
    )
    return of_qkv, of_scales

  def _gradient_specs(self, block: "_Block") -> list[pl.BlockSpec]:
    """A whole row of each."""
    size = block.width // self.heads
    return [*super()._gradient_specs(block), block.scales(size)]


def _cost(
  columns: int,
  scores: int,
  turned: int,
  arguments: Sequence[Array],
  results: Sequence[jax.ShapeDtypeStruct],
) -> pl.CostEstimate:
  """What a kernel tells the compiler.

  A product [N, D] x [D, N] or [N, N] x [N, D] is 2 N^2 D operations: 2 D for each score, and
  `columns` is D times the number of products. Of what else is done per score the one exponential
  is counted. Blocks of keys stay where they are while those of queries pass, so each argument,
  which may serve in several places, is read once and each result is written once. `turned` numbers
  are normalised and turned, forth or back.
  """
  read = {id(x): x for x in arguments}.values()
  return pl.CostEstimate(
    flops=2 * columns * scores + _TURNING * turned,
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

  def fits(self, *, packed: bool, turned: bool = False) -> bool:
    """Whether all that the kernels hold at once fits the chip's own memory, about.

    Arguments and results lie there twice, so that one is copied while the other is in use. What is
    turned lies there again, next to a few float32 forms of it.
    """
    columns = pl.cdiv(self.columns, LANES) * LANES
    keys, queries = self.keys * columns, self.queries * columns
    gradients = 3 * self.keys * self.width if packed else 2 * keys + queries
    tangent = 2 * self.itemsize * (4 * keys + 4 * queries)
    backward = 2 * self.itemsize * (2 * keys + 2 * queries + gradients) + 2 * 4 * keys
    scores = 6 * 4 * self.keys * self.queries
    scores += (2 * self.itemsize + 4 * 4) * (keys + queries) * turned
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

  def scales(self, size: int) -> pl.BlockSpec:
    """How a step sees the scales of its row."""
    return pl.BlockSpec((1, 2, size), lambda b, g, i: (b, 0, 0))

  def tables(self, size: int) -> list[pl.BlockSpec]:
    """How a step sees the angles of its queries, and of all keys."""
    shape = 2, size // 2
    return [
      pl.BlockSpec((*shape, self.queries), lambda b, g, i: (0, 0, i)),
      pl.BlockSpec((*shape, self.keys), lambda b, g, i: (0, 0, 0)),
    ]


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
  dq_ref, dk_ref, dv_ref = _gradient_refs(gradients, q_ref.shape)
  outputs = _accumulate(q_ref, do_ref, k_ref, v_ref, dk_sum, dv_sum, size, tokens)
  dq_ref[...] = _by_query(outputs, dq_ref)

  @pl.when(_is_last_block())
  def _finish() -> None:
    dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
    dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _accumulate(q_ref, do_ref, k_ref, v_ref, dk_sum, dv_sum, size: int, tokens: int) -> list[Array]:
  """Adds to the gradients of keys and values; those of queries [D, queries], of each head."""

  @pl.when(pl.program_id(2) == 0)
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
  return outputs


def _is_last_block() -> Array:
  return pl.program_id(2) == pl.num_programs(2) - 1


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


@dataclasses.dataclass(frozen=True)
class _Turning:
  """Queries or keys of some heads that are normalised, scaled and turned, with tokens last.

  With x^ = x / rms(x) that is R (s x^), R being the rotation. The derivative R (s A x' + s' x^) has
  A x' = (x' - x^ mean(x^ x')) / rms(x), which is symmetric: gradients g come back as A (s R^T g).

  Attributes:
    hat: x^ [heads, D, tokens].
    inverse: 1 / rms(x) [heads, 1, tokens].
    scale: s [1, D, 1].
    angles: their cosines and sines [2, 1, d, tokens].
  """

  hat: Array
  inverse: Array
  scale: Array
  angles: Array

  @classmethod
  def of(cls, x: Array, scale: Array, angles: Array) -> "_Turning":
    """Of x [tokens, columns], a scale [1, D] and angles [2, d, tokens]."""
    x = _by_feature(x, scale.shape[1])
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + rotary.EPSILON)
    return cls(x * inverse, inverse, _column(scale), angles[:, None])

  def value(self) -> Array:
    """[tokens, columns]."""
    return _by_token(self._turned(self.scale * self.hat))

  def along(self, dx: Array, dscale: Array) -> Array:
    """The value's derivative, from tangents of x and of the scale."""
    moved = self.scale * self._normalised(_by_feature(dx, self.hat.shape[1]))
    return _by_token(self._turned(moved + _column(dscale) * self.hat))

  def back(self, gradient: Array) -> tuple[Array, Array]:
    """Gradients of x and of the scale, from that of the value [columns, tokens]."""
    cos, sin = self.angles
    first, second = _halves(gradient.reshape(self.hat.shape))
    gradient = jnp.concatenate([first * cos + second * sin, second * cos - first * sin], axis=1)
    of_scale = jnp.sum(jnp.sum(gradient * self.hat, axis=0), axis=1, keepdims=True).T
    return _by_token(self._normalised(self.scale * gradient)), of_scale

  def _normalised(self, x: Array) -> Array:
    return self.inverse * (x - self.hat * jnp.mean(self.hat * x, axis=1, keepdims=True))

  def _turned(self, x: Array) -> Array:
    cos, sin = self.angles
    first, second = _halves(x)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=1)


def _turned_forward(
  q_ref, k_ref, v_ref, scales_ref, at_queries, at_keys, o_ref, q_s, k_s, *, size: int, tokens: int
) -> None:
  for heads in _whole_tiles(q_ref, size):
    turning = _Turning.of(_queries(q_ref, heads, tokens), scales_ref[0, :1], at_queries[...])
    q_s[0, :, heads] = turning.value().astype(q_s.dtype)

  @pl.when(pl.program_id(2) == 0)
  def _turn_keys() -> None:
    for heads in _whole_tiles(k_ref, size):
      turning = _Turning.of(_keys(k_ref, heads, tokens), scales_ref[0, 1:], at_keys[...])
      k_s[0, :, heads] = turning.value().astype(k_s.dtype)

  _forward(q_s, k_s, v_ref, o_ref, size=size, tokens=tokens)


def _turned_tangent(
  q_ref,
  dq_ref,
  k_ref,
  v_ref,
  dk_ref,
  dv_ref,
  scales_ref,
  along_ref,
  at_queries,
  at_keys,
  o_ref,
  t_ref,
  q_s,
  k_s,
  dq_s,
  dk_s,
  *,
  size: int,
  tokens: int,
) -> None:
  for heads in _whole_tiles(q_ref, size):
    turning = _Turning.of(_queries(q_ref, heads, tokens), scales_ref[0, :1], at_queries[...])
    along = turning.along(_queries(dq_ref, heads, tokens), along_ref[0, :1])
    q_s[0, :, heads] = turning.value().astype(q_s.dtype)
    dq_s[0, :, heads] = along.astype(dq_s.dtype)

  @pl.when(pl.program_id(2) == 0)
  def _turn_keys() -> None:
    for heads in _whole_tiles(k_ref, size):
      turning = _Turning.of(_keys(k_ref, heads, tokens), scales_ref[0, 1:], at_keys[...])
      along = turning.along(_keys(dk_ref, heads, tokens), along_ref[0, 1:])
      k_s[0, :, heads] = turning.value().astype(k_s.dtype)
      dk_s[0, :, heads] = along.astype(dk_s.dtype)

  _tangent(q_s, dq_s, k_s, v_ref, dk_s, dv_ref, o_ref, t_ref, size=size, tokens=tokens)


def _turned_backward(
  q_ref,
  do_ref,
  k_ref,
  v_ref,
  scales_ref,
  at_queries,
  at_keys,
  gradient_ref,
  of_scales_ref,
  q_s,
  k_s,
  dk_sum,
  dv_sum,
  *,
  size: int,
  tokens: int,
) -> None:
  dq_ref, dk_ref, dv_ref = _gradient_refs([gradient_ref], q_ref.shape)
  tiles = _whole_tiles(q_ref, size)
  of_queries = lambda at: _Turning.of(
    _queries(q_ref, at, tokens), scales_ref[0, :1], at_queries[...]
  )
  of_keys = lambda at: _Turning.of(_keys(k_ref, at, tokens), scales_ref[0, 1:], at_keys[...])
  for heads in tiles:
    q_s[0, :, heads] = of_queries(heads).value().astype(q_s.dtype)

  @pl.when(pl.program_id(2) == 0)
  def _turn_keys() -> None:
    for heads in tiles:
      k_s[0, :, heads] = of_keys(heads).value().astype(k_s.dtype)

  @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
  def _start() -> None:
    of_scales_ref[...] = jnp.zeros_like(of_scales_ref)

  outputs = _accumulate(q_s, do_ref, k_s, v_ref, dk_sum, dv_sum, size, tokens)
  outputs = jnp.concatenate(outputs, axis=0)
  for heads in tiles:
    dq, of_scale = of_queries(heads).back(outputs[heads])
    dq_ref[:, heads] = dq.astype(dq_ref.dtype)
    of_scales_ref[0, :1] += of_scale

  @pl.when(_is_last_block())
  def _finish() -> None:
    for heads in tiles:
      dk, of_scale = of_keys(heads).back(dk_sum[:, heads].T)
      dk_ref[:, heads] = dk.astype(dk_ref.dtype)
      of_scales_ref[0, 1:] += of_scale
    dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _whole_tiles(ref, size: int) -> list[slice]:
  """The columns of the fewest heads that end where lanes do, and of the next."""
  return _heads(ref, math.lcm(size, LANES))


def _halves(x: Array) -> tuple[Array, Array]:
  half = x.shape[1] // 2
  return x[:, :half], x[:, half:]


def _by_feature(x: Array, size: int) -> Array:
  """From [tokens, columns] to float32 [heads, D, tokens]."""
  return x.astype(jnp.float32).T.reshape(-1, size, x.shape[0])


def _by_token(x: Array) -> Array:
  return x.reshape(-1, x.shape[-1]).T


def _column(row: Array) -> Array:
  return row.astype(jnp.float32).T[None]
