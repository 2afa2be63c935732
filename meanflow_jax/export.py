"""A trained generator as a folder that a program without this package loads and runs, with jax."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, PyTree, UInt8

from meanflow_jax.arrays import Image, Label
from meanflow_jax.generate import ROUNDING, Generator
from meanflow_jax.methods.sampler import sample
from meanflow_jax.models.autoencoder import DECODING
from meanflow_jax.runtime.downloads import sha256
from meanflow_jax.train_step import sampling_params, velocity_fn

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PROGRAM, WEIGHTS = "generator.stablehlo", "weights.npz"
ROUNDED = {"meanflow": "floor(127.5 x + 128)", "adm": "floor(127.5 x + 127.5)"}

# Flat names such as "network/blocks/attention/qkv/kernel", "autoencoder/decoder/conv_in/bias".
Weights = dict[str, Array | np.ndarray]
# Pixels, where an autoencoder makes them of latents of another height, width and depth.
Bytes = UInt8[Array, "B h w c"]

README = """# A generator of images: noise and labels to pictures, in {steps}

It needs Python with `pip install {requirements}` and nothing else, with jax for one of {platforms}.
In this folder:

```python
import jax
import jax.export
import numpy as np

with open("{program}", "rb") as file:
  generate = jax.jit(jax.export.deserialize(bytearray(file.read())).call)
with np.load("{weights}") as file:
  weights = jax.device_put(dict(file))
noise = np.random.default_rng(0).standard_normal({noise}, np.float32)
labels = np.array({labels}, np.int32)
images = np.asarray(generate(weights, noise, labels))  # uint8 {images}
```

- noise: float32 [b, {noise_shape}], standard normal; any number of images b (jax compiles anew for
  each b).
- labels: int32 [b], {classes}.
- images: uint8 [b, {image_shape}], {rounded} of values in [-1, 1], cut off
  at 0 and 255.
