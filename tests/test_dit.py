"""The transformer: its published sizes, what it depends on, and that shortcuts change nothing."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import DIT
from meanflow_jax.models import transformer
from meanflow_jax.train_step import init_params
from tests import tiny

IMAGE = (4, 6, 2)  # not square
BATCH = 3

# Parameters in millions and GMACs per image of 32 x 32 x 4 (arXiv 2212.09748, Table 4).
PUBLISHED = {
  ("S", 8): (33, 0.36),
  ("S", 4): (33, 1.41),
  ("S", 2): (33, 6.06),
  ("B", 8): (131, 1.42),
  ("B", 4): (130, 5.56),
  ("B", 2): (130, 23.01),
  ("L", 8): (459, 5.01),
  ("L", 4): (458, 19.70),
  ("L", 2): (458, 80.71),
  ("XL", 8): (676, 7.39),
  ("XL", 4): (675, 29.05),
  ("XL", 2): (675, 118.64),
}
# The same of MeanFlow, whose networks embed two times (arXiv 2505.13447, Tables 1 and 2).
MEANFLOW = {("B", 4): 131, ("B", 2): 131, ("M", 2): 308, ("L", 2): 459, ("XL", 2): 676}


# Sizes.


def parameter_count(size: str, patch_size: int, conditioning: tuple[str, ...]) -> int:
  network = published(size, patch_size, conditioning=conditioning)
  shapes = jax.eval_shape(lambda: init_params(network, 0, (32, 32, 4)))
  return sum(x.size for x in jax.tree.leaves(shapes))


def published(size: str, patch_size: int, **changes: Any):
  return tiny.dit(
    **DIT[size], patch_size=patch_size, num_classes=1000, time_frequencies=256, **changes
  )


@pytest.mark.parametrize(("size", "patch_size"), PUBLISHED)
def test_a_transformer_of_one_time_has_the_published_size(size, patch_size):
  learned_variance = (DIT[size]["width"] + 1) * patch_size**2 * 4  # which DiT predicts, too
  count = parameter_count(size, patch_size, ("t",)) + learned_variance
  assert round(count / 1e6) == PUBLISHED[size, patch_size][0]


@pytest.mark.parametrize(("size", "patch_size"), MEANFLOW)
def test_a_transformer_of_two_times_has_the_published_size(size, patch_size):
  assert round(parameter_count(size, patch_size, ("t", "h")) / 1e6) == MEANFLOW[size, patch_size]


@pytest.mark.parametrize(("size", "patch_size"), PUBLISHED)
def test_a_forward_pass_costs_what_is_published(size, patch_size):
  multiplications = published(size, patch_size).forward_flops((32, 32, 4)) / 2e9
  assert multiplications == pytest.approx(PUBLISHED[size, patch_size][1], rel=0.01)


# Values and derivatives.


def inputs() -> tuple[jax.Array, ...]:
  """z, t, h and y."""
  z = jax.random.normal(jax.random.key(1), (BATCH, *IMAGE))
  return z, jnp.array([0.3, 0.6, 1.0]), jnp.array([0.0, 0.5, 1.0]), jnp.array([0, 2, 3])


@functools.cache
def computed(**changes: Any) -> tuple[jax.Array, jax.Array, Any]:
  """u, its derivative along all inputs, and a gradient with the JVP inside, as in training."""
  network = tiny.dit(**changes)
  z, t, h, y = inputs()

  def loss(params: tiny.Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    u_of = lambda z, t, h: network.apply({"params": params}, z, t, h, y)
    u, du = jax.jvp(u_of, (z, t, h), (jnp.flip(z), jnp.ones(BATCH), jnp.ones(BATCH)))
    return jnp.mean((u - jax.lax.stop_gradient(z + du)) ** 2), (u, du)

  params = tiny.random_params(network, IMAGE)
  (_, (u, du)), gradient = tiny.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return u, du, gradient


def assert_close(ours: Any, expected: Any, tolerance: float) -> None:
  """Relative to the largest magnitude of each array."""
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
  "changes", [{"scan": False}, {"remat": "matmuls"}, {"remat": "blocks"}], ids=str
)
def test_shortcuts_change_nothing(changes):
  assert_close(computed(**changes), computed(), 1e-5)


def shapes_and_network(**changes: Any):
  network = tiny.dit(**changes)
  return jax.eval_shape(lambda: init_params(network, 0, IMAGE)), network


@pytest.mark.parametrize("scan", [True, False])
def test_layers_are_a_loop_or_unrolled(scan):
  shapes, network = shapes_and_network(scan=scan)
  program = jax.jit(network.apply).lower({"params": shapes}, *inputs())
  assert ("while" in program.as_text()) == scan


@pytest.mark.parametrize(
  ("scan", "times", "tied"), [(False, 4, True), (False, 1, False), (True, 4, False)]
)
def test_gradients_of_many_rows_come_in_turn(scan, times, tied):
  """Of unrolled layers that keep more numbers than they have weights."""
  shapes, network = shapes_and_network(scan=scan)
  rows = [jnp.repeat(x, times, axis=0) for x in inputs()]
  total = lambda params: jnp.sum(network.apply({"params": params}, *rows))
  program = jax.jit(jax.grad(total)).lower(shapes)
  assert ("optimization_barrier" in program.as_text()) == tied


def test_a_jvp_costs_no_more_where_gradients_come_in_turn(monkeypatch):
  def flops() -> float:
    shapes, network = shapes_and_network(scan=False)
    z, *rest = (jnp.repeat(x, 4, axis=0) for x in inputs())
    of = lambda params, z: network.apply({"params": params}, z, *rest)
    both = lambda params, z: jax.jvp(lambda z: of(params, z), (z,), (z,))
    return jax.jit(both).lower(shapes, z).compile().cost_analysis()["flops"]

  in_turn = flops()
  monkeypatch.setattr(transformer, "in_turn", lambda block: block)
  assert in_turn == flops()


def test_remat_keeps_less_for_the_backward_pass():
  def kept(remat: str) -> int:
    shapes, network = shapes_and_network(remat=remat)
    apply = lambda params: network.apply({"params": params}, *inputs())
    residuals = jax.eval_shape(lambda params: jax.vjp(apply, params)[1], shapes)
    return sum(x.size for x in jax.tree.leaves(residuals))

  assert kept("blocks") < 0.8 * kept("matmuls")
  assert kept("matmuls") < 0.7 * kept("none")


def test_bfloat16_is_close_to_float32_and_not_equal():
  *low, gradient = computed(dtype="bfloat16")
  *high, _ = computed()
  for a, b in zip(low, high, strict=True):
    assert a.dtype == jnp.float32
    assert_close(a, b, 0.05)
    assert not np.allclose(a, b, rtol=1e-4)
  assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_all_products_but_those_of_times_are_in_bfloat16():
  shapes, network = shapes_and_network(dtype="bfloat16")
  program = jax.jit(network.apply).lower({"params": shapes}, *inputs()).as_text()
  products = [line for line in program.splitlines() if "dot_general" in line]
  single = [line for line in products if "xf32>, tensor<" in line]
  assert len(single) == 2 * 2 < len(products)  # two layers for each of two times


def test_a_checkpoint_does_not_depend_on_how_the_network_is_computed():
  expected, _ = shapes_and_network()
  assert {leaf.dtype for leaf in jax.tree.leaves(expected)} == {jnp.dtype("float32")}
  for changes in ({"scan": False}, {"remat": "blocks"}, {"dtype": "bfloat16"}):
    assert shapes_and_network(**changes)[0] == expected


# Initialisation.


@functools.cache
def new_params() -> tiny.Params:
  network = tiny.dit(width=32, time_frequencies=32, num_classes=100)
  return tiny.jit(lambda: init_params(network, 0, IMAGE))()


def test_a_new_network_is_zero():
  network = tiny.dit()
  fresh = tiny.jit(lambda: network.apply({"params": init_params(network, 0, IMAGE)}, *inputs()))
  assert not fresh().any()


def expected_deviation(path: str, shape: tuple[int, ...]) -> float:
  """Of the published initialisation: zeros, normal(0.02) or uniform (Xavier)."""
  if path.endswith("bias") or "modulation" in path or path.startswith("final"):
    return 0.0
  if path.startswith(("t_", "h_", "label")):
    return 0.02
  return np.sqrt(2 / (shape[-2] + shape[-1]))


def test_new_parameters_are_spread_as_published():
  for keys, leaf in jax.tree_util.tree_leaves_with_path(new_params()):
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    expected = expected_deviation(path, leaf.shape)
    assert leaf.std() == pytest.approx(expected, rel=0.1), path
    if expected > 0.02:
      assert jnp.abs(leaf).max() <= np.sqrt(3) * expected, path


def test_new_layers_differ():
  for name in ("mlp_in", "mlp_out"):
    first, second = new_params()["blocks"][name]["kernel"]
    assert jnp.abs(jnp.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1


# Conditioning.

TIMES = ("t", "h", "r")
VARIANTS = [v for n in (1, 2, 3) for v in itertools.combinations(TIMES, n)]
# Directions in (t, h), with r = t - h, along which each time stands still.
STILL = {"t": (0.0, 1.0), "h": (1.0, 0.0), "r": (1.0, 1.0)}


@pytest.mark.parametrize("conditioning", VARIANTS, ids="-".join)
def test_each_embedded_time_enters_and_no_other(conditioning):
  """With all but one embedder silenced, u stands still exactly where that time does."""
  network = tiny.dit(depth=1, conditioning=conditioning)
  params = tiny.random_params(network, IMAGE)
  assert {name for name in TIMES if f"{name}_embedder" in params} == set(conditioning)
  z, t, h, y = inputs()

  @tiny.jit
  def slope(params: tiny.Params, direction: jax.Array) -> jax.Array:
    u_of = lambda t, h: network.apply({"params": params}, z, t, h, y)
    return jnp.abs(jax.jvp(u_of, (t, h), tuple(direction))[1]).max()

  for name in conditioning:
    others = {f"{other}_embedder": None for other in conditioning if other != name}
    silenced = params | {k: jax.tree.map(jnp.zeros_like, params[k]) for k in others}
    for still, direction in STILL.items():
      moves = slope(silenced, jnp.outer(jnp.array(direction), jnp.ones(BATCH)))
      assert moves < 1e-6 if still == name else moves > 1e-2


def test_labels_and_the_null_label_each_have_their_row():
  network = tiny.dit(depth=1)
  params = tiny.random_params(network, IMAGE)
  z, t, h, _ = inputs()
  u_of = tiny.jit(lambda y: network.apply({"params": params}, z, t, h, jnp.full(BATCH, y)))
  of_label = [u_of(y) for y in range(4)]
  for a, b in itertools.combinations(of_label, 2):
    assert jnp.abs(a - b).max() > 1e-2
  assert params["label_embedder"]["embedding"].shape == (4, 16)


def test_an_unconditional_network_has_no_labels():
  network = tiny.dit(depth=1, num_classes=0)
  params = tiny.random_params(network, IMAGE)
  assert "label_embedder" not in params
  z, t, h, y = inputs()
  u_of = tiny.jit(lambda y: network.apply({"params": params}, z, t, h, y))
  np.testing.assert_array_equal(u_of(y), u_of(y + 1))


# Patches.


def test_every_pixel_comes_back_to_its_place():
  """A network whose parameters make it the identity.

  Pixel k of a patch goes to feature k and, negated, to 8 + k; two features so large that they
  alone decide the norm keep it linear.
  """
  network = tiny.dit(depth=1, positions="learned")
  zeros = jax.eval_shape(lambda: init_params(network, 0, (4, 6, 1)))
  params = jax.tree.map(lambda x: jnp.zeros(x.shape), zeros)
  large, ones = 1e3, jnp.eye(4, 8)
  params["patch_embedder"] = {
    "kernel": jnp.concatenate([ones, -ones], axis=1),
    "bias": jnp.zeros(16).at[4].set(large).at[12].set(-large),
  }
  params["final"]["kernel"] = large / jnp.sqrt(8.0) * jnp.eye(16, 4)
  z, t, h, y = inputs()
  z = z[..., :1]
  u = tiny.jit(network.apply)({"params": params}, z, t, h, y)
  np.testing.assert_allclose(u, z, atol=1e-3)


@pytest.mark.parametrize("attends", [True, False])
def test_patches_mix_in_the_attention_alone(attends):
  network = tiny.dit(depth=1)
  params = tiny.random_params(network, IMAGE)
  if not attends:
    params["blocks"]["attention"]["out"] = jax.tree.map(
      jnp.zeros_like, params["blocks"]["attention"]["out"]
    )
  z, t, h, y = (x[:1] for x in inputs())
  u_of = lambda z: network.apply({"params": params}, z, t, h, y)
  jacobian = tiny.jit(jax.jacfwd(u_of))(z).reshape(2, 2, 3, 2, 2, 2, 2, 3, 2, 2)
  # From patch (k, l) to patch (i, j); the other axes are the places inside a patch, and channels.
  response = jnp.abs(jacobian).max(axis=(1, 3, 4, 6, 8, 9)).reshape(6, 6)
  same = np.eye(6, dtype=bool)
  assert (response[same] > 1e-2).all()
  assert (response[~same] > 1e-5).all() if attends else not response[~same].any()


def test_each_gate_opens_its_branch():
  network = tiny.dit(depth=1)
  params = tiny.random_params(network, IMAGE)

  @tiny.jit
  def slopes(gates: jax.Array) -> dict[str, jax.Array]:
    modulation = {"kernel": jnp.zeros((1, 16, 96)), "bias": jnp.repeat(gates, 16)[None]}
    block = params["blocks"] | {"modulation": modulation}
    loss = lambda block: network.apply({"params": params | {"blocks": block}}, *inputs()).sum()
    return jax.tree.map(lambda x: jnp.abs(x).max(), jax.grad(loss)(block))

  # Shift, scale and gate of the attention, then of the perceptron.
  for place, branch in ((2, "attention"), (5, "mlp")):
    for name, layer in slopes(jnp.zeros(6).at[place].set(1)).items():
      if name != "modulation":
        moves = max(float(x) for x in jax.tree.leaves(layer))
        assert moves > 1e-2 if name.startswith(branch) else moves == 0


def test_positions_tell_equal_patches_apart():
  for positions in ("sincos", "learned"):
    network = tiny.dit(depth=1, positions=positions)
    params = tiny.random_params(network, IMAGE)
    assert ("positions" in params) == (positions == "learned")
    z, t, h, y = inputs()
    u = tiny.jit(network.apply)({"params": params}, jnp.ones_like(z), t, h, y)[0]
    patches = u.reshape(2, 2, 3, 2, 2).swapaxes(1, 2).reshape(6, -1)
    for a, b in itertools.combinations(patches, 2):
      assert jnp.abs(a - b).max() > 1e-3


# Mistakes.


@pytest.mark.parametrize("image", [(5, 6, 2), (4, 5, 2)])
def test_an_image_of_broken_patches_is_refused(image):
  with pytest.raises(ValueError, match="does not divide into patches of 2"):
    init_params(tiny.dit(), 0, image)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"conditioning": ("t", "x")}, "model.conditioning must be one of"),
    ({"conditioning": ()}, r"model.conditioning must be some of .* got \(\)"),
    ({"conditioning": ("h", "h")}, "each once"),
    ({"positions": "rope"}, "model.positions must be one of"),
    ({"positions": "none"}, "model.positions 'none' would leave a DiT without any"),
    ({"remat": "all"}, "model.remat must be one of"),
    ({"dtype": "float16"}, "model.dtype must be one of"),
    ({"num_heads": 3}, "divisible by model.num_heads 3"),
    ({"width": 18}, "model.width 18 must be divisible by 4"),
  ],
)
def test_impossible_settings_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny.dit(**changes)
