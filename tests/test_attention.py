"""Fused attention, run in Python, against attention in double precision, on every path."""

import collections
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from jax.sharding import NamedSharding, PartitionSpec

from configs import base
from meanflow_jax import build
from meanflow_jax.kernels import forward_mode, pallas_tpu, plain
from meanflow_jax.kernels.attention import Fused, attention, choose
from meanflow_jax.runtime.mesh import make_mesh
from meanflow_jax.runtime.topology import tpu_devices
from tests import tiny
from tests.tpu import uncached

FUSED = Fused(interpret=True)
# Tokens, heads, their size: whole blocks, parts of one, several; groups of heads, aligned or not.
SHAPES = ((256, 2, 64), (5, 3, 8), (100, 2, 72))
MORE_SHAPES = ((300, 1, 64), (640, 2, 64), (20, 16, 72))
WITHIN = {"float32": 1e-6, "bfloat16": 6e-3}

Attention = Callable[..., jax.Array]


def heads(shape: tuple[int, int, int], dtype: str) -> list[jax.Array]:
  """q, k, v, their tangents, and a weight of the output."""
  values = np.random.default_rng(0).normal(size=(7, 2, *shape))
  return [jnp.asarray(x, dtype) for x in values]


def definition(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
  weights /= weights.sum(-1, keepdims=True)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def as_packed(shape: tuple[int, int, int], packed: Attention) -> Attention:
  """Attention of three arrays, by one that takes them packed."""
  tokens, count, size = shape
  flat = lambda x: x.reshape(2, tokens, count * size)

  def function(*qkv: jax.Array) -> jax.Array:
    mixed = packed(jnp.concatenate(list(map(flat, qkv)), axis=-1), count)
    return mixed.reshape(2, *shape)

  return function


def everything(function: Attention, x: list[jax.Array], jvp: Callable) -> dict[str, Any]:
  """Value, gradients, tangent, and gradients of a loss whose target holds the tangent.

  Of arguments, their tangents, and a weight of the output.
  """
  count = len(x) // 2
  args, along, weight = tuple(x[:count]), tuple(x[count:-1]), x[-1]

  def loss(*args: jax.Array) -> Any:
    value, tangent = jvp(function, args, along)
    target = jax.lax.stop_gradient(jnp.sin(value) + tangent)
    error = (value - target).astype(jnp.float32)
    return jnp.sum(error**2 * weight), (value, tangent)

  value, pull_back = jax.vjp(function, *args)
  gradient = jax.grad(loss, argnums=range(count), has_aux=True)
  gradients, (value_of_jvp, tangent) = gradient(*args)
  return {
    "value": value,
    "gradients": pull_back(weight),
    "value of a jvp": value_of_jvp,
    "tangent": tangent,
    "gradients of a jvp": gradients,
  }


@functools.cache
def exact(shape: tuple[int, int, int], dtype: str) -> dict[str, Any]:
  """In double precision, of the same rounded numbers."""
  x = [a.astype("float32") for a in heads(shape, dtype)]
  with jax.enable_x64(True):
    x = [jnp.asarray(np.asarray(a), "float64") for a in x]
    return jax.tree.map(np.asarray, jax.jit(lambda x: everything(definition, x, jax.jvp))(x))


def error(ours: Any, exact: Any) -> float:
  """The largest of all arrays' errors, each relative in the Euclidean norm."""
  norm = lambda x: np.linalg.norm(np.asarray(x, np.float64))
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)
  return max(norm(np.asarray(a, np.float64) - b) / norm(b) for a, b in pairs)


# Values and derivatives.


EVERYDAY = [*zip(SHAPES, ("float32", "float32", "bfloat16"), strict=True)]


