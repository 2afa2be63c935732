"""The reference's numbers of MeanFlow on a tiny DiT."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meanflow_jax.methods.guidance import Guidance, LabelDropout
from meanflow_jax.methods.meanflow import AdaptiveWeight, Draws, MeanFlow, velocity_and_derivative
from meanflow_jax.methods.row_groups import RowGroups
from meanflow_jax.methods.sampler import sample
from meanflow_jax.methods.time_sampling import TimePairs, Uniform
from meanflow_jax.models import dit_layouts
from meanflow_jax.models.dit import DiT
from meanflow_jax.train_step import velocity_fn

Golden = dict[str, np.ndarray]
Comparison = tuple[str, np.ndarray, np.ndarray]

TOLERANCE = 2e-5
from_theirs = dit_layouts.from_meanflow


def recognises(golden: Golden, meta: dict[str, Any]) -> bool:
  """Whether a golden file is one of these."""
  return {"x", "e", "v_g", "u", "du_dt", "loss"} <= golden.keys() and "omega" not in golden


def params_of(golden: Golden, meta: dict[str, Any], root: str) -> dict[str, Any]:
  """The reference's tree under `root` ("params", "grads") in our names and layout."""
  leaves = {k.removeprefix(f"{root}/"): v for k, v in golden.items() if k.startswith(f"{root}/")}
  return from_theirs(network(meta), image_shape(meta), leaves)


def image_shape(meta: dict[str, Any]) -> tuple[int, int, int]:
  data = meta["data"]
  return data["size"], data["size"], data["channels"]


def network(meta: dict[str, Any]) -> DiT:
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


def velocities(network: DiT, params: Any, golden: Golden, y: Any) -> dict[str, Any]:
  """What the network says of a golden file's points, in its order of rows."""
  z, r, t, y = (jnp.asarray(x) for x in (golden["z"], golden["r"], golden["t"], y))
  return {"u": velocity_fn(network, params)(z, r, t, y)}


def y_after_drop(golden: Golden, meta: dict[str, Any]) -> np.ndarray:
  dropped = np.arange(meta["batch"]) < meta["n_drop"]
  return np.where(dropped, meta["data"]["num_classes"], golden["y"]).astype(np.int32)


def check(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
  """The rows with r = t are the first of the reference's batch, and of our groups."""
  net, method = network(meta), meanflow(meta)
  params = params_of(golden, meta, "params")
  reference_grads = params_of(golden, meta, "grads")
  rows = RowGroups.from_fraction(meta["n_fm"] / meta["batch"])
  regroup = lambda a: rows.merge(a[: meta["n_fm"]], a[meta["n_fm"] :])
  ungroup = lambda a: jnp.concatenate(rows.split(a))
  x, e, r, t, y = (regroup(jnp.asarray(golden[k])) for k in ("x", "e", "r", "t", "y"))
  dropped = regroup(jnp.arange(meta["batch"]) < meta["n_drop"])
  draws = Draws(noise=e, r=r, t=t, dropped=dropped, rows=rows)

  @jax.jit
  def ours(params: dict[str, Any]) -> dict[str, Any]:
    velocity = velocity_fn(net, params)
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
  loss_fn = lambda params: method.objective(velocity_fn(net, params), x, y, draws)[0]
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
