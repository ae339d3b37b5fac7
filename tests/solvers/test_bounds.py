"""No bound above any feasible value; and bounds that are worth something."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import (
    all_placements,
    layer_placements,
    make_problem,
    problems,
    random_placement,
    topic_tokens,
)

from solvers import Problem, bounds, solve
from solvers.bounds.transport import price_bound, transport_bound
from solvers.check import check, objective

SEEDS = st.integers(0, 2**32 - 1)


def flow_kept(problem: Problem, placement: np.ndarray) -> float:
    return (1 - check(problem, placement)["cross_rank_fraction"]) * problem.affinity.sum()


def assert_bounds_hold(problem: Problem, placement: np.ndarray) -> None:
    rough = replace(problem, tokens=None, primary=None, batch=None)
    for version, goal, dispatch in itertools.product(
        (problem, rough), ("balance", "traffic", "latency"), ("alltoall", "coherent", "allgather")
    ):
        asked = replace(version, objective=goal, dispatch=dispatch)
        parts = check(asked, placement)
        value, bound = objective(asked, parts), bounds.lower_bound(asked)
        assert bound <= value + 1e-9, (goal, dispatch, version is rough)
    if problem.num_layers > 1:
        assert bounds.kept_flow_bound(problem.affinity, problem) >= (
            flow_kept(problem, placement) - 1e-9
        )


@settings(max_examples=150, deadline=None)
@given(problems(), SEEDS)
def test_no_bound_is_above_the_value_of_a_placement(problem, seed):
    assert_bounds_hold(problem, random_placement(problem, np.random.default_rng(seed)))


@settings(max_examples=40, deadline=None)
@given(problems(max_experts=4, max_ranks=2, max_spare=1, max_layers=2), SEEDS)
def test_no_bound_is_above_the_optimum(problem, seed):
    best: dict[tuple[str, str], float] = {}
    kinds = list(itertools.product(("balance", "traffic"), ("alltoall", "coherent")))
    asked = {kind: replace(problem, objective=kind[0], dispatch=kind[1]) for kind in kinds}
    for placement in all_placements(problem):
        for kind, version in asked.items():
            value = objective(version, check(version, placement))
            best[kind] = min(value, best.get(kind, np.inf))
    for kind, version in asked.items():
        assert bounds.lower_bound(version) <= best[kind] + 1e-9


def least_max_load(load: np.ndarray, num_ranks: int, slots: int) -> float:
    """By brute force over all placements of one layer, copies included."""
    problem = Problem(load=load[None], num_ranks=num_ranks, slots_per_rank=slots, ranks_per_node=1)
    rows = np.array(layer_placements(problem)).reshape(-1, num_ranks, slots)
    held = (rows[..., None] == np.arange(load.size)).any(axis=2)
    share = load / held.sum(axis=1)
    return float((held * share[:, None]).sum(axis=2).max(axis=1).min())


@settings(max_examples=200, deadline=None)
@given(
    loads=st.lists(st.integers(0, 20), min_size=6, max_size=6),
    shape=st.sampled_from([(6, 2, 3), (6, 3, 2), (6, 2, 4), (6, 6, 1), (4, 3, 2), (3, 4, 2)]),
)
def test_load_bounds_against_brute_force(loads, shape):
    num_experts, num_ranks, slots = shape
    load = np.array(loads[:num_experts], np.float64)
    problem = Problem(
        load=load[None], num_ranks=num_ranks, slots_per_rank=slots, ranks_per_node=num_ranks
    )
    best = least_max_load(load, num_ranks, slots)
    assert bounds.rank_load_bound(problem)[0] <= best + 1e-9


@pytest.mark.parametrize(
    ("loads", "num_ranks", "expected"),
    [
        ([9, 1, 1, 1], 2, 10),  # the hottest takes the coolest along
        ([6, 6, 6, 1, 1, 1], 2, 13),  # two of three hot ones share a rank, and take a cool one
        ([4, 3, 3, 2], 2, 6),  # the mean
        ([5, 5, 5, 5, 5, 5], 3, 10),
    ],
)
def test_load_bounds_meet_the_optimum(loads, num_ranks, expected):
    problem = Problem(
        load=np.array([loads], np.float64),
        num_ranks=num_ranks,
        slots_per_rank=len(loads) // num_ranks,
        ranks_per_node=num_ranks,
    )
    assert bounds.rank_load_bound(problem)[0] == pytest.approx(expected)
    best = least_max_load(problem.load[0], num_ranks, problem.slots_per_rank)
    assert best == pytest.approx(expected)


def test_a_load_that_copies_cannot_split_bounds_redundant_slots_too():
    load = np.array([[12.0, 1, 1, 1]])
    problem = Problem(load=load, num_ranks=4, slots_per_rank=1, ranks_per_node=4)
    assert bounds.rank_load_bound(problem)[0] == 12
    two = replace(problem, num_ranks=5, ranks_per_node=5)
    assert bounds.rank_load_bound(two)[0] == 6
    many = replace(problem, slots_per_rank=4)
    assert bounds.rank_load_bound(many)[0] == pytest.approx(15 / 4)


def test_a_layer_without_load_is_balanced():
    problem = Problem(
        load=np.zeros((2, 4)), num_ranks=2, slots_per_rank=2, ranks_per_node=2, objective="balance"
    )
    assert solve(problem, "eplb").status == "optimal"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limits", [(1, 1), (2, 2), (2, 3), (5, 5), (9, 1)])
def test_transport_bounds_are_those_of_the_linear_program(seed, limits):
    from scipy.optimize import linprog

    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 9, (5, 5)) / (3.0 if seed else np.pi)
    rows, columns = np.kron(np.eye(5), np.ones(5)), np.tile(np.eye(5), 5)
    solved = linprog(
        -weights.ravel(),
        A_ub=np.vstack([rows, columns]),
        b_ub=np.repeat(limits, 5),
        bounds=(0, 1),
    )
    bound = transport_bound(weights, *limits)
    assert bound == pytest.approx(-solved.fun, rel=1e-7)
    assert bound >= -solved.fun * (1 - 1e-12)


@pytest.mark.parametrize("limits", [(1, 1), (2, 3), (5, 5), (40, 1), (1, 60), (0, 3)])
def test_bounds_by_prices_are_little_above_those_of_the_transport_problem(limits):
    weights = np.random.default_rng(1).exponential(1, (30, 30)) ** 2
    exact, by_prices = transport_bound(weights, *limits), price_bound(weights, *limits)
    assert exact * (1 - 1e-12) <= by_prices <= 1.05 * exact


def test_integers_are_exact_for_fractions_and_never_less_than_the_weights():
    sixths = np.arange(12).reshape(3, 4) / 6
    integers, scale = bounds.to_integers(sixths)
    assert scale == 6
    assert (integers == np.arange(12).reshape(3, 4)).all()
    odd = np.random.default_rng(0).gamma(0.3, size=(20, 20))
    integers, scale = bounds.to_integers(odd)
    assert (integers >= odd * scale).all()
    assert integers.sum() / scale == pytest.approx(odd.sum(), rel=1e-6)


@pytest.mark.parametrize("home", [True, False])
@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_traffic_bounds_meet_the_optimum_of_perfect_topics(dispatch, home):
    """Pairs that always fire together, in every layer, two to a rank: one rank serves a token."""
    rng = np.random.default_rng(0)
    pair = rng.integers(0, 4, 200)
    tokens = np.stack([np.stack([2 * pair, 2 * pair + 1], axis=1)] * 3, axis=1)
    problem = make_problem(
        tokens, 8, 4, 2, dispatch=dispatch, home=pair.astype(np.int64) if home else None
    )
    result = solve(problem, "contiguous")
    assert result.objective == pytest.approx(
        0 if home else 0.75 * (1 if dispatch == "alltoall" else 1 / 3)
    )
    assert result.status == "optimal"


def test_traffic_bounds_are_worth_something_where_topics_blur():
    problem = make_problem(topic_tokens(0), 16, 4, 4)
    ratio = bounds.lower_bound(problem) / solve(problem, "random").objective
    spare = replace(problem, slots_per_rank=5)
    assert 0.65 < ratio < 1
    assert bounds.lower_bound(spare) < bounds.lower_bound(problem)
    assert bounds.lower_bound(replace(problem, tokens=None)) > 0.3


def test_k_experts_need_ranks_for_all():
    tokens = np.tile(np.arange(6), (10, 1, 1))
    problem = make_problem(tokens, 6, 3, 2, home=np.zeros(10, np.int64))
    assert bounds.lower_bound(problem) == pytest.approx(2)
    assert solve(problem, "contiguous").status == "optimal"


def test_a_copy_lets_an_expert_meet_two_partners_and_the_bound_knows():
    tokens = np.array([[[0, 1]], [[0, 2]]])
    tight = make_problem(tokens, 4, 2, 2)
    assert bounds.lower_bound(tight) == pytest.approx(0.5 * 1.5)  # one pair is cut
    spare = make_problem(tokens, 3, 2, 2)
    placement = np.array([[0, 1, 0, 2]])
    assert objective(spare, check(spare, placement)) == pytest.approx(0.5)
    assert bounds.lower_bound(spare) == pytest.approx(0.5)


def test_no_tokens_no_pairs_no_bound():
    problem = Problem(load=np.ones((1, 4)), num_ranks=2, slots_per_rank=2, ranks_per_node=2)
    assert bounds.lower_bound(problem) is None
    assert bounds.lower_bound(replace(problem, objective="balance")) is not None


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    spare=st.integers(0, 1),
    robust=st.sampled_from(["mean", "worst", "cvar"]),
    dispatch=st.sampled_from(["alltoall", "coherent"]),
    workloads=st.sampled_from([None, (0, 0, 0), (0, 1, 0), (2, 0, 1)]),
    costs=st.booleans(),
    speeds=st.booleans(),
)
def test_bounds_hold_for_scenarios_workloads_link_costs_and_speeds(
    seed, spare, robust, dispatch, workloads, costs, speeds
):
    rng = np.random.default_rng(seed)
    tokens = topic_tokens(seed, num_tokens=60, num_layers=2, num_experts=8)
    scenario = np.append(np.arange(3), rng.integers(0, 3, len(tokens) - 3))
    loads = np.zeros((3, 2, 8))
    for layer, column in itertools.product(range(2), range(2)):
        np.add.at(loads, (scenario, layer, tokens[:, layer, column]), rng.integers(1, 3))
    cost = rng.integers(1, 9, (4, 4)) * (1.0 - np.eye(4))
    problem = make_problem(
        tokens,
        8,
        4,
        2 + spare,
        home=rng.integers(0, 4, len(tokens)) if seed % 3 else None,
        scenario_load=loads,
        scenario=scenario,
        workload=None if workloads is None else np.array(workloads),
        robust=robust,
        dispatch=dispatch,
        link_cost=cost if costs else None,
        rank_speed=rng.integers(1, 4, 4).astype(float) if speeds else None,
        latency_load_us=0.25,
        latency_message_us=1.5,
    )
    for goal in ("balance", "traffic", "latency"):
        asked = replace(problem, objective=goal)
        bound = bounds.lower_bound(asked)
        for _ in range(4):
            placement = random_placement(problem, rng)
            assert bound <= objective(asked, check(asked, placement)) + 1e-9