@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    pytest.param(*case, marks=[pytest.mark.slow] * (case not in EVERYDAY))
    for case in itertools.product(SHAPES + MORE_SHAPES, ("float32", "bfloat16"))
  ],
  ids=str,
)
def test_all_paths_are_those_of_attention(shape, dtype):
  """With an error no larger than the plain form's, but for chance where numbers are few."""
  x = heads(shape, dtype)
  fused = as_packed(shape, FUSED.packed)
  ours = jax.jit(lambda x: everything(fused, x, forward_mode.jvp))(x)
  plainly = jax.jit(lambda x: everything(plain.attention, x, jax.jvp))(x)
  for name, expected in exact(shape, dtype).items():
    assert {leaf.dtype for leaf in jax.tree.leaves(ours[name])} == {jnp.dtype(dtype)}
    found = error(ours[name], expected)
    assert found < WITHIN[dtype], name
    if dtype == "bfloat16":
      assert found < 1.25 * error(plainly[name], expected), name


def test_a_projection_need_not_be_taken_apart():
  """The kernels of packed arrays and of three give the same bits, and both are used."""
  takes = [shape for shape in SHAPES + MORE_SHAPES if pallas_tpu.takes_packed(*shape, "float32")]
  assert takes == [(256, 2, 64), (640, 2, 64), (20, 16, 72)]
  shape = takes[0]
  x = heads(shape, "float32")
  compute = lambda f: jax.jit(lambda x: everything(f, x, forward_mode.jvp))(x)
  ours, apart = compute(as_packed(shape, FUSED.packed)), compute(FUSED)
  jax.tree.map(np.testing.assert_array_equal, ours, apart)
  assert error(compute(as_packed(shape, plain.packed)), compute(plain.attention)) < 1e-6


def test_scores_may_be_large():
  q, k, v, *_ = heads((300, 1, 64), "float32")
  q, k = 30 * q, 30 * k
  with jax.enable_x64(True):
    expected = definition(*(jnp.asarray(np.asarray(x), "float64") for x in (q, k, v)))
  assert error(jax.jit(FUSED)(q, k, v), np.asarray(expected)) < 1e-3


def test_a_batch_of_batches():
  x = jax.random.normal(jax.random.key(0), (3, 2, 1, 5, 1, 8))
  ours = jax.vmap(FUSED, in_axes=(0, None, 0))(x[0], x[1, 0], x[2])
  plainly = jax.vmap(plain.attention, in_axes=(0, None, 0))(x[0], x[1, 0], x[2])
  np.testing.assert_allclose(ours, plainly, atol=1e-5)


def test_no_rows_are_no_rows():
  x = jnp.zeros((0, 256, 2, 64))
  assert FUSED(x, x, x).shape == x.shape
  assert FUSED.packed(jnp.zeros((0, 256, 384)), 2).shape == (0, 256, 128)
  for turned in (FUSED.turned, plain.turned):
    assert turned(jnp.zeros((0, 256, 384)), 2, jnp.ones((0, 2, 64))).shape == (0, 256, 128)


# Queries and keys that are normalised and turned first.


def turned_arguments(shape: tuple[int, int, int], dtype: str) -> list[jax.Array]:
  """q, k, v and scales, their tangents, and a weight of the output."""
  *x, weight = heads(shape, dtype)
  scales = np.random.default_rng(1).normal(size=(2, 2, 2, shape[2])).astype(np.float32)
  return [*x[:3], jnp.asarray(1 + scales[0] / 3), *x[3:], jnp.asarray(scales[1]), weight]


def as_turned(shape: tuple[int, int, int], function: Attention) -> Attention:
  """Attention of four arrays, by one that takes the first three packed."""
  return lambda *x: as_packed(shape, lambda qkv, count: function(qkv, count, x[3]))(*x[:3])


