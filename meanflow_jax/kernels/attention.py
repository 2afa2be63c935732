"""Which attention runs: a fused kernel where there is one, or the plain form."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PyTree

from meanflow_jax.kernels import pallas_gpu, pallas_tpu, plain
from meanflow_jax.kernels.forward_mode import differentiable
from meanflow_jax.kernels.plain import Heads, Packed
from meanflow_jax.kernels.rotary import Scales

CHOICES = ("auto", "plain", "pallas")
KERNELS = {"tpu": pallas_tpu, "cuda": pallas_gpu}
Kernels = pallas_gpu.Kernels | pallas_tpu.Kernels


def platform_of(device: jax.Device) -> str:
  """What kernels know a device by: "tpu", "cuda" (NVIDIA GPUs since Ampere), or another name."""
  capability = str(getattr(device, "compute_capability", ""))
  if device.platform == "gpu" and capability[:1].isdigit() and float(capability) >= 8:
    return "cuda"
  return device.platform


def choose(
  name: str, platform: str, *, tokens: int, heads: int, size: int, dtype: str
) -> tuple[str, str | None]:
  """What runs where an attention is asked for by name.

  Args:
    name: "auto" (a kernel where one can run), "plain" or "pallas".
    platform: of the devices that it is compiled for, as `platform_of` has it.
    tokens, heads, size, dtype: of a sequence, and of its heads each.

  Returns:
    "plain" or "pallas", and why a kernel of this platform is passed over, if one is.

  Raises:
    ValueError: an unknown name, or a kernel asked for by name cannot run there.
  """
  if name not in CHOICES:
    raise ValueError(f"attention must be one of {CHOICES}, got {name!r}")
  if name == "plain" or (name == "auto" and platform not in KERNELS):
    return "plain", None
  reason = (
    KERNELS[platform].reason_against(tokens, heads, size, dtype)
    if platform in KERNELS
    else f"runs on TPUs, and on NVIDIA GPUs since Ampere, not on a {platform}"
  )
  if reason is None:
    return "pallas", None
  if name == "pallas":
    raise ValueError(f"attention 'pallas' {reason}; what can run there is 'plain' (or 'auto')")
  return "plain", f"attention is plain, since the fused kernel {reason}"


@dataclasses.dataclass(frozen=True)
class Fused:
  """Softmax attention without a mask, scores scaled by 1 / sqrt(D), by a fused kernel.

  The softmax is taken in float32. Has reverse mode, and inside `forward_mode.jvp` forward mode;
  `jax.jvp` alone raises a TypeError.

  Attributes:
    mesh: the devices over which the rows [B] are spread; None is one device.
    interpret: run the kernel in Python, on any platform.
    platform: of `KERNELS`: whose they are.
  """

  mesh: Mesh | None = None
  interpret: bool = False
  platform: str = "tpu"

  def __call__(self, q: Heads, k: Heads, v: Heads) -> Heads:
    """Mixes v."""
    batch, tokens, heads, size = q.shape
    arrays = (x.reshape(batch, tokens, heads * size) for x in (q, k, v))
    return self._apply(self._kernels(heads, packed=False), *arrays).reshape(q.shape)

  def packed(self, qkv: Packed, heads: int) -> Packed:
    """Mixes the last third of the columns, by the others: a projection as it comes.

    Args:
      qkv: [B, N, 3 K D].
      heads: K.

    Returns:
      [B, N, K D].
    """
    _, tokens, columns = qkv.shape
    size, takes_packed = columns // (3 * heads), KERNELS[self.platform].takes_packed
    if takes_packed(tokens, heads, size, str(qkv.dtype)):
      return self._apply(self._kernels(heads, packed=True), qkv)
    return self._apply(self._kernels(heads, packed=False), *jnp.split(qkv, 3, axis=-1))

  def turned(self, qkv: Packed, heads: int, scales: Scales) -> Packed:
    """The same, of queries and keys that are normalised and turned first, as `rotary` says.

    Where a kernel does that too, in the chip's own memory, nothing of it is written or kept.

    Args:
      qkv: [B, N, 3 K D].
      heads: K.
      scales: [B, 2, D].

    Returns:
      [B, N, K D].
    """
    batch, tokens, columns = qkv.shape
    size, takes_turned = columns // (3 * heads), KERNELS[self.platform].takes_turned
    if takes_turned(tokens, heads, size, str(qkv.dtype)):
      return self._apply(pallas_tpu.TurnedKernels(heads, True, self.interpret), qkv, scales)
    mixed = self(*plain.turned_heads(qkv, heads, scales))
    return mixed.reshape(batch, tokens, columns // 3)

  def _kernels(self, heads: int, *, packed: bool) -> Kernels:
    return KERNELS[self.platform].Kernels(heads, packed, self.interpret)

  def _apply(self, kernels: Kernels, *arrays: Array) -> Packed:
    if not arrays[0].size:  # a kernel has no grid of no rows
      return arrays[0][..., : kernels.width(arrays[0])]
    spread = functools.partial(self._on_rows, arrays[0].shape[0])
    function = differentiable(kernels.forward, kernels.backward, kernels.tangent, spread)
    return function(*arrays)

  def _on_rows(self, batch: int, kernel: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Lets each device take its rows: the partitioner cannot look into a kernel.

    Rows that do not divide among the devices (one row, to initialise) are computed by each. Inside
    a `shard_map` each device has its own already.
    """
    taken = jax.sharding.get_abstract_mesh().manual_axes
    if self.mesh is None or self.mesh.size == 1 or {*self.mesh.axis_names} <= {*taken}:
      return kernel
    rows = PartitionSpec() if batch % self.mesh.size else PartitionSpec(self.mesh.axis_names)
    return jax.shard_map(kernel, mesh=self.mesh, in_specs=rows, out_specs=rows, check_vma=False)


def attention(q: Heads, k: Heads, v: Heads, *, name: str = "auto") -> Heads:
  """Softmax attention without a mask, scores scaled by 1 / sqrt(D), on one device.

  Args:
    q, k, v: queries, keys and values.
    name: "auto" (a kernel where one can run), "plain" or "pallas".

  Raises:
    ValueError: an unknown name, or a kernel asked for by name cannot run here.
  """
  _, tokens, heads, size = q.shape
  here = platform_of(jax.devices()[0])
  chosen, _ = choose(name, here, tokens=tokens, heads=heads, size=size, dtype=str(q.dtype))
  return Fused(platform=here)(q, k, v) if chosen == "pallas" else plain.attention(q, k, v)
