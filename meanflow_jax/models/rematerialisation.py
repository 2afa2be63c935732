"""What the backward pass of a stack of blocks recomputes, and what is kept for it."""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

REMAT = ("none", "matmuls", "blocks")

_MIXED = "mixed"  # what attention puts out


def name_mixed(x: Array) -> Array:
  """Marks what attention puts out, so that "matmuls" keeps it."""
  return checkpoint_name(x, _MIXED)


def rematerialised(block: type[nn.Module], remat: str, *, scan: bool) -> type[nn.Module]:
  """A block that keeps for the backward pass what `remat` says.

  Args:
    block: of a stack of layers.
    remat: what is recomputed: "none", "matmuls": all but products with weights and the output of
      attention (so that no attention scores are kept), "blocks": all but the block's input.
    scan: whether the stack is a loop, instead of unrolled.
  """
  if remat == "blocks":
    return nn.remat(block, prevent_cse=not scan)
  if remat == "matmuls":
    # Unrolled, XLA may undo this: it finds what to keep by itself. It cannot see through a scan.
    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(
      policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(_MIXED)
    )
    return nn.remat(block, prevent_cse=False, policy=policy)
  return block
