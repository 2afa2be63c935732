"""Forward-mode derivatives of what is also differentiated in reverse.

Reverse mode linearises a function first and runs that backwards. Here the forward derivative is
passed through the linearisation, so that the backward pass knows nothing of it: no part of the
derivative is kept for it or computed again, and a kernel needs no rule for both at once.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import JaxprEqn, Primitive
from jax.interpreters import ad, batching, mlir, partial_eval
from jaxtyping import Array, PyTree


def jvp(
  f: Callable[..., PyTree], primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[PyTree, PyTree]:
  """`jax.jvp` of a function that calls attention.

  The value has reverse mode, with respect to the primals and to all that `f` closes over. The
  derivative has none: it is meant for targets, behind a `stop_gradient` right where it is taken, as
  in MeanFlow and continuous-time consistency models.

  Args:
    f: any function of arrays that has reverse mode.
    primals: its arguments.
    tangents: the direction, of the primals' shapes and dtypes.

  Returns:
    f(*primals), and its derivative along the tangents.

  Raises:
    TypeError: primals and tangents of different structures.
    NotImplementedError: later, if a gradient is taken through the derivative.
  """
  if jax.tree.structure(primals) != jax.tree.structure(tangents):
    raise TypeError(
      f"primals and tangents must have one structure, got {jax.tree.structure(primals)} and "
      f"{jax.tree.structure(tangents)}"
    )
  f, arguments = _of_arrays(f, *primals)

  @jax.custom_jvp
  def both(arguments: list[Array], along: list[Array]) -> tuple[PyTree, PyTree]:
    return _linearised(f, arguments, along, range(len(arguments)))[0]

  def rule(primals: tuple, moves: tuple) -> tuple:
    moves, others = ({i: d for i, d in enumerate(ds) if not _is_zero(d)} for ds in moves)
    (value, slope), change = _linearised(f, *primals, moves or range(len(primals[0])))
    change_of_value = change(moves) if moves else jax.tree.map(jnp.zeros_like, value)
    every = [*moves.values(), *others.values()]
    change_of_slope = jax.tree.map(lambda x: _refused.bind(*every, like=jax.typeof(x)), slope)
    return (value, slope), (change_of_value, change_of_slope)

  both.defjvp(rule, symbolic_zeros=True)
  return both(arguments, jax.tree.leaves(tangents))


def _of_arrays(
  f: Callable[..., PyTree], *args: PyTree
) -> tuple[Callable[..., PyTree], list[Array]]:
  """A function of the arrays in its arguments and of all that it closes over, and those arrays.

  `jax.closure_convert` leaves integers inside, which are of no use once a branch or loop around
  them has been traced.
  """
  jaxpr, shape = jax.make_jaxpr(f, return_shape=True)(*args)
  given = jax.tree.leaves(args)
  count = len(given)

  def function(*arrays: Array) -> PyTree:
    values = jax.core.eval_jaxpr(jaxpr.jaxpr, arrays[count:], *arrays[:count])
    return jax.tree.unflatten(jax.tree.structure(shape), values)

  return function, [*given, *map(jnp.asarray, jaxpr.consts)]


def _linearised(
  f: Callable[..., PyTree], arguments: list[Array], along: list[Array], moving: Iterable[int]
) -> tuple[tuple[PyTree, PyTree], Callable[[dict[int, Array]], PyTree]]:
  """Value and derivative of a function, and how the value changes where other arguments move.

  Args:
    f: of arrays.
    arguments: its arguments.
    along: directions of the first of them, of the derivative.
    moving: numbers of those arguments of whose directions the change is a linear function.
  """

  def linearised(*first: Array) -> tuple[PyTree, Callable]:
    at = dict(enumerate([*first, *arguments[len(first) :]]))
    of_moving = lambda changed: f(*(at | changed).values())
    return jax.linearize(of_moving, {i: at[i] for i in moving})

  value, slope, change = jax.jvp(linearised, arguments[: len(along)], along, has_aux=True)
  return (value, slope), change


def _is_zero(direction: Array | SymbolicZero) -> bool:
  return isinstance(direction, SymbolicZero)


def differentiable(
  forward: Callable[..., Array],
  backward: Callable[..., tuple[Array, ...]],
  tangent: Callable[..., tuple[Array, Array]],
  spread: Callable[[Callable], Callable] = lambda kernel: kernel,
) -> Callable[..., Array]:
  """A function from three kernels: it has reverse mode, and inside `jvp` forward mode too.

  Of a derivative that nothing is made of, a jitted function computes nothing.

  Args:
    forward: the value of some arguments.
    backward: the arguments' gradients, from the arguments and the value's gradient.
    tangent: value and derivative, from the arguments and their tangents.
    spread: lets each of several devices take its part of the arguments.
  """
  value = spread(functools.partial(_value.bind, forward=forward, tangent=tangent))
  backward = spread(_once(backward))
  function = jax.custom_vjp(lambda *args: value(*args))
  function.defvjp(lambda *args: (value(*args), args), lambda args, g: backward(*args, g))
  return function


def _once(kernel: Callable[..., PyTree]) -> Callable[..., PyTree]:
  """A kernel of a derivative, which says that it has none itself."""
  refusing = jax.custom_jvp(lambda *args: kernel(*args))
  refusing.defjvp(_refuse_second)
  return refusing


def _refuse_second(*_: object, **__: object) -> NoReturn:
  raise NotImplementedError(
    "a second derivative is taken of a fused attention, which has first ones only: use plain "
    "attention there"
  )


def _shape(*args: jax.core.ShapedArray, forward: Callable, tangent: Callable) -> Any:
  value = jax.eval_shape(forward, *args)
  return jax.core.ShapedArray(value.shape, value.dtype)


def _forward(*args: Array, forward: Callable, tangent: Callable) -> Array:
  return forward(*args)


def _both(args: tuple, along: tuple, **kernels: Callable) -> tuple:
  return tuple(_pair.bind(*args, *map(ad.instantiate_zeros, along), **kernels))


def _shapes(*args: jax.core.ShapedArray, forward: Callable, tangent: Callable) -> list:
  return [_shape(*args[: len(args) // 2], forward=forward, tangent=tangent)] * 2


def _tangent(*args: Array, forward: Callable, tangent: Callable) -> tuple[Array, Array]:
  return tangent(*args)


def _without_tangent(used: list[bool], *rest: Any) -> tuple[list[bool], JaxprEqn | None]:
  """What is left of both where not both are used: the tangent's arguments are not needed then."""
  eqn = rest[-1]  # jax 0.12 says before it which arguments are references that are still read
  count = len(eqn.invars) // 2
  if not any(used):
    return [False] * 2 * count, None
  if used[1]:
    return [True] * 2 * count, eqn
  alone = eqn.replace(primitive=_value, invars=eqn.invars[:count], outvars=eqn.outvars[:1])
  return [True] * count + [False] * count, alone


