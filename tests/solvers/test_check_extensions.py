"""The checker on scenarios, workloads, unequal ranks, link costs, pins, moves and budgets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import make_problem, random_placement, topic_tokens

from solvers import Problem
from solvers.check import check, objective
from solvers.problem import balanced_halves

NUM_RANKS = 4


def split_problem(seed, *, workload=None, slots=4, **others):
    """200 tokens of 16 experts in 3 scenarios, each with its own load."""
    rng = np.random.default_rng([seed, 5])
    tokens = topic_tokens(seed, num_tokens=200, num_layers=3).astype(np.int64)
    scenario = rng.integers(0, 3, len(tokens))
    load = np.zeros((3, 3, 16))
    for t, c in enumerate(scenario):
        for layer in range(3):
            for expert in tokens[t, layer]:
                load[c, layer, expert] += 1
    problem = make_problem(tokens, 16, NUM_RANKS, slots)
    return replace(
        problem,
        scenario_load=load,
        scenario=scenario,
        workload=None if workload is None else np.array(workload),
        home=rng.integers(0, NUM_RANKS, len(tokens)),
        **others,
    )


def rank_of(row, slots_per_rank):
    return {int(e): s // slots_per_rank for s, e in enumerate(row) if e >= 0}


def imbalances(problem, placement):
    """[scenario] mean over layers of max / mean, one pair at a time."""
    fair = problem.fair_share
    found = []
    for load in problem.scenario_load:
        of_layer = []
        for layer, row in enumerate(placement):
            where = rank_of(row, problem.slots_per_rank)
            ranks = [0.0] * NUM_RANKS
            for expert, rank in where.items():
                ranks[rank] += load[layer, expert]
            mean = sum(ranks) / NUM_RANKS
            of_layer.append(max(r / f for r, f in zip(ranks, fair, strict=True)) / mean)
        found.append(sum(of_layer) / len(of_layer))
    return found


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_imbalance_over_scenarios_is_the_mean_of_theirs(seed):
    problem = split_problem(seed, rank_speed=np.array([1.0, 2.0, 1.0, 4.0]))
    placement = random_placement(problem, np.random.default_rng(seed))
    expected = sum(imbalances(problem, placement)) / 3
    figures = check(problem, placement)
    assert figures["imbalance_scenarios"] == pytest.approx(expected, rel=1e-12)
    assert objective(replace(problem, objective="balance"), figures) == pytest.approx(expected)


def test_balance_over_folds_is_that_of_what_is_left_without_each():
    problem = split_problem(3)
    left = problem.scenario_load.sum(axis=0) - problem.scenario_load
    placement = random_placement(problem, np.random.default_rng(3))
    found = check(replace(problem, folds=True), placement)["imbalance_scenarios"]
    expected = check(replace(problem, scenario_load=left), placement)["imbalance_scenarios"]
    assert found == pytest.approx(expected, rel=1e-12)


def in_parts(workload=None, **others):
    """A problem whose tokens lie in 24 parts of each workload, one after another."""
    problem = split_problem(3)
    count = 24 if workload is None else len(workload)
    scenario = np.arange(len(problem.tokens)) % count
    load = np.zeros((count, *problem.load.shape))
    row, layer, column = np.nonzero(problem.tokens >= 0)
    np.add.at(load, (scenario[row], layer, problem.tokens[row, layer, column]), 1)
    return replace(
        problem, scenario_load=load, scenario=scenario, workload=workload, folds=True, **others
    )


def test_parts_are_dealt_out_to_three_folds():
    problem = in_parts()
    folds = problem.scenario_load.reshape(8, 3, *problem.load.shape).sum(axis=0)
    expected = replace(problem, scenario_load=folds, scenario=problem.scenario % 3)
    placement = random_placement(problem, np.random.default_rng(3))
    found = check(problem, placement)["imbalance_scenarios"]
    assert found == pytest.approx(check(expected, placement)["imbalance_scenarios"], rel=1e-12)


def test_halves_scatter_about_the_whole_as_the_whole_does_about_the_truth():
    half = balanced_halves()
    assert (half.sum(axis=1) == 12).all()
    assert (half.sum(axis=0) == 23).all()
    parts = np.random.default_rng(0).exponential(size=24)
    found = np.mean((half @ parts / 12 - parts.mean()) ** 2)
    assert found == pytest.approx(parts.var(ddof=1) / 24, rel=1e-12)


@pytest.mark.parametrize("workload", [None, np.repeat([0, 1], 24)])
def test_resampled_balance_is_that_of_halves_of_the_requests(workload):
    problem = in_parts(workload, resampled=True)
    placement = random_placement(problem, np.random.default_rng(3))
    loads = problem.scenario_load.reshape(-1, 24, *problem.load.shape)
    halves = np.concatenate([[own[half].sum(axis=0) for half in balanced_halves()]
                             for own in loads])  # fmt: skip
    each = replace(
        problem, folds=False, scenario_load=halves, scenario=np.zeros_like(problem.scenario),
        workload=None,
    )  # fmt: skip
    found = check(problem, placement)["imbalance_scenarios"]
    assert found == pytest.approx(sum(imbalances(each, placement)) / len(halves), rel=1e-12)
    assert problem.workload_of_judged.shape == (len(halves),)


def test_a_workload_needs_two_folds():
    with pytest.raises(ValueError, match="two folds"):
        split_problem(3, workload=[0, 1, 1], folds=True)


@pytest.mark.parametrize("robust", ["mean", "worst", "cvar"])
def test_workloads_count_alike_and_are_summed_up_as_asked(robust):
    problem = split_problem(1, workload=[0, 1, 1], robust=robust)
    placement = random_placement(problem, np.random.default_rng(1))
    first, *second = imbalances(problem, placement)
    of_workload = [first, sum(second) / 2]
    traffic, tokens = [0, 0], [0, 0]
    for t, c in enumerate(problem.scenario):
        w = int(problem.workload[c])
        tokens[w] += 1
        for layer, row in enumerate(placement):
            where = rank_of(row, problem.slots_per_rank)
            ranks = {where[int(e)] for e in problem.tokens[t, layer]}
            traffic[w] += len(ranks - {int(problem.home[t])})
    per_token = [m / (n * 3) for m, n in zip(traffic, tokens, strict=True)]
    pick = {"mean": lambda x: sum(x) / 2, "worst": max, "cvar": max}[robust]  # the worse of two
    figures = check(problem, placement)
    assert figures["imbalance_scenarios"] == pytest.approx(pick(of_workload))
    assert figures["traffic_workloads"] == pytest.approx(pick(per_token))
    assert objective(problem, figures) == figures["traffic_workloads"]


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_messages_cost_what_their_link_does(dispatch):
    rng = np.random.default_rng(2)
    cost = rng.random((NUM_RANKS, NUM_RANKS))
    np.fill_diagonal(cost, 0.0)
    problem = split_problem(2, link_cost=cost, dispatch=dispatch)
    placement = random_placement(problem, rng)
    total = 0.0
    for t in range(len(problem.tokens)):
        home = int(problem.home[t])
        for layer, row in enumerate(placement):
            where = rank_of(row, problem.slots_per_rank)
            experts = problem.tokens[t, layer].tolist()
            ranks = {where[e] for e in experts}
            total += sum(cost[home, g] for g in ranks)
            if dispatch == "coherent":
                home = where[experts[0]]
                total += sum(cost[g, home] for g in ranks)
    figures = check(problem, placement)
    assert objective(problem, figures) == pytest.approx(total / len(problem.tokens) / 3)


def test_copies_on_new_ranks_are_counted_as_moves():
    problem = split_problem(3)
    current = random_placement(problem, np.random.default_rng(3))
    moved = current.copy()
    slots = problem.slots_per_rank
    moved[1, [0, slots]] = moved[1, [slots, 0]]  # two experts change places
    moved[2, :slots] = moved[2, :slots][::-1]  # no one leaves the rank
    assert check(replace(problem, current=current), current)["moves"] == 0
    assert check(replace(problem, current=current), moved)["moves"] == 2
    with pytest.raises(ValueError, match="2 moves, at most 1"):
        check(replace(problem, current=current, max_moves=1), moved)


def test_pins_slots_and_budgets_that_are_not_kept_are_refused():
    problem = split_problem(4, slots=5)
    placement = np.full((3, 20), -1)
    placement[:, np.arange(20) % 5 < 4] = np.arange(16)
    pinned = np.full((3, 16), -1)
    pinned[1, 0] = 0
    check(replace(problem, pinned=pinned), placement)
    pinned[1, 0] = 3
    with pytest.raises(ValueError, match="layer 1: expert 0 is not on rank 3"):
        check(replace(problem, pinned=pinned), placement)
    slots = np.full((3, NUM_RANKS), 4)
    check(replace(problem, rank_slots=slots), placement)
    placement[2, 4] = 15
    with pytest.raises(ValueError, match="layer 2: rank 0 fills 5 slots, it has 4"):
        check(replace(problem, rank_slots=slots), placement)
    assert check(replace(problem, slot_budget=13), placement)["slots_filled"] == 13
    with pytest.raises(ValueError, match="a rank fills 13 slots"):
        check(replace(problem, slot_budget=12), placement)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scenario_load": np.ones((2, 3, 5))}, "scenario_load has shape"),
        ({"workload": np.array([0, 2, 2])}, "workload must give"),
        ({"rank_speed": np.array([1.0, 1, 1, 0])}, "rank_speed must be 4 positive"),
        ({"rank_slots": np.full((3, 4), 3)}, "the ranks' 12 slots cannot hold 16"),
        ({"link_cost": np.ones((4, 4))}, "0 on the diagonal"),
        ({"pinned": np.zeros((3, 16), np.int64)}, "more experts are pinned"),
        ({"max_moves": 3}, "needs current"),
        ({"slot_budget": 11}, "need 12"),
    ],
)
def test_an_impossible_problem_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(split_problem(5), **wrong)


def test_a_problem_without_scenarios_is_one_workload():
    problem = Problem(load=np.ones((1, 4)), num_ranks=2, slots_per_rank=2, ranks_per_node=2)
    assert problem.num_workloads == 1
    assert "imbalance_scenarios" not in check(problem, np.arange(4)[None])


def test_imbalance_over_batches_counts_load_by_what_is_fair_for_a_ranks_speed():
    tokens = np.array([[[0]], [[2]], [[2]], [[3]]])
    problem = make_problem(tokens, 4, 2, 2, batch=np.zeros(4, np.int64))
    placement = np.arange(4)[None]
    alike = check(problem, placement)["imbalance_batch"]
    uneven = check(replace(problem, rank_speed=np.array([1.0, 3.0])), placement)
    assert (alike, uneven["imbalance_batch"]) == (1.5, 1.0)


def test_redundant_slots_and_scenarios_need_the_scenario_of_each_token():
    problem = split_problem(4, slots=5)
    with pytest.raises(ValueError, match="scenario of each token"):
        replace(problem, scenario=None)
    no_tokens = replace(problem, scenario=None, tokens=None, home=None, primary=None)
    assert no_tokens.scenario_load is not None
    no_redundant_slots = replace(split_problem(4), scenario=None)
    assert no_redundant_slots.scenario_load is not None
