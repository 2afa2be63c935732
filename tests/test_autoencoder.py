"""The autoencoder: shapes, precision, what it reads and what it refuses."""

import functools
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from meanflow_jax.models import autoencoder
from meanflow_jax.runtime import pretrained
from tests.fill import filled

GOLDEN = pathlib.Path(__file__).parent / "golden" / "autoencoder_tiny.npz"
IMAGES = (2, 8, 12, 3)  # not square


@functools.cache
def published() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """A small config.json and the tensors of its weights, by their published names."""
  with np.load(GOLDEN) as golden:
    meta, shapes = (json.loads(str(golden[key])) for key in ("meta", "tensors"))
  return meta["config"], filled(shapes)


def network(dtype: str = "float32") -> autoencoder.Autoencoder:
  return autoencoder.from_config(published()[0], dtype)


@functools.cache
def params() -> autoencoder.Params:
  return autoencoder.params_from_torch(network(), published()[1])


@functools.cache
def compiled(method: str, dtype: str = "float32"):
  return jax.jit(lambda params, x: network(dtype).apply({"params": params}, x, method=method))


def images() -> jax.Array:
  return jax.random.uniform(jax.random.key(0), IMAGES, minval=-1)


def latents() -> jax.Array:
  return jax.random.normal(jax.random.key(1), (2, 4, 6, 4))


def assert_equal_trees(a: Any, b: Any) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


# The network.


@pytest.mark.parametrize("dtype", autoencoder.DTYPES)
def test_latents_are_smaller_and_images_as_large_again(dtype):
  mean, std = compiled("encode", dtype)(params(), images())
  decoded = compiled("decode", dtype)(params(), mean)
  assert mean.shape == std.shape == (2, 4, 6, 4)
  assert decoded.shape == IMAGES
  assert {x.dtype for x in (mean, std, decoded)} == {jnp.dtype("float32")}
  assert (std > 0).all()


def test_parameters_are_float32_whatever_the_dtype():
  low = autoencoder.params_from_torch(network("bfloat16"), published()[1])
  assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {np.dtype("float32")}
  assert_equal_trees(low, params())


def test_bfloat16_is_close_to_float32_and_not_equal():
  """Measured: 1.6 % of the largest value at most; of the deviation, 1.6 % in the mean square."""
  for method, x in (("encode", images()), ("decode", latents())):
    high, low = (
      np.asarray(jax.tree.leaves(compiled(method, dtype)(params(), x))[0])
      for dtype in autoencoder.DTYPES
    )
    assert 1e-3 < np.abs(low - high).max() / np.abs(high).max() < 0.03
    assert np.sqrt(np.mean((low - high) ** 2)) < 0.03 * high.std()


@pytest.mark.parametrize(("shift", "std"), [(-1e3, np.exp(-15)), (1e3, np.exp(10))])
def test_the_variance_is_bounded(shift, std):
  bias = params()["quant_conv"]["bias"] + np.repeat([0, shift], 4).astype(np.float32)
  shifted = params() | {"quant_conv": params()["quant_conv"] | {"bias": bias}}
  np.testing.assert_allclose(compiled("encode")(shifted, images())[1], std, rtol=1e-5)


def test_images_do_not_depend_on_their_batch():
  both = compiled("decode")(params(), latents())
  alone = compiled("decode")(params(), latents()[1:])
  np.testing.assert_allclose(both[1:], alone, atol=1e-5)


def test_a_drawn_latent_has_the_encoded_mean_and_deviation():
  mean, std = jnp.full((1, 64, 64, 4), 2.0), jnp.full((1, 64, 64, 4), 0.5)
  drawn = autoencoder.sample_latent(jax.random.key(0), mean, std)
  assert drawn.mean() == pytest.approx(2.0, abs=0.02)
  assert drawn.std() == pytest.approx(0.5, abs=0.02)
  certain = autoencoder.sample_latent(jax.random.key(0), mean, 0 * std)
  np.testing.assert_array_equal(certain, mean)


