"""Feature extractors by name, with published weights' stand-ins."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from meanflow_jax import features
from meanflow_jax.metrics.summary import FEATURES, LOGITS, SPATIAL
from meanflow_jax.models import dinov2, inception
from tests.fill import filled

GOLDEN = pathlib.Path(__file__).parent / "golden"
LEVELS = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
  with np.load(GOLDEN / "inception_fid.npz") as golden:
    safetensors.numpy.save_file(filled(json.loads(str(golden["tensors"]))), path)
  return path


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("dinov2")
  with np.load(GOLDEN / "dinov2_tiny.npz") as golden:
    meta, tensors = (json.loads(str(golden[name])) for name in ("meta", "tensors"))
  (folder / "config.json").write_text(json.dumps(meta["config"]))
  safetensors.numpy.save_file(filled(tensors), folder / "model.safetensors")
  return folder


def test_pixels_are_images_again():
  found = features.pixels(resolution=8)(jnp.asarray(LEVELS))[FEATURES]
  np.testing.assert_allclose(found, (LEVELS / 127.5 - 1).reshape(2, -1), atol=1e-6)
  halved = features.pixels(resolution=4)(jnp.asarray(LEVELS))[FEATURES]
  assert halved.shape == (2, 4 * 4 * 3)
  constant = features.pixels(resolution=3)(jnp.full((1, 8, 8, 1), 255.0))[FEATURES]
  np.testing.assert_allclose(constant, np.ones((1, 9)), rtol=1e-6)


@pytest.mark.parametrize("logits_bias", [True, False])
def test_inception_gives_what_the_network_does(inception_file: pathlib.Path, logits_bias: bool):
  made = features.fid_inception(
    weights=str(inception_file), inputs="tensorflow", logits_bias=logits_bias
  )
  found = jax.jit(lambda made, levels: made(levels))(made, jnp.asarray(LEVELS))
  prepared = inception.tensorflow_inputs(jnp.asarray(LEVELS))
  direct = jax.jit(inception.Inception().apply)({"params": made.params}, prepared)
  logits = direct.logits if logits_bias else direct.logits_without_bias
  for name, expected in (
    (FEATURES, direct.pool3),
    (SPATIAL, direct.spatial.reshape(2, -1)),
    (LOGITS, logits),
  ):
    np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-4)
  assert found[SPATIAL].shape == (2, 2023)
  assert "unpublished" in made.convention
  assert "tensorflow input" in made.convention
  assert ("without bias" in made.convention) != logits_bias


def test_grey_images_are_images_of_colours_that_agree(inception_file: pathlib.Path):
  made = features.fid_inception(weights=str(inception_file), inputs="pytorch", logits_bias=True)
  extract = jax.jit(lambda made, levels: made(levels))
  grey = jnp.asarray(LEVELS[..., :1])
  found, expected = extract(made, grey), extract(made, jnp.repeat(grey, 3, axis=-1))
  np.testing.assert_allclose(found[FEATURES], expected[FEATURES], rtol=1e-5)


def test_dinov2_gives_its_class_token(dinov2_folder: pathlib.Path):
  made = features.fd_dinov2(weights=str(dinov2_folder), dtype="float32")
  found = jax.jit(lambda made, levels: made(levels))(made, jnp.asarray(LEVELS))
  network = dinov2.from_config(json.loads((dinov2_folder / "config.json").read_text()), "float32")
  prepared = dinov2.preprocess(jnp.asarray(LEVELS, jnp.uint8))
  token, _ = jax.jit(network.apply)({"params": made.params}, prepared)
  assert found.keys() == {FEATURES}
  np.testing.assert_allclose(found[FEATURES], token, rtol=1e-4, atol=1e-5)


def test_precision_does_not_depend_on_the_default():
  """A TPU's default rounds the operands of products to bfloat16."""
  made = features.Extractor(
    jnp.eye(4), lambda params, levels: {FEATURES: levels[:, 0, 0] @ params}, "x", "x"
  )
  program = jax.jit(lambda made, levels: made(levels)).lower(made, jnp.ones((2, 1, 1, 4)))
  assert "HIGHEST" in program.as_text()


def test_what_is_missing_or_unknown_is_said(tmp_path: pathlib.Path):
  with pytest.raises(FileNotFoundError, match=r"(?s)6726825d.*--download=inception") as missing:
    features.fid_inception(
      weights=str(tmp_path / "x.safetensors"), inputs="pytorch", logits_bias=True
    )
  assert "--inception=" in str(missing.value)
  with pytest.raises(FileNotFoundError, match="dinov2-large"):
    features.fd_dinov2(weights=str(tmp_path), dtype="float32")
  with pytest.raises(ValueError, match=r"evaluate.inception.inputs must be one of .*'torch'"):
    features.fid_inception(weights="x", inputs="torch", logits_bias=True)


@pytest.mark.parametrize(
  ("figure", "extractor", "name"),
  [
    ("frechet", "inception", "fid"),
    ("frechet", "dinov2", "fd_dinov2"),
    ("frechet", "pixels", "frechet_pixels"),
    ("kid", "inception", "kid"),
    ("precision", "dinov2", "precision_dinov2"),
  ],
)
def test_figures_have_their_usual_names(figure: str, extractor: str, name: str):
  assert features.figure_name(figure, extractor) == name
