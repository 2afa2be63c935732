"""alpha-Flow on class-conditional digits, 8x8: from flow matching to MeanFlow by degrees.

python main.py --config=configs/digits_alpha_flow.py --workdir=runs/digits_alpha_flow
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
  """The preset."""
  config = digits.get_config()
  config.method.name = "alpha_flow"
  config.method.alpha_flow.anneal_to = config.train.steps
  return config
