"""MeanFlow on digits from a flow-matching model: without guidance first, then with.

  python main.py --config=configs/digits_flow.py --workdir=runs/digits_flow
  python main.py --config=configs/digits_fine_tune.py --workdir=runs/digits_fine_tune

The two take as long as configs/digits.py, and come to a pixel Frechet distance of 0.44 in one step;
there it is 0.52 (benchmarks/RESULTS.md).
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
  """The preset."""
  config = digits.get_config()
  config.train.start_from = "runs/digits_flow"
  config.train.steps = 950
  config.method.guidance.from_step = 200
  return config
