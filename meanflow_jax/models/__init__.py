"""Networks, as Flax Linen modules."""
