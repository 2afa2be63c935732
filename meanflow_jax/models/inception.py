"""FID's InceptionV3: the classifier whose features images are compared by.

The architecture is that of arXiv 1512.00567 as TensorFlow's graph of 2015-12-05 has it, which
arXiv 1706.08500 measures with; it differs from the published classifier in its pools. Weights come
from `pt_inception-2015-12-05-6726825d.pth`, the port to PyTorch (github.com/mseitzer/pytorch-fid).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

SIDE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7
BATCH_NORM_EPSILON = 1e-3
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")

Pixels = Num[Array, "B H W 3"]  # the values of 8-bit images, 0 to 255, whatever their dtype
Inputs = Float[Array, "B 299 299 3"]
Maps = Float[Array, "B _ _ _"]  # NHWC
Params = dict[str, dict[str, Float[np.ndarray, "..."]]]


@no_type_check  # what jax.tree.map puts in an array's place is no array
class Features(flax.struct.PyTreeNode):
  """What the network says of a batch of images.

  Attributes:
    pool3: the features of FID.
    spatial: the features of sFID, the first 7 channels of `Mixed_6d.branch1x1` after its ReLU.
    logits: of 1008 classes, for the inception score.
    logits_without_bias: without the last layer's bias, as ADM and improved MeanFlow score.
  """

  pool3: Float[Array, "B 2048"]
  spatial: Float[Array, "B 17 17 7"]
  logits: Float[Array, "B 1008"]
  logits_without_bias: Float[Array, "B 1008"]


# The architecture: a network is a sequence of steps, a block is parallel sequences.


class Conv(NamedTuple):
  """A convolution and its ReLU; the name is that of the weights."""

  name: str
  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"


class Pool(NamedTuple):
  """A 3 x 3 pool; an average leaves out what lies beyond the border."""

  kind: str
  stride: int = 1
  padding: str = "SAME"


class Block(NamedTuple):
  """Branches that start from the same input, and whose outputs are concatenated."""

  name: str
  branches: tuple[tuple["Conv | Pool | Block", ...], ...]


Step = Conv | Pool | Block
Padding = str | tuple[tuple[int, int], ...]


def _chain(prefix: str, *layers: tuple[int, tuple[int, int]]) -> tuple[Conv, ...]:
  """Convolutions in sequence, of given features and kernels, numbered from 1."""
  return tuple(Conv(f"{prefix}_{i}", *layer) for i, layer in enumerate(layers, 1))


def _halving(conv: Conv) -> Conv:
  return conv._replace(stride=2, padding="VALID")


def _fork(prefix: str) -> Block:
  """The last, widest layer of `Mixed_7b` and `Mixed_7c`: a row and a column, side by side."""
  return Block("", ((Conv(f"{prefix}a", 384, (1, 3)),), (Conv(f"{prefix}b", 384, (3, 1)),)))


def _mixed_5(name: str, pool_features: int) -> Block:
  return Block(
    name,
    (
      (Conv("branch1x1", 64),),
      _chain("branch5x5", (48, (1, 1)), (64, (5, 5))),
      _chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
      (Pool("average"), Conv("branch_pool", pool_features)),
    ),
  )


def _mixed_6(name: str, width: int) -> Block:
  row, column = (1, 7), (7, 1)
  return Block(
    name,
    (
      (Conv("branch1x1", 192),),
      _chain("branch7x7", (width, (1, 1)), (width, row), (192, column)),
      _chain(
        "branch7x7dbl",
        *((width, (1, 1)), (width, column), (width, row), (width, column), (192, row)),
      ),
      (Pool("average"), Conv("branch_pool", 192)),
    ),
  )


def _mixed_7(name: str, pool: str) -> Block:
  return Block(
    name,
    (
      (Conv("branch1x1", 320),),
      (Conv("branch3x3_1", 384), _fork("branch3x3_2")),
      (*_chain("branch3x3dbl", (448, (1, 1)), (384, (3, 3))), _fork("branch3x3dbl_3")),
      (Pool(pool), Conv("branch_pool", 192)),
    ),
  )


def _shrinking(name: str, *branches: tuple[Conv, ...]) -> Block:
  """A block whose branches all end by halving the sides, beside a pool that does."""
  halving = tuple((*branch[:-1], _halving(branch[-1])) for branch in branches)
  return Block(name, (*halving, (Pool("max", 2, "VALID"),)))


NETWORK: tuple[Step, ...] = (
  Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
  Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
  Conv("Conv2d_2b_3x3", 64, (3, 3)),
  Pool("max", 2, "VALID"),
  Conv("Conv2d_3b_1x1", 80),
  Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
  Pool("max", 2, "VALID"),
  _mixed_5("Mixed_5b", 32),
  _mixed_5("Mixed_5c", 64),
  _mixed_5("Mixed_5d", 64),
  _shrinking(
    "Mixed_6a",
    (Conv("branch3x3", 384, (3, 3)),),
    _chain("branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
  ),
  _mixed_6("Mixed_6b", 128),
  _mixed_6("Mixed_6c", 160),
  _mixed_6("Mixed_6d", 160),
  _mixed_6("Mixed_6e", 192),
  _shrinking(
    "Mixed_7a",
    _chain("branch3x3", (192, (1, 1)), (320, (3, 3))),
    _chain("branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3))),
  ),
  _mixed_7("Mixed_7b", "average"),
  _mixed_7("Mixed_7c", "max"),
)


# Layers. On a CPU XLA (of jax 0.10) is slow at some, and there they are computed in other ways.


def max_pool(x: Maps, stride: int, padding: str) -> Maps:
  """The maximum of 3 x 3 pixels; where the stride is not 1, of "VALID" windows."""

  def shifted(x: Maps) -> Maps:
    x = _padded(x, -jnp.inf) if padding == "SAME" else x
    for axis in (1, 2):
      x = functools.reduce(jnp.maximum, _shifted(x, axis, stride))
    return x

  pool = functools.partial(
    nn.max_pool, window_shape=(3, 3), strides=(stride, stride), padding=padding
  )
  return jax.lax.platform_dependent(x, cpu=shifted, default=pool)


def average_pool(x: Maps) -> Maps:
  """The mean of the 3 x 3 pixels around each; at the border, of those that there are."""

  def shifted(x: Maps) -> Maps:
    rows, columns = (3 - sum(np.arange(n) == end for end in (0, n - 1)) for n in x.shape[1:3])
    share = jnp.asarray(1 / np.outer(rows, columns)[None, :, :, None], x.dtype)
    x = _padded(x, 0.0)
    for axis in (1, 2):
      x = functools.reduce(jnp.add, _shifted(x, axis, 1))
    return x * share

  pool = functools.partial(
    nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
  )
  return jax.lax.platform_dependent(x, cpu=shifted, default=pool)


def _padded(x: Maps, value: float) -> Maps:
  return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)


def _shifted(x: Maps, axis: int, stride: int) -> list[Maps]:
  """The first, the second and the third pixels along an axis, of all windows of three."""
  span = (x.shape[axis] - 3) // stride * stride + 1
  return [jax.lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(3)]


def convolution(
  x: Maps, kernel: Float[Array, "H W I O"], strides: Sequence[int], padding: str, **settings: Any
) -> Maps:
  """`jax.lax.conv_general_dilated`; on a CPU a matrix product, or with a surplus row.

  There most convolutions take 1.3 to 6 times as long if their result is not cut. So they get a row
  of zeros more, and what comes of it is dropped.
  """

  def plain(x: Maps, kernel: Array, padding: Padding = padding) -> Maps:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)

  def on_cpu(x: Maps, kernel: Array) -> Maps:
    if kernel.shape[:2] == tuple(strides) == (1, 1):
      return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])
    (top, bottom), sides = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    height = (x.shape[1] + top + bottom - kernel.shape[0]) // strides[0] + 1
    return plain(x, kernel, ((top, bottom + strides[0]), sides))[:, :height]

  return jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)


class Inception(nn.Module):
  """The network for inference: batch norms are part of the convolutions (`params_from_torch`).

  The outputs of the blocks are among its intermediates, by their names.
  """

  @nn.compact
  def __call__(self, images: Inputs) -> Features:
    """The features of images prepared by one of the `CONVENTIONS`."""
    x, blocks = images, {}
    for step in NETWORK:
      x = self._apply(step, x)
      if isinstance(step, Block):
        blocks[step.name] = x
        self.sow("intermediates", step.name, x)
    pool3 = x.mean((1, 2))
    fc = nn.Dense(CLASSES, name="fc")
    logits = fc(pool3)
    return Features(
      pool3=pool3,
      spatial=blocks["Mixed_6d"][..., :SPATIAL_CHANNELS],  # branch1x1 is the first
      logits=logits,
      logits_without_bias=logits - fc.variables["params"]["bias"][None],
    )

  def _apply(self, step: Step, x: Maps, prefix: str = "") -> Maps:
    """Applies a step; the names of weights start with those of the blocks around them."""
    match step:
      case Conv(name, features, kernel, stride, padding):
        conv = nn.Conv(
          features, kernel, stride, padding, name=prefix + name, conv_general_dilated=convolution
        )
        return nn.relu(conv(x))
      case Pool("max", stride, padding):
        return max_pool(x, stride, padding)
      case Pool():
        return average_pool(x)
      case Block(name, branches):
        prefix += name and f"{name}."
        outputs = [self._apply_all(branch, x, prefix) for branch in branches]
        return jnp.concatenate(outputs, axis=-1)

  def _apply_all(self, steps: tuple[Step, ...], x: Maps, prefix: str) -> Maps:
    for step in steps:
      x = self._apply(step, x, prefix)
    return x


# Published weights.


def params_from_torch(tensors: Mapping[str, np.ndarray]) -> Params:
  """Our parameters from the tensors of the published file, by their names there.

  A batch norm in inference is affine, so it is folded into the convolution before it.

  Raises:
    ValueError: a tensor is missing, unknown or of another shape; lists the names.
  """
  layers = _layer_shapes()
  _check_tensors(tensors, layers)
  params = {name: _folded(tensors, name) for name in layers if name != "fc"}
  params["fc"] = {"kernel": tensors["fc.weight"].T, "bias": tensors["fc.bias"]}
  return jax.tree.map(lambda a: np.ascontiguousarray(a, np.float32), params)


def _layer_shapes() -> dict[str, tuple[int, ...]]:
  """The shapes of the layers' kernels."""
  images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  shapes = jax.eval_shape(Inception().init, jax.random.key(0), images)["params"]
  return {name: leaves["kernel"].shape for name, leaves in shapes.items()}


