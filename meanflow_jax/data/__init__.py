"""Images and labels: random access to them, and batches as a function of (seed, step)."""
