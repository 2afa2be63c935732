"""The reference's numbers of improved MeanFlow on a tiny two-headed network."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from meanflow_jax.arrays import GuidanceScale, NetworkFn
from meanflow_jax.methods.guidance import LabelDropout
from meanflow_jax.methods.improved_meanflow import Draws, ImprovedMeanFlow
from meanflow_jax.methods.meanflow import AdaptiveWeight, velocity_and_derivative
from meanflow_jax.methods.row_groups import RowGroups
from meanflow_jax.methods.sampler import sample
from meanflow_jax.methods.time_sampling import TimePairs, Uniform
from meanflow_jax.models import in_context_layouts
from meanflow_jax.models.in_context_dit import InContextDiT
from meanflow_jax.train_step import velocity_fn
from tests.golden_meanflow import Comparison, Golden, compare_trees, image_shape, y_after_drop

TOLERANCE = 2e-5
from_theirs = in_context_layouts.from_imeanflow


def recognises(golden: Golden, meta: dict[str, Any]) -> bool:
  """Whether a golden file is one of these."""
  keys = {"x", "e", "omega", "t_min", "t_max", "v_g_before_drop", "v_c", "u", "v", "loss_v"}
  return keys <= golden.keys() and "aux_head_depth" in meta["net"]


def params_of(golden: Golden, meta: dict[str, Any], root: str) -> dict[str, Any]:
  """The reference's tree under `root` ("params", "grads") in our names and layout."""
  leaves = {k.removeprefix(f"{root}/"): v for k, v in golden.items() if k.startswith(f"{root}/")}
  return from_theirs(network(meta), image_shape(meta), leaves)


def network(meta: dict[str, Any]) -> InContextDiT:
  net = meta["net"]
  return InContextDiT(
    patch_size=net["patch_size"],
    width=net["hidden_size"],
    depth=net["depth"],
    num_heads=net["num_heads"],
    num_classes=meta["data"]["num_classes"],
    conditioning=("h",),
    positions="none",
    head_depth=net["aux_head_depth"],
    class_tokens=net["num_class_tokens"],
    omega_tokens=net["num_cfg_tokens"],
    interval_tokens=net["num_interval_tokens"],
    time_tokens=net["num_time_tokens"],
    time_frequencies=256,
    dtype="float32",
    scan=True,
    remat="none",
  )


def improved_meanflow(meta: dict[str, Any]) -> ImprovedMeanFlow:
  return ImprovedMeanFlow(
    times=TimePairs(Uniform(), Uniform(), "sorted", meta["n_fm"] / meta["batch"]),
    label_dropout=LabelDropout(0.0, "all"),
    weight=AdaptiveWeight(p=meta["norm_p"], c=meta["norm_eps"]),
    null_label=meta["data"]["num_classes"],
    omega_max=8.0,
    omega_exponent=1.0,
    interval_split=0.5,
  )


def velocities(network: InContextDiT, params: Any, golden: Golden, y: Any) -> dict[str, Any]:
  """What the heads say of a golden file's points, in its order of rows; v_c is the direction."""
  of = velocity_fn(network, params)
  z, r, t, v_c = (jnp.asarray(golden[k]) for k in ("z", "r", "t", "v_c"))
  guidance = GuidanceScale(*(jnp.asarray(golden[k]) for k in GuidanceScale._fields))
  y = jnp.asarray(y)
  both = lambda z, r, t, y: of(z, r, t, y, guidance=guidance, heads=("u", "v"))
  (u, v), (du_dt, _) = velocity_and_derivative(both, z, r, t, y, v_c)
  return {"u": u, "v": v, "du_dt": du_dt}


def check(golden: Golden, meta: dict[str, Any]) -> Iterator[Comparison]:
  """The rows with r = t are the first of the reference's batch, and of our groups."""
  net, method = network(meta), improved_meanflow(meta)
  params = params_of(golden, meta, "params")
  reference_grads = params_of(golden, meta, "grads")
  rows = RowGroups.from_fraction(meta["n_fm"] / meta["batch"])
  regroup = lambda a: rows.merge(a[: meta["n_fm"]], a[meta["n_fm"] :])
  ungroup = lambda a: jnp.concatenate(rows.split(a))
  regrouped = lambda *keys: (regroup(jnp.asarray(golden[k])) for k in keys)
  x, e, r, t, y = regrouped("x", "e", "r", "t", "y")
  guidance = GuidanceScale(*regrouped(*GuidanceScale._fields))
  none = jnp.zeros(meta["batch"], bool)
  draws = Draws(noise=e, r=r, t=t, dropped=none, rows=rows, guidance=guidance)
  chosen = method.sampling_guidance(**meta["sampling"])

  @jax.jit
  def ours(params: dict[str, Any]) -> dict[str, Any]:
    of = velocity_fn(net, params)
    z = x + (e - x) * t[:, None, None, None]
    v_c = conditional(of, z, t, y, guidance)
    v_equal = rows.split(v_c)[0]
    v_g, v_c_ahead = method.guided_velocity(of, z, e - x, y, draws, v_equal)
    samples = {
      f"sample_{nfe}step": sample(method.step, chosen.guided(of), e, y, grid)
      for nfe, grid in ((1, (1.0, 0.0)), (2, (1.0, 0.5, 0.0)))
    }
    v_c = rows.merge(v_equal, v_c_ahead)
    return {"z": z, "v_g_before_drop": v_g, "v_c": v_c, **samples}

  for name, rows_of_ours in ours(params).items():
    yield name, ungroup(rows_of_ours), golden[name]
  points = jax.jit(lambda params: velocities(net, params, golden, y_after_drop(golden, meta)))
  for name, found in points(params).items():
    yield name, found, golden[name]

  draws = draws.replace(dropped=regroup(jnp.arange(meta["batch"]) < meta["n_drop"]))
  loss_fn = lambda params: method.objective(velocity_fn(net, params), x, y, draws)
  (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
  yield "loss", loss, golden["loss"]
  yield "loss_u", metrics["error"], golden["loss_u"]
  yield "loss_v", metrics["velocity_error"], golden["loss_v"]
  yield from compare_trees("grad", grads, reference_grads)


def conditional(of: NetworkFn, z: Any, t: Any, y: Any, guidance: GuidanceScale) -> Any:
  """The head v with the scale that is in force, guidance holding everywhere."""
  scale = GuidanceScale.everywhere(guidance.in_force(t))
  return of(z, t, t, y, guidance=scale, heads=("v",))[0]