def _folded(tensors: Mapping[str, np.ndarray], layer: str) -> dict[str, np.ndarray]:
  """Kernel and bias of a convolution and the batch norm after it, in double precision."""
  double = lambda name: np.asarray(tensors[f"{layer}.{name}"], np.float64)
  gain, offset, mean, variance = (double(f"bn.{leaf}") for leaf in BATCH_NORM)
  scale = gain / np.sqrt(variance + BATCH_NORM_EPSILON)
  kernel = double("conv.weight").transpose(2, 3, 1, 0)  # OIHW to HWIO
  return {"kernel": kernel * scale, "bias": offset - mean * scale}


def _check_tensors(
  tensors: Mapping[str, np.ndarray], layers: Mapping[str, tuple[int, ...]]
) -> None:
  expected: dict[str, tuple[int, ...]] = {"fc.weight": layers["fc"][::-1], "fc.bias": (CLASSES,)}
  counters = set()  # PyTorch keeps one beside the running statistics, of no use here
  for name, (*kernel, inputs, outputs) in ((n, s) for n, s in layers.items() if n != "fc"):
    expected[f"{name}.conv.weight"] = (outputs, inputs, *kernel)
    expected.update({f"{name}.bn.{leaf}": (outputs,) for leaf in BATCH_NORM})
    counters.add(f"{name}.bn.num_batches_tracked")
  misshapen = (
    f"{name} {tensors[name].shape} instead of {shape}"
    for name, shape in expected.items()
    if name in tensors and tensors[name].shape != shape
  )
  faults = {
    "missing": sorted(expected.keys() - tensors.keys()),
    "unknown": sorted(tensors.keys() - expected.keys() - counters),
    "of another shape": sorted(misshapen),
  }
  found = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
  if found:
    raise ValueError(f"these are not the weights of FID's InceptionV3; {found}")


