"""Fused attention for NVIDIA GPUs, run in Python and lowered without one."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
  AbstractDevice,
  AbstractMesh,
  NamedSharding,
  PartitionSpec,
  SingleDeviceSharding,
  use_abstract_mesh,
)

from configs import base
from meanflow_jax import build
from meanflow_jax.kernels import attention as kernels
from meanflow_jax.kernels import forward_mode, pallas_gpu, plain
from meanflow_jax.kernels.attention import Fused, choose
from meanflow_jax.runtime.mesh import make_mesh
from tests import exact_attention, gpu
from tests.tpu import uncached

FUSED = Fused(interpret=True, platform="cuda")
WITHIN = {"float32": 2e-6, "bfloat16": 6e-3}
# Tokens and the size of a head: parts of one block; several whole ones; several and a part, with a
# head in two pieces of which one is not full.
CASES = [((5, 8), "float32"), ((256, 64), "bfloat16"), ((300, 72), "float32")]
MORE = [((5, 8), "bfloat16"), ((256, 64), "float32"), ((300, 72), "bfloat16")] + [
  (shape, dtype)
  for shape in ((16, 24), (17, 40), (64, 64), (129, 136), (640, 72), (130, 256))
  for dtype in ("float32", "bfloat16")
]

Shape = tuple[int, int]


def arrays(shape: Shape, dtype: str, count: int = 7, batch: int = 2) -> list[jax.Array]:
  """q, k, v, their tangents, and a gradient of the output, of two heads."""
  values = np.random.default_rng(0).normal(size=(count, batch, shape[0], 2, shape[1]))
  return [jnp.asarray(x, dtype) for x in values]


def flat(*arrays: jax.Array) -> list[jax.Array]:
  return [x.reshape(*x.shape[:2], -1) for x in arrays]


@jax.jit
def fused(x: list[jax.Array]) -> dict[str, tuple[jax.Array, ...]]:
  """What each kernel makes of three arrays."""
  kernel = pallas_gpu.Kernels(x[0].shape[2], False, interpret=True)
  qkv, along, do = flat(*x[:3]), flat(*x[3:6]), flat(x[6])
  shaped = lambda outputs: tuple(y.reshape(x[0].shape) for y in outputs)
  return {
    "forward": shaped([kernel.forward(*qkv)]),
    "tangent": shaped(kernel.tangent(*qkv, *along)),
    "backward": shaped(kernel.backward(*qkv, *do)),
  }


@jax.jit
def packed(x: list[jax.Array]) -> dict[str, tuple[jax.Array, ...]]:
  """The same, of queries, keys and values in one array."""
  kernel = pallas_gpu.Kernels(x[0].shape[2], True, interpret=True)
  qkv, along = (jnp.concatenate(flat(*part), axis=-1) for part in (x[:3], x[3:6]))
  (gradient,) = kernel.backward(qkv, *flat(x[6]))
  shaped = lambda outputs: tuple(y.reshape(x[0].shape) for y in outputs)
  return {
    "forward": shaped([kernel.forward(qkv)]),
    "tangent": shaped(kernel.tangent(qkv, along)),
    "backward": shaped(jnp.split(gradient, 3, axis=-1)),
  }


@jax.jit
def plainly(x: list[jax.Array]) -> dict[str, tuple[jax.Array, ...]]:
  qkv, along, do = tuple(x[:3]), tuple(x[3:6]), x[6]
  out, transposed = jax.vjp(plain.attention, *qkv)
  tangent = jax.jvp(plain.attention, qkv, along)
  return {"forward": (out,), "tangent": tangent, "backward": transposed(do)}


def exactly(x: list[jax.Array]) -> dict[str, tuple[np.ndarray, ...]]:
  tangent = exact_attention.tangent(x[:3], x[3:6])
  gradients = exact_attention.gradients(x[:3], x[6])
  return {"forward": tangent[:1], "tangent": tangent, "backward": gradients}


# Values and derivatives.


@pytest.mark.parametrize(
  ("shape", "dtype"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_kernels_are_attention_and_its_derivatives(shape, dtype):
  """With errors no larger than the plain form's, but for chance where numbers are few."""
  x = arrays(shape, dtype)
  ours, plain_form = fused(x), plainly(x)
  for name, expected in exactly(x).items():
    assert {y.dtype for y in ours[name]} == {jnp.dtype(dtype)}
    found = exact_attention.error(ours[name], expected)
    assert found < WITHIN[dtype], name
    if dtype == "bfloat16":
      assert found < 1.25 * exact_attention.error(plain_form[name], expected), name


