"""Attention and its derivatives by their formulas, in double precision on the host."""

from collections.abc import Sequence

import numpy as np

Arrays = Sequence[np.ndarray]  # each [B, N, K, D]


def tangent(qkv: Arrays, along: Arrays) -> tuple[np.ndarray, np.ndarray]:
  """The output, and its derivative along tangents of queries, keys and values."""
  (q, k, v), (dq, dk, dv) = map(_double, (qkv, along))
  p = _softmax(q, k)
  ds = (_products(dq, k) + _products(q, dk)) / np.sqrt(q.shape[-1])
  dp = p * (ds - (p * ds).sum(-1, keepdims=True))
  return _mix(p, v), _mix(dp, v) + _mix(p, dv)


def gradients(qkv: Arrays, do: np.ndarray) -> tuple[np.ndarray, ...]:
  """The gradients of queries, keys and values, from that of the output."""
  q, k, v, do = _double((*qkv, do))
  p = _softmax(q, k)
  dp = _products(do, v)
  ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
  return _mix(ds, k), _mix(ds.swapaxes(2, 3), q), _mix(p.swapaxes(2, 3), do)


def error(ours: Sequence, exact: Arrays) -> float:
  """The largest of several arrays' errors, each relative in the Euclidean norm."""
  pairs = zip(_double(ours), exact, strict=True)
  return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def _double(arrays: Sequence) -> list[np.ndarray]:
  return [np.asarray(x).astype(np.float64) for x in arrays]


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.einsum("bqhd,bkhd->bhqk", a, b, optimize=True)


def _mix(p: np.ndarray, x: np.ndarray) -> np.ndarray:
  return np.einsum("bhqk,bkhd->bqhd", p, x, optimize=True)


def _softmax(q: np.ndarray, k: np.ndarray) -> np.ndarray:
  scores = _products(q, k) / np.sqrt(q.shape[-1])
  p = np.exp(scores - scores.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)
