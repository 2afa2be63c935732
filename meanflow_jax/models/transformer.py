"""What transformers share: their settings, patches with positions, stacks of blocks."""

from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from meanflow_jax.arrays import Image, Time
from meanflow_jax.models.embeddings import sincos_positions
from meanflow_jax.models.patches import split_patches
from meanflow_jax.models.rematerialisation import REMAT, in_turn, rematerialised

Tokens = Float[Array, "B N E"]

TIMES = ("t", "h", "r")
POSITIONS = ("none", "sincos", "learned")
DTYPES = ("float32", "bfloat16")


class PatchTransformer(nn.Module):
  """A transformer over the patches of images or latents.

  Parameters are float32; the parameters of blocks are stacked over layers, so that a checkpoint
  does not depend on `scan`.

  Attributes:
    STACKS: names of the parameters of stacks of blocks.
    patch_size: side of a patch, in pixels.
    width, depth, num_heads: of the transformer.
    num_classes: size of the label table without the null class; 0 takes no labels.
    conditioning: which of t, h = t - r and r the network is told.
    time_frequencies: sinusoids of a time's embedding.
    positions: what is added to patches: "none", "sincos" or "learned".
    dtype: the dtype of computation; embeddings of numbers, norms' statistics, rotations and softmax
      are float32.
    scan: compile one block and loop over it, instead of unrolling all.
    remat: what the backward pass recomputes: "none", "matmuls": all but products with weights and
      the output of a fused attention (so that no attention scores are kept), "blocks": all but the
      input of each block.
  """

  STACKS: ClassVar[tuple[str, ...]]

  patch_size: int
  width: int
  depth: int
  num_heads: int
  num_classes: int
  conditioning: tuple[str, ...]
  time_frequencies: int
  positions: str
  dtype: str
  scan: bool
  remat: str

  def __post_init__(self):
    for name, choices in (("positions", POSITIONS), ("dtype", DTYPES), ("remat", REMAT)):
      _check_choice(name, getattr(self, name), choices)
    for time in self.conditioning:
      _check_choice("conditioning", time, TIMES)
    if not self.conditioning or len(set(self.conditioning)) < len(self.conditioning):
      raise ValueError(
        f"model.conditioning must be some of {TIMES}, each once, got {self.conditioning}"
      )
    for name in ("patch_size", "width", "depth", "num_heads"):
      if getattr(self, name) < 1:
        raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
    if self.time_frequencies < 2 or self.time_frequencies % 2:
      raise ValueError(f"model.time_frequencies must be even, got {self.time_frequencies}")
    if self.positions == "sincos" and self.width % 4:
      raise ValueError(
        f"model.width {self.width} must be divisible by 4 where model.positions is 'sincos'"
      )
    super().__post_init__()

  @property
  def looped(self) -> tuple[str, ...]:
    """Names of the parameters that a loop over layers passes over."""
    return self.STACKS if self.scan else ()

  def _times(self, t: Time, h: Time) -> dict[str, Time]:
    """The times that the network is told, by their names."""
    times = {"t": t, "h": h, "r": t - h}
    return {name: times[name] for name in self.conditioning}

  def _embed_patches(self, z: Image) -> Tokens:
    """Linear patch embeddings plus positions.

    Raises:
      ValueError: if the image's sides are not divisible by the patch size.
    """
    init = nn.initializers.xavier_uniform()
    dense = nn.Dense(self.width, dtype=self.dtype, kernel_init=init, name="patch_embedder")
    x = dense(split_patches(z, self.patch_size))
    if self.positions == "none":
      return x
    rows, columns = (side // self.patch_size for side in z.shape[1:3])
    if self.positions == "learned":
      shape = (rows * columns, self.width)
      positions = self.param("positions", nn.initializers.normal(0.02), shape)
    else:
      positions = sincos_positions(rows, columns, self.width)
    return x + jnp.asarray(positions, self.dtype)[None]

  def _stack(self, block: type[nn.Module], depth: int) -> Callable[..., nn.Module]:
    """The class of `depth` blocks in a row; what blocks take besides tokens is the same for all."""
    block = rematerialised(block, self.remat, scan=self.scan)
    return nn.scan(
      block if self.scan else in_turn(block),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=depth,
      unroll=1 if self.scan else depth,
    )


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f"model.{key} must be one of {choices}, got {value!r}")
