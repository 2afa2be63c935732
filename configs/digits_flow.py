"""Flow matching on class-conditional digits, 8x8: what configs/digits_fine_tune.py starts from.

Times are those of MeanFlow, the later of two draws, and targets have no guidance.

  python main.py --config=configs/digits_flow.py --workdir=runs/digits_flow
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
  """The preset."""
  config = digits.get_config()
  config.method.times.equal_fraction = 1.0
  config.method.guidance.update(omega=1.0, kappa=0.0)
  config.train.steps = 950
  config.sample.nfe = 16
  config.evaluate.nfe = (1, 16)
  return config
