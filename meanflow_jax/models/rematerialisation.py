"""The backward pass of a stack of blocks: what it recomputes, what is kept for it, its order."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.core import lift
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, PyTree

REMAT = ("none", "matmuls", "blocks")

_KEPT = "kept"


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
  """A block the gradients of whose parameters are computed before those of the block before it.

  XLA puts them off where layers are unrolled, and keeps until then what they are products of.
  """

  def lifted(block: Callable) -> Callable:
    def tied(
      inside: Callable, outside: Callable, params: PyTree, rngs: PyTree, x: Array, *args: Any
    ):
      params, x = _tied((params, x))
      scope = inside(params, rngs)
      return block(scope, x, *args), outside(scope)

    return lift.pack(tied, ("params",), ("params",), (True,), name="in_turn")

  return nn.transforms.lift_transform(lifted, block)


@jax.custom_jvp
def _tied(values: PyTree) -> PyTree:
  """Values whose gradients are all computed before any of them is used."""
  return values


@_tied.defjvp
def _tied_jvp(values: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
  return values[0], jax.lax.optimization_barrier(tangents[0])
