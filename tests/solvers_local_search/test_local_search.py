"""Whole searches: sound, deterministic, within their cap, better than contiguous."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers import Budget, NoSolutionFound, check
from solvers.local_search import _align, _coherent_traffic, _prepare, local_search

from .cases import group_of, groups_used, problem_of, random_tokens, topic_tokens

QUICK = settings(max_examples=12, deadline=None)


@st.composite
def problems(draw):
    """Random tokens on few ranks: divisible or not, spare slots, one or two nodes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_ranks = draw(st.sampled_from([1, 2, 3, 4, 6]))
    num_experts = draw(st.integers(2, 14))
    nodes = 2 if num_ranks % 2 == 0 and draw(st.booleans()) else 1
    tokens = random_tokens(
        rng,
        draw(st.integers(1, 80)),
        draw(st.integers(1, 3)),
        num_experts,
        2,
        gaps=draw(st.booleans()),
    )
    return problem_of(
        tokens,
        num_experts,
        num_ranks,
        slots_per_rank=min(num_experts, -(-num_experts // num_ranks) + draw(st.integers(0, 2))),
        ranks_per_node=num_ranks // nodes,
        node_weight=3.0 if nodes == 2 else 0.0,
        dispatch=draw(st.sampled_from(["alltoall", "coherent", "allgather"])),
        objective=draw(st.sampled_from(["traffic", "balance"])),
        max_imbalance=draw(st.sampled_from([None, 1.2, 2.0])),
    )


@QUICK
@given(problem=problems(), seed=st.integers(0, 5))
def test_every_placement_is_sound_and_its_cap_kept_or_said_to_be_broken(problem, seed):
    result = solvers.solve(problem, "local_search", seed=seed)
    assert result.placement.shape == (problem.num_layers, problem.num_slots)
    parts = check.check(problem, result.placement)  # raises where it is unsound
    imbalance = parts.get("imbalance_served", parts["imbalance"])
    cap = problem.max_imbalance
    broken = cap is not None and imbalance > cap * (1 + 1e-9)
    assert (result.status == "infeasible") == broken


@pytest.mark.parametrize(("seed", "slots"), [(0, 5), (1, 5), (2, 5), (3, 6)])
def test_spare_slots_do_not_break_a_cap_that_is_kept_without_them(seed, slots):
    tokens = topic_tokens(seed, num_tokens=200)
    home = np.arange(200) % 4
    for width in (4, slots):
        problem = problem_of(tokens, 16, 4, slots_per_rank=width, max_imbalance=1.1, home=home)
        assert solvers.solve(problem, "local_search", seed=0).status == "feasible"


@QUICK
@given(problem=problems())
def test_alltoall_without_a_cap_is_never_worse_than_contiguous(problem):
    fewest = -(-problem.num_experts // problem.num_ranks)
    problem = replace(
        problem, dispatch="alltoall", objective="traffic", max_imbalance=None,
        slots_per_rank=fewest,
    )  # fmt: skip
    ours, theirs = (solvers.solve(problem, name) for name in ("local_search", "contiguous"))
    assert ours.objective <= theirs.objective + 1e-9


@pytest.mark.parametrize("cap", [1.05, 1.2, 1.5])
@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_a_cap_that_can_be_kept_is_kept_and_traffic_still_falls(dispatch, cap):
    problem = problem_of(topic_tokens(0), 16, 4, dispatch=dispatch, max_imbalance=cap)
    ours = solvers.solve(problem, "local_search")
    assert ours.status == "feasible"
    assert ours.parts["imbalance"] <= cap * (1 + 1e-9)
    contiguous = solvers.solve(replace(problem, max_imbalance=None), "contiguous")
    assert ours.objective < 0.88 * contiguous.objective


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_topics_are_found_when_no_cap_forbids_it(dispatch):
    """Sixteen experts in four groups that fire together, on four ranks."""
    problem = problem_of(topic_tokens(1), 16, 4, dispatch=dispatch)
    ours, theirs = (solvers.solve(problem, name) for name in ("local_search", "contiguous"))
    assert ours.objective < 0.65 * theirs.objective
    assert ours.parts["span"] < 0.75 * theirs.parts["span"]


def test_a_looser_cap_never_costs_traffic():
    problem = problem_of(topic_tokens(2), 16, 4)
    values = [
        solvers.solve(replace(problem, max_imbalance=cap), "local_search").objective
        for cap in (1.02, 1.1, 1.3, None)
    ]
    assert values == sorted(values, reverse=True)


def test_a_cap_below_the_floor_is_infeasible_and_says_how_close_it_came():
    load = np.ones((2, 8))
    load[:, 0] = 20  # one expert alone carries twice the mean rank load
    problem = replace(problem_of(topic_tokens(3, num_layers=2, num_experts=8), 8, 4), load=load,
                      max_imbalance=1.5)  # fmt: skip
    result = solvers.solve(problem, "local_search")
    floor = 20 / (27 / 4)
    assert result.status == "infeasible"
    assert result.parts["imbalance"] >= floor - 1e-9


def test_two_nodes_are_told_apart():
    problem = problem_of(topic_tokens(4), 16, 4, ranks_per_node=2, node_weight=8.0)
    flat = solvers.solve(replace(problem, node_weight=0.0), "local_search")
    aware = solvers.solve(problem, "local_search")
    assert aware.parts["node_messages"] < flat.parts["node_messages"]
    assert aware.objective < check.objective(problem, check.check(problem, flat.placement))


def test_balance_alone_reaches_the_even_load_that_exists():
    load = np.tile(np.array([9.0, 1, 8, 2, 7, 3, 6, 4]), (3, 1))
    problem = solvers.Problem(
        load=load, num_ranks=4, slots_per_rank=2, ranks_per_node=4, objective="balance"
    )
    result = solvers.solve(problem, "local_search")
    assert result.objective == pytest.approx(1.0)
    assert result.status == "optimal"


def test_latency_weighs_load_against_messages():
    tokens = topic_tokens(5)
    base = problem_of(tokens, 16, 4, objective="latency")
    cheap_links = solvers.solve(
        replace(base, latency_load_us=1.0, latency_message_us=1e-6), "local_search"
    )
    dear_links = solvers.solve(
        replace(base, latency_load_us=1e-6, latency_message_us=1.0), "local_search"
    )
    assert cheap_links.parts["imbalance"] < dear_links.parts["imbalance"]
    assert dear_links.parts["messages_alltoall"] < cheap_links.parts["messages_alltoall"]


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
@pytest.mark.parametrize("slots", [4, 5])
def test_the_same_seed_gives_the_same_placement(dispatch, slots):
    problem = problem_of(
        topic_tokens(6, num_tokens=200), 16, 4, dispatch=dispatch, max_imbalance=1.2,
        slots_per_rank=slots,
    )  # fmt: skip
    first, again = (solvers.solve(problem, "local_search", seed=3) for _ in range(2))
    assert (first.placement == again.placement).all()
    assert first.objective == again.objective


def test_an_expired_budget_gives_a_sound_placement_or_says_that_there_is_none():
    problem = problem_of(topic_tokens(7, num_tokens=100), 16, 4)
    result = solvers.solve(problem, "local_search", budget=Budget(0.0))
    assert result.termination == "time_limit"
    assert result.status == "feasible"
    with pytest.raises(NoSolutionFound):
        solvers.solve(replace(problem, dispatch="coherent"), "local_search", budget=Budget(0.0))


def test_a_stopped_budget_ends_the_search_as_interrupted():
    budget = Budget()
    budget.stop()
    result = solvers.solve(problem_of(topic_tokens(8), 16, 4), "local_search", budget=budget)
    assert result.termination == "interrupted"


@QUICK
@given(seed=st.integers(0, 2**32), nodes=st.booleans())
def test_coherent_traffic_equals_a_direct_count(seed, nodes):
    rng = np.random.default_rng(seed)
    tokens = random_tokens(rng, 50, 3, 8, 3, gaps=True)
    problem = problem_of(tokens, 8, 4, dispatch="coherent", ranks_per_node=2 if nodes else 4,
                         node_weight=2.0 if nodes else 0.0)  # fmt: skip
    placement = [rng.permutation(8) for _ in range(3)]
    expected = 0.0
    for groups, weight in [(4, 1.0), (2, 2.0)][: 1 + nodes]:
        where = [group_of(slots, groups) for slots in placement]
        for token in tokens:
            for layer in range(3):
                used = groups_used(token[layer], where[layer])
                expected += weight * 2 * len(used)
                if layer > 0 and token[layer - 1, 0] >= 0:
                    expected -= weight * (where[layer - 1][int(token[layer - 1, 0])] in used)
    found = _coherent_traffic(_prepare(problem), placement)
    assert found == pytest.approx(expected / (50 * 3))


@QUICK
@given(seed=st.integers(0, 2**32), ranks_per_node=st.sampled_from([4, 2]))
def test_aligning_relabels_ranks_and_nothing_else(seed, ranks_per_node):
    rng = np.random.default_rng(seed)
    tokens = topic_tokens(seed % 100, num_tokens=120, num_layers=4, num_experts=8)
    problem = problem_of(tokens, 8, 4, dispatch="coherent", ranks_per_node=ranks_per_node)
    layers = _prepare(problem)
    before = [rng.permutation(8) for _ in range(4)]
    after = _align(layers, before)
    for old, new in zip(before, after, strict=True):
        assert {frozenset(r) for r in old.reshape(4, 2)} == {
            frozenset(r) for r in new.reshape(4, 2)
        }
        nodes = 4 // ranks_per_node
        assert {frozenset(n) for n in old.reshape(nodes, -1)} == {
            frozenset(n) for n in new.reshape(nodes, -1)
        }
    if ranks_per_node == 4:
        assert _coherent_traffic(layers, after) <= _coherent_traffic(layers, before) + 1e-12


def test_relabelling_the_ranks_changes_no_value_of_the_search():
    """Without home ranks, which rank is called which is nobody's business."""
    problem = problem_of(topic_tokens(9, num_tokens=150), 16, 4, max_imbalance=1.3)
    result = solvers.solve(problem, "local_search")
    order = np.array([3, 1, 0, 2])
    moved = result.placement.reshape(5, 4, 4)[:, order].reshape(5, 16)
    parts = check.check(problem, moved)
    assert check.objective(problem, parts) == pytest.approx(result.objective)
    assert parts["imbalance"] == pytest.approx(result.parts["imbalance"])


def test_a_replica_pays_for_an_expert_that_everybody_uses():
    """Expert 0 is in every token; with a spare slot per rank it can be everywhere."""
    rng = np.random.default_rng(11)
    others = rng.integers(1, 16, (400, 2, 1))
    tokens = np.concatenate([np.zeros_like(others), others], axis=2)
    problem = problem_of(tokens, 16, 4, home=np.arange(400) % 4)
    without = solvers.solve(problem, "local_search")
    spare = solvers.solve(replace(problem, slots_per_rank=5), "local_search")
    assert spare.objective < 0.75 * without.objective
    assert (spare.placement == 0).sum(axis=1).min() > 1


def test_the_solver_itself_returns_a_solution_for_one_rank():
    problem = problem_of(topic_tokens(10, num_tokens=20), 16, 1)
    solution = local_search(problem, 0, Budget())
    assert sorted(solution.placement[0]) == list(range(16))


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_a_cap_binds_the_objective_latency_as_well(dispatch):
    """Messages are dear and load is cheap: only the cap keeps the ranks balanced."""
    options = {"dispatch": dispatch, "objective": "latency", "max_imbalance": 1.1}
    prices = {"latency_load_us": 0.01, "latency_message_us": 1.0}
    problem = problem_of(topic_tokens(1), 16, 4, **options, **prices)
    assert solvers.solve(problem, "local_search").status == "feasible"


def test_a_problem_without_tokens_is_one_of_load_alone():
    tokens = topic_tokens(1)
    problem = problem_of(tokens, 16, 4, objective="balance")
    empty = replace(problem, tokens=tokens[:0], primary=tokens[:0, :, 0])
    assert empty.tokens is None
    assert solvers.solve(empty, "local_search").parts["imbalance"] < 1.1
