"""Improved MeanFlow on class-conditional digits, 8x8: guidance is chosen when sampling.

  python main.py --config=configs/digits_imf.py --workdir=runs/digits_imf

On two CPU cores 15 minutes. After as many steps as configs/digits.py has, of twice the batch, the
pixel Frechet distance is 0.41 to 0.50 in one step and 0.37 to 0.43 in two, over three seeds; there
it is 0.48 to 0.52 and 0.44 to 0.50 (benchmarks/RESULTS.md).
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
  """The preset."""
  config = digits.get_config()
  config.model.update(name="in_context_dit", depth=5, width=128, num_heads=4)
  config.model.in_context_dit.update(
    head_depth=2, class_tokens=2, omega_tokens=1, interval_tokens=1, time_tokens=2
  )
  config.method.name = "improved_meanflow"
  config.method.improved_meanflow.update(omega_max=2.0)
  # More rows near r = 0 and t = 1, which is what one step asks for.
  config.method.times.update(mean=0.0, std=1.4, r_mean=-2.0, r_std=1.4)
  config.optimizer.learning_rate = 5e-3
  config.train.batch_size = 128
  config.sample.guidance.omega = 1.1
  return config
