"""What a placement costs: replay of a trace, metrics with intervals, modelled step time.

numba is imported when a replay first needs it, not when this package is imported.
"""

from placer.cost.definitions import METRICS, MetricInfo
from placer.cost.metrics import Metrics, compare, measure
from placer.cost.pricing import Transport
from placer.cost.replay import Replay, replay
from placer.cost.serving import ReplicaPolicy
from placer.cost.step_time import StepTime, step_time

__all__ = [
    "METRICS",
    "MetricInfo",
    "Metrics",
    "Replay",
    "ReplicaPolicy",
    "StepTime",
    "Transport",
    "compare",
    "measure",
    "replay",
    "step_time",
]