def test_scaling_is_undone():
  scaled = autoencoder.scale_latents(latents())
  assert scaled.std() / latents().std() == pytest.approx(0.18215)
  np.testing.assert_allclose(autoencoder.unscale_latents(scaled), latents(), rtol=1e-6)


# Reading.


def test_all_wrong_tensors_are_listed():
  tensors = dict(published()[1])
  del tensors["encoder.conv_in.bias"], tensors["decoder.conv_out.weight"]
  tensors["decoder.extra"] = np.zeros(3)
  tensors["quant_conv.weight"] = np.zeros((8, 4, 1, 1))
  with pytest.raises(ValueError, match="not the network's") as error:
    autoencoder.params_from_torch(network(), tensors)
  assert str(error.value).splitlines()[1:] == [
    "  missing: decoder.conv_out.weight, encoder.conv_in.bias",
    "  not of this network: decoder.extra",
    "  misshapen: quant_conv.weight (8, 4, 1, 1) instead of (8, 8, 1, 1)",
  ]


def test_older_names_of_the_attention_are_read():
  older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  tensors = {}
  for name, tensor in published()[1].items():
    for new, old in older.items():
      name = name.replace(f".{new}.", f".{old}.")
    tensors[name] = tensor
  assert sum(name.endswith("proj_attn.weight") for name in tensors) == 2
  assert_equal_trees(autoencoder.params_from_torch(network(), tensors), params())


def test_low_precision_tensors_become_float32():
  halves = {name: tensor.astype(np.float16) for name, tensor in published()[1].items()}
  read = autoencoder.params_from_torch(network(), halves)
  assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype("float32")}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"act_fn": "relu"}, "act_fn must be 'silu', got 'relu'"),
    ({"scaling_factor": 0.13}, "scaling_factor must be 0.18215, got 0.13"),
    ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "up_block_types must all"),
  ],
)
def test_other_architectures_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    autoencoder.from_config(published()[0] | changes, "float32")


def test_mistakes_are_refused():
  with pytest.raises(ValueError, match="no block_out_channels"):
    autoencoder.from_config({}, "float32")
  with pytest.raises(ValueError, match="dtype must be one of"):
    network("float16")
  with pytest.raises(ValueError, match="7 x 8 is not divisible by 2"):
    compiled("encode")(params(), jnp.zeros((1, 7, 8, 3)))


# Folders.


def write(folder: pathlib.Path) -> pathlib.Path:
  config, tensors = published()
  (folder / "config.json").write_text(json.dumps(config))
  weights = folder / pretrained.AUTOENCODER.weights
  safetensors.numpy.save_file(tensors, weights)
  return weights


def test_a_published_folder_comes_back(tmp_path):
  write(tmp_path)
  config, tensors = pretrained.load(tmp_path, pretrained.AUTOENCODER)
  restored = autoencoder.from_config(config, "float32")
  assert restored == network()
  assert_equal_trees(autoencoder.params_from_torch(restored, tensors), params())


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_missing_file_is_named_with_where_it_is_published(tmp_path, name):
  write(tmp_path)
  (tmp_path / name).unlink()
  with pytest.raises(FileNotFoundError, match="does not exist") as error:
    pretrained.load(tmp_path, pretrained.AUTOENCODER)
  for part in (str(tmp_path / name), "stabilityai/sd-vae-ft-mse", "sd-vae-ft-ema", "hf download"):
    assert part in str(error.value)


def test_broken_files_are_refused_by_name(tmp_path):
  weights = write(tmp_path)
  weights.write_bytes(weights.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r"safetensors is not a whole safetensors file"):
    pretrained.load(tmp_path, pretrained.AUTOENCODER)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config.json is not JSON"):
    pretrained.load(tmp_path, pretrained.AUTOENCODER)


def test_the_hash_is_that_of_all_bytes(tmp_path):
  path = tmp_path / "bytes"
  path.write_bytes(bytes(range(256)) * 5000)  # more than one buffer
  assert pretrained.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
