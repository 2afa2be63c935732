"""Inception's conventions, pools and weights; its numbers are held to the golden files."""

import itertools
import json
import pathlib

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_jax.models.inception import (
  CONVENTIONS,
  Inception,
  average_pool,
  convolution,
  max_pool,
  params_from_torch,
)
from tests.fill import filled

RNG = np.random.default_rng(0)
CENTRED = {"pytorch": 0.5, "tensorflow": 0.0, "meanflow": 0.5}
to_pixels = {  # from the network's input back to 0 to 255
  "pytorch": lambda x: (x + 1) * 127.5,
  "tensorflow": lambda x: x * 128 + 128,
  "meanflow": lambda x: x * 128 + 128,
}
all_conventions = pytest.mark.parametrize("name", CONVENTIONS)


def prepared(name: str, images: np.ndarray) -> np.ndarray:
  return np.asarray(CONVENTIONS[name](jnp.asarray(images)))


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
  """A stand-in for the published file."""
  with np.load(pathlib.Path(__file__).parent / "golden" / "inception_fid.npz") as golden:
    return filled(json.loads(str(golden["tensors"])))


# Conventions.


@all_conventions
@pytest.mark.parametrize("size", [1, 32, 299, 300, 700])
def test_a_ramp_is_read_where_the_convention_says(name, size):
  """Nearest to the border, the border's value is repeated."""
  ramp = np.linspace(0, 255, size)
  destination = np.arange(299)
  source = (destination + CENTRED[name]) * size / 299 - CENTRED[name]
  expected = np.clip(source, 0, size - 1) * 255 / max(size - 1, 1)
  flat = np.zeros((2, 1, size, 3))
  across = prepared(name, (flat + ramp[:, None]).astype(np.float32))
  down = prepared(name, (flat + ramp[:, None]).swapaxes(1, 2).astype(np.float32))
  for resized in (across, down.swapaxes(1, 2)):
    assert resized.shape == (2, 299, 299, 3)
    pixels = to_pixels[name](resized)
    np.testing.assert_allclose(pixels, np.broadcast_to(expected[:, None], pixels.shape), atol=2e-3)


@all_conventions
def test_images_of_the_networks_size_are_not_resized(name):
  images = RNG.integers(0, 256, (1, 299, 299, 3), np.uint8)
  pixels = to_pixels[name](prepared(name, images))
  np.testing.assert_allclose(pixels, images.astype(float), atol=5e-5)
  if name != "pytorch":  # all of these steps are exact
    np.testing.assert_array_equal(pixels, images)


@all_conventions
def test_larger_images_are_not_smoothed(name):
  """No antialiasing: a destination depends on two neighbouring pixels of the source alone."""
  image = np.zeros((1, 600, 600, 3), np.uint8)
  image[:, 300, 300] = 255
  spread = np.count_nonzero(to_pixels[name](prepared(name, image))[0, ..., 0] > 1e-3)
  assert spread <= 4


@all_conventions
def test_pixels_may_be_of_any_dtype(name):
  images = RNG.integers(0, 256, (2, 5, 7, 3), np.uint8)
  np.testing.assert_array_equal(prepared(name, images), prepared(name, images.astype(np.float32)))


def test_the_conventions_differ_where_they_say():
  images = RNG.integers(0, 256, (1, 32, 32, 3), np.uint8)
  pixels = {name: to_pixels[name](prepared(name, images)) for name in CONVENTIONS}
  np.testing.assert_allclose(pixels["meanflow"], pixels["pytorch"], atol=1e-3)
  assert np.abs(pixels["meanflow"] - pixels["tensorflow"]).max() > 50


# Layers.

LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 7), (5, 2)])
@pytest.mark.parametrize("sides", [(9, 8), (8, 9)])
def test_a_convolution_is_that_of_jax(padding, stride, kernel, sides):
  x = RNG.normal(size=(2, *sides, 3)).astype(np.float32)
  weights = RNG.normal(size=(*kernel, 3, 4)).astype(np.float32)
  settings = {"dimension_numbers": LAYOUT}
  expected = jax.lax.conv_general_dilated(x, weights, (stride, stride), padding, **settings)
  ours = convolution(jnp.asarray(x), jnp.asarray(weights), (stride, stride), padding, **settings)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(("platform", "height"), [("cpu", 10), ("cuda", 9), ("tpu", 9)])
def test_a_convolution_has_a_surplus_row_on_a_cpu_alone(platform, height):
  convolve = jax.jit(
    lambda x, weights: convolution(x, weights, (1, 1), "SAME", dimension_numbers=LAYOUT)
  )
  shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 9, 8, 3), (3, 3, 3, 4)))
  program = jax.export.export(convolve, platforms=[platform])(*shapes).mlir_module()
  (computed,) = (line for line in program.splitlines() if "stablehlo.convolution" in line)
  assert f"-> tensor<2x{height}x8x4xf32>" in computed


