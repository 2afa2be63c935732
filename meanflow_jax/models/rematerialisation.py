"""The backward pass of a stack of blocks: what it recomputes, what is kept for it, its order."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.core import lift
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, PyTree

REMAT = ("none", "matmuls", "blocks")

_KEPT = "kept"
# Numbers for each of its input: qkv 3, mixed 1, projected 1, perceptron 4 + 1.
_KEPT_OF_A_BLOCK = 10


def kept(x: Array) -> Array:
  """Marks what "matmuls" keeps for the backward pass."""
  return checkpoint_name(x, _KEPT)


def kept_product(layer: nn.Dense) -> Callable[[Array], Array]:
  """A layer whose product with weights, bias included, "matmuls" keeps, in the layer's dtype.

  Kept before its bias, as by policies that ask for products, it would be stored beside the sum, and
  added up again.
  """
  return lambda x: kept(layer(x).astype(layer.dtype))


def rematerialised(block: type[nn.Module], remat: str, *, scan: bool) -> type[nn.Module]:
  """A block that keeps for the backward pass what `remat` says.

  Args:
    block: of a stack of layers.
    remat: what is recomputed: "none", "matmuls": all but what is `kept`, which are products with
      weights and the output of attention (so that no attention scores are), "blocks": all but the
      block's input.
    scan: whether the stack is a loop, instead of unrolled.
  """
  if remat == "blocks":
    return nn.remat(block, prevent_cse=not scan)
  if remat == "matmuls":
    # Unrolled, XLA may undo this: it finds what to keep by itself. It cannot see through a scan.
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    return nn.remat(block, prevent_cse=False, policy=policy)
  return block


def in_turn(block: type[nn.Module]) -> type[nn.Module]:
  """A block whose parameters' gradients are done before the backward pass of the one before it.

  XLA puts them off where layers are unrolled, and keeps until then what they are products of. Of
  few rows that is less than the gradients themselves, which XLA sums up in fewer passes if let.
  """

  def lifted(apply: Callable) -> Callable:
    def tied(
      inside: Callable, outside: Callable, params: PyTree, rngs: PyTree, x: Array, *args: Any
    ) -> tuple[Any, PyTree]:
      if _KEPT_OF_A_BLOCK * x.size > sum(p.size for p in jax.tree.leaves(params)):
        params, x = _tied((params, x))
      scope = inside(params, rngs)
      return apply(scope, x, *args), outside(scope)

    return lift.pack(tied, ("params",), ("params",), (True,), name="in_turn")

  return nn.transforms.lift_transform(lifted, block)


@jax.custom_jvp
def _tied(values: PyTree) -> PyTree:
  """Values whose gradients are all computed before any of them is used."""
  return values


def _tied_jvp(values: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
  # Parameters that do not move keep no tangent: behind a barrier XLA would not see their zeros.
  leaves, structure = jax.tree.flatten(tangents[0])
  moving = [i for i, leaf in enumerate(leaves) if not isinstance(leaf, SymbolicZero)]
  barred = jax.lax.optimization_barrier([leaves[i] for i in moving])
  for i, leaf in zip(moving, barred, strict=True):
    leaves[i] = leaf
  return values[0], jax.tree.unflatten(structure, leaves)


_tied.defjvp(_tied_jvp, symbolic_zeros=True)
