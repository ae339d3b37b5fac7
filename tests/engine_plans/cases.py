"""Plans to write and read back."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from placer.engines.registry import ENGINES, PlanFormat, PlanHints
from placer.placement import Placement
from placer.plan import Plan

KINDS: list[tuple[str, PlanFormat]] = [
    (name, plan_format) for name, engine in ENGINES.items() for plan_format in engine.plan_formats()
]
KIND_IDS = [f"{name}{plan_format.suffix}" for name, plan_format in KINDS]


def random_plan(
    seed: int, layers: int = 3, experts: int = 8, ranks: int = 4, slots: int = 3, nodes: int = 2
) -> Plan:
    """A plan with every slot filled; at random, with copies, at odd layer ids."""
    rng = np.random.default_rng(seed)
    table = np.stack([random_row(rng, experts, ranks, slots) for _ in range(layers)])
    layer_ids = np.cumsum(rng.integers(1, 3, layers)).tolist()
    return Plan(Placement(table, experts, ranks, ranks // nodes), tuple(layer_ids))


def random_row(rng: np.random.Generator, experts: int, ranks: int, slots: int) -> np.ndarray:
    """[S] every expert somewhere, none twice on a rank, no slot empty."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in rng.permutation(experts).tolist():
        room = [rank for rank in held if len(rank) < slots]
        room[int(rng.integers(len(room)))].append(expert)
    for rank in held:
        others = [e for e in range(experts) if e not in rank]
        rank += rng.permutation(others)[: slots - len(rank)].tolist()
        rng.shuffle(rank)
    return np.array(held, np.int64).reshape(-1)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan without empty slots."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6]))
    experts = draw(st.integers(ranks, 13))
    slots = draw(st.integers(-(-experts // ranks), experts))
    nodes = draw(st.sampled_from([n for n in (1, 2, 3) if ranks % n == 0]))
    return random_plan(
        draw(st.integers(0, 2**32 - 1)),
        layers=draw(st.integers(1, 4)),
        experts=experts,
        ranks=ranks,
        slots=slots,
        nodes=nodes,
    )


def hints_of(plan: Plan) -> PlanHints:
    """Everything that a user could say of a plan."""
    placement = plan.placement
    return PlanHints(
        placement.num_ranks, placement.num_nodes, placement.num_experts, plan.layer_ids
    )


def experts_by_rank(placement: Placement) -> list[list[set[int]]]:
    """[layer][rank] what a rank holds."""
    table = placement.physical_to_logical.reshape(
        placement.num_layers, placement.num_ranks, placement.slots_per_rank
    )
    return [[set(rank.tolist()) - {-1} for rank in layer] for layer in table]
