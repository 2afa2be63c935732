"""The U-Net: its size, what it depends on, dropout under a derivative, and mistakes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meanflow_jax.arrays import Label, Told, with_dropout, without_dropout
from meanflow_jax.methods.meanflow import velocity_and_derivative
from meanflow_jax.models.unet import UNet, doubled, dropped, halved
from meanflow_jax.train_step import init_params, velocity_fn
from tests import tiny

IMAGE = (4, 8, 2)  # not square
BATCH = 4
CIFAR = {
  "width": 128,
  "multipliers": (2, 2, 2),
  "blocks": 4,
  "attention_at": (16,),
  "time_frequencies": 256,
  "num_classes": 0,
}


def unet(**changes: Any) -> UNet:
  settings = {
    "width": 4,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_at": (4,),
    "num_heads": 2,
    "time_frequencies": 8,
    "dropout": 0.5,
    "num_classes": 3,
    "augmentation": 6,
    "dtype": "float32",
    "remat": "none",
  }
  return UNet(**settings | changes)


SMALL = {"multipliers": (1,), "attention_at": ()}  # five blocks instead of ten


@functools.cache
def params(**changes: Any) -> tiny.Params:
  return jax.tree.map(lambda x: 3 * x, tiny.random_params(unet(**changes), IMAGE))


def inputs() -> tuple[jax.Array, jax.Array, jax.Array, Told]:
  """z, r, t and the labels."""
  keys = jax.random.split(jax.random.key(1), 2)
  z = jax.random.normal(keys[0], (BATCH, *IMAGE))
  y = Told(jnp.array([0, 1, 2, 3]), jax.random.normal(keys[1], (BATCH, 6)))
  return z, jnp.array([0.0, 0.1, 0.3, 0.6]), jnp.array([0.2, 0.1, 0.9, 1.0]), y


# Sizes.


def parameter_count(network: UNet) -> int:
  shapes = jax.eval_shape(lambda: init_params(network, 0, (32, 32, 3)))
  return sum(x.size for x in jax.tree.leaves(shapes))


def test_the_network_of_cifar_has_the_published_size():
  """55.7M of one time with half the frequencies, and with 9 numbers of an augmentation (EDM's)."""
  count = parameter_count(unet(**CIFAR))
  one_time, labels = 512 * (512 - 128), 6 * 512 - 9 * 128
  assert count - one_time - labels == 55_733_891
  assert round(count / 1e6, 1) == 55.9


def test_operations_are_those_that_the_compiler_counts():
  """Which leaves out products with the zeros around an image: of a large one, few."""
  network, shape = unet(**CIFAR | {"attention_at": (64,)}), (128, 128, 3)
  shapes = jax.eval_shape(lambda: init_params(network, 0, shape))
  image, time = jax.ShapeDtypeStruct((1, *shape), jnp.float32), jnp.zeros(1)
  apply = lambda params, z: network.apply({"params": params}, z, time, time, jnp.zeros(1, int))
  counted = jax.jit(apply).lower(shapes, image).cost_analysis()["flops"]
  assert network.forward_flops(shape) == pytest.approx(counted, rel=0.02)
  # 21.2 billion multiplications: EDM's network, but for its second time.
  assert unet(**CIFAR).forward_flops((32, 32, 3)) / 2e9 == pytest.approx(21.2, abs=0.05)


# What it depends on.


@functools.cache
def forward(network: UNet):
  return jax.jit(lambda params, z, r, t, y: velocity_fn(network, params)(z, r, t, y))


def test_the_velocity_depends_on_all_inputs():
  z, r, t, y = inputs()
  u = forward(unet())
  base = u(params(), z, r, t, y)
  assert base.shape == z.shape
  others = [
    (z + 0.1, r, t, y),
    (z, r - 0.05, t, y),
    (z, r, t + 0.05, y),
    (z, r, t, y._replace(label=(y.label + 1) % 4)),
    (z, r, t, y._replace(augmentation=y.augmentation + 0.1)),
  ]
  for changed in others:
    assert (jnp.abs(u(params(), *changed) - base).max(axis=(1, 2, 3)) > 1e-4).all()


def test_rows_know_nothing_of_each_other():
  z, r, t, y = inputs()
  both = forward(unet())(params(), z, r, t, y)
  rows = jax.tree.map(lambda x: x[1:3], (z, r, t, y))
  np.testing.assert_allclose(forward(unet())(params(), *rows), both[1:3], atol=1e-5)


def test_no_label_is_a_label_of_zeros():
  z, r, t, y = inputs()
  zeros = y._replace(augmentation=jnp.zeros((BATCH, 6)))
  u = forward(unet())
  np.testing.assert_array_equal(u(params(), z, r, t, y.label), u(params(), z, r, t, zeros))


def test_bfloat16_is_close_to_float32_and_not_equal():
  low, high = (forward(unet(dtype=dtype))(params(), *inputs()) for dtype in ("bfloat16", "float32"))
  assert low.dtype == jnp.float32
  assert 1e-4 < jnp.abs(low - high).max() / jnp.abs(high).max() < 0.05


def test_at_its_start_the_network_says_next_to_nothing():
  """So do the branches of its blocks."""
  start = tiny.jit(lambda: init_params(unet(), 0, IMAGE))()
  assert jnp.abs(forward(unet())(start, *inputs())).max() < 1e-4
  block = start["encoder_0_block_0"]
  for name in ("conv_out", "attention_out"):
    assert 0 < jnp.abs(block[name]["kernel"]).max() < 1e-4


def test_halving_and_doubling_keep_what_is_smooth():
  row, column = jnp.meshgrid(jnp.arange(8.0), jnp.arange(6.0), indexing="ij")
  slope = (1 + 2 * row + 3 * column)[None, :, :, None]
  small, large = halved(slope), doubled(slope)
  assert small.shape == (1, 4, 3, 1)
  assert large.shape == (1, 16, 12, 1)
  inner = np.s_[:, 1:-1, 1:-1]  # beyond the edges are zeros
  np.testing.assert_allclose(small[inner], (slope[:, ::2, ::2] + 2.5)[inner], rtol=1e-6)
  expected = (
    1 + 2 * (jnp.arange(16.0) / 2 - 0.25)[:, None] + 3 * (jnp.arange(12.0) / 2 - 0.25)[None]
  )
  np.testing.assert_allclose(large[inner], expected[None, :, :, None][inner], rtol=1e-6)


# Dropout. A training target has du/dt of the network that the loss sees: one mask for both.


def keyed(y: Label, seed: int) -> Told:
  return with_dropout(y, jax.random.split(jax.random.key(seed), BATCH))


@functools.cache
def derivatives():
  """u, du/dt, and du/dt by differences of two calls, each with labels of its own."""

  def all_three(params: Any, y: Told, one: Told, other: Told) -> Any:
    z, r, t, _ = inputs()
    velocity, tangent, step = velocity_fn(unet(**SMALL), params), jnp.cos(z), 1e-3
    u, du_dt = velocity_and_derivative(velocity, z, r, t, y, tangent)
    after = velocity(z + step * tangent, r, t + step, one)
    before = velocity(z - step * tangent, r, t - step, other)
    return u, du_dt, (after - before) / (2 * step)

  return tiny.jit(all_three)


def test_the_derivative_is_that_of_the_network_with_the_mask_of_the_value():
  y = inputs()[-1]
  first, second = keyed(y, 7), keyed(y, 8)
  _, du_dt, differences = derivatives()(params(**SMALL), first, first, first)
  assert jnp.abs(du_dt - differences).max() < 0.02 * jnp.abs(du_dt).max()
  # Another mask has another derivative, and a new one for each call has none.
  _, other, _ = derivatives()(params(**SMALL), second, first, first)
  assert jnp.abs(du_dt - other).max() > 0.1 * jnp.abs(du_dt).max()
  _, _, broken = derivatives()(params(**SMALL), first, first, second)
  assert jnp.abs(du_dt - broken).max() > 10 * jnp.abs(du_dt).max()


def test_the_given_share_is_dropped_and_the_mean_kept():
  keys = jax.random.split(jax.random.key(0), 64)
  ones = jnp.ones((64, 8, 8, 4))
  one, same, other = (np.asarray(dropped(ones, k, 0.2)) for k in (keys, keys, keys[::-1]))
  np.testing.assert_array_equal(one, same)
  np.testing.assert_array_equal(one, other[::-1])  # a row's mask follows from its own key
  assert set(np.unique(one)) == {0, np.float32(1 / 0.8)}
  assert one.mean() == pytest.approx(1, abs=0.02)
  assert len({row.tobytes() for row in one}) == 64


def test_each_block_drops_by_itself():
  first, second = (unet()._keys(keyed(inputs()[-1], 0), number) for number in (0, 1))
  assert (jax.random.key_data(first) != jax.random.key_data(second)).any(axis=1).all()


def test_without_keys_nothing_is_dropped():
  z, r, t, y = inputs()
  u = forward(unet(**SMALL))
  expected = forward(unet(dropout=0.0, **SMALL))(params(**SMALL), z, r, t, keyed(y, 0))
  quiet = u(params(**SMALL), z, r, t, without_dropout(keyed(y, 0)))
  np.testing.assert_allclose(quiet, expected, atol=1e-6)
  assert jnp.abs(u(params(**SMALL), z, r, t, keyed(y, 0)) - expected).max() > 0.1


@pytest.mark.parametrize("guidance", [{"omega": 1.5, "kappa": 0.3}, {"omega": 0.6, "kappa": 0.4}])
def test_targets_of_guidance_are_without_dropout(guidance):
  """Where guidance asks for velocities, they are those of the network that samples."""
  method = tiny.meanflow(equal_fraction=0.5, guidance=guidance, dropout=0.2)
  x, _, _, y = inputs()
  y = y._replace(label=y.label % 3)
  draws = method.draw(jax.random.key(2), x, y)
  z, v = x + draws.t[:, None, None, None] * (draws.noise - x), draws.noise - x

  @tiny.jit
  def guided(params: Any, y: Told) -> jax.Array:
    velocity = velocity_fn(unet(**SMALL), params)
    rows = draws.rows.split((z, draws.t, y))[0]
    u_equal = velocity(rows[0], rows[1], rows[1], rows[2])
    return method.guided_velocity(velocity, z, v, y, draws, u_equal)

  dropping, plain = guided(params(**SMALL), keyed(y, 3)), guided(params(**SMALL), y)
  np.testing.assert_allclose(dropping, plain, atol=1e-5)


# Shortcuts.


def test_recomputing_changes_nothing():
  """With dropout, whose masks are recomputed too."""

  def gradient(remat: str) -> Any:
    def loss(params: Any) -> jax.Array:
      z, r, t, y = inputs()
      velocity = velocity_fn(unet(remat=remat, **SMALL), params)
      u, du_dt = velocity_and_derivative(velocity, z, r, t, keyed(y, 5), jnp.cos(z))
      return jnp.sum((u - du_dt) ** 2)

    return tiny.jit(jax.grad(loss))(params(**SMALL))

  expected = gradient("none")
  for remat in ("matmuls", "blocks"):
    for ours, theirs in zip(
      jax.tree.leaves(gradient(remat)), jax.tree.leaves(expected), strict=True
    ):
      np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max() + 1e-7)


