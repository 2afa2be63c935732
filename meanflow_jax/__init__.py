"""MeanFlow and its successors in JAX: train, sample and measure one-step image generators."""

__version__ = "0.1.0"