def test_the_oracle_is_that_of_the_plain_form():
  x = arrays((17, 8), "float32")
  for name, found in plainly(x).items():
    assert exact_attention.error(found, exactly(x)[name]) < 1e-6, name


@pytest.mark.parametrize(
  "shape",
  [(5, 8), *(pytest.param(s, marks=pytest.mark.slow) for s in ((256, 64), (300, 72)))],
  ids=str,
)
def test_a_projection_need_not_be_taken_apart(shape):
  """The kernels give the same bits for one array as for three."""
  x = arrays(shape, "float32")
  jax.tree.map(np.testing.assert_array_equal, packed(x), fused(x))


def test_one_token_is_handed_on():
  x = arrays((1, 16), "float32")
  for name, expected in exactly(x).items():
    for a, b in zip(fused(x)[name], expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_scores_may_be_large():
  x = arrays((300, 72), "float32")
  x[:2] = [30 * a for a in x[:2]]
  ours, expected = fused(x), exactly(x)
  assert all(exact_attention.error(ours[name], expected[name]) < 1e-3 for name in expected)


def test_what_keys_have_in_common_costs_no_digits():
  """It moves scores' derivatives and dP by a number for each query, which no result depends on."""
  x = arrays((256, 64), "bfloat16")
  for i in (2, 4):  # v and dk
    x[i] = (x[i].astype("float32") + 16).astype("bfloat16")
  ours, plain_form, expected = fused(x), plainly(x), exactly(x)
  for name in ("tangent", "backward"):
    for found, other, exact in zip(ours[name], plain_form[name], expected[name], strict=True):
      within = 1.25 * exact_attention.error([other], [exact])
      assert exact_attention.error([found], [exact]) < within, name


# As the rest of the program uses them.


def test_a_loss_with_a_derivative_in_its_target_learns_the_same():
  x = arrays((5, 8), "float32")
  qkv, along = tuple(x[:3]), tuple(x[3:6])

  def gradient(function: Callable) -> Any:
    def loss(*qkv: jax.Array) -> jax.Array:
      u, derivative = forward_mode.jvp(function, qkv, along)
      return jnp.sum((u - jax.lax.stop_gradient(jnp.sin(u) + derivative)) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv)

  in_one = lambda q, k, v: FUSED.packed(jnp.concatenate(flat(q, k, v), -1), 2).reshape(q.shape)
  for a, b in zip(gradient(in_one), gradient(plain.attention), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_each_device_takes_its_rows():
  """In one array, which one kernel fills after the other."""
  mesh = make_mesh(4, 2)
  rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  qkv, weight = np.random.default_rng(0).normal(size=(2, 8, 5, 3 * 2 * 8)).astype(np.float32)
  weight = weight[..., :16]

  def gradient(fused: Fused) -> Callable:
    return jax.jit(jax.grad(lambda qkv, weight: jnp.sum(fused.packed(qkv, 2) * weight)))

  spread = gradient(Fused(mesh, True, "cuda"))(*(jax.device_put(x, rows) for x in (qkv, weight)))
  assert spread.sharding.is_equivalent_to(rows, 3)
  np.testing.assert_allclose(spread, gradient(FUSED)(qkv, weight), rtol=1e-5, atol=1e-6)


def test_no_rows_are_no_rows():
  x = jnp.zeros((0, 256, 2, 64))
  assert FUSED(x, x, x).shape == x.shape
  assert FUSED.packed(jnp.zeros((0, 256, 384)), 2).shape == (0, 256, 128)


# What goes to the compiler of GPUs.


def test_pieces_cover_a_head():
  for size in range(8, pallas_gpu.WIDEST + 1, 8):
    tiles = pallas_gpu._Tiles(1, size, 16, 16)
    widths = [width for _, width in tiles.columns]
    assert all(width >= 16 and width & (width - 1) == 0 for width in widths)
    assert [start for start, _ in tiles.columns] == [0, *widths[:-1]]
    assert size <= tiles.width <= max(16, 1 << (size - 1).bit_length())
  width = lambda size: pallas_gpu._Tiles(1, size, 16, 16).width
  assert [width(size) for size in (8, 24, 40, 64, 72, 96)] == [16, 32, 48, 64, 80, 96]


def programs(tokens: int, size: int, dtype: str, packed: bool) -> dict[str, tuple]:
  """Each kernel with the shapes of its arguments, as on a GPU."""
  kernel = pallas_gpu.Kernels(2, packed)
  array = lambda thirds: jax.ShapeDtypeStruct((3, tokens, thirds * 2 * size), dtype)
  qkv = (array(3),) if packed else (array(1),) * 3
  return {
    "forward": (kernel.forward, qkv),
    "tangent": (kernel.tangent, qkv * 2),
    "backward": (kernel.backward, (*qkv, array(1))),
  }


def params_of(primitive: str, function: Callable, shapes: tuple) -> list[dict[str, Any]]:
  """Of all its uses, in kernels too."""

  def uses(jaxpr: Any) -> Iterator[dict[str, Any]]:
    for equation in jaxpr.eqns:
      if equation.primitive.name == primitive:
        yield equation.params
      if inner := equation.params.get("jaxpr"):
        yield from uses(getattr(inner, "jaxpr", inner))

  return list(uses(jax.make_jaxpr(function)(*shapes).jaxpr))


@pytest.mark.parametrize("packed", [True, False])
def test_costs_are_those_of_the_arithmetic(packed):
  tokens, size, scores = 256, 64, 3 * 2 * 256**2
  one, number = 3 * tokens * 2 * size * 2, 3 * tokens * 2 * 4  # bytes
  products = {"forward": [2], "tangent": [6], "backward": [4, 4]}
  moved = {"forward": [4 * one], "tangent": [8 * one]}
  moved["backward"] = [5 * one + 2 * number, 6 * one + 2 * number]
  for name, (function, shapes) in programs(tokens, size, "bfloat16", packed).items():
    costs = [params["cost_estimate"] for params in params_of("pallas_call", function, shapes)]
    assert [c.flops for c in costs] == [2 * n * scores * size for n in products[name]]
    assert [c.bytes_accessed for c in costs] == moved[name]
    assert {c.transcendentals for c in costs} == {scores}


def lowered(function: Callable, shapes: tuple) -> str:
  """For a GPU; since JAX 0.11 one must be named."""
  mesh = contextlib.nullcontext()
  if jax.__version_info__ >= (0, 11):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
  with mesh:
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
  ("tokens", "size", "dtype"), [(1, 8, "float32"), (256, 64, "bfloat16"), (1000, 72, "bfloat16")]
)
def test_kernels_lower_for_gpus(tokens, size, dtype, packed):
  """And nothing but kernels is left, so that no array is copied and no scores are written."""
  for name, (function, shapes) in programs(tokens, size, dtype, packed).items():
    text = lowered(function, shapes)
    assert text.count("@__gpu$xla.gpu.triton") == (2 if name == "backward" else 1)
    assert text.count("#stablehlo.output_operand_alias") == (packed and name == "backward")
    operations = set(re.findall(r"(?<!#)stablehlo\.\w+", text))
    assert operations == {"stablehlo.custom_call", "stablehlo.reshape"}


@pytest.mark.parametrize(
  ("asked", "dtype", "expected"),
  [
    (None, "float32", None),
    ("highest", "float32", jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3),
    ("float32", "float32", jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3),
    ("highest", "bfloat16", (jax.lax.Precision.HIGHEST,) * 2),
  ],
)
def test_products_are_as_exact_as_asked(asked, dtype, expected):
  for function, shapes in programs(16, 16, dtype, True).values():
    with jax.default_matmul_precision(asked):
      dots = params_of("dot_general", function, shapes)
    assert {params["precision"] for params in dots} == {expected}


needs_compiler = pytest.mark.skipif(not gpu.is_installed(), reason="no compiler of GPUs")


def compiled_gradient(attention: Fused | None, shapes: jax.ShapeDtypeStruct) -> Any:
  """Of a loss with a derivative in its target, and of one without; None is plain attention."""
  mix = attention.packed if attention else plain.packed

  def loss(qkv: jax.Array, along: jax.Array) -> jax.Array:
    u, derivative = forward_mode.jvp(lambda x: mix(x, 2), (qkv,), (along,))
    target = jax.lax.stop_gradient(derivative)
    return jnp.sum((u - target).astype(jnp.float32) ** 2) + mix(along, 2).astype(jnp.float32).sum()

  with uncached():
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(shapes, shapes).compile()


@needs_compiler
@pytest.mark.slow
def test_scores_are_not_in_memory():
  """Where the plain form has several of [rows, heads, tokens, tokens]."""
  (device,) = gpu.gpu_devices(1)
  rows, tokens, size = 8, 256, 64
  on_gpu = SingleDeviceSharding(device)
  x = jax.ShapeDtypeStruct((rows, tokens, 3 * 2 * size), "bfloat16", sharding=on_gpu)
  fused = compiled_gradient(Fused(platform="cuda"), x)
  assert fused.as_text().count('custom_call_target="__gpu$xla.gpu.triton"') == 6
  assert f"{tokens},{tokens}]" not in fused.as_text()
  scores = rows * 2 * tokens**2 * 2
  temporary = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
  assert temporary(compiled_gradient(None, x)) > temporary(fused) + 2 * scores


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "size", "dtype"), [(256, 64, "bfloat16"), (100, 72, "float32")])
def test_kernels_compile_for_gpus(tokens, size, dtype):
  """On a mesh, of which each device takes its rows."""
  mesh = make_mesh(4, 1, devices=gpu.gpu_devices(4))
  assert kernels.platform_of(mesh.devices.flat[0]) == "cuda"
  rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  x = jax.ShapeDtypeStruct((8, tokens, 3 * 2 * size), dtype, sharding=rows)
  text = compiled_gradient(Fused(mesh, platform="cuda"), x).as_text()
  for name in ("forward", "tangent", "backward_queries", "backward_keys"):
    assert f"attention_{name}" in text
  assert "all-gather" not in text


