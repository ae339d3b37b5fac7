"""What a placement costs: replay of a trace, metrics with intervals, modelled step time.

numba is imported when a replay first needs it, not when this package is imported.
"""

from placer.cost.definitions import METRICS, MetricInfo
from placer.cost.metrics import Metrics, compare, measure
from placer.cost.replay import Replay, replay

__all__ = [
    "METRICS",
    "MetricInfo",
    "Metrics",
    "Replay",
    "compare",
    "measure",
    "replay",
]
