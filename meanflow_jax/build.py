"""From the sections of a config to the objects of a run; nothing below sees a config."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from meanflow_jax import features, networks
from meanflow_jax.data import augment, sources
from meanflow_jax.data.augment import Augmentation
from meanflow_jax.data.latents import Latents
from meanflow_jax.data.sources import Source
from meanflow_jax.features import Extractor
from meanflow_jax.generate import Decoder, Generator, Labels
from meanflow_jax.guard import Guard
from meanflow_jax.methods import registry
from meanflow_jax.methods.guidance import Guidance, LabelDropout
from meanflow_jax.methods.meanflow import AdaptiveWeight
from meanflow_jax.methods.method import Method
from meanflow_jax.methods.sampler import time_grid
from meanflow_jax.methods.time_sampling import LogitNormal, TimePairs, Uniform
from meanflow_jax.models import autoencoder
from meanflow_jax.models.autoencoder import Autoencoder
from meanflow_jax.runtime import pretrained
from meanflow_jax.runtime.checkpoints import CheckpointError
from meanflow_jax.runtime.mesh import (
  make_mesh,
  replicate,
  rows_sharding,
)
from meanflow_jax.runtime.pretrained import Origin
from meanflow_jax.train_step import (
  AugmentedInputs,
  Averages,
  Inputs,
  TrainStep,
  latent_inputs,
  make_optimizer,
  pixel_inputs,
)


class UserError(Exception):
  """A mistake in a config, a command or the data, worded for the user."""


@contextlib.contextmanager
def explaining_mistakes() -> Iterator[None]:
  """Turns what constructors refuse into a message for the user, without a traceback."""
  try:
    yield
  except (ValueError, OSError, ModuleNotFoundError, CheckpointError) as error:
    mistake = UserError(str(error))
    for note in getattr(error, "__notes__", ()):
      mistake.add_note(note)
    raise mistake from error


def mesh(config: ConfigDict) -> Mesh:
  """The devices of `config.mesh`."""
  return make_mesh(**config.mesh)


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
  """Height, width and channels of what the model sees."""
  return config.data.image_size, config.data.image_size, config.data.channels


def source(config: ConfigDict) -> Source:
  """The examples of `config.data`.

  Raises:
    ValueError: an unknown source, or images or classes other than the config says.
  """
  data = config.data
  if data.threads < 0 or data.prefetch < 1 or config.seed < 0:
    raise ValueError(
      "seed and data.threads must be 0 or more and data.prefetch at least 1, "
      f"got {config.seed}, {data.threads} and {data.prefetch}"
    )
  size = {"image_size": data.image_size, "channels": data.channels}
  make = {
    "digits": lambda: sources.Digits(**data.digits),
    "folder": lambda: sources.Folder(**data.folder, **size),
    "tfds": lambda: sources.Tfds(**data.tfds, **size),
    "latents": lambda: _latents(config),
    "synthetic": lambda: sources.Synthetic(
      **data.synthetic, **size, num_classes=max(1, data.num_classes), seed=config.seed
    ),
  }
  if data.source not in make:
    raise ValueError(f"data.source must be one of {sorted(make)}, got {data.source!r}")
  made = make[data.source]()
  _check_source(made, config)
  return made


def _latents(config: ConfigDict) -> Latents:
  """What meanflow_jax.prepare made, of the kind and by the autoencoder that the config names."""
  data, weights = config.data, config.autoencoder.path
  if not data.latents.path:
    raise ValueError("data.latents.path is empty: name a folder that meanflow_jax.prepare made")
  made = Latents(**data.latents)
  recipe, kind = made.manifest.recipe, "latents" if weights else "pixels"
  if recipe.kind != kind:
    raise ValueError(
      f"{data.latents.path} holds {recipe.kind}, and autoencoder.path {weights!r} asks for {kind}: "
      "it names the weights for a model of latents, and is empty for one of pixels"
    )
  if kind == "latents":
    _check_autoencoder(made, pathlib.Path(weights).expanduser() / pretrained.AUTOENCODER.weights)
  if data.flip and not made.has_mirrored:
    raise ValueError(
      f"data.flip takes the latents of mirrored images, and {data.latents.path} was prepared "
      "without (prepare.flipped)"
    )
  return made


def _check_autoencoder(made: Latents, weights: pathlib.Path) -> None:
  recipe = made.manifest.recipe
  if weights.is_file() and (ours := pretrained.origin(weights)).sha256 != recipe.autoencoder_sha256:
    raise ValueError(
      f"the latents were made by {recipe.autoencoder} (sha256 {recipe.autoencoder_sha256}), but "
      f"{weights} is {ours}"
    )
  if recipe.scale_factor != autoencoder.SCALE_FACTOR:
    raise ValueError(
      f"the latents' scale factor is {recipe.scale_factor}, ours {autoencoder.SCALE_FACTOR}"
    )


def reads_moments(config: ConfigDict) -> bool:
  """Whether a batch holds mean and standard deviation of latents, to be drawn at each step."""
  return config.data.source == "latents" and bool(config.autoencoder.path)


def stored_shape(config: ConfigDict) -> tuple[int, int, int]:
  """Height, width and channels of an image in a batch."""
  height, width, channels = image_shape(config)
  return height, width, channels * (2 if reads_moments(config) else 1)


def _check_source(made: Source, config: ConfigDict) -> None:
  classes, shape = config.data.num_classes, made[0]["image"].shape
  if shape != stored_shape(config):
    raise ValueError(
      f"the images of {config.data.source!r} are {shape}, but data.image_size and data.channels "
      f"say {stored_shape(config)}"
    )
  if classes not in (0, made.num_classes):
    raise ValueError(
      f"{config.data.source!r} has {made.num_classes} classes, but data.num_classes is {classes}: "
      f"set --config.data.num_classes={made.num_classes}, or 0 to ignore labels"
    )


def network(config: ConfigDict, mesh: Mesh) -> nn.Module:
  """The network of `config.model`.

  Raises:
    ValueError: an unknown network; sizes that do not fit the image, each other or the mesh; an
      augmentation that it cannot be told of.
  """
  return networks.make(config, mesh, told=augment.LABELS if augmentation(config) else 0)


def augmentation(config: ConfigDict) -> Augmentation | None:
  """The augmentation of `config.augmentation`, unless it is off.

  Raises:
    ValueError: an impossible setting, or images that are latents.
  """
  made = Augmentation(**config.augmentation)
  if made.is_on and config.autoencoder.path:
    raise ValueError(
      "augmentation is of pixels, and the model is one of latents (autoencoder.path): set "
      "augmentation.probability to 0 and augmentation.flip to False"
    )
  return made if made.is_on else None


def inputs(config: ConfigDict) -> Inputs:
  """What the model sees of a batch.

  Raises:
    ValueError: an impossible augmentation.
  """
  if changes := augmentation(config):
    return AugmentedInputs(changes)
  return latent_inputs if reads_moments(config) else pixel_inputs


def method(config: ConfigDict) -> Method:
  """The method of `config.method`.

  Raises:
    ValueError: an impossible setting, guidance for a model that has no classes, or never drops its
      labels, or a network that does not fit.
  """
  settings = config.method
  kind = registry.find(settings.name)
  sections = {
    "times": lambda: _times(**settings.times),
    "guidance": lambda: Guidance(**settings.guidance),
    "label_dropout": lambda: LabelDropout(**settings.label_dropout),
    "weight": lambda: AdaptiveWeight(**settings.weight),
    "null_label": lambda: config.data.num_classes,
  }
  fields = registry.fields(kind)
  own = settings.to_dict().get(settings.name, {})
  made = kind(**{name: make() for name, make in sections.items() if name in fields}, **own)
  _check_network(config, kind)
  dropped = _dropped(config)
  if not config.data.num_classes and (made.is_guided or dropped):
    raise ValueError(
      "an unconditional model (data.num_classes = 0) takes no guidance and drops no labels: set "
      "method.label_dropout.rate to 0 and guidance off (method.guidance.omega 1 and kappa 0, or "
      "method.improved_meanflow.omega_max 1)"
    )
  if made.needs_unconditional and not dropped:
    raise ValueError(
      "guidance takes the velocity without a class, which only rows with a dropped label teach: "
      "set method.label_dropout.rate above 0 (0.1 is usual)"
    )
  return made


def _dropped(config: ConfigDict) -> float:
  """The share of rows that drop their label."""
  fields = registry.fields(registry.find(config.method.name))
  return config.method.label_dropout.rate if "label_dropout" in fields else 0.0


def _check_network(config: ConfigDict, kind: type[Method]) -> None:
  heads = networks.heads(networks.kind(config))
  if heads == kind.HEADS:
    return
  pairs = [
    f"{method} with {' or '.join(fitting)}"
    for method, made in registry.known().items()
    if (
      fitting := [name for name, net in networks.KINDS.items() if networks.heads(net) == made.HEADS]
    )
  ]
  raise ValueError(
    f"method.name {config.method.name!r} does not fit model.name {config.model.name!r}: the first "
    f"trains the heads {kind.HEADS}, the second has {heads}. What fits: "
    f"{'; '.join(pairs)}"
  )


def _times(
  *,
  distribution: str,
  mean: float,
  std: float,
  r_mean: float,
  r_std: float,
  pairing: str,
  equal_fraction: float,
) -> TimePairs:
  samplers = {
    "logit_normal": lambda: (LogitNormal(mean, std), LogitNormal(r_mean, r_std)),
    "uniform": lambda: (Uniform(), Uniform()),
  }
  if distribution not in samplers:
    raise ValueError(
      f"method.times.distribution must be one of {sorted(samplers)}, got {distribution!r}"
    )
  t, r = samplers[distribution]()
  return TimePairs(t=t, r=r, pairing=pairing, equal_fraction=equal_fraction)


def train_step(config: ConfigDict, network: nn.Module, method: Method, mesh: Mesh) -> TrainStep:
  """The step of `config.train`, `optimizer` and `ema`.

  Raises:
    ValueError: an impossible setting, or a batch that does not divide.
  """
  _check_batch(config.train.batch_size, config.train.accumulate, mesh.size, method)
  _check_cadences(config.train)
  method.check_steps(config.train.steps)
  optimizer, learning_rate = make_optimizer(**config.optimizer, total_steps=config.train.steps)
  return TrainStep(
    network=network,
    image_shape=image_shape(config),
    inputs=inputs(config),
    method=method,
    optimizer=optimizer,
    learning_rate=learning_rate,
    averages=Averages(**config.ema),
    accumulate=config.train.accumulate,
    seed=config.seed,
    guard=guard(config),
    dropout=config.model.name == "unet" and config.model.unet.dropout > 0,
  )


def guard(config: ConfigDict) -> Guard | None:
  """The guard of `config.train.guard`, unless it is off.

  Raises:
    ValueError: an impossible setting, or a roll-back further than checkpoints reach.
  """
  made, kept = Guard(**config.train.guard), config.checkpoint
  every = config.train.checkpoint_every
  reach = (kept.keep_latest - 1) * every + 1  # of the oldest one, right after a new one
  too_far = every == 0 or (made.steps_back > reach and not kept.keep_every)
  if made.action == "roll_back" and too_far:
    raise ValueError(
      f"train.guard.steps_back {made.steps_back} needs a checkpoint that old, and of "
      f"train.checkpoint_every {every} the last checkpoint.keep_latest {kept.keep_latest} are kept"
    )
  return None if made.action == "off" else made


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a global batch, and how it is spread."""
  rows = config.train.batch_size
  shapes = {
    "image": ((rows, *stored_shape(config)), jnp.float16 if reads_moments(config) else jnp.float32),
    "label": ((rows,), jnp.int32),
  }
  return {k: jax.ShapeDtypeStruct(*v, sharding=rows_sharding(mesh)) for k, v in shapes.items()}


