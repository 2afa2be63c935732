"""Attention: one function, whatever runs underneath."""
