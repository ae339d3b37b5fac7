"""Analysis of a trace: load, co-activation and inter-layer affinity.

Importing this loads numpy and nothing heavier.
"""

from placer.affinity.counts import (
    AffinityCounter,
    count,
    count_by,
    count_chunks,
    label_of,
    phase_of,
)
from placer.affinity.model import Affinity
from placer.affinity.store import read_affinity, write_affinity

__all__ = [
    "Affinity",
    "AffinityCounter",
    "count",
    "count_by",
    "count_chunks",
    "label_of",
    "phase_of",
    "read_affinity",
    "write_affinity",
]
