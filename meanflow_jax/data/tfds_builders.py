"""Prepared examples as datasets of TensorFlow-datasets, without TensorFlow.

Once this module is imported, `tfds.data_source("meanflow_latents", data_dir=FOLDER)` opens a folder
that meanflow_jax.prepare made; `tfds.builder_from_directory(FOLDER)` does without it.
"""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from meanflow_jax.data import manifest as manifests
from meanflow_jax.data.manifest import KINDS, Manifest, Recipe

VERSION = "1.0.0"


class _Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A folder that is ready: this reads it, and makes none."""

  VERSION = tfds.core.Version(VERSION)

  def _build_data_dir(self, given_data_dir: str | None) -> tuple[str, str]:
    """TFDS looks in FOLDER/name/version; ours may be FOLDER itself."""
    if given_data_dir and (pathlib.Path(given_data_dir) / manifests.NAME).exists():
      return given_data_dir, given_data_dir
    return super()._build_data_dir(given_data_dir)

  def _info(self) -> tfds.core.DatasetInfo:
    folder = pathlib.Path(self.data_dir)
    if not (folder / manifests.NAME).exists():
      raise FileNotFoundError(
        f"there are no prepared examples in {folder}: make them with {manifests.COMMAND}"
      )
    recipe = manifests.read(folder).recipe
    if KINDS[recipe.kind].dataset != self.name:
      raise ValueError(f"{folder} holds {KINDS[recipe.kind].dataset}, not {self.name}")
    return tfds.core.DatasetInfo(builder=self, features=features_of(recipe))

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    raise NotImplementedError(f"{self.name} is made by {manifests.COMMAND}")

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
    raise NotImplementedError(f"{self.name} is made by {manifests.COMMAND}")


class MeanflowLatents(_Prepared):
  """Mean and standard deviation of an autoencoder's latents: "moments" [H, W, 2 C], float16."""


class MeanflowPixels(_Prepared):
  """Images that are cropped and resized: "image" [H, W, C], uint8."""


def features_of(recipe: Recipe) -> tfds.features.FeaturesDict:
  """What a record holds."""
  kind = KINDS[recipe.kind]
  array = tfds.features.Tensor(shape=recipe.shape, dtype=np.dtype(kind.dtype), encoding="bytes")
  label = tfds.features.ClassLabel(names=list(recipe.class_names))
  return tfds.features.FeaturesDict({kind.feature: array, "label": label})


def write_metadata(folder: pathlib.Path, manifest: Manifest) -> None:
  """Writes what TensorFlow-datasets reads beside the shards: dataset_info.json and features."""
  splits = [
    tfds.core.SplitInfo(
      name=split,
      shard_lengths=[shard.records for shard in shards],
      num_bytes=sum(shard.bytes for shard in shards),
    )
    for split, shards in manifest.splits.items()
  ]
  kind = KINDS[manifest.recipe.kind]
  tfds.folder_dataset.write_metadata(
    data_dir=os.fspath(folder),
    features=features_of(manifest.recipe),
    split_infos=splits,
    version=VERSION,
    filename_template=tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=kind.dataset, filetype_suffix="array_record"
    ),
    check_data=False,
    description=f"Images prepared for training: {manifest.recipe.kind}",
  )
