"""The two-headed network: its theorems, its parts that only training asks for, and its sizes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet_imf
from meanflow_jax import build
from meanflow_jax.arrays import GuidanceScale
from meanflow_jax.kernels import forward_mode, plain, rotary
from meanflow_jax.kernels.attention import Fused
from meanflow_jax.models import in_context_dit
from meanflow_jax.models.in_context_dit import InContextDiT
from meanflow_jax.models.patches import join_patches, split_patches
from meanflow_jax.runtime.mesh import make_mesh
from meanflow_jax.runtime.topology import tpu_devices
from meanflow_jax.train_step import init_params, sampling_params
from tests import tiny
from tests.runs import mesh_of

BATCH, IMAGE = 4, (4, 4, 1)
# arXiv 2512.02012: millions of parameters when sampling.
PUBLISHED = {"B": 89, "M": 174, "L": 409, "XL": 610}


def inputs() -> tuple[jax.Array, ...]:
  """z, t, h and y of different rows."""
  rng = np.random.default_rng(0)
  z = jnp.asarray(rng.normal(size=(BATCH, *IMAGE)), jnp.float32)
  t = jnp.linspace(0.3, 0.9, BATCH)
  return z, t, t / 3, jnp.arange(BATCH) % 3


def guidance() -> GuidanceScale:
  return GuidanceScale(
    jnp.linspace(1.5, 4, BATCH), jnp.linspace(0, 0.3, BATCH), jnp.linspace(0.6, 1, BATCH)
  )


def applied(network: InContextDiT, params: Any, *args: Any, **more: Any) -> Any:
  return tiny.jit(lambda params: network.apply({"params": params}, *args, **more))(params)


# The rotation.


def test_scores_depend_on_the_distance_of_positions_alone():
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 2, 8)), jnp.float32) for _ in "qk")
  everywhere = lambda x: rotary.turn(jnp.broadcast_to(x, (1, 12, 2, 8)))
  scores = np.einsum("bnkd,bmkd->kmn", everywhere(q), everywhere(k))
  for distance in range(-11, 12):
    along = np.diagonal(scores, distance, axis1=1, axis2=2)
    np.testing.assert_allclose(along, np.broadcast_to(along[:, :1], along.shape), atol=1e-5)
  assert np.ptp(scores[:, 0], axis=-1).min() > 0.1


def test_the_first_position_is_not_turned_and_no_length_changes():
  x = jax.random.normal(jax.random.key(0), (2, 9, 3, 4))
  turned = rotary.turn(x)
  np.testing.assert_allclose(turned[:, 0], x[:, 0], atol=1e-6)
  np.testing.assert_allclose(
    jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
  )


# Patches.


@pytest.mark.parametrize(
  ("shape", "size"), [((2, 4, 6, 3), 2), ((1, 3, 3, 1), 3), ((0, 4, 4, 1), 2)]
)
def test_patches_are_put_together_again(shape, size):
  image = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape)
  patches = split_patches(image, size)
  np.testing.assert_array_equal(join_patches(patches, size, shape), image)
  assert patches.shape == (shape[0], shape[1] * shape[2] // size**2, size**2 * shape[3])
  if shape[0]:
    np.testing.assert_array_equal(patches[0, -1], image[0, -size:, -size:].ravel())


def test_an_image_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match="4 x 6 does not divide into patches of 4"):
    split_patches(jnp.zeros((1, 4, 6, 1)), 4)


# The heads.


def test_heads_are_asked_for_by_name():
  network = tiny.in_context_dit()
  params = tiny.random_params(network, IMAGE)
  u, v = applied(network, params, *inputs(), guidance(), ("u", "v"))
  np.testing.assert_allclose(applied(network, params, *inputs(), guidance()), u, atol=1e-6)
  (alone,) = applied(network, params, *inputs(), guidance(), ("v",))
  np.testing.assert_allclose(alone, v, atol=1e-6)
  assert u.shape == v.shape == (BATCH, *IMAGE)
  assert jnp.abs(u - v).max() > 0.1


def test_sampling_needs_nothing_of_the_auxiliary_head():
  network = tiny.in_context_dit()
  params = tiny.random_params(network, IMAGE)
  kept = sampling_params(network, params)
  assert params.keys() - kept.keys() == {"v_blocks", "v_norm", "v_out"}
  ours, all_ = (applied(network, p, *inputs(), guidance()) for p in (kept, params))
  np.testing.assert_array_equal(ours, all_)
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  heads = {name: {k: x for k, x in params.items() if k[:2] == f"{name}_"} for name in "uv"}
  assert count(kept) == count(params) - count(heads["v"])
  assert count(heads["u"]) == count(heads["v"]) > 0


@pytest.mark.parametrize("more", [{}, {"conditioning": ("t", "h"), "positions": "learned"}])
def test_every_parameter_and_every_input_takes_effect(more):
  """But for t, where the network is told h alone."""
  network = tiny.in_context_dit(**more)
  params = tiny.random_params(network, IMAGE)
  assert ("positions" in params) == ("positions" in more)
  z, t, h, y = inputs()

  def total(params: Any, z: Any, t: Any, h: Any, scale: GuidanceScale) -> jax.Array:
    u, v = network.apply({"params": params}, z, t, h, y, scale, ("u", "v"))
    return (u**2).sum() + (v**2).sum()

  slopes = tiny.jit(jax.grad(total, argnums=range(5)))(params, z, t, h, guidance())
  of_params, of_z, of_t, of_h, of_scale = slopes
  assert all(np.any(x != 0) for x in jax.tree.leaves((of_params, of_z)))
  assert np.all((of_t != 0) == ("t" in network.conditioning))
  assert all(np.all(x != 0) for x in (of_h, *of_scale))
  other = applied(network, params, z, t, h, (y + 1) % 3, guidance())
  assert jnp.abs(other - applied(network, params, z, t, h, y, guidance())).min(axis=(1, 2, 3)).all()


def test_no_guidance_is_a_scale_of_one_everywhere():
  network = tiny.in_context_dit()
  params = tiny.random_params(network, IMAGE)
  off = GuidanceScale.off(jnp.ones(BATCH))
  np.testing.assert_array_equal(
    applied(network, params, *inputs()), applied(network, params, *inputs(), off)
  )
  for found, expected in zip(off, (1, 0, 1), strict=True):
    np.testing.assert_array_equal(found, expected)


def test_without_classes_labels_do_not_matter():
  network = tiny.in_context_dit(num_classes=0)
  params = tiny.random_params(network, IMAGE)
  assert "label_embedder" not in params
  z, t, h, y = inputs()
  np.testing.assert_array_equal(
    applied(network, params, z, t, h, y), applied(network, params, z, t, h, y * 0)
  )


def test_a_fresh_network_says_zero_and_its_gates_are_shut():
  network = tiny.in_context_dit()
  params = tiny.jit(lambda: init_params(network, 0, IMAGE))()
  for velocity in applied(network, params, *inputs(), guidance(), ("u", "v")):
    assert not velocity.any()
  for stack in ("trunk", "u_blocks", "v_blocks"):
    assert not params[stack]["attention_gate"].any()
    assert not params[stack]["mlp_gate"].any()


def test_the_initial_weights_have_the_published_spread():
  network = tiny.in_context_dit(width=128, time_frequencies=256, num_classes=1000)
  params = tiny.jit(lambda: init_params(network, 0, IMAGE))()
  block = params["trunk"]
  spread = lambda x: float(np.std(np.asarray(x)))
  for name in ("qkv", "attention_out", "mlp_in"):
    assert spread(block[name]["kernel"]) == pytest.approx(0.32 / np.sqrt(128), rel=0.05), name
  hidden = in_context_dit.mlp_size(128)
  assert spread(block["mlp_out"]["kernel"]) == pytest.approx(0.32 / np.sqrt(hidden), rel=0.05)
  embedder = params["omega_embedder"]
  assert spread(embedder["hidden"]["kernel"]) == pytest.approx(1 / np.sqrt(256), rel=0.05)
  assert spread(embedder["out"]["kernel"]) == pytest.approx(1 / np.sqrt(128), rel=0.05)
  table = params["label_embedder"]["embedding"]
  assert spread(table) == pytest.approx(1 / np.sqrt(128), rel=0.05)


# Forms of the same network.


@pytest.mark.parametrize(
  "changes", [{"scan": False}, {"remat": "blocks"}, {"remat": "matmuls"}, {"depth": 1}]
)
def test_scan_and_remat_change_no_number(changes):
  """In value, derivative and gradient; with depth 1 there is no trunk."""
  plain = tiny.in_context_dit(depth=changes.get("depth", 2))
  params = tiny.random_params(plain, IMAGE)
  z, t, h, y = inputs()

  def figures(network: InContextDiT) -> Any:
    def loss(params: Any) -> Any:
      both = lambda z, h: network.apply({"params": params}, z, t, h, y, guidance(), ("u", "v"))
      (u, v), (du, _) = jax.jvp(both, (z, h), (z, jnp.ones_like(h)))
      return ((u + jax.lax.stop_gradient(du)) ** 2).sum() + (v**2).sum(), du

    return tiny.jit(jax.value_and_grad(loss, has_aux=True))(params)

  def same(ours: jax.Array, theirs: jax.Array) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())

  jax.tree.map(same, figures(plain.clone(**changes)), figures(plain))


@pytest.mark.parametrize("remat", ["none", "matmuls"])
def test_fused_attention_changes_no_number(remat):
  """Neither velocities, nor their derivative, nor the gradient of a loss with it as target."""
  z, t, h, y = inputs()

  def everything(**settings: Any) -> Any:
    network = tiny.in_context_dit(remat=remat, **settings)
    velocity = lambda params, z, t: network.apply(
      {"params": params}, z, t, h, y, guidance(), heads=("u", "v")
    )

    def loss(params: Any) -> tuple[jax.Array, Any]:
      along = z, jnp.ones_like(t)
      (u, v), (du_dt, _) = forward_mode.jvp(lambda z, t: velocity(params, z, t), (z, t), along)
      return jnp.sum((u + v - jax.lax.stop_gradient(du_dt)) ** 2), (u, v, du_dt)

    params = tiny.random_params(tiny.in_context_dit(), IMAGE)
    return jax.jit(jax.grad(loss, has_aux=True))(params)

  ours, plainly = everything(attention=Fused(interpret=True).turned), everything()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), ours, plainly)


@pytest.mark.tpu
def test_a_network_takes_the_kernel_that_its_mesh_can_run():
  config = imagenet_imf.get_config()
  here, there = mesh_of(1, 1), make_mesh(1, 1, tpu_devices("v5p:2x2x1")[:1])
  assert build.network(config, here).attention is plain.turned
  assert build.network(config, there).attention.__self__ == Fused(there)


def test_computation_in_bfloat16_is_near():
  network = tiny.in_context_dit(remat="matmuls")
  params = tiny.random_params(network, IMAGE)
  exact = applied(network, params, *inputs(), guidance())
  near = applied(network.clone(dtype="bfloat16"), params, *inputs(), guidance())
  assert near.dtype == jnp.float32
  assert 0 < jnp.abs(near - exact).max() < 0.1 * jnp.abs(exact).max()


def test_an_empty_batch_passes():
  network = tiny.in_context_dit()
  params = tiny.random_params(network, IMAGE)
  empty = [x[:0] for x in inputs()]
  assert applied(network, params, *empty).shape == (0, *IMAGE)


# Sizes.


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
  config = imagenet_imf.get_config()
  config.model.update(imagenet_imf.SIZES[size])
  network = build.network(config, mesh_of(1, 1))
  shapes = jax.eval_shape(lambda: init_params(network, 0, (32, 32, 4)))
  used = sampling_params(network, shapes)
  assert round(sum(x.size for x in jax.tree.leaves(used)) / 1e6) == PUBLISHED[size]


@pytest.mark.parametrize("heads", [("u",), ("v",), ("u", "v")])
def test_operations_are_those_that_are_compiled(heads):
  """XLA's count of matrix products, layers unrolled, in units of two."""
  told = {"conditioning": ("t", "h", "r"), "positions": "sincos"}
  network = tiny.in_context_dit(width=64, depth=3, head_depth=1, scan=False, **told)
  shapes = jax.eval_shape(lambda: init_params(network, 0, (8, 8, 1)))
  rows = [jax.ShapeDtypeStruct((1, *s), d) for s, d in (((8, 8, 1), "float32"), ((), "float32"))]
  label = jax.ShapeDtypeStruct((1,), "int32")
  scale = GuidanceScale(rows[1], rows[1], rows[1])
  apply = lambda params, *args: network.apply({"params": params}, *args, heads=heads)
  compiled = jax.jit(apply).lower(shapes, rows[0], rows[1], rows[1], label, scale).compile()
  flops = compiled.cost_analysis()["flops"]
  assert network.forward_flops((8, 8, 1), heads) == pytest.approx(flops, rel=0.1)


# Mistakes.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"head_depth": 3}, "head_depth 3 must lie between 1 and model.depth 2"),
    ({"head_depth": 0}, "head_depth 0 must lie between"),
    ({"width": 18, "num_heads": 6}, "divisible by twice model.num_heads 6"),
    ({"omega_tokens": 0}, "omega_tokens must be at least 1"),
    ({"conditioning": ("t", "x")}, "model.conditioning must be one of"),
    ({"conditioning": ()}, "model.conditioning must be some of"),
    ({"time_frequencies": 7}, "must be even, got 7"),
    ({"remat": "some"}, "model.remat must be one of"),
    ({"dtype": "float16"}, "model.dtype must be one of"),
    ({"patch_size": 0}, "model.patch_size must be at least 1"),
  ],
)
def test_impossible_sizes_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny.in_context_dit(**changes)
