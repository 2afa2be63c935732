"""Makes what a run reads: latents or resized images, and statistics of real images.

  python -m meanflow_jax.prepare --config=FILE --source=folder:PATH --out=DIR [--statistics]
  python -m meanflow_jax.prepare --check=DIR [--config=FILE --source=folder:PATH]
  python -m meanflow_jax.prepare --statistics --config=FILE --out=FILE.npz

The first encodes all images of a source by the autoencoder of the config, or, where
autoencoder.path is empty, keeps their pixels. Run it again to go on after an interruption; on
several hosts, run it on each. The last makes the statistics of all images of `config.data`, or of
those of --images.
"""

import functools
import os
import pathlib
import sys
import time

import jax
from absl import app, flags
from ml_collections import ConfigDict

from meanflow_jax import build, command_line, encoding, evaluate
from meanflow_jax.data import manifest as manifests
from meanflow_jax.data import shards, tfds_builders
from meanflow_jax.data.latents import Latents
from meanflow_jax.data.manifest import FLIPPED, KINDS, PLAIN, Manifest, Recipe
from meanflow_jax.data.sources import Folder, Source, UnreadableImageError, made_elsewhere
from meanflow_jax.encoding import Encoder, Preparation
from meanflow_jax.metrics.summary import KEEPING
from meanflow_jax.models.autoencoder import SCALE_FACTOR
from meanflow_jax.runtime import processes, reference_statistics
from meanflow_jax.runtime.mesh import make_mesh, replicated
from meanflow_jax.runtime.pretrained import Origin

CONFIG = command_line.define_config(required=False)
SOURCE = flags.DEFINE_string(
  "source", None, "The images: folder:PATH, tfds:NAME, or config (those of its section data)."
)
OUT = flags.DEFINE_string("out", None, "The folder (with --source) or .npz file to write.")
STATISTICS = flags.DEFINE_bool(
  "statistics", False, "Make reference statistics; with --source, after all else and into --out."
)
IMAGES = flags.DEFINE_string("images", None, "A folder or .npz of images, in the data's place.")
CHECK = flags.DEFINE_string("check", None, "A prepared folder whose every record is to be read.")
REENCODE = flags.DEFINE_integer(
  "reencode", 8, "--check with --source: how many images to encode anew.", lower_bound=0
)
DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Look for the other processes of a cluster that JAX knows."
)
STARTUP_TIMEOUT = flags.DEFINE_integer(
  "startup_timeout", 300, "Seconds that the other processes have to come.", lower_bound=1
)

POLL = 2.0  # seconds


def main(_: list[str]) -> None:
  """Runs; the user's mistakes end it with a message, no traceback."""
  try:
    with build.explaining_mistakes():
      processes.join(detect=DISTRIBUTED.value, timeout=STARTUP_TIMEOUT.value)
      _run(CONFIG.value)
  except build.UserError as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    print("interrupted; the same command goes on", file=sys.stderr)
    sys.exit(130)


def _run(config: ConfigDict | None) -> None:
  """Does what the flags ask for."""
  if not (SOURCE.value or STATISTICS.value or CHECK.value):
    raise ValueError("say what to prepare: --source=folder:PATH, --check=DIR or --statistics")
  if config is None and (SOURCE.value or not CHECK.value):
    raise ValueError("--config=FILE is missing")
  if CHECK.value:
    check(pathlib.Path(CHECK.value).expanduser(), config if SOURCE.value else None, REENCODE.value)
    return
  if not OUT.value:
    raise ValueError("--out is missing: where to write")
  out = pathlib.Path(OUT.value).expanduser()
  if not SOURCE.value:
    make_statistics(config, out, IMAGES.value)
    return
  if IMAGES.value:
    raise ValueError("--images stands in for the data of --statistics; here it is --source")
  prepare(config, out, jax.process_index(), jax.process_count())
  if STATISTICS.value and statistics_path(config, out).exists():
    print(f"{statistics_path(config, out)} is there already")
  elif STATISTICS.value:
    make_statistics(image_config(config), statistics_path(config, out), None)


def apply_source(config: ConfigDict) -> None:
  """Sets the keys that --source stands for; exits with a message where it is none."""
  kind, _, where = (SOURCE.value or "config").partition(":")
  if kind == "folder" and where:
    config.data.source, config.data.folder.path = "folder", os.path.expanduser(where)
  elif kind == "tfds" and where:
    config.data.source, config.data.tfds.name = "tfds", where
  elif kind != "config" or where:
    sys.exit(f"error: --source must be folder:PATH, tfds:NAME or config, got {SOURCE.value!r}")