@pytest.mark.parametrize(("stride", "padding"), [(1, "SAME"), (1, "VALID"), (2, "VALID")])
@pytest.mark.parametrize("sides", [(7, 9), (9, 8)])
def test_a_maximum_is_of_three_by_three_pixels(stride, padding, sides):
  x = RNG.normal(size=(2, *sides, 3)).astype(np.float32) - 5  # zeros beyond the border would win
  expected = nn.max_pool(x, (3, 3), (stride, stride), padding)
  np.testing.assert_array_equal(max_pool(jnp.asarray(x), stride, padding), expected)


def test_an_average_leaves_out_what_is_beyond_the_border():
  x = RNG.normal(size=(2, 4, 5, 3)).astype(np.float32)
  expected = np.empty_like(x)
  for i, j in itertools.product(range(4), range(5)):
    around = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
    expected[:, i, j] = around.mean((1, 2))
  np.testing.assert_allclose(average_pool(jnp.asarray(x)), expected, atol=1e-6)


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_the_average_of_a_constant_is_that_constant(side):
  np.testing.assert_allclose(average_pool(jnp.full((1, side, 8, 2), 3.0)), 3.0, rtol=1e-6)


def test_batch_norms_are_folded_into_the_convolutions(tensors):
  layer = params_from_torch(tensors)["Conv2d_1a_3x3"]
  patch = RNG.normal(size=(3, 3, 3))  # HWI
  gain, offset, mean, variance = (
    tensors[f"Conv2d_1a_3x3.bn.{leaf}"]
    for leaf in ("weight", "bias", "running_mean", "running_var")
  )
  convolved = np.einsum("hwi,oihw->o", patch, tensors["Conv2d_1a_3x3.conv.weight"])
  expected = (convolved - mean) / np.sqrt(variance + 1e-3) * gain + offset
  ours = np.einsum("hwi,hwio->o", patch, layer["kernel"]) + layer["bias"]
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_network_gives_all_its_features(tensors):
  params = params_from_torch(tensors)
  images = jnp.asarray(RNG.uniform(-1, 1, (1, 299, 299, 3)), jnp.float32)
  apply = jax.jit(
    lambda params, images: Inception().apply(
      {"params": params},
      images,
      capture_intermediates=lambda module, _: module.name == "Mixed_6d.branch1x1",
    )
  )
  features, state = apply(params, images)
  # The last layer's bias is in one of the logits.
  kernel = tensors["fc.weight"].T
  bare, pool3 = features.logits_without_bias, np.asarray(features.pool3)
  np.testing.assert_allclose(bare, pool3 @ kernel, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(features.logits - bare, tensors["fc.bias"][None], atol=1e-6)
  # The features of sFID are the first channels of one branch.
  (branch,) = state["intermediates"]["Mixed_6d.branch1x1"]["__call__"]
  np.testing.assert_array_equal(features.spatial, np.maximum(branch[..., :7], 0))
  sides = {name: x[0].shape[1:] for name, x in state["intermediates"].items() if "." not in name}
  assert sides["Mixed_5d"] == (35, 35, 288)
  assert sides["Mixed_6e"] == (17, 17, 768)
  assert sides["Mixed_7c"] == (8, 8, 2048)


# Weights.


def test_the_parameters_are_what_the_network_asks_for(tensors):
  images = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
  expected = jax.eval_shape(Inception().init, jax.random.key(0), images)["params"]
  shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  params = params_from_torch(tensors)
  assert shapes(params) == shapes(expected)
  assert len(params) == 94 + 1
  assert params["Mixed_7c.branch3x3dbl_3b"]["kernel"].shape == (3, 1, 384, 384)
  np.testing.assert_array_equal(params["fc"]["kernel"], tensors["fc.weight"].T)


def test_wrong_tensors_are_listed(tensors):
  wrong = dict(tensors)
  del wrong["Mixed_6c.branch7x7_2.conv.weight"], wrong["fc.bias"]
  wrong["AuxLogits.fc.weight"] = np.zeros(3)
  wrong["Mixed_5b.branch1x1.bn.bias"] = np.zeros(65)
  with pytest.raises(ValueError, match="not the weights") as error:
    params_from_torch(wrong)
  for fault in (
    "missing: Mixed_6c.branch7x7_2.conv.weight, fc.bias;",
    "unknown: AuxLogits.fc.weight;",
    "of another shape: Mixed_5b.branch1x1.bn.bias (65,) instead of (64,)",
  ):
    assert fault in str(error.value)


def test_counters_of_batches_are_ignored(tensors):
  """PyTorch stores one beside every batch norm's statistics."""
  counter = np.zeros((), np.int64)
  params_from_torch({**tensors, "Conv2d_1a_3x3.bn.num_batches_tracked": counter})
  with pytest.raises(ValueError, match=r"unknown: Conv2d_9z\.bn\.num_batches_tracked"):
    params_from_torch({**tensors, "Conv2d_9z.bn.num_batches_tracked": counter})
