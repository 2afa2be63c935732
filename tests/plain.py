"""Objectives with nothing saved, straight from the formulas: what ours must equal."""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from meanflow_jax.arrays import GuidanceScale, Image, Label, NetworkFn, Scalar, VelocityFn
from meanflow_jax.methods import improved_meanflow
from meanflow_jax.methods.improved_meanflow import ImprovedMeanFlow
from meanflow_jax.methods.meanflow import Draws, MeanFlow


def plain_objective(
  method: MeanFlow, velocity_fn: VelocityFn, x: Image, y: Label, draws: Draws
) -> tuple[Scalar, dict[str, Scalar]]:
  """The JVP on all rows, and all three velocities of guidance as passes of their own."""
  image = lambda a: jnp.reshape(a, (-1, 1, 1, 1))
  e, r, t, dropped = draws.noise, draws.r, draws.t, draws.dropped
  null = jnp.full_like(y, method.null_label)
  z = (1 - image(t)) * x + image(t) * e
  v = e - x

  guidance = method.guidance
  guided = (guidance.t_start <= t) & (t <= guidance.t_end) & ~dropped
  omega, kappa = image(jnp.where(guided, guidance.omega, 1)), jnp.where(guided, guidance.kappa, 0)
  v_c, v_u = velocity_fn(z, t, t, y), velocity_fn(z, t, t, null)
  v_g = stop_gradient(omega * v + image(kappa) * v_c + (1 - omega - image(kappa)) * v_u)

  u_of = lambda z, r, t: velocity_fn(z, r, t, jnp.where(dropped, null, y))
  u, du_dt = jax.jvp(u_of, (z, r, t), (v_g, jnp.zeros_like(r), jnp.ones_like(t)))
  squares = (u - stop_gradient(v_g - image(t - r) * du_dt)) ** 2
  error = jnp.sum(squares, axis=(1, 2, 3))
  loss = jnp.mean(error / stop_gradient(error + method.weight.c) ** method.weight.p)

  metrics = {"error": jnp.mean(squares)}
  if draws.rows.first:
    metrics["velocity_error"] = jnp.mean((u - v) ** 2, where=image(r == t))
  return loss, metrics


def plain_improved_objective(
  method: ImprovedMeanFlow,
  network_fn: NetworkFn,
  x: Image,
  y: Label,
  draws: improved_meanflow.Draws,
) -> tuple[Scalar, dict[str, Scalar]]:
  """The JVP on all rows, and both velocities of guidance as passes of their own."""
  image = lambda a: jnp.reshape(a, (-1, 1, 1, 1))
  e, r, t, guidance = draws.noise, draws.r, draws.t, draws.guidance
  null, ones = jnp.full_like(y, method.null_label), jnp.ones_like(t)
  v_t = e - x
  z = (1 - image(t)) * x + image(t) * e

  inside = (guidance.t_min <= t) & (t <= guidance.t_max)
  w = jnp.where(inside, guidance.omega, 1)
  v_of = lambda y, w: stop_gradient(
    network_fn(z, t, t, y, guidance=GuidanceScale(w, 0 * ones, ones), heads=("u", "v"))[1]
  )
  v_c, v_u = v_of(y, w), v_of(null, ones)
  v_g = jnp.where(image(draws.dropped), v_t, v_t + (1 - 1 / image(w)) * (v_c - v_u))

  y_in = jnp.where(draws.dropped, null, y)
  both = lambda z, r, t: network_fn(z, r, t, y_in, guidance=guidance, heads=("u", "v"))
  (u, v), (du_dt, _) = jax.jvp(both, (z, r, t), (v_c, 0 * ones, ones))
  squares = (u + image(t - r) * stop_gradient(du_dt) - v_g) ** 2, (v - v_g) ** 2
  errors = [jnp.sum(s, axis=(1, 2, 3)) for s in squares]
  weighted = [e / stop_gradient(e + method.weight.c) ** method.weight.p for e in errors]
  metrics = {"error": jnp.mean(squares[0]), "velocity_error": jnp.mean(squares[1])}
  return jnp.mean(weighted[0] + weighted[1]), metrics