# Mistakes.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"width": 0}, "model.unet.width must be at least 1, got 0"),
    ({"blocks": 0}, "model.unet.blocks must be at least 1"),
    ({"multipliers": ()}, "model.unet.multipliers must be 1 or more"),
    ({"multipliers": (1, 0)}, "model.unet.multipliers must be 1 or more"),
    ({"time_frequencies": 7}, "time_frequencies must be even"),
    ({"dropout": 1.0}, r"model.unet.dropout must lie in \[0, 1\), got 1.0"),
    ({"width": 6}, "18 channels .* do not divide into 4 groups"),
    ({"num_heads": 3}, "do not divide into model.unet.num_heads 3"),
    ({"remat": "some"}, "model.remat must be one of"),
    ({"dtype": "float16"}, "model.dtype must be one of"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    unet(**changes)


def test_images_that_cannot_be_halved_are_refused():
  with pytest.raises(ValueError, match=r"4 x 6 is not divisible by 4.*3 levels"):
    init_params(unet(multipliers=(1, 1, 1)), 0, (4, 6, 2))


def test_labels_that_nobody_reads_are_refused():
  network = unet(augmentation=0)
  with pytest.raises(ValueError, match="augmented, of which the network is not told"):
    velocity_fn(network, tiny.random_params(network, IMAGE))(*inputs())
