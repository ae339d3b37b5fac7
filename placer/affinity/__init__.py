"""Analysis of a trace: load, co-activation and inter-layer affinity (docs/analysis.md).

Importing this loads numpy and nothing heavier.
"""

from placer.affinity.analysis import Analysis, analyse
from placer.affinity.coactivation import Concentration, concentration, lift
from placer.affinity.counts import AffinityCounter, count, count_by, count_chunks
from placer.affinity.drift import Drift, load_drift
from placer.affinity.graph import affinity_graph, write_graphml
from placer.affinity.groups import both_of, fold_of, label_of, phase_of
from placer.affinity.headroom import Headroom, headroom, random_span
from placer.affinity.information import (
    Information,
    all_pairs_information,
    conditional,
    held_out_information,
    mutual_information,
    primary_information,
)
from placer.affinity.loads import PartLoad
from placer.affinity.model import Affinity
from placer.affinity.skew import LoadSkew, balance_bound, load_skew
from placer.affinity.statistics import summary
from placer.affinity.store import read_affinity, write_affinity

__all__ = [
    "Affinity",
    "AffinityCounter",
    "Analysis",
    "Concentration",
    "Drift",
    "Headroom",
    "Information",
    "LoadSkew",
    "PartLoad",
    "affinity_graph",
    "all_pairs_information",
    "analyse",
    "balance_bound",
    "both_of",
    "concentration",
    "conditional",
    "count",
    "count_by",
    "count_chunks",
    "fold_of",
    "headroom",
    "held_out_information",
    "label_of",
    "lift",
    "load_drift",
    "load_skew",
    "mutual_information",
    "phase_of",
    "primary_information",
    "random_span",
    "read_affinity",
    "summary",
    "write_affinity",
    "write_graphml",
]