def prepare(config: ConfigDict, out: pathlib.Path, process: int, count: int) -> None:
  """Makes the shards of one of `count` processes; the last to be done finishes the folder.

  Raises:
    UserError: a mistake in the config or the images, an `out` that is not this run's, a full disk.
  """
  with build.explaining_mistakes():
    preparation, ours = plan(config, out)
    claimed = manifests.begin(out, ours)
    todo = preparation.unfinished(process, count)
    recipe = preparation.recipe
    mine = len(range(process, recipe.shards, count))
    print(
      f"{recipe.images} images of {ours.source}, {len(recipe.class_names)} classes, to "
      f"{recipe.kind} {list(recipe.shape)}: {mine} of {recipe.shards} shards are this process's, "
      f"{mine - len(todo)} of them done",
      flush=True,
    )
    start = time.monotonic()
    written = _write(preparation, todo)
    seconds = time.monotonic() - start
    if written:
      print(f"{written} images in {seconds:.0f} s: {written / seconds:.1f} images/s", flush=True)
    while jax.process_count() > 1 and not preparation.whole:
      time.sleep(POLL)  # one that dies ends all
    if not preparation.whole:
      print("the shards of other processes are missing; the last to be done finishes", flush=True)
      return
    made = preparation.finished(claimed)
    if process == 0 or jax.process_count() == 1:
      tfds_builders.write_metadata(out, made)
      manifests.write(out, made)
      _report(out, made)


def _write(preparation: Preparation, numbers: list[int]) -> int:
  try:
    return preparation.write(numbers)
  except OSError as error:
    if error.errno not in shards.FULL:
      raise
    raise OSError(
      f"no space is left for {preparation.folder} ({error.strerror}): finished shards are kept, "
      "and the same command goes on once there is space"
    ) from error
  except UnreadableImageError as error:
    raise ValueError(
      f"{error}; with --config.data.folder.skip_unreadable=True broken images are left out, named "
      "and counted"
    ) from error


def _report(out: pathlib.Path, made: Manifest) -> None:
  records = {split: sum(shard.records for shard in each) for split, each in made.splits.items()}
  size = sum(shard.bytes for each in made.splits.values() for shard in each)
  for reason in made.unreadable[:20]:
    print(f"left out: {reason}")
  print(
    f"{out}: {', '.join(f'{split} {count}' for split, count in records.items())} records, "
    f"{size / 1e9:.2f} GB, {len(made.unreadable)} images left out; fingerprint of the source "
    f"{made.recipe.fingerprint}",
    flush=True,
  )


def plan(config: ConfigDict, out: pathlib.Path) -> tuple[Preparation, Manifest]:
  """What a config asks for, and the manifest that it starts with.

  Raises:
    ValueError: an impossible setting; images or weights that do not fit.
    FileNotFoundError: there are no such images or weights.
  """
  images, settings = image_config(config), config.prepare
  source = build.source(images)
  mesh = make_mesh(-1, 1, jax.local_devices())
  skip = images.data.source == "folder" and images.data.folder.skip_unreadable
  if isinstance(source, Folder):
    source = source.without_substitutes()
  if settings.records_per_shard < 1 or settings.workers < 0:
    raise ValueError(
      "prepare.records_per_shard must be at least 1 and prepare.workers 0 or more, got "
      f"{settings.records_per_shard} and {settings.workers}"
    )
  encoder, facts = None, _pixel_facts(config)
  if config.autoencoder.path:
    network, params, origin = build.load_autoencoder(config)
    encoder = Encoder(jax.device_put(params, replicated(mesh)), network)
    facts = _latent_facts(config, origin)
  dtype = encoding.first_readable(source)["image"].dtype
  if encoder is None and dtype != KINDS["pixels"].dtype:
    raise ValueError(f"pixels are stored in uint8, but those of {images.data.source} are {dtype}")
  recipe = Recipe(
    **facts,
    image_size=images.data.image_size,
    records_per_shard=settings.records_per_shard,
    images=len(source),
    class_names=_class_names(source),
    fingerprint=encoding.fingerprint(source),
  )
  preparation = Preparation(
    folder=out,
    recipe=recipe,
    source=source,
    encoder=encoder,
    mesh=mesh,
    skip_unreadable=skip,
    batch_size=settings.batch_size,
    num_threads=config.data.threads,
    prefetch=config.data.prefetch,
    workers=settings.workers,
  )
  return preparation, Manifest(recipe, _name(images))


