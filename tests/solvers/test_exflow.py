"""ExFlow's program: optimal where it can be checked, good and quick where it cannot."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from solver_cases import make_problem, topic_tokens

from solvers import Budget, Problem, solve
from solvers.binary_program import BinaryProgram
from solvers.binary_program import solve as solve_program
from solvers.check import check
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


@pytest.mark.parametrize("solver", ["exflow", "exflow_pulp"])
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


@pytest.mark.parametrize("backend", ["cp_sat", "cbc"])
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
    for variables, number in program.totals:
        assert point[list(variables)].sum() == number
    for variables, consequence in program.implications:
        assert not point[list(variables)].all() or point[consequence]
    assert (exflow._ranks(point, pairs, 3, 4) == ranks).all()


@pytest.mark.parametrize("backend", ["cp_sat", "cbc"])
def test_back_ends_agree_on_a_knapsack_of_clauses(backend):
    program = BinaryProgram()
    x = program.binaries(5)
    program.total(x, 3)
    program.implies([x[0], x[1]], x[2])
    program.implies([x[3]], x[4])
    program.maximise({x[0]: 5, x[1]: 4, x[3]: 6, x[4]: -3, x[2]: 1})
    start = np.array([1, 1, 1, 0, 0], bool)
    answer = solve_program(program, backend, start, effort=5.0, budget=Budget())
    assert answer.optimal
    assert answer.upper_bound == 10
    assert answer.values.tolist() == [True, True, True, False, False]


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
    assert nodes == [[16] * 4, [4] * 4, [4] * 4, [4] * 4, [4] * 4]
    assert 0.9 < given[0] <= 1.0
    assert all(seconds > 0 for seconds in given)
