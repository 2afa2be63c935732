"""The reference's numbers of MeanFlow on a tiny DiT."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meanflow_jax.arrays import VelocityFn
from meanflow_jax.methods.guidance import Guidance, LabelDropout
from meanflow_jax.methods.meanflow import AdaptiveWeight, Draws, MeanFlow, velocity_and_derivative
from meanflow_jax.methods.row_groups import RowGroups
from meanflow_jax.methods.sampler import sample
from meanflow_jax.methods.time_sampling import TimePairs, Uniform
from meanflow_jax.models.dit import DiT

Golden = dict[str, np.ndarray]
Comparison = tuple[str, np.ndarray, np.ndarray]

TOLERANCE = 2e-5


def recognises(golden: Golden, meta: dict[str, Any]) -> bool:
  """Whether a golden file is one of these."""
  return {"x", "e", "v_g", "u", "du_dt", "loss"} <= golden.keys() and "omega" not in golden


# Our parameters' names, and the reference's.
DIT_NAMES = {
  "patch_embedder": "x_embedder/proj",
  "t_embedder/hidden": "t_embedder/mlp/layers_0/_flax_linear",
  "t_embedder/out": "t_embedder/mlp/layers_2/_flax_linear",
  "h_embedder/hidden": "h_embedder/mlp/layers_0/_flax_linear",
  "h_embedder/out": "h_embedder/mlp/layers_2/_flax_linear",
  "label_embedder": "y_embedder/embedding_table/_flax_embedding",
  "final_modulation": "final_layer/adaLN_modulation/layers_1/_flax_linear",
  "final": "final_layer/linear/_flax_linear",
}
BLOCK_NAMES = {
  "modulation": "adaLN_modulation/layers_1/_flax_linear",
  "attention/qkv": "attn/qkv/_flax_linear",
  "attention/out": "attn/proj/_flax_linear",
  "mlp_in": "mlp/fc1/_flax_linear",
  "mlp_out": "mlp/fc2/_flax_linear",
}


def dit_params(golden: Golden, root: str, depth: int) -> dict[str, Any]:
  """The reference's tree under `root` ("params/net", "grads/net") in our names and layout."""
  leaves = {}
  for ours, theirs in DIT_NAMES.items():
    for leaf in ("kernel", "bias", "embedding"):
      if f"{root}/{theirs}/{leaf}" in golden:
        leaves[f"{ours}/{leaf}"] = golden[f"{root}/{theirs}/{leaf}"]
  for ours, theirs in BLOCK_NAMES.items():
    for leaf in ("kernel", "bias"):
      layers = [golden[f"{root}/blocks/layers_{i}/{theirs}/{leaf}"] for i in range(depth)]
      leaves[f"blocks/{ours}/{leaf}"] = np.stack(layers)
  kernel = leaves["patch_embedder/kernel"]  # a convolution's
  leaves["patch_embedder/kernel"] = kernel.reshape(-1, kernel.shape[-1])
  return nest(leaves)


def nest(leaves: dict[str, np.ndarray]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, value in leaves.items():
    *parents, leaf = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def dit(meta: dict[str, Any]) -> DiT:
  net = meta["net"]
  return DiT(
    patch_size=net["patch_size"],
    width=net["hidden_size"],
    depth=net["depth"],
    num_heads=net["num_heads"],
    num_classes=meta["data"]["num_classes"],
    conditioning=("t", "h"),
    time_frequencies=256,
    positions="sincos",
    dtype="float32",
    scan=True,
    remat="none",
  )


def meanflow(meta: dict[str, Any]) -> MeanFlow:
  settings = {} if meta["method"].get("guidance_eq") == "none" else meta["method"]
  return MeanFlow(
    times=TimePairs(Uniform(), Uniform(), "sorted", meta["n_fm"] / meta["batch"]),
    guidance=Guidance(
      omega=settings.get("omega", 1.0),
      kappa=settings.get("kappa", 0.0),
      t_start=settings.get("t_start", 0.0),
      t_end=settings.get("t_end", 1.0),
    ),
    label_dropout=LabelDropout(0.0, "all"),
    weight=AdaptiveWeight(p=meta["norm_p"], c=meta["norm_eps"]),
    null_label=meta["data"]["num_classes"],
  )


def check(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
  """The rows with r = t are the first of the reference's batch, and of our groups."""
  network, method = dit(meta), meanflow(meta)
  params = dit_params(golden, "params/net", meta["net"]["depth"])
  reference_grads = dit_params(golden, "grads/net", meta["net"]["depth"])
  rows = RowGroups.from_fraction(meta["n_fm"] / meta["batch"])
  regroup = lambda a: rows.merge(a[: meta["n_fm"]], a[meta["n_fm"] :])
  ungroup = lambda a: jnp.concatenate(rows.split(a))
  x, e, r, t, y = (regroup(jnp.asarray(golden[k])) for k in ("x", "e", "r", "t", "y"))
  dropped = regroup(jnp.arange(meta["batch"]) < meta["n_drop"])
  draws = Draws(noise=e, r=r, t=t, dropped=dropped, rows=rows)

  def velocity_fn(params: dict[str, Any]) -> VelocityFn:
    return lambda z, r, t, y: network.apply({"params": params}, z, t, t - r, y)

  @jax.jit
  def ours(params: dict[str, Any]) -> dict[str, Any]:
    velocity = velocity_fn(params)
    z = x + (e - x) * t[:, None, None, None]
    u_equal = rows.split(velocity(z, t, t, y))[0]
    v_g = method.guided_velocity(velocity, z, e - x, y, draws, u_equal)
    y_in = jnp.where(dropped, method.null_label, y)
    u, du_dt = velocity_and_derivative(velocity, z, r, t, y_in, v_g)
    samples = {
      "sample_1step": sample(method.step, velocity, e, y, (1.0, 0.0)),
      "sample_2step": sample(method.step, velocity, e, y, (1.0, 0.5, 0.0)),
    }
    return {"z": z, "v_g": v_g, "u": u, "du_dt": du_dt, **samples}

  for name, rows_of_ours in ours(params).items():
    yield name, ungroup(rows_of_ours), golden[name]
  loss_fn = lambda params: method.objective(velocity_fn(params), x, y, draws)[0]
  loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
  yield "loss", loss, golden["loss"]
  yield from compare_trees("grad", grads, reference_grads)


def compare_trees(label: str, ours: Any, reference: Any) -> Iterator[Comparison]:
  theirs = dict(jax.tree_util.tree_leaves_with_path(reference))
  leaves = jax.tree_util.tree_leaves_with_path(ours)
  if {path for path, _ in leaves} != theirs.keys():
    raise ValueError("our parameters and the reference's differ in their names")
  for path, leaf in leaves:
    yield f"{label} {jax.tree_util.keystr(path, simple=True, separator='/')}", leaf, theirs[path]
