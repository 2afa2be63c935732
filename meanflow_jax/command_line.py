"""Flags: the config and its overrides, with mistakes found before anything starts."""

import itertools
import pathlib
import re
import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from meanflow_jax.methods import registry

# Keys that are read only where another key has a certain value (or one of several), or names it
# among others.
_READ_WHERE = {
  "data.digits.": ("data.source", "digits"),
  "data.folder.": ("data.source", "folder"),
  "data.tfds.": ("data.source", "tfds"),
  "data.latents.": ("data.source", "latents"),
  "data.synthetic.": ("data.source", "synthetic"),
  **dict.fromkeys(
    (
      "model.patch_size",
      "model.depth",
      "model.width",
      "model.num_heads",
      "model.conditioning",
      "model.time_frequencies",
      "model.positions",
      "model.attention",
      "model.scan",
    ),
    ("model.name", ("dit", "in_context_dit")),
  ),
  "model.in_context_dit.": ("model.name", "in_context_dit"),
  "model.unet.": ("model.name", "unet"),
  "augmentation.": ("model.name", "unet"),
  "method.times.mean": ("method.times.distribution", "logit_normal"),
  "method.times.std": ("method.times.distribution", "logit_normal"),
  "method.times.r_mean": ("method.times.distribution", "logit_normal"),
  "method.times.r_std": ("method.times.distribution", "logit_normal"),
  "train.guard.factor": ("train.guard.action", ("record", "skip", "roll_back")),
  "train.guard.window": ("train.guard.action", ("record", "skip", "roll_back")),
  "train.guard.steps_back": ("train.guard.action", "roll_back"),
  "sample.label": ("sample.labels", "one"),
  "evaluate.statistics.pixels": ("evaluate.extractors", "pixels"),
  "evaluate.statistics.inception": ("evaluate.extractors", "inception"),
  "evaluate.statistics.dinov2": ("evaluate.extractors", "dinov2"),
  "evaluate.pixels.": ("evaluate.extractors", "pixels"),
  "evaluate.inception.": ("evaluate.extractors", "inception"),
  "evaluate.dinov2.": ("evaluate.extractors", "dinov2"),
}


def define_config(*, required: bool = True) -> flags.FlagHolder:
  """The flag --config=FILE, with --config.section.key=value for every key."""
  holder = config_flags.DEFINE_config_file("config", None, "The config, a file in configs/.")
  if required:
    flags.mark_flag_as_required("config")
  return holder


def parse(argv: list[str], adjust: Callable[[ConfigDict], None] | None = None) -> list[str]:
  """Parses all flags; exits with a message where a key does not exist or would not be read.

  Args:
    argv: the command line.
    adjust: what other flags change of the config, before it is asked which keys would be read.
  """
  _check_file(argv)
  try:
    remaining = app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:  # of a locked ConfigDict, with the nearest key
    message = error
    while isinstance(message, Exception):
      message = message.args[0]
    sys.exit("error: unknown config key " + message.replace("\n", "; "))
  if flags.FLAGS.config is None:
    return remaining
  if adjust:
    adjust(flags.FLAGS.config)
  given = config_flags.get_override_values(flags.FLAGS["config"])
  if mistakes := unread(flags.FLAGS.config, list(given)):
    sys.exit("error: " + "\n".join(mistakes))
  return remaining


def _check_file(argv: list[str]) -> None:
  for argument, following in itertools.pairwise([*argv, ""]):
    if given := re.fullmatch(r"--?config(?:=(.*))?", argument):
      path = pathlib.Path(following if given[1] is None else given[1])
      if not path.is_file():
        folder = path if path.is_dir() else path.parent
        there = ", ".join(map(str, sorted(folder.glob("*.py")))) or "none there"
        sys.exit(f"error: --config={path} is not a file; configs in {folder}/: {there}")


def unread(config: ConfigDict, given: list[str]) -> list[str]:
  """Says of each overridden key that nothing would read it, and why."""
  return [
    f"--config.{key} is read only where {switch} is {_either(value)}, not {found!r}"
    for key in given
    for prefix, (switch, value) in (_READ_WHERE | _read_by_methods()).items()
    if (key == prefix or (prefix.endswith(".") and key.startswith(prefix)))
    and not {*_values(value)} & {*_values(found := _value(config, switch))}
  ]


def _read_by_methods() -> dict[str, tuple[str, str | tuple[str, ...]]]:
  """The same of the sections of `method`, from the fields of the methods."""
  readers = {name: ("method.name", name) for name in registry.known()}
  for section in ("times", "guidance", "label_dropout", "weight"):
    names = [name for name, made in registry.known().items() if section in registry.fields(made)]
    readers[section] = "method.name", tuple(names)
  return {f"method.{section}.": reader for section, reader in readers.items()}


def _either(value: str | tuple[str, ...]) -> str:
  return " or ".join(map(repr, _values(value)))


def _values(found: object) -> tuple[object, ...]:
  return tuple(found) if isinstance(found, tuple | list) else (found,)


def _value(config: ConfigDict, path: str) -> object:
  for key in path.split("."):
    config = config[key]
  return config
