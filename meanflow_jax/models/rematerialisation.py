"""What the backward pass of a stack of blocks recomputes, and what is kept for it."""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

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
