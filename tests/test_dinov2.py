"""DINOv2: what its features depend on, what it reads and what it refuses."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

from meanflow_jax.models import dinov2
from meanflow_jax.runtime import pretrained
from tests.fill import filled

GOLDEN = pathlib.Path(__file__).parent / "golden" / "dinov2_tiny.npz"
IMAGES = (2, 28, 42, 3)  # 2 x 3 patches, of a stored grid of 4 x 4


@functools.cache
def published() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """A small config.json and the tensors of its weights, by their published names."""
  with np.load(GOLDEN) as golden:
    meta, shapes = (json.loads(str(golden[key])) for key in ("meta", "tensors"))
  return meta["config"], filled(shapes)


def network(dtype: str = "float32") -> dinov2.DINOv2:
  return dinov2.from_config(published()[0], dtype)


@functools.cache
def params() -> dinov2.Params:
  return dinov2.params_from_torch(network(), published()[1])


@functools.cache
def features(dtype: str = "float32"):
  return jax.jit(lambda params, x: network(dtype).apply({"params": params}, x))


def images() -> jax.Array:
  return jax.random.normal(jax.random.key(0), IMAGES)


def assert_equal_trees(a: Any, b: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


# Features.


def test_features_are_one_vector_per_image():
  for feature in features()(params(), images()):
    assert feature.shape == (2, 48)
    assert feature.dtype == jnp.float32


def test_features_do_not_depend_on_the_batch():
  both = features()(params(), images())
  alone = features()(params(), images()[1:])
  for a, b in zip(both, alone, strict=True):
    np.testing.assert_allclose(a[1:], b, atol=1e-5)


def test_only_positions_tell_where_a_patch_is():
  still = params() | {"positions": np.zeros_like(params()["positions"])}
  moved = jnp.roll(images(), 14, axis=2)  # whole patches
  for there, here in zip(features()(still, moved), features()(still, images()), strict=True):
    np.testing.assert_allclose(there, here, atol=1e-5)
  difference = features()(params(), moved)[0] - features()(params(), images())[0]
  assert jnp.abs(difference).max() > 1e-2


def test_bfloat16_is_close_to_float32_and_not_equal():
  """Measured: 0.8 % of the largest value at most."""
  low, high = (features(dtype)(params(), images()) for dtype in ("bfloat16", "float32"))
  for a, b in zip(low, high, strict=True):
    assert a.dtype == jnp.float32
    assert 1e-4 < jnp.abs(a - b).max() / jnp.abs(b).max() < 0.02


# Positions.


def test_the_stored_grid_is_kept():
  positions = jax.random.normal(jax.random.key(0), (16, 5))
  np.testing.assert_array_equal(dinov2.interpolate_positions(positions, 4, 4), positions)


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (16, 2), (1, 1)])
def test_interpolation_keeps_constants_and_directions(rows, columns):
  """What varies along one side only, does so after interpolation."""
  row, column = jnp.meshgrid(jnp.arange(6.0), jnp.arange(6.0), indexing="ij")
  positions = jnp.stack([jnp.ones((6, 6)), row**2, column**2], axis=-1).reshape(36, 3)
  grid = dinov2.interpolate_positions(positions, rows, columns).reshape(rows, columns, 3)
  constant, down, across = jnp.moveaxis(grid, -1, 0)
  np.testing.assert_allclose(constant, 1, atol=1e-6)
  np.testing.assert_allclose(down, down[:, :1].repeat(columns, axis=1), atol=1e-5)
  np.testing.assert_allclose(across, across[:1].repeat(rows, axis=0), atol=1e-5)
  assert (jnp.diff(down, axis=0) > 0).all()
  assert (jnp.diff(across, axis=1) > 0).all()


# Preprocessing.


# Wide or square: newer versions of Pillow (13) resize tall images along columns first.
@pytest.mark.parametrize(("height", "width"), [(256, 256), (260, 300), (224, 100), (32, 32)])
def test_images_are_resized_as_pillow_does(height, width):
  """Noise, so that the rounding of each pass and the clipping show."""
  pixels = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)
  ours = np.asarray(jax.jit(dinov2.preprocess)(pixels))[0]
  resized = PIL.Image.fromarray(pixels[0]).resize((224, 224), PIL.Image.Resampling.BICUBIC)
  expected = (np.asarray(resized) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  levels = np.abs(ours - expected) * 255 * [0.229, 0.224, 0.225]
  assert levels.max() < 1.01  # Pillow's fixed-point weights round a few values the other way,
  assert (levels > 0.01).mean() < 2e-3  # up to one in a thousand


# Reading.


def test_all_wrong_tensors_are_listed():
  tensors = dict(published()[1])
  del tensors["encoder.layer.1.mlp.fc1.bias"], tensors["layernorm.weight"]
  tensors["embeddings.register_tokens"] = np.zeros((1, 4, 48))
  tensors["encoder.layer.3.norm1.weight"] = np.zeros(48)  # a layer too many
  tensors["encoder.layer.2.mlp.fc2.weight"] = np.zeros((192, 48))
  with pytest.raises(ValueError, match="not the network's") as error:
    dinov2.params_from_torch(network(), tensors)
  assert str(error.value).splitlines()[1:] == [
    "  missing: encoder.layer.1.mlp.fc1.bias, layernorm.weight",
    "  not of this network: embeddings.register_tokens, encoder.layer.3.norm1.weight",
    "  misshapen: encoder.layer.2.mlp.fc2.weight (192, 48) instead of (48, 192)",
  ]


def test_the_mask_of_pretraining_may_be_left_out():
  tensors = {name: t for name, t in published()[1].items() if not name.endswith("mask_token")}
  assert len(tensors) == len(published()[1]) - 1
  assert_equal_trees(dinov2.params_from_torch(network(), tensors), params())


def test_older_names_of_the_attention_are_read():
  older = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
  }
  tensors = {}
  for name, tensor in published()[1].items():
    for new, old in older.items():
      name = name.replace(f".{new}.", f".{old}.")
    tensors[name] = tensor
  assert "encoder.layer.2.attention.attention.query.weight" in tensors
  assert_equal_trees(dinov2.params_from_torch(network(), tensors), params())


def test_a_published_folder_comes_back(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(published()[0]))
  safetensors.numpy.save_file(published()[1], tmp_path / "model.safetensors")
  config, tensors = pretrained.load(tmp_path, pretrained.DINOV2)
  restored = dinov2.from_config(config, "float32")
  assert restored == network()
  assert_equal_trees(dinov2.params_from_torch(restored, tensors), params())


def test_a_missing_file_is_named_with_where_it_is_published(tmp_path):
  with pytest.raises(FileNotFoundError, match="facebook/dinov2-large"):
    pretrained.load(tmp_path, pretrained.DINOV2)


# Mistakes.


def test_mistakes_are_refused():
  with pytest.raises(ValueError, match="no hidden_size, image_size"):
    dinov2.from_config({}, "float32")
  with pytest.raises(ValueError, match="use_swiglu_ffn must be False, got True"):
    dinov2.from_config(published()[0] | {"use_swiglu_ffn": True}, "float32")
  with pytest.raises(ValueError, match="dtype must be one of"):
    network("float16")
  with pytest.raises(ValueError, match="28 x 40 does not divide into patches of 14"):
    features()(params(), jnp.zeros((1, 28, 40, 3)))