def batch_unit(accumulate: int, devices: int, method: Method) -> int:
  """What `train.batch_size` must be a multiple of."""
  return devices * accumulate * method.rows.size


def _check_batch(batch_size: int, accumulate: int, devices: int, method: Method) -> None:
  if batch_size < 1 or accumulate < 1:
    raise ValueError(
      f"train.batch_size {batch_size} and train.accumulate {accumulate} must be at least 1"
    )
  unit = batch_unit(accumulate, devices, method)
  share = method.rows.first / method.rows.size
  if batch_size % unit:
    raise ValueError(
      f"train.batch_size {batch_size} is not divisible by {unit}: {devices} devices x "
      f"train.accumulate {accumulate} x groups of {method.rows.size} rows "
      f"(method.times.equal_fraction {share:g}); the nearest that are: "
      f"{max(1, batch_size // unit) * unit}, {(max(1, batch_size // unit) + 1) * unit}"
    )


def _check_cadences(train: ConfigDict) -> None:
  for name in ("steps", "log_every"):
    if train[name] < 1:
      raise ValueError(f"train.{name} must be at least 1, got {train[name]}")
  for name in ("checkpoint_every", "sample_every", "evaluate_every"):
    if train[name] < 0:
      raise ValueError(f"train.{name} must be 0 (only at the end) or more, got {train[name]}")