# Conventions: from an image to the network's input. Figures under one cannot be compared with
# figures under another.


def pytorch_inputs(images: Pixels) -> Inputs:
  """pytorch-fid's: bilinear with half-pixel centres, no antialiasing, then 2 x / 255 - 1."""
  return _resize(images, half_pixel=True) / 127.5 - 1


def tensorflow_inputs(images: Pixels) -> Inputs:
  """The original graph's, and ADM's (arXiv 2105.05233): TensorFlow 1's resize, (x - 128) / 128.

  That resize reads the source at destination * scale: nothing is centred.
  """
  return (_resize(images, half_pixel=False) - 128) / 128


def meanflow_inputs(images: Pixels) -> Inputs:
  """MeanFlow's reference implementation's: half-pixel centres, yet (x - 128) / 128.

  It means to resize as TensorFlow 1, by shifting a grid by half a pixel, but its copy of that
  code discards the shift (github.com/Gsunshine/meanflow, utils/jax_fid/resize.py).
  """
  return (_resize(images, half_pixel=True) - 128) / 128


CONVENTIONS: dict[str, Callable[[Pixels], Inputs]] = {
  "pytorch": pytorch_inputs,
  "tensorflow": tensorflow_inputs,
  "meanflow": meanflow_inputs,
}


def _resize(images: Pixels, *, half_pixel: bool) -> Inputs:
  """Bilinear interpolation as two matrix products, for accelerators are slow at gathering."""
  rows, columns = (jnp.asarray(_interpolation(n, half_pixel)) for n in images.shape[1:3])
  exact = jax.lax.Precision.HIGHEST  # else accelerators round pixels to bfloat16
  images = jnp.einsum("oh,bhwc->bowc", rows, images.astype(jnp.float32), precision=exact)
  return jnp.einsum("ow,bhwc->bhoc", columns, images, precision=exact)


def _interpolation(size: int, half_pixel: bool) -> Float[np.ndarray, "299 S"]:
  """Weights of the source's pixels, for each pixel of a row; the border repeats outwards."""
  centre = 0.5 if half_pixel else 0.0
  source = np.clip((np.arange(SIDE) + centre) * (size / SIDE) - centre, 0, size - 1)
  distance = np.abs(source[:, None] - np.arange(size)[None])
  return np.maximum(1 - distance, 0).astype(np.float32)
