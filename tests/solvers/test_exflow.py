"""ExFlow's program: optimal where it can be checked, good and quick where it cannot."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from solver_cases import make_problem, topic_tokens

from solvers import Budget, Problem, solve
from solvers.check import check
from solvers.integer_program import BACKENDS
from solvers.published import exflow


def problem_of(flow, num_ranks, slots_per_rank, ranks_per_node=None):
    num_layers, num_experts = len(flow) + 1, flow.shape[1]
    return Problem(
        load=np.ones((num_layers, num_experts)),
        num_ranks=num_ranks,
        slots_per_rank=slots_per_rank,
        ranks_per_node=ranks_per_node or num_ranks,
        affinity=flow,
        objective="balance",
    )


def best_kept(flow, sizes):
    """Largest flow within ranks, by brute force over labelled partitions, layer by layer."""
    rows = np.array(sorted(set(itertools.permutations(np.repeat(np.arange(len(sizes)), sizes)))))
    value = np.zeros(len(rows))
    for layer_flow in flow:
        stay = np.array(
            [[layer_flow[first[:, None] == second].sum() for second in rows] for first in rows]
        )
        value = (value[:, None] + stay).max(axis=0)
    return value.max()


@pytest.mark.parametrize("solver", ["exflow_pulp", *(f"exflow:{name}" for name in BACKENDS)])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (2, 2, 2)])
def test_small_chains_are_solved_and_proved_optimal(solver, sizes):
    num_experts = sum(sizes)
    flow = np.random.default_rng(len(sizes)).gamma(0.3, size=(3, num_experts, num_experts))
    result = solve(problem_of(flow, len(sizes), sizes[0]), solver)
    optimum = 1 - best_kept(flow, sizes) / flow.sum()
    assert result.parts["cross_rank_fraction"] == pytest.approx(optimum, abs=1e-9)
    assert result.bound_of == "cross_rank_fraction"
    assert result.lower_bound == pytest.approx(optimum, abs=1e-6)
    assert result.notes["integer_program"] == "optimal"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_program_finds_the_optimum_without_help_from_the_chain(backend, monkeypatch):
    """Start it from the contiguous placement."""
    from solvers import chain

    def start(flow, sizes, rng, budget, effort):
        return chain.contiguous_ranks(len(flow) + 1, sizes)

    monkeypatch.setattr(exflow, "keep_flow", start)
    flow = np.random.default_rng(9).integers(0, 20, size=(2, 6, 6)).astype(float)
    sizes = np.array([2, 2, 2])
    stage = exflow.place(flow, sizes, np.random.default_rng(0), Budget(), backend)
    optimum = best_kept(flow, sizes)
    assert exflow.kept_flow(flow, stage.ranks) == optimum
    assert (stage.upper_bound, stage.program) == (optimum, "optimal")
    assert exflow.kept_flow(flow, start(flow, sizes, None, None, None)) < optimum


def test_points_of_the_program_are_placements_and_back():
    ranks = np.array([[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 1, 0]])
    program, pairs = exflow._program(np.ones((2, 4, 4), np.int64), 2)
    point = exflow._shared(ranks, pairs)
    assert program.is_feasible(point)
    assert program.value(point) == exflow.kept_flow(np.ones((2, 4, 4)), ranks)
    assert (exflow._ranks(point, pairs, 3, 4) == ranks).all()


def test_the_bound_is_only_of_the_program_where_slots_leave_no_choice():
    """With a spare slot per rank a placement may keep more flow than equal counts allow."""
    flow = np.zeros((1, 4, 4))
    flow[0, 0, 0] = flow[0, 0, 1] = flow[0, 0, 2] = 1
    tight, loose = solve(problem_of(flow, 2, 2), "exflow"), solve(problem_of(flow, 2, 3), "exflow")
    assert tight.lower_bound == tight.parts["cross_rank_fraction"] == pytest.approx(1 / 3)
    assert loose.lower_bound < 1e-9


def test_a_large_chain_gets_a_bound_and_is_not_called_optimal():
    flow = np.random.default_rng(2).gamma(0.3, size=(4, 24, 24))
    result = solve(problem_of(flow, 6, 4), "exflow")
    assert result.status == "feasible"
    assert result.notes["integer_program"] == "not run"
    assert 0.05 < result.gap < 0.5


def test_nodes_come_first():
    tokens = topic_tokens(4, num_experts=24, top_k=3)
    problem = make_problem(tokens, 24, 4, 6, ranks_per_node=2)
    nodes = solve(replace(problem, num_ranks=2, slots_per_rank=12), "exflow")
    ranks = solve(problem, "exflow")
    as_nodes = replace(problem, num_ranks=2, slots_per_rank=12)
    kept = check(as_nodes, ranks.placement)["cross_rank_fraction"]
    assert kept == pytest.approx(nodes.parts["cross_rank_fraction"], rel=1e-9)
    contiguous = solve(problem, "contiguous")
    assert ranks.parts["cross_rank_fraction"] < 0.8 * contiguous.parts["cross_rank_fraction"]


@pytest.mark.parametrize("shape", [(7, 3, 3), (6, 4, 2), (5, 8, 1), (3, 5, 2)])
def test_uneven_numbers_of_experts_are_spread_evenly(shape):
    num_experts, num_ranks, slots = shape
    flow = np.random.default_rng(0).gamma(0.3, size=(2, num_experts, num_experts))
    result = solve(problem_of(flow, num_ranks, slots), "exflow")
    held = (result.placement.reshape(3, num_ranks, slots) >= 0).sum(axis=2)
    assert held.max() - held.min() <= 1
    optimum = 1 - best_kept(flow, np.sort(held[0])[::-1]) / flow.sum()
    assert result.parts["cross_rank_fraction"] == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_no_flow_means_contiguous(num_layers):
    problem = problem_of(np.zeros((num_layers - 1, 4, 4)), 2, 2)
    result = solve(problem, "exflow")
    assert (result.placement == np.arange(4)).all()


def test_a_time_limit_is_kept_and_admitted():
    flow = np.random.default_rng(2).gamma(0.3, size=(5, 16, 16))
    result = solve(problem_of(flow, 4, 4), "exflow", time_limit=0.5)
    assert result.termination == "time_limit"
    assert result.lower_bound <= result.parts["cross_rank_fraction"]


def test_a_time_limit_leaves_time_for_the_ranks_of_a_node(monkeypatch):
    flow = np.random.default_rng(2).gamma(0.2, size=(12, 64, 64))
    problem = problem_of(flow, 16, 4, ranks_per_node=4)
    nodes, given = [], []
    place = exflow.place

    def spy(flow, sizes, rng, budget, backend):
        given.append(budget.seconds)
        nodes.append(sizes.tolist())
        return place(flow, sizes, rng, budget, backend)

    monkeypatch.setattr(exflow, "place", spy)
    solve(problem, "exflow", time_limit=2.0)
    # before these a miniature was placed, to compile what is needed
    assert nodes[-5:] == [[16] * 4, [4] * 4, [4] * 4, [4] * 4, [4] * 4]
    assert 0.7 < given[-5] <= 1.0
    assert all(seconds > 0 for seconds in given[-5:])


def test_bisection_splits_the_ranks_into_halves_again_and_again(monkeypatch):
    seen = []
    place = exflow.place

    def spy(flow, sizes, *others):
        seen.append(sizes.tolist())
        return place(flow, sizes, *others)

    monkeypatch.setattr(exflow, "place", spy)
    flow = np.random.default_rng(0).gamma(0.3, size=(2, 12, 12))
    result = solve(problem_of(flow, 6, 2), "exflow_bisection")
    assert seen == [[6, 6], [4, 2], [2, 2], [4, 2], [2, 2]]
    assert result.lower_bound <= result.parts["cross_rank_fraction"]


def test_one_stage_sees_no_nodes_and_keeps_at_least_as_much_as_two():
    tokens = topic_tokens(4, num_experts=24, top_k=3)
    problem = make_problem(tokens, 24, 4, 6, ranks_per_node=2)
    one, two = solve(problem, "exflow_one_stage"), solve(problem, "exflow")
    flat = solve(replace(problem, ranks_per_node=4), "exflow")
    assert (one.placement == flat.placement).all()
    assert one.parts["cross_rank_fraction"] <= two.parts["cross_rank_fraction"]


def test_top1_looks_at_the_primary_experts_alone():
    """Primary experts go 0 -> 1 -> 0; all that the secondary ones do is noise."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4, (200, 1))
    primary = np.concatenate([first, (first + 1) % 4, first], axis=1)
    noise = (primary + rng.integers(1, 4, primary.shape)) % 4
    tokens = np.stack([noise, primary], axis=2).astype(np.int16)
    problem = make_problem(tokens, 4, 2, 2, primary=primary.astype(np.int16))
    flow = exflow.primary_flow(problem)
    assert flow[0, 0, 1] == (first == 0).sum()
    assert flow.sum() == 400
    placement = solve(problem, "exflow_top1").placement.reshape(3, 2, 2)
    ranks = np.array([[np.nonzero((row == e).any(axis=1))[0][0] for e in range(4)]
                      for row in placement])  # fmt: skip
    assert all(len({ranks[0, e], ranks[1, (e + 1) % 4], ranks[2, e]}) == 1 for e in range(4))


def test_top1_without_primary_experts_takes_the_first_column():
    tokens = np.array([[[2, 1], [0, 1], [-1, -1]], [[2, 0], [1, 0], [0, 2]]], np.int16)
    flow = exflow.primary_flow(make_problem(tokens, 3, 1, 3))
    assert np.argwhere(flow).tolist() == [[0, 2, 0], [0, 2, 1], [1, 1, 0]]