def grid(config: ConfigDict) -> tuple[float, ...]:
  """The time grid of `config.sample`."""
  return time_grid(config.sample.nfe, config.sample.grid)


def decoder(config: ConfigDict, mesh: Mesh) -> Decoder | None:
  """The autoencoder of `config.autoencoder`, or None where the model sees pixels.

  Raises:
    FileNotFoundError: the weights are missing; says where they are published.
    ValueError: these are other weights, or of other latents than the model makes.
  """
  if not config.autoencoder.path:
    return None
  network, params, origin = load_autoencoder(config)
  name = f"{origin.short}, {config.autoencoder.dtype}"
  return Decoder(replicate(mesh, params), network, name)


def load_autoencoder(config: ConfigDict) -> tuple[Autoencoder, PyTree, Origin]:
  """The network of `config.autoencoder`, its parameters, and where they come from.

  Raises:
    FileNotFoundError: the weights are missing; says where they are published.
    ValueError: these are other weights, or of other latents than the model makes.
  """
  path = pathlib.Path(config.autoencoder.path).expanduser()
  published, tensors = pretrained.load(path, pretrained.AUTOENCODER)
  network = autoencoder.from_config(published, config.autoencoder.dtype)
  if network.latent_channels != config.data.channels:
    raise ValueError(
      f"{path} decodes {network.latent_channels} channels, but data.channels is "
      f"{config.data.channels}; a model of pixels has autoencoder.path empty"
    )
  params = autoencoder.params_from_torch(network, tensors)
  return network, params, pretrained.origin(path / pretrained.AUTOENCODER.weights)