def turned_definition(q: jax.Array, k: jax.Array, v: jax.Array, scales: jax.Array) -> jax.Array:
  """A pair of features is turned as a complex number."""
  _, tokens, _, size = q.shape
  angles = np.outer(np.arange(tokens), 1e4 ** (-2 * np.arange(size // 2) / size))[:, None]

  def turned(x: jax.Array, scale: jax.Array) -> jax.Array:
    x *= scale[:, None, None] / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    pairs = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(1j * angles)[None]
    return jnp.concatenate([pairs.real, pairs.imag], axis=-1)

  return definition(turned(q, scales[:, 0]), turned(k, scales[:, 1]), v)


@pytest.mark.parametrize(
  ("shape", "dtype", "by_kernel"),
  [
    ((20, 16, 16), "float32", True),
    ((276, 2, 64), "bfloat16", True),
    ((5, 3, 8), "float32", False),
    # Several groups of heads and blocks of queries.
    pytest.param((640, 12, 64), "float32", True, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_queries_and_keys_may_be_turned_first(shape, dtype, by_kernel):
  """All paths, with an error no larger than the plain form's; where kernels do not, it is done."""
  assert pallas_tpu.takes_turned(*shape, dtype) == by_kernel
  x = turned_arguments(shape, dtype)
  compute = lambda f, jvp: jax.jit(lambda x: everything(as_turned(shape, f), x, jvp))(x)
  ours = compute(FUSED.turned, forward_mode.jvp)
  plainly = compute(plain.turned, jax.jvp)
  with jax.enable_x64(True):
    exactly = [jnp.asarray(np.asarray(a.astype("float32")), "float64") for a in x]
    exactly = jax.jit(lambda x: everything(turned_definition, x, jax.jvp))(exactly)
    exactly = jax.tree.map(np.asarray, exactly)
  for name, expected in exactly.items():
    same_types = jax.tree.map(lambda a, b: a.dtype == b.dtype, ours[name], plainly[name])
    assert all(jax.tree.leaves(same_types)), name
    found = error(ours[name], expected)
    assert found < 1.5 * WITHIN[dtype], name
    assert found < 1.25 * error(plainly[name], expected) + 5e-7, name


def test_turned_rows_stay_where_they_are():
  """On a mesh; the gradient of scales that all rows share is one sum over devices."""
  mesh = make_mesh(4, 2)
  rows, everywhere = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (mesh.axis_names, None))
  rng = np.random.default_rng(0)
  qkv, along = rng.normal(size=(2, 8, 5, 3 * 128)).astype(np.float32)
  scales = rng.normal(size=(2, 16)).astype(np.float32)

  def gradient(fused: Fused) -> Callable:
    def loss(qkv: jax.Array, along: jax.Array, scales: jax.Array) -> jax.Array:
      scales = jnp.broadcast_to(scales[None], (8, *scales.shape))
      u, slope = forward_mode.jvp(lambda qkv: fused.turned(qkv, 8, scales), (qkv,), (along,))
      return jnp.sum((u - jax.lax.stop_gradient(slope)) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 2)))

  placed = *(jax.device_put(x, rows) for x in (qkv, along)), jax.device_put(scales, everywhere)
  compiled = gradient(Fused(mesh, interpret=True)).lower(*placed).compile()
  assert "all-gather" not in compiled.as_text()
  for ours, alone in zip(compiled(*placed), gradient(FUSED)(qkv, along, scales), strict=True):
    np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())


# What has no derivative says so.


@pytest.mark.parametrize("function", [FUSED, plain.attention])
def test_reverse_mode_through_the_tangent_is_refused(function):
  q, k, v, *along, _ = heads((5, 1, 8), "float32")
  both = lambda q, dq: forward_mode.jvp(function, (q, k, v), (dq, *along[1:]))
  jax.jit(both)(q, along[0])
  for argument in (0, 1):
    with pytest.raises(NotImplementedError, match="stop_gradient around it"):
      jax.grad(lambda *args: both(*args)[1].sum(), argument)(q, along[0])
  # The value does not depend on the direction.
  assert not jax.grad(lambda dq: both(q, dq)[0].sum())(along[0]).any()


@pytest.mark.parametrize("directions", [(1.0,), (1.0, None), (1.0, 1.0, 1.0), ({"t": 1.0}, 1.0)])
def test_a_direction_for_each_argument(directions):
  with pytest.raises(TypeError, match="one structure"):
    forward_mode.jvp(lambda z, t: z * t, (2.0, 3.0), directions)


def test_a_jvp_that_was_not_announced_is_refused():
  q, k, v, *along, _ = heads((5, 1, 8), "float32")
  with pytest.raises(TypeError, match="custom_vjp"):
    jax.jvp(FUSED, (q, k, v), tuple(along))


def test_a_second_derivative_is_refused():
  q, k, v, *_ = heads((5, 1, 8), "float32")
  squares = lambda q: jnp.sum(FUSED(q, k, v) ** 2)
  slope = lambda q: forward_mode.jvp(squares, (q,), (q,))[1]
  for second in (
    lambda: jax.jvp(jax.grad(squares), (q,), (q,)),
    lambda: forward_mode.jvp(slope, (q,), (q,)),
  ):
    with pytest.raises(NotImplementedError, match=r"second derivative.*plain attention"):
      second()


# What depends on the direction of a derivative, and what does not.


@pytest.mark.parametrize("moving", [(0,), (1, 2), ()], ids=str)
def test_some_arguments_may_stand_still(moving):
  """In a network of two attentions, of which one sees nothing that moves; value and gradients."""
  arrays, along = heads((5, 2, 8), "float32")[:3], heads((5, 2, 8), "float32")[3:6]

  def gradient(attend: Attention, jvp: Callable) -> Any:
    def network(w: jax.Array, z: jax.Array) -> jax.Array:
      still = [jnp.sin(w * x) for x in arrays]
      x = [
        a + z * b if i in moving else a for i, (a, b) in enumerate(zip(still, along, strict=True))
      ]
      return w * attend(*x) + z * attend(*still)

    def loss(w: jax.Array, z: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
      u, slope = jvp(lambda z: network(w, z), (z,), (jnp.float32(0.7),))
      slope = jax.lax.stop_gradient(slope)
      return jnp.sum((u - slope) ** 2), (u, slope)

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(jnp.float32(0.5), jnp.float32(0.3))

  ours, plainly = gradient(FUSED, forward_mode.jvp), gradient(plain.attention, jax.jvp)
  assert error(ours, plainly) < 1e-5


def test_a_jvp_may_stand_in_a_branch():
  """Which is differentiated after it has been traced, with all that it closes over: labels, too."""
  labels, x = jnp.array([0, 2, 1]), jnp.array([0.3, 0.5, 0.7])

  def gradient(jvp: Callable) -> Any:
    def loss(w: jax.Array, taken: jax.Array, y: jax.Array) -> jax.Array:
      f = lambda x: jnp.sin(w[y] * x)
      along = lambda: jvp(f, (x,), (x,))
      value, slope = jax.lax.cond(taken, along, lambda: (f(x), x))
      return jnp.sum((value - jax.lax.stop_gradient(slope)) ** 2)

    return jax.jit(jax.grad(loss))(jnp.array([0.5, 1.0, 2.0]), jnp.bool_(True), labels)

  np.testing.assert_allclose(gradient(forward_mode.jvp), gradient(jax.jvp), rtol=1e-6)


def test_what_a_jvp_closes_over_has_gradients():
  """Also where it is rows of labels, or where nothing asks for the value's own gradient."""
  w, labels = jnp.arange(3.0), jnp.array([2, 0])

  def u_and_slope(w: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    return forward_mode.jvp(lambda z: z**2 * w[labels], (z,), (jnp.ones(2),))

  z = jnp.array([0.5, 2.0])
  np.testing.assert_allclose(jax.jit(u_and_slope)(w, z)[1], 2 * z * w[labels])
  gradients = jax.grad(lambda w, z: u_and_slope(w, z)[0].sum(), argnums=(0, 1))(w, z)
  np.testing.assert_allclose(gradients[0], [4.0, 0.0, 0.25])
  np.testing.assert_allclose(gradients[1], 2 * z * w[labels])


# As the network uses it.


@functools.cache
def step_of_a_network(attend: Callable, remat: str, scan: bool) -> Any:
  """Loss, metrics and gradients."""
  network = tiny.dit(width=32, remat=remat, scan=scan, attention=attend)
  x, y = jax.random.normal(jax.random.key(0), (4, 6, 4, 2)), jnp.arange(4) % 3

  def loss(params: tiny.Params) -> Any:
    u = lambda z, r, t, y: network.apply({"params": params}, z, t, t - r, y)
    return tiny.meanflow(equal_fraction=0.5).loss(u, jax.random.key(1), x, y)

  params = tiny.random_params(network, x.shape[1:])
  return tiny.jit(jax.value_and_grad(loss, has_aux=True))(params)


OTHER_WAYS = [("blocks", True), ("matmuls", False), ("none", False)]


@pytest.mark.parametrize(
  ("remat", "scan"),
  [("matmuls", True), *[pytest.param(*way, marks=pytest.mark.slow) for way in OTHER_WAYS]],
)
def test_a_network_learns_the_same(remat, scan):
  """Under a scan and rematerialisation."""
  ours = step_of_a_network(FUSED.packed, remat, scan)
  plainly = step_of_a_network(plain.packed, "matmuls", True)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
  jax.tree.map(close, ours, plainly)


def kernels_of(function: Callable, *args: Any) -> dict[str, int]:
  """How often each kernel occurs in a program; those of value and tangent go by other names."""
  return kernels_in(str(jax.make_jaxpr(function)(*args)))


def kernels_in(program: str) -> dict[str, int]:
  names = re.findall(r"name=attention_(backward)|value_(with|and)_tangent\[", program)
  given = {"with": "forward", "and": "tangent"}
  found = collections.Counter(kernel or given[primitive] for kernel, primitive in names)
  return {name: found[name] for name in ("forward", "tangent", "backward")}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("matmuls", 0), ("blocks", 1)])
def test_what_the_backward_pass_runs_again(remat, again, scan):
  """Attention only where blocks are run anew as a whole; nothing of the tangent anywhere."""
  network = tiny.dit(remat=remat, scan=scan, attention=FUSED.packed, num_classes=0)
  z, t, y = jnp.zeros((1, 4, 6, 2)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
  params = tiny.random_params(network, z.shape[1:])

  def value(params: tiny.Params) -> jax.Array:
    return jnp.sum(network.apply({"params": params}, z, t, t, y) ** 2)

  def with_tangent(params: tiny.Params) -> jax.Array:
    u_of = lambda z: network.apply({"params": params}, z, t, t, y)
    u, along = forward_mode.jvp(u_of, (z,), (jnp.ones_like(z),))
    return jnp.sum((u - jax.lax.stop_gradient(along)) ** 2)

  assert kernels_of(value, params) == {"forward": 1, "tangent": 0, "backward": 0}
  found = kernels_of(jax.grad(value), params)
  assert found == {"forward": 1 + again, "tangent": 0, "backward": 1}
  found = kernels_of(jax.grad(with_tangent), params)
  assert found == {"forward": again, "tangent": 1, "backward": 1}


@pytest.mark.parametrize("scan", [True, False])
def test_a_tangent_that_is_not_used_is_not_computed(scan):
  """Of a network with two heads, the derivative of one: the other has forward kernels alone."""
  network = tiny.in_context_dit(
    depth=5, head_depth=3, remat="matmuls", scan=scan, attention=FUSED.turned
  )
  z, t, y = jnp.ones((1, 4, 4, 1)), jnp.ones(1), jnp.zeros(1, jnp.int32)
  params = tiny.random_params(network, z.shape[1:])

  def loss(params: tiny.Params, used: tuple[bool, bool]) -> jax.Array:
    both = lambda z: network.apply({"params": params}, z, t, t, y, heads=("u", "v"))
    values, slopes = forward_mode.jvp(both, (z,), (jnp.ones_like(z),))
    targets = [jax.lax.stop_gradient(slope) for slope in slopes]
    pairs = zip(values, targets, used, strict=True)
    return sum(jnp.sum((value - target if use else value) ** 2) for value, target, use in pairs)

  def kernels(*used: bool) -> dict[str, int]:
    program = jax.make_jaxpr(jax.grad(lambda params: loss(params, used)))(params).jaxpr
    kept, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    return kernels_in(str(kept))

  # The trunk and each head are one loop.
  assert kernels(True, True) == {"forward": 0, "tangent": 3, "backward": 3}
  assert kernels(True, False) == {"forward": 1, "tangent": 2, "backward": 3}
  assert kernels(False, False) == {"forward": 3, "tangent": 0, "backward": 3}


# On a mesh.


@pytest.mark.parametrize("packed", [True, False])
def test_each_device_takes_its_rows(packed):
  """Nothing is gathered, and the numbers are those of one device."""
  mesh = make_mesh(4, 2)
  rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  shape = (8, 5, 2 * 128 * 3) if packed else (8, 5, 2, 8)
  count = 1 if packed else 3
  x = np.random.default_rng(0).normal(size=(2 * count, *shape)).astype(np.float32)

  def gradient(fused: Fused) -> Callable:
    function = (lambda qkv: fused.packed(qkv, 2)) if packed else fused

    def loss(*x: jax.Array) -> jax.Array:
      u, along = forward_mode.jvp(function, x[:count], x[count:])
      return jnp.sum((u - jax.lax.stop_gradient(along)) ** 2)

    return jax.jit(jax.grad(loss, argnums=tuple(range(count))))

  spread = gradient(Fused(mesh, interpret=True)).lower(*(jax.device_put(a, rows) for a in x))
  compiled = spread.compile()
  text = compiled.as_text()
  assert "all-gather" not in text
  assert "all-to-all" not in text
  ours = compiled(*(jax.device_put(a, rows) for a in x))
  for a, b in zip(ours, gradient(FUSED)(*x), strict=True):
    assert a.sharding.is_equivalent_to(rows, a.ndim)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_devices_that_have_their_rows_already_keep_them():
  mesh = make_mesh(8, 1)
  rows = PartitionSpec(mesh.axis_names)
  own = jax.shard_map(
    Fused(mesh, interpret=True), mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
  )
  x = jax.random.normal(jax.random.key(0), (3, 8, 5, 2, 8))
  np.testing.assert_allclose(jax.jit(own)(*x), plain.attention(*x), atol=1e-5)


def test_rows_that_do_not_divide_are_computed_by_all():
  x = jax.random.normal(jax.random.key(0), (3, 3, 5, 2, 8))
  ours = jax.jit(Fused(make_mesh(8, 1), interpret=True))(*x)
  np.testing.assert_allclose(ours, plain.attention(*x), atol=1e-5)


# What runs where.


def chosen(name: str, platform: str, *sizes: int, dtype: str = "float32") -> tuple[str, str | None]:
  tokens, count, size = sizes or (256, 12, 64)
  return choose(name, platform, tokens=tokens, heads=count, size=size, dtype=dtype)


def test_kernels_run_on_tpus():
  assert chosen("auto", "tpu", dtype="bfloat16") == ("pallas", None)
  assert chosen("pallas", "tpu", 1024, 16, 72) == ("pallas", None)
  for platform in ("cpu", "gpu"):
    assert chosen("auto", platform) == ("plain", None)
  assert chosen("plain", "tpu") == ("plain", None)


@pytest.mark.parametrize(
  ("sizes", "dtype", "reason"),
  [
    ((256, 12, 64), "float16", "takes float32 or bfloat16, not float16"),
    ((256, 12, 33), "float32", "multiple of 8, not 33"),
    ((9000, 16, 72), "float32", "cannot hold 9000 tokens of 16 heads of size 72 in the chip"),
    ((0, 12, 64), "float32", "cannot hold 0 tokens"),
  ],
)
def test_what_a_kernel_cannot_take(sizes, dtype, reason):
  name, why = chosen("auto", "tpu", *sizes, dtype=dtype)
  assert name == "plain"
  assert why.startswith("attention is plain, since the fused kernel ")
  assert reason in why
  with pytest.raises(ValueError, match=f"{reason}.*'plain'"):
    chosen("pallas", "tpu", *sizes, dtype=dtype)


def test_a_kernel_where_there_is_none_is_refused():
  with pytest.raises(ValueError, match=r"runs on TPUs, and .*, not on a gpu; .*'plain'"):
    chosen("pallas", "gpu")
  with pytest.raises(ValueError, match=r"one of \('auto', 'plain', 'pallas'\), got 'flash'"):
    chosen("flash", "cpu")


def test_here_it_is_plain():
  q, k, v, *_ = heads((5, 3, 8), "float32")
  np.testing.assert_array_equal(attention(q, k, v), plain.attention(q, k, v))
  with pytest.raises(ValueError, match="not on a cpu"):
    attention(q, k, v, name="pallas")


def test_a_network_takes_what_its_mesh_can_run():
  config = base.get_config()
  here = make_mesh(8, 1)
  assert build.network(config, here).attention is plain.packed
  config.model.attention = "pallas"
  with pytest.raises(ValueError, match="not on a cpu"):
    build.network(config, here)


@pytest.mark.tpu
def test_the_log_says_once_why_it_is_plain(caplog):
  mesh = make_mesh(4, 1, devices=tpu_devices("v5e:2x2"))
  config = base.get_config()
  config.model.update(width=44, num_heads=1)
  for _ in range(2):
    assert build.network(config, mesh).attention is plain.packed
  (said,) = [r.getMessage() for r in caplog.records if "attention" in r.getMessage()]
  assert "multiple of 8, not 44" in said
  config.model.update(width=128, num_heads=2)
  assert build.network(config, mesh).attention.__self__ == Fused(mesh)


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
  ("tokens", "count", "size", "dtype"),
  [(256, 16, 72, "bfloat16"), (100, 2, 72, "float32"), (640, 2, 64, "bfloat16")],
)
def test_kernels_compile_for_tpus(topology, tokens, count, size, dtype):
  """On a mesh, gradients of a JVP; what the compiler counts is what is declared."""
  mesh = make_mesh(4, 1, devices=tpu_devices(topology))
  rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  x = jax.ShapeDtypeStruct((8, tokens, 3 * count * size), dtype, sharding=rows)
  function = lambda qkv: Fused(mesh).packed(qkv, count)

  def loss(qkv: jax.Array, along: jax.Array) -> jax.Array:
    u, derivative = forward_mode.jvp(function, (qkv,), (along,))
    return jnp.sum(u.astype(jnp.float32)) + function(qkv).astype(jnp.float32).sum(), derivative

  with uncached():
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(x, x).compile()
  text = compiled.as_text()
  for name in ("forward", "tangent", "backward"):
    assert f"attention_{name}" in text
  assert "all-gather" not in text
  products = 2 * (2 + 6 + 5 + 5) * 2 * tokens**2 * count * size
  assert compiled.cost_analysis()["flops"] == pytest.approx(products, rel=0.1)


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_that_turn_compile_for_tpus(topology):
  """On a mesh, gradients of a JVP; turning adds little to what the compiler counts."""
  mesh = make_mesh(4, 1, devices=tpu_devices(topology))
  rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
  qkv, scales = place((8, 276, 3 * 256), "bfloat16"), place((8, 2, 64), "float32")
  function = lambda qkv, scales: Fused(mesh).turned(qkv, 4, scales)

  def loss(qkv: jax.Array, scales: jax.Array, along: jax.Array) -> jax.Array:
    u, derivative = forward_mode.jvp(lambda qkv: function(qkv, scales), (qkv,), (along,))
    value = u.astype(jnp.float32).sum() + function(qkv, scales).astype(jnp.float32).sum()
    return value, derivative

  gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  with uncached():
    compiled = gradient.lower(qkv, scales, qkv).compile()
  text = compiled.as_text()
  for name in ("forward", "tangent", "backward"):
    assert f"attention_turned_{name}" in text
  assert "all-gather" not in text
  products = 2 * (2 + 6 + 5 + 5) * 2 * 276**2 * 256
  assert compiled.cost_analysis()["flops"] == pytest.approx(products, rel=0.1)
