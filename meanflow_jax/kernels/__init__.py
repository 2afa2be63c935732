"""Attention that can be differentiated forward: one function, whatever runs underneath."""