def extractors(config: ConfigDict, mesh: Mesh) -> tuple[Extractor, ...]:
  """The feature extractors that `config.evaluate` names.

  Raises:
    FileNotFoundError: weights are missing; says where they are published.
    ValueError: an unknown name or setting, or other weights.
  """
  settings = config.evaluate
  make = {
    "pixels": lambda: features.pixels(**settings.pixels),
    "inception": lambda: features.fid_inception(**settings.inception),
    "dinov2": lambda: features.fd_dinov2(**settings.dinov2),
  }
  names = tuple(settings.extractors)
  if not names or len(set(names)) != len(names) or set(names) - make.keys():
    raise ValueError(f"evaluate.extractors must be some of {sorted(make)}, got {names}")
  return replicate(mesh, tuple(make[name]() for name in names))


def generator(
  config: ConfigDict,
  network: nn.Module,
  method: Method,
  mesh: Mesh,
  decoder: Decoder | None,
  grid: tuple[float, ...],
  omega: float,
  t_min: float,
  t_max: float,
) -> Generator:
  """Images by `config.sample`, on a time grid, with a guidance scale for t in [t_min, t_max].

  Raises:
    ValueError: an impossible setting.
  """
  settings = config.sample
  if settings.count < 1:
    raise ValueError(f"sample.count must be at least 1, got {settings.count}")
  if omega != 1 and not config.data.num_classes:
    raise ValueError(
      f"guidance of {omega} takes classes, and the model has none (data.num_classes = 0): set "
      "sample.guidance.omega to 1"
    )
  if omega != 1 and not _dropped(config):
    raise ValueError(
      f"guidance of {omega} takes the velocity without a class, which this config never teaches "
      "(no label is dropped in training): set sample.guidance.omega to 1"
    )
  return Generator(
    network=network,
    step=method.step,
    guidance=method.sampling_guidance(omega, t_min, t_max),
    grid=grid,
    image_shape=image_shape(config),
    labels=Labels(settings.labels, settings.label, config.data.num_classes),
    seed=settings.seed,
    batch_size=settings.batch_size,
    rounding=settings.rounding,
    mesh=mesh,
    decoder=decoder,
  )


def sample_generator(
  config: ConfigDict, network: nn.Module, method: Method, mesh: Mesh
) -> Generator:
  """The generator of `config.sample`.

  Raises:
    ValueError: an impossible setting, or an autoencoder that does not fit.
    FileNotFoundError: the autoencoder's weights are missing.
  """
  made = generator(
    config, network, method, mesh, decoder(config, mesh), grid(config), **config.sample.guidance
  )
  # Of fewer images than a batch has, no more are made than devices need.
  needed = -(-config.sample.count // mesh.size) * mesh.size
  return dataclasses.replace(made, batch_size=min(made.batch_size, needed))
