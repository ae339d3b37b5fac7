"""From traces to plans: split the requests, pose the problem, solve it, judge what comes out."""

from placer.planning.certifying import Certificate, bounds_of_results, certify_plan
from placer.planning.frontier import Frontier, make_frontier
from placer.planning.making import (
    cap_warnings,
    certificate_of,
    check_solver,
    make_plan,
    modelled_step_times,
    placement_of,
    plan_of_result,
    refuse_broken_cap,
    run_solver,
    versions,
)
from placer.planning.parts import Parts, digest_of, judging_part, open_traces, split_sources
from placer.planning.posing import build_problem, expert_groups, sample_tokens
from placer.planning.pricing import cluster_of, prices, ranks_per_node, slots_needed
from placer.planning.settings import (
    CAPPED_SOLVERS,
    DEFAULT_MAX_IMBALANCE,
    DEFAULT_NODE_WEIGHT,
    PROFILE_TOKENS,
    Progress,
    Settings,
)
from placer.planning.stopwatch import Stopwatch

__all__ = [
    "CAPPED_SOLVERS",
    "DEFAULT_MAX_IMBALANCE",
    "DEFAULT_NODE_WEIGHT",
    "PROFILE_TOKENS",
    "Certificate",
    "Frontier",
    "Parts",
    "Progress",
    "Settings",
    "Stopwatch",
    "bounds_of_results",
    "build_problem",
    "cap_warnings",
    "certificate_of",
    "certify_plan",
    "check_solver",
    "cluster_of",
    "digest_of",
    "expert_groups",
    "judging_part",
    "make_frontier",
    "make_plan",
    "modelled_step_times",
    "open_traces",
    "placement_of",
    "plan_of_result",
    "prices",
    "ranks_per_node",
    "refuse_broken_cap",
    "run_solver",
    "sample_tokens",
    "slots_needed",
    "split_sources",
    "versions",
]