# What runs where.


@pytest.mark.parametrize(
  ("platform", "capability", "expected"),
  [
    ("gpu", "9.0", "cuda"),
    ("gpu", "8.6", "cuda"),
    ("gpu", "12.0", "cuda"),
    ("gpu", "7.5", "gpu"),
    ("gpu", "gfx942", "gpu"),
    ("tpu", None, "tpu"),
    ("cpu", None, "cpu"),
  ],
)
def test_devices_that_have_kernels(platform, capability, expected):
  device = mock.Mock(spec=jax.Device, platform=platform)
  if capability:
    device.compute_capability = capability
  assert kernels.platform_of(device) == expected


def chosen(name: str, platform: str, tokens: int, size: int, dtype: str) -> tuple[str, str | None]:
  return choose(name, platform, tokens=tokens, heads=16, size=size, dtype=dtype)


def test_kernels_run_on_gpus():
  assert chosen("auto", "cuda", 256, 64, "bfloat16") == ("pallas", None)
  assert chosen("pallas", "cuda", 4096, 72, "float32") == ("pallas", None)
  assert chosen("plain", "cuda", 256, 64, "float32") == ("plain", None)
  assert chosen("auto", "gpu", 256, 64, "float32") == ("plain", None)


@pytest.mark.parametrize(
  ("tokens", "size", "dtype", "reason"),
  [
    (256, 64, "float16", "takes float32 or bfloat16, not float16"),
    (256, 33, "float32", "multiple of 8, of at most 256, not 33"),
    (256, 264, "float32", "multiple of 8, of at most 256, not 264"),
    (4097, 64, "float32", "takes 1 to 4096 tokens, not 4097"),
  ],
)
def test_what_a_kernel_cannot_take(tokens, size, dtype, reason):
  name, why = chosen("auto", "cuda", tokens, size, dtype)
  assert name == "plain"
  assert reason in why
  with pytest.raises(ValueError, match=f"{reason}.*plain"):
    chosen("pallas", "cuda", tokens, size, dtype)


def test_without_triton_it_is_plain(monkeypatch):
  monkeypatch.setattr(pallas_gpu, "plgpu", None)
  name, why = chosen("auto", "cuda", 256, 64, "bfloat16")
  assert name == "plain"
  assert "needs Pallas on Triton, which JAX" in why


def test_a_network_on_gpus_takes_their_kernels(monkeypatch):
  mesh, config = make_mesh(8, 1), base.get_config()
  monkeypatch.setattr(kernels, "platform_of", lambda device: "cuda")
  network = build.network(config, mesh)
  assert network.attention.__self__ == Fused(mesh, platform="cuda")


@pytest.mark.slow
def test_the_benchmark_runs_without_a_gpu():
  """Errors and times of three paths, for two types."""
  script = pathlib.Path(__file__).parents[1] / "benchmarks" / "attention.py"
  command = [sys.executable, str(script), "--tiny", "--rounds=1"]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
  rows = re.findall(r"^(?:output|gradient|tangent) +40 .*", result.stdout, re.MULTILINE)
  assert len(rows) == 12
  assert "less exact" not in result.stdout
