"""Checkpoints: written in the background, atomic, checked before use, restored onto any mesh.

On disk everything is Orbax's own format, but for the manifest:

  <directory>/<step>/<item>/        one Orbax item per named tree, so that each restores alone
  <directory>/<step>/config/        the run's config, as JSON
  <directory>/<step>/manifest.json  the size of every file, and a checksum of its two ends
  <directory>/<step>/returns.json   how often a run went back to this step, and with what ahead
  <directory>_damaged/<step>/       what did not match its manifest: moved aside, never deleted

The manifest is there because Orbax notices a damaged file late, with the same bare `Exception`
that an unreachable disk causes, and an overwritten one often not at all: the numbers come back
changed. Its check reads at most 8 KiB per file; bytes that flip further inside stay unnoticed.
Whatever Orbax raises after that check is raised as it is: memory that ran out is no damage.
"""

import contextlib
import itertools
import json
import logging
import zlib
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from meanflow_jax.runtime import processes

PyTree = Any
Manifest = dict[str, dict[str, list[int]]]  # item -> file -> [size, checksum]

_MANIFEST = "manifest.json"
_RETURNS = "returns.json"
_CONFIG = "config"
_END = 4096
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
  """A checkpoint could not be written, or there is none that this run can continue from."""


class Checkpoints:
  """The checkpoints of one run; a context manager that waits for the last save as it closes.

  Args:
    directory: where they lie, local or `gs://`; created if need be.
    keep_latest: how many of the newest to keep.
    keep_every: also keep each step that is a multiple of this; None keeps no others.
    read_only: look only. Nothing is created, cleaned up or moved, `save` raises, and damaged
      checkpoints are passed over: for reading what another process is still writing.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    keep_latest: int,
    keep_every: int | None,
    read_only: bool = False,
  ):
    path = epath.Path(directory)
    self._directory = path if path.is_absolute() else path.resolve()  # resolve() breaks gs://
    self._read_only = read_only
    self._writing = -1  # the step of the last save, finished or not
    self._finished: int | None = None  # the newest step that is known to be on disk
    self._held: int | None = None  # the step whose state the caller holds, as far as we know
    self._kept: list[policies.PreservationPolicy] = [policies.LatestN(keep_latest)]
    if keep_every is not None:
      self._kept.append(policies.EveryNSteps(keep_every))
    self._manager = self._open(cleanup=not read_only)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Waits for the save in progress and frees the threads; raises what `wait` raises."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def steps(self) -> list[int]:
    """The steps that have a checkpoint, oldest first; one being written counts."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """The newest step that has a checkpoint; one being written counts."""
    return self._manager.latest_step()

  def save(self, step: int, items: Mapping[str, PyTree], config: Mapping[str, Any]) -> None:
    """Starts to write a checkpoint and returns once the arrays are copied off the devices.

    Saving the step that was saved or restored last is a no-op: a run that is told to stop right
    after a save may simply save.

    Args:
      step: the step; newer than every checkpoint there is.
      items: trees of arrays by name; any name but `config`.
      config: what JSON can hold, nested (tuples become lists).

    Raises:
      CheckpointError: this or the previous save failed, or there is a newer checkpoint.
    """
    self.wait()
    if step == self._held:
      return
    self._writing = step
    trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    args = ocp.args.Composite(**trees, **{_CONFIG: ocp.args.JsonSave(dict(config))})
    try:
      accepted = self._manager.save(step, args=args)
    except Exception as error:
      raise self._write_failure(error) from error
    if not accepted:
      why = "it is open for reading only" if self._read_only else f"it has {self.steps()}"
      raise CheckpointError(f"{self._directory} takes no checkpoint {step}: {why}")
    self._held = step

  def drop_from(self, step: int) -> None:
    """Deletes the checkpoints of a step and of all later ones, which `save` would not take."""
    self.wait()
    for later in reversed(self.steps()):  # what a kill leaves is the past of one run
      if later >= step:
        self._manager.delete(later)
        self._held = None

  def go_back(self, step: int, position: int) -> None:
    """Deletes all later checkpoints, and notes with this one from which batch a run goes on.

    A run that is killed before its next save finds the note; it lasts as long as the checkpoint.
    """
    times, _ = self.returns(step)
    self.drop_from(step + 1)
    if jax.process_index() == 0:
      note = self._folder(step) / _RETURNS
      partial = note.with_name(f"{note.name}.partial")
      partial.write_text(json.dumps({"times": times + 1, "position": position}))
      partial.replace(note)
    multihost_utils.sync_global_devices(f"back to checkpoint {step}")

  def returns(self, step: int) -> tuple[int, int]:
    """How often a run went back to a checkpoint, and the last time with which batch; or zeros."""
    found, note = {"times": 0, "position": 0}, self._folder(step) / _RETURNS
    if jax.process_index() == 0 and note.exists():
      found = json.loads(note.read_text())
    said = np.array([found["times"], found["position"]], np.int32)
    times, position = multihost_utils.broadcast_one_to_all(said)  # one verdict for all processes
    return int(times), int(position)

  def wait(self) -> None:
    """Blocks until the save in progress is on disk.

    Raises:
      CheckpointError: it failed; says which step, why, and which checkpoint is the newest.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._write_failure(error) from error
    self._finished = self.latest_step()

  def restore(
    self,
    targets: Mapping[str, PyTree],
    *,
    step: int | None = None,
    identity: Mapping[str, Mapping[str, Any]] | None = None,
    optional: Collection[str] = (),
  ) -> tuple[int, dict[str, PyTree]] | None:
    """Reads the newest usable checkpoint; damaged ones are moved aside, with a warning.

    Args:
      targets: trees of `jax.ShapeDtypeStruct` with shardings, by name; only these are read.
      step: take this checkpoint and no other.
      identity: keys of the config, by section, that must equal the checkpoint's.
      optional: names in `targets` that a checkpoint may lack.

    Returns:
      The step and the restored trees, or None where there is no checkpoint at all.

    Raises:
      CheckpointError: none is usable, `step` does not exist, or the checkpoint is not one of this
        run: an item is missing, or configs, names, shapes or dtypes differ. Then nothing is moved.
    """
    self.wait()
    self._manager.reload()
    if step is not None and step not in self.steps():
      raise CheckpointError(f"{self._directory} has no checkpoint {step}, but {self.steps()}")
    refused = []
    for candidate in reversed(self.steps()) if step is None else [step]:
      damage = self._damage(candidate, targets)
      if damage is None:
        return candidate, self._read(candidate, targets, identity or {}, optional)
      refused.append(f"{candidate}: {damage}")
      self._set_aside(candidate, damage)
    if refused:
      raise CheckpointError(_listing(f"{self._directory} has no usable checkpoint", refused))
    return None

  def config(self, step: int) -> dict[str, Any]:
    """The config that a checkpoint was saved with."""
    args = ocp.args.Composite(**{_CONFIG: ocp.args.JsonRestore()})
    return self._manager.restore(step, args=args)[_CONFIG]

  def _open(self, *, cleanup: bool) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(self._kept),
      cleanup_tmp_directories=cleanup,
      read_only=self._read_only,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
    )
    return ocp.CheckpointManager(self._directory, options=options)

  def _folder(self, step: int) -> epath.Path:
    return self._directory / str(step)

  def _unfinished_folder(self) -> epath.Path:
    return self._directory / f"{self._writing}{ocp.utils.TMP_DIR_SUFFIX}"

  def _write_manifest(self) -> None:
    """Called by Orbax when all items are on disk, before the folder counts as a checkpoint."""
    folder = self._unfinished_folder()
    if not folder.exists():  # object stores cannot rename: there a marker file comes last
      folder = self._folder(self._writing)
    manifest = {item.name: _fingerprints(item) for item in folder.iterdir() if item.is_dir()}
    (folder / _MANIFEST).write_text(json.dumps(manifest))

  def _write_failure(self, error: Exception) -> CheckpointError:
    newest, self._held = self._finished, None
    # Orbax's manager would repeat the error in later calls; some of its writers may still be busy,
    # so that the folder is removed now if it can be, or else when the next run starts.
    with contextlib.suppress(Exception):
      self._manager.close()
    if jax.process_index() == 0:
      with contextlib.suppress(OSError):
        self._unfinished_folder().rmtree()
    if jax.process_count() == 1:  # of several, all would have to open it, and this one failed
      self._manager = self._open(cleanup=False)
      newest = self.latest_step()
    return CheckpointError(
      f"checkpoint {self._writing} could not be written to {self._directory}: {error}\n"
      f"the newest intact checkpoint is {newest}"
    )

  def _damage(self, step: int, items: Collection[str]) -> str | None:
    """What process 0 finds wrong with the files of `items`: one verdict for all processes."""
    found = _find_damage(self._folder(step), items) if jax.process_index() == 0 else None
    return (found or "process 0 knows why") if processes.agreed(found is not None) else None

  def _set_aside(self, step: int, damage: str) -> None:
    if jax.process_index() == 0:
      folder, outcome = self._folder(step), "passed over"
      if not self._read_only:
        aside = _unused(self._directory.with_name(f"{self._directory.name}_damaged") / str(step))
        aside.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
        outcome = f"moved to {aside}"
      _log.warning("checkpoint %s is damaged (%s): %s", folder, damage, outcome)
    multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
    self._manager.reload()

  def _read(
    self,
    step: int,
    targets: Mapping[str, PyTree],
    identity: Mapping[str, Mapping[str, Any]],
    optional: Collection[str],
  ) -> dict[str, PyTree]:
    folder = self._folder(step)
    available = _read_manifest(folder).keys() - {_CONFIG}
    if missing := targets.keys() - available - {*optional}:
      raise CheckpointError(f"{folder} has no {sorted(missing)}, but {sorted(available)}")
    if identity:
      self._require_identity(step, identity)
    targets = {name: tree for name, tree in targets.items() if name in available}
    for name, target in targets.items():
      _require_same_arrays(folder / name, target)
    trees = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    restored = self._manager.restore(step, args=ocp.args.Composite(**trees))
    self._held = step
    return {name: restored[name] for name in targets}

  def _require_identity(self, step: int, identity: Mapping[str, Mapping[str, Any]]) -> None:
    theirs, ours = known_keys(self.config(step), identity)
    if lines := _differences(_by_name(theirs), _by_name(ours)):
      raise CheckpointError(_listing(f"{self._folder(step)} has another config", lines))