def _pixel_facts(config: ConfigDict) -> dict[str, object]:
  return {
    "kind": "pixels",
    "shape": build.image_shape(config),
    "autoencoder": "",
    "autoencoder_sha256": "",
    "autoencoder_dtype": "",
    "scale_factor": 1.0,
    "splits": (PLAIN,),
  }


def _latent_facts(config: ConfigDict, origin: Origin) -> dict[str, object]:
  height, width, channels = build.image_shape(config)
  return {
    "kind": "latents",
    "shape": (height, width, 2 * channels),
    "autoencoder": origin.short,
    "autoencoder_sha256": origin.sha256,
    "autoencoder_dtype": config.autoencoder.dtype,
    "scale_factor": SCALE_FACTOR,
    "splits": (PLAIN, FLIPPED) if config.prepare.flipped else (PLAIN,),
  }


def _class_names(source: Source) -> tuple[str, ...]:
  named = getattr(source, "class_names", ())
  return tuple(named) or tuple(str(label) for label in range(source.num_classes))


def _name(config: ConfigDict) -> str:
  data = config.data
  names = {"folder": data.folder.path, "tfds": f"{data.tfds.name} {data.tfds.split}"}
  return f"{data.source} {names.get(data.source, '')}".strip()


def image_config(config: ConfigDict) -> ConfigDict:
  """The config of the images themselves: `data` says what the model sees, perhaps their latents.

  Raises:
    ValueError: the source of the images is not said, or the autoencoder does not fit.
  """
  if config.data.source == "latents":
    raise ValueError(
      "data.source is 'latents', which is what is to be made: say where the images are, "
      "--source=folder:PATH or --source=tfds:NAME"
    )
  if not config.autoencoder.path:
    return config
  network, _, _ = build.load_autoencoder(config)
  images = config.copy_and_resolve_references()
  images.data.image_size *= network.downsampling
  images.data.channels = network.in_channels
  return images


def statistics_path(config: ConfigDict, out: pathlib.Path) -> pathlib.Path:
  """Where the statistics of a prepared folder's images lie."""
  return out / f"{'_'.join(config.evaluate.extractors)}_statistics.npz"


def check(folder: pathlib.Path, config: ConfigDict | None, reencode: int) -> None:
  """Reads every record of a folder and, given a config with a source, encodes some images anew.

  Raises:
    UserError: what is damaged.
  """
  with build.explaining_mistakes():
    manifest = manifests.read(folder)
    if not manifest.complete:
      raise ValueError(f"the preparation in {folder} is not finished: run its command again")
    wrong, anew = encoding.check(folder, manifest), "none was encoded anew (no --source)"
    if config is not None and not wrong:
      preparation, ours = plan(config, folder)
      manifests.begin(folder, ours)
      count, wrong = preparation.compare(Latents(path=str(folder)), reencode)
      anew = f"{count} images encoded anew agree"
    if wrong:
      shown = [*wrong[:20], *([f"and {len(wrong) - 20} more"] if len(wrong) > 20 else [])]
      raise ValueError("\n  ".join([f"{len(wrong)} faults in {folder}:", *shown]))
    records = sum(shard.records for each in manifest.splits.values() for shard in each)
    print(f"{folder}: {records} records are what was written; {anew}")


def make_statistics(config: ConfigDict, out: pathlib.Path, images: str | None) -> None:
  """Writes the statistics of real images for the extractor of `config.evaluate`.

  With the figures kid or precision_recall, the features of all images are part of the file.

  Raises:
    UserError: a mistake in the config or the images; there is such a file already.
  """
  with build.explaining_mistakes():
    if out.exists():
      raise FileExistsError(f"{out} exists; it is left as it is: choose another name")
    if not out.parent.is_dir():
      raise FileNotFoundError(f"--out: there is no folder {out.parent}")
    if not images and build.reads_moments(config):
      raise ValueError(
        "statistics are of images, and data.source is 'latents': name the images with --images, "
        "or by --config.data.source=folder and an empty autoencoder.path"
      )
    mesh = build.mesh(config)
    source = made_elsewhere(os.path.expanduser(images)) if images else build.source(config)
    extractors = build.extractors(config, mesh)
    if len(extractors) != 1:
      raise ValueError(
        f"a file holds statistics of one extractor: evaluate.extractors names {len(extractors)}"
      )
    keep = bool(KEEPING & set(config.evaluate.figures))
    (made,) = evaluate.measure_source(config, mesh, extractors, source, keep).values()
    if jax.process_index() == 0:
      reference_statistics.write(out, made)
  print(f"{made.count} images, {made.convention}, fingerprint {made.fingerprint}: {out}")


if __name__ == "__main__":
  app.run(main, flags_parser=functools.partial(command_line.parse, adjust=apply_source))
