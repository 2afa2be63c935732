"""Figures of merit: pure numpy, no devices, no files."""