def known_keys(
  config: Mapping[str, Any], identity: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """What a saved config and an identity say of the keys that both have, in all their sections.

  A key that is younger than the checkpoint says nothing of it; arrays are compared anyway.
  """
  theirs, ours = {}, {}
  for key, value in json.loads(json.dumps(identity)).items():  # tuples are lists there
    if isinstance(value, Mapping):
      theirs[key], ours[key] = known_keys(config.get(key, {}), value)
    elif key in config:
      theirs[key], ours[key] = config[key], value
  return theirs, ours


def _require_same_arrays(item: epath.Path, target: PyTree) -> None:
  # Orbax would cast to the target's dtypes without a word.
  stored = ocp.StandardCheckpointHandler().metadata(item).tree
  if lines := _differences(_signatures(stored), _signatures(target)):
    raise CheckpointError(_listing(f"{item} holds other arrays", lines))


def _signatures(arrays: PyTree) -> dict[str, str]:
  return {name: f"{np.dtype(x.dtype)}{list(x.shape)}" for name, x in _by_name(arrays).items()}


def _by_name(tree: PyTree) -> dict[str, Any]:
  """The leaves by dotted path, alike for tuples, lists and named tuples, as Orbax keeps them."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
  return [
    f"{name}: checkpoint {theirs.get(name)}, this run {ours.get(name)}"
    for name in sorted(theirs.keys() | ours.keys())
    if theirs.get(name) != ours.get(name)
  ]


def _listing(heading: str, lines: Iterable[str]) -> str:
  return "\n  ".join([f"{heading}:", *lines])


def _unused(path: epath.Path) -> epath.Path:
  names = itertools.chain([path.name], (f"{path.name}-{again}" for again in itertools.count(2)))
  return next(path.with_name(name) for name in names if not path.with_name(name).exists())


def _read_manifest(folder: epath.Path) -> Manifest:
  return json.loads((folder / _MANIFEST).read_text())


def _find_damage(folder: epath.Path, items: Collection[str]) -> str | None:
  try:
    manifest = _read_manifest(folder)
  except (FileNotFoundError, ValueError) as error:
    return f"no legible manifest: {error}"
  for item in manifest.keys() & {*items, _CONFIG}:
    found = _fingerprints(folder / item)
    for file, written in manifest[item].items():
      if file not in found:
        return f"{item}/{file} is missing"
      if found[file] != written:
        return f"{item}/{file} is not as written ({found[file][0]} bytes of {written[0]})"
  return None


def _fingerprints(folder: epath.Path) -> dict[str, list[int]]:
  files = [parent / name for parent, _, names in folder.walk() for name in names]
  with ThreadPoolExecutor() as pool:  # on object stores a file costs a round trip
    return {
      str(file.relative_to(folder)): fingerprint
      for file, fingerprint in zip(files, pool.map(_fingerprint, files), strict=True)
    }


def _fingerprint(file: epath.Path) -> list[int]:
  size = file.stat().length
  with file.open("rb") as stream:
    head = zlib.crc32(stream.read(_END))
    stream.seek(max(size - _END, 0))
    return [size, zlib.crc32(stream.read(), head)]