- times of the steps: {grid}; guidance when sampling: {guidance}.
{facts}
`config.json` says all of this and how the model was trained. The program is StableHLO as
`jax.export` writes it: calling convention {version}, written by jax {jax}.
"""


def export_generator(
  folder: pathlib.Path,
  generator: Generator,
  params: PyTree,
  *,
  platforms: Sequence[str],
  record: dict[str, Any],
) -> None:
  """Writes program, weights, README.md and config.json; the folder appears whole or not at all.

  The program is a function of (weights, noise [b, H, W, C], labels [b]) that returns bytes
  [b, h, w, c] for any b: what `generator` makes, but for where noise and labels come from. Weights
  are an argument, because a program that holds them cannot be larger than 2 GB.

  Args:
    folder: must not exist.
    generator: how to sample; its mesh, seed and batch size do not matter.
    params: of its network.
    platforms: some of `PLATFORMS`, the ones that the program is for.
    record: where the model comes from (config, step, average, ...), all that JSON can say.

  Raises:
    ValueError: the folder exists, or a platform is unknown.
    FileNotFoundError: there is nothing that the folder could lie in.
  """
  _check(folder, platforms)
  weights = {name: np.asarray(leaf) for name, leaf in _weights(generator, params).items()}
  exported = _exported(generator, weights, platforms)
  with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
    partial = pathlib.Path(beside) / folder.name
    partial.mkdir()
    (partial / PROGRAM).write_bytes(exported.serialize())
    np.savez(partial / WEIGHTS, **weights)
    facts = _facts(generator, exported, partial) | {"record": record}
    (partial / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    (partial / "README.md").write_text(_readme(facts))
    os.rename(partial, folder)


def _check(folder: pathlib.Path, platforms: Sequence[str]) -> None:
  if folder.exists():
    raise ValueError(f"{folder} exists; it is left as it is: choose another name")
  if not folder.parent.is_dir():
    raise FileNotFoundError(f"there is no folder {folder.parent} for the export to lie in")
  unknown = sorted(set(platforms) - set(PLATFORMS))
  if unknown or not platforms:
    raise ValueError(f"platforms must be some of {PLATFORMS}, got {unknown or 'none'}")


def _weights(generator: Generator, params: PyTree) -> Weights:
  tree = {"network": sampling_params(generator.network, params)}
  if generator.decoder:
    tree["autoencoder"] = {name: generator.decoder.params[name] for name in DECODING}
  return traverse_util.flatten_dict(tree, sep="/")


def _exported(
  generator: Generator, weights: Weights, platforms: Sequence[str]
) -> jax.export.Exported:
  (batch,) = jax.export.symbolic_shape("b")
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights)
  noise = jax.ShapeDtypeStruct((batch, *generator.image_shape), jnp.float32)
  labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
  with _without_paths():
    export = jax.export.export(jax.jit(_program(generator)), platforms=tuple(platforms))
    return export(shapes, noise, labels)


def _program(generator: Generator) -> Callable[[Weights, Image, Label], Bytes]:
  # Constraints on the sharding of activations name devices that are here and not there.
  network = generator.network.clone(constrain=lambda x: x)

  def generate(weights: Weights, noise: Image, labels: Label) -> Bytes:
    tree = traverse_util.unflatten_dict(weights, sep="/")
    velocity = generator.guidance.guided(velocity_fn(network, tree["network"]))
    images = sample(generator.step, velocity, noise, labels, generator.grid)
    if generator.decoder:
      images = generator.decoder.replace(params=tree["autoencoder"])(images)
    return ROUNDING[generator.rounding](images).astype(jnp.uint8)

  return generate


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
  """Programs name the source files they come from: here without the folders, which are private."""
  name = "jax_hlo_source_file_canonicalization_regex"
  before = getattr(jax.config, name)
  jax.config.update(name, ".*/")
  try:
    yield
  finally:
    jax.config.update(name, before)


def _facts(
  generator: Generator, exported: jax.export.Exported, folder: pathlib.Path
) -> dict[str, Any]:
  """What a program that calls the generator wants to know."""
  guidance = generator.guidance
  return {
    "noise": list(generator.image_shape),
    "images": list(exported.out_avals[0].shape[1:]),
    "num_classes": generator.labels.num_classes,
    "null_label": generator.labels.num_classes or None,
    "grid": list(generator.grid),
    "guidance": {"omega": guidance.omega, "t_min": guidance.t_min, "t_max": guidance.t_max},
    "rounding": generator.rounding,
    "autoencoder": generator.decoder is not None,
    "platforms": list(exported.platforms),
    "calling_convention_version": exported.calling_convention_version,
    "jax": jax.__version__,
    "sha256": {name: sha256(folder / name) for name in (PROGRAM, WEIGHTS)},
  }


def _readme(facts: dict[str, Any]) -> str:
  examples, classes, nfe = 4, facts["num_classes"], len(facts["grid"]) - 1
  omega = facts["guidance"]["omega"]
  in_force = "t in [{t_min}, {t_max}]".format(**facts["guidance"])
  plain = {key: value for key, value in facts["record"].items() if not isinstance(value, dict)}
  return README.format(
    program=PROGRAM,
    weights=WEIGHTS,
    requirements="jax numpy flatbuffers",
    platforms=", ".join(facts["platforms"]),
    steps=f"{nfe} steps" if nfe > 1 else "one step",
    noise=(examples, *facts["noise"]),
    labels=[i % max(1, classes) for i in range(examples)],
    images=[examples, *facts["images"]],
    noise_shape=_listed(facts["noise"]),
    image_shape=_listed(facts["images"]),
    classes=f"0 to {classes - 1}; {facts['null_label']} is no class" if classes else "all 0",
    rounded=ROUNDED[facts["rounding"]],
    grid=_listed(facts["grid"]),
    guidance="none" if omega == 1 else f"omega {omega} for {in_force}",
    facts="".join(f"- {key}: {value}\n" for key, value in plain.items()),
    version=facts["calling_convention_version"],
    jax=facts["jax"],
  )


def _listed(values: Sequence[int | float]) -> str:
  return ", ".join(map(str, values))