def _batched(args: tuple, axes: tuple, *, forward: Callable, tangent: Callable) -> tuple:
  return jax.vmap(forward, in_axes=axes)(*args), 0


def _batched_pair(args: tuple, axes: tuple, *, forward: Callable, tangent: Callable) -> tuple:
  return jax.vmap(tangent, in_axes=axes)(*args), (0, 0)


def _refuse_gradient(*_: object, **__: object) -> NoReturn:
  raise NotImplementedError(
    "a derivative is taken of a forward-mode derivative (the second value of "
    "kernels.forward_mode.jvp), which has none: put jax.lax.stop_gradient around it, or take "
    "jax.jvp of a network with plain attention"
  )


# How the derivative changes: of no use to anyone who stops it.
_refused = Primitive("change_of_derivative")
_refused.def_impl(_refuse_gradient)
_refused.def_abstract_eval(lambda *_, like: like)
ad.primitive_transposes[_refused] = _refuse_gradient
batching.primitive_batchers[_refused] = _refuse_gradient
mlir.register_lowering(_refused, _refuse_gradient)

# A `custom_jvp` would not do: linearising a scan or a rematerialised block drops its rule.
_value = Primitive("value_with_tangent")
_value.def_impl(_forward)
_value.def_abstract_eval(_shape)
ad.primitive_jvps[_value] = _both
batching.primitive_batchers[_value] = _batched
mlir.register_lowering(_value, mlir.lower_fun(_forward, multiple_results=False))

# Both, as one kernel computes them. It stays whole until all is known that is used of it: a network
# of several heads may be asked for the derivative of one.
_pair = Primitive("value_and_tangent")
_pair.multiple_results = True
_pair.def_impl(_tangent)
_pair.def_abstract_eval(_shapes)
ad.primitive_jvps[_pair] = _refuse_second
batching.primitive_batchers[_pair] = _batched_pair
mlir.register_lowering(_pair, mlir.lower_fun(_tangent, multiple_results=True))
partial_eval.dce_rules[_pair] = _without_tangent
