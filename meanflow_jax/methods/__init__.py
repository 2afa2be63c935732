"""What a model learns and how it samples: pure functions of arrays and a velocity function."""
