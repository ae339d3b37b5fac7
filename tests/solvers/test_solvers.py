"""What holds for every solver, those that see nothing, golden values, and the documented table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import make_problem, problems, topic_tokens

from solvers import Problem, get, names, solve
from solvers.check import check

ROOT = Path(__file__).parents[2]
TRACE = ROOT.parent / "shared" / "traces" / "gpt_oss_20b_decode.npz"
BASIC = ("contiguous", "round_robin", "random", "eplb", "eplb_global")
SHAPES = [  # experts, ranks, slots per rank, ranks per node
    (8, 4, 2, 4),
    (8, 4, 3, 2),
    (7, 3, 3, 3),
    (5, 8, 1, 4),
    (6, 1, 7, 1),
    (9, 6, 2, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("solver", names())
def test_every_solver_copes_with_every_shape_and_repeats_itself(solver, shape):
    num_experts, num_ranks, slots, ranks_per_node = shape
    tokens = topic_tokens(3, num_tokens=60, num_layers=3, num_experts=8, top_k=3, num_topics=2)
    tokens = np.where(tokens < num_experts, tokens, tokens % 4 if num_experts > 4 else 0)
    for row in tokens.reshape(-1, 3):  # the first use of an expert counts, used ones come first
        distinct = list(dict.fromkeys(row.tolist()))
        row[:] = distinct + [-1] * (3 - len(distinct))
    problem = make_problem(
        tokens,
        num_experts,
        num_ranks,
        slots,
        ranks_per_node=ranks_per_node,
        home=np.arange(60) % num_ranks,
        batch=np.arange(60) // 12,
        primary=tokens[:, :, 0],
    )
    first, second = solve(problem, solver, seed=4), solve(problem, solver, seed=4)
    if get(solver).deterministic:
        assert first.placement.tobytes() == second.placement.tobytes()
    copies = np.bincount(first.placement[first.placement >= 0], minlength=num_experts)
    if not get(solver).replicates:
        assert (copies == problem.num_layers).all()
    assert first.lower_bound is None or 0 <= first.gap <= 1


@settings(max_examples=80, deadline=None)
@given(problems(), st.sampled_from(BASIC), st.integers(0, 100))
def test_placements_are_sound_and_even_without_replicas(problem, solver, seed):
    result = solve(problem, solver, seed=seed)  # which checks the placement
    held = (result.placement.reshape(-1, problem.num_ranks, problem.slots_per_rank) >= 0).sum(2)
    if not get(solver).replicates:
        assert held.max() == -(-problem.num_experts // problem.num_ranks)
        assert held.min() == problem.num_experts // problem.num_ranks
    elif (
        problem.num_slots <= problem.num_experts * problem.num_ranks
        and problem.slots_per_rank <= (problem.num_experts)
    ):
        assert (result.placement >= 0).all()  # no redundant slot is wasted


def test_256_experts_on_144_ranks_of_two_slots():
    problem = Problem(load=np.ones((2, 256)), num_ranks=144, slots_per_rank=2, ranks_per_node=8)
    for solver in ("contiguous", "round_robin", "random"):
        entry = get(solver)
        placement = entry.function(problem, 0, None).placement
        held = (placement.reshape(2, 144, 2) >= 0).sum(axis=2)
        assert (np.sort(held) == [1] * 32 + [2] * 112).all()
        check(problem, placement)


def test_contiguous_and_round_robin_are_what_they_say():
    problem = Problem(
        load=np.ones((1, 7)), num_ranks=3, slots_per_rank=3, ranks_per_node=3, objective="balance"
    )
    assert solve(problem, "contiguous").placement.tolist() == [[0, 1, 2, 3, 4, -1, 5, 6, -1]]
    assert solve(problem, "round_robin").placement.tolist() == [[0, 3, 6, 1, 4, -1, 2, 5, -1]]


def test_random_differs_by_seed_and_by_layer():
    problem = Problem(
        load=np.ones((2, 16)), num_ranks=4, slots_per_rank=4, ranks_per_node=4, objective="balance"
    )
    first, second = solve(problem, "random", 0).placement, solve(problem, "random", 1).placement
    assert (first != second).any()
    assert (first[0] != first[1]).any()


def topic_problem(**others) -> Problem:
    tokens = topic_tokens(0, num_layers=4, num_experts=20, num_topics=4, top_k=3)
    return make_problem(tokens, 20, 4, 5, home=np.arange(600) % 4, **others)


GOLDEN = {  # messages_alltoall, cross_rank_fraction, imbalance
    "contiguous": (1.8042, 0.7440, 1.1922),
    "round_robin": (1.7996, 0.7660, 1.1783),
    "random": (1.7925, 0.7839, 1.1828),
    "eplb": (1.9192, 0.7546, 1.0150),
    "exflow": (1.0492, 0.3617, 1.4744),
}


@pytest.mark.parametrize("solver", GOLDEN)
def test_golden_values_on_hidden_topics(solver):
    parts = solve(topic_problem(), solver).parts
    figures = (parts["messages_alltoall"], parts["cross_rank_fraction"], parts["imbalance"])
    assert figures == pytest.approx(GOLDEN[solver], abs=5e-4)


def test_each_is_best_at_what_it_minimises():
    problem = topic_problem()
    parts = {solver: solve(problem, solver).parts for solver in GOLDEN}

    def best(figure):
        return min(parts, key=lambda solver: parts[solver][figure])

    assert best("imbalance") == "eplb"
    assert best("cross_rank_fraction") == "exflow"
    assert parts["exflow"]["messages_alltoall"] < 0.7 * parts["contiguous"]["messages_alltoall"]


@settings(max_examples=25, deadline=None)
@given(problems(max_experts=6, max_ranks=3, max_spare=0))
def test_exflow_is_never_worse_than_contiguous_on_one_node(problem):
    if problem.num_layers == 1:
        return
    problem = replace(problem, ranks_per_node=problem.num_ranks)
    figure = "cross_rank_fraction"
    exflow, contiguous = solve(problem, "exflow").parts, solve(problem, "contiguous").parts
    assert exflow[figure] <= contiguous[figure] + 1e-12


@pytest.mark.skipif(not TRACE.exists(), reason="the GPT-OSS trace is not here")
def test_on_gpt_oss_affinity_pays_and_load_balances():
    from solver_cases import split_by_request

    train, test = split_by_request(TRACE, num_ranks=8, max_tokens=4000)
    parts = {}
    for solver in ("contiguous", "eplb", "exflow"):
        parts[solver] = check(test, solve(train, solver).placement)
    assert parts["eplb"]["imbalance"] < 1.15 < parts["contiguous"]["imbalance"]
    assert parts["exflow"]["messages_alltoall"] < 0.78 * parts["contiguous"]["messages_alltoall"]
    assert parts["exflow"]["messages_coherent"] < 0.65 * parts["contiguous"]["messages_coherent"]


def documented() -> dict[str, list[str]]:
    """Rows of the table in docs/solvers.md, by solver."""
    rows = {}
    for line in (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 5:
            rows[cells[0].strip("`")] = cells[1:]
    return rows


def test_the_documented_table_is_the_registry():
    rows = documented()
    assert sorted(rows) == names()
    for name, (source, sees, replicas, bound) in rows.items():
        entry = get(name)
        assert source == entry.source
        assert replicas == ("yes" if entry.replicates else "no")
        assert sees
        assert bound
        needed = {need.replace("_", " ") for need in entry.needs}
        assert all(need in sees for need in needed), f"{name} needs {needed}"
