"""Bounds on span and messages with redundant slots: below every placement, and not far below."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from solver_cases import (
    all_placements,
    make_problem,
    random_placement,
    topic_tokens,
)

from placer.trace import open_trace
from solvers import Budget, names, solve
from solvers.bounds import copies_kernels as kernels
from solvers.bounds.certifying import certify
from solvers.bounds.copies import Copies, CopyTokens
from solvers.bounds.copies_kernels import UNIT
from solvers.bounds.span import bounds_as_balanced
from solvers.bounds.spare import spare_total
from solvers.bounds.token_sets import TokenSets
from solvers.bounds.traffic import layer_bounds
from solvers.check import check

TRACES = Path(__file__).parents[2] / "traces"
FIGURES = ("span", "messages_alltoall", "messages_coherent")
STOP = np.zeros(1, np.int64)


def proven(problem, figure, budget=None):
    """Mean over tokens and layers that copies prove; None if no more than the cheap bound."""
    total = spare_total(problem, figure, layer_bounds(problem, figure), budget or Budget())
    return None if total is None else total / problem.tokens.shape[0] / problem.num_layers


def layer_tokens(tokens, num_experts, num_ranks, size, home):
    sets = TokenSets.of(tokens, num_experts, home)
    return CopyTokens.of(sets, num_ranks, size, home is not None)


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "slots"),
    [(3, 2, 2), (4, 2, 3), (4, 3, 2), (5, 3, 2), (3, 3, 2), (5, 2, 3)],
)
@pytest.mark.parametrize("homes", [True, False])
def test_no_bound_is_above_the_optimum(num_experts, num_ranks, slots, homes):
    rng = np.random.default_rng([num_experts, num_ranks, homes])
    for _ in range(3):
        skew = rng.dirichlet(np.ones(num_experts))
        width = int(rng.integers(1, min(4, num_experts) + 1))
        tokens = np.array([[rng.choice(num_experts, width, False, skew)] for _ in range(20)])
        tokens = tokens.astype(np.int16)
        tokens[rng.random(len(tokens)) < 0.1] = -1
        home = rng.integers(0, num_ranks, 20) if homes else None
        problem = make_problem(tokens, num_experts, num_ranks, slots, home=home)
        values = [check(problem, placement) for placement in all_placements(problem)]
        for figure in FIGURES:
            best = min(parts[figure] for parts in values)
            bound = proven(problem, figure)
            assert bound is None or bound <= best + 1e-9


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "slots", "top_k", "gap"),
    [(6, 2, 4, 3, 0.01), (6, 2, 4, 2, 0.01), (5, 2, 3, 2, 0.01), (5, 3, 2, 2, 0.15)],
)
def test_bounds_come_close_to_optima(num_experts, num_ranks, slots, top_k, gap):
    rng = np.random.default_rng(2)
    for _ in range(3):
        skew = rng.dirichlet(3 * np.ones(num_experts))
        tokens = np.array([[rng.choice(num_experts, top_k, False, skew)] for _ in range(60)])
        home = rng.integers(0, num_ranks, 60)
        problem = make_problem(tokens.astype(np.int16), num_experts, num_ranks, slots, home=home)
        best = min(check(problem, p)["messages_alltoall"] for p in all_placements(problem))
        cheap = float(layer_bounds(problem, "messages_alltoall").sum()) / 60
        assert cheap < 0.7 * best
        assert (1 - gap) * best <= proven(problem, "messages_alltoall") <= best + 1e-9


def test_nothing_is_searched_where_every_rank_can_hold_every_expert(monkeypatch):
    def search(*_):
        raise AssertionError("cheap bounds are met there")

    monkeypatch.setattr("solvers.bounds.spare.annealed", search)
    tokens = topic_tokens(2, num_tokens=80, num_layers=1, num_experts=4, num_topics=2)
    for slots in (4, 6):
        problem = make_problem(tokens, 4, 3, slots, home=np.arange(80) % 3)
        best = solve(problem, "local_search", seed=0)
        assert (best.parts["messages_alltoall"], best.parts["span"]) == (0.0, 1.0)
        for figure in FIGURES:
            assert proven(problem, figure) is None
            assert layer_bounds(problem, figure).sum() / 80 == best.parts[figure]


def test_copies_prove_far_more_than_room_for_pairs_does():
    tokens = topic_tokens(3, num_layers=1, num_experts=32, top_k=4, num_topics=8)
    problem = make_problem(tokens, 32, 8, 5, home=np.arange(600) % 8)
    best = solve(problem, "local_search", seed=0)
    (bound,) = certify(problem, best.placement, Budget(effort=3.0), ["messages_alltoall"])
    assert bound.method == "priced copies"
    assert bound.max_imbalance is None
    assert bound.gap < 0.2
    assert (best.objective - best.lower_bound) / best.objective > 2 * bound.gap


def test_more_effort_never_proves_less_and_the_same_effort_the_same():
    problem = make_problem(topic_tokens(2, num_layers=2), 16, 4, 5, home=np.arange(600) % 4)
    found = [
        proven(problem, "messages_alltoall", Budget(effort=effort)) or 0.0
        for effort in (0.0, 0.2, 0.4, 0.4, 0.8, 1.6)
    ]
    assert found == sorted(found)
    assert found[2] == found[3]
    assert found[0] == 0.0
    assert found[1] < found[-1]


@pytest.mark.parametrize("folds", [False, True])
def test_bounds_hold_with_scenarios_under_a_cap(folds):
    tokens = topic_tokens(6, num_tokens=200, num_layers=2)
    scenario = np.arange(200) // 50
    load = np.zeros((4, 2, 16))
    row, layer, column = np.nonzero(tokens >= 0)
    np.add.at(load, (scenario[row], layer, tokens[row, layer, column]), 1.0)
    problem = make_problem(
        tokens, 16, 4, 5, home=np.arange(200) % 4, scenario=scenario, scenario_load=load,
        folds=folds, max_imbalance=1.2,
    )  # fmt: skip
    best = solve(problem, "local_search", seed=0)
    for bound in certify(problem, best.placement, Budget(effort=1.0), FIGURES):
        assert bound.method == "priced copies"
        assert bound.lower_bound <= best.parts[bound.figure] + 1e-9


def test_several_placements_are_compared_with_one_bound():
    problem = make_problem(topic_tokens(2, num_layers=1), 16, 4, 5, home=np.arange(600) % 4)
    parts = [solve(problem, name).parts for name in ("local_search", "eplb_global")]
    bounds = bounds_as_balanced(problem, "messages_alltoall", parts, Budget(effort=0.5))
    assert [bound.value for bound in bounds] == [each["messages_alltoall"] for each in parts]
    assert bounds[0].lower_bound == bounds[1].lower_bound
    assert 0 < bounds[0].gap < bounds[1].gap < 0.5
    assert bounds_as_balanced(problem, "messages_alltoall", parts, Budget(effort=0.0)) == []


def test_nothing_is_begun_without_time():
    problem = make_problem(topic_tokens(2, num_layers=1), 16, 4, 5)
    placement = random_placement(problem, np.random.default_rng(0))
    for budget in (Budget(0.0), Budget(effort=0.0)):
        (bound,) = certify(problem, placement, budget, ["span"])
        assert bound.method == "transport problems"


def test_bounds_hold_where_ranks_differ_in_room_and_experts_are_pinned():
    rng = np.random.default_rng(4)
    tokens = np.array([[rng.permutation(4)[:2]] for _ in range(30)], np.int16)
    home = rng.integers(0, 3, 30)
    problem = make_problem(tokens, 4, 3, 2, home=home)
    limited = replace(
        problem,
        rank_slots=np.array([[2, 2, 1]]),
        pinned=np.array([[0, -1, -1, -1]]),
    )
    for placement in all_placements(problem):
        try:
            parts = check(limited, placement)
        except ValueError:
            continue
        for bound in certify(limited, placement, Budget(effort=0.1), FIGURES):
            assert bound.lower_bound <= parts[bound.figure] + 1e-9


@pytest.mark.parametrize("by_home", [True, False])
@pytest.mark.parametrize(("size", "spare"), [(1, 2), (2, 1), (2, 4), (3, 4), (4, 2)])
def test_the_least_sets_are_found(by_home, size, spare):
    rng = np.random.default_rng([size, spare, by_home])
    num_experts = 9
    kinds = 3 if by_home else 1
    for _ in range(5):
        tokens = np.array([rng.permutation(num_experts)[:4] for _ in range(60)])
        tokens = np.where(np.arange(4) < rng.integers(1, 5, 60)[:, None], tokens, -1)
        home = rng.integers(0, 3, 60)
        layer = layer_tokens(tokens, num_experts, 3, size, home if by_home else None)
        pay = rng.integers(0, UNIT + 1, layer.experts.shape)
        price = rng.integers(0, 20 * UNIT, (2, num_experts))
        user_pay = pay[layer.users, layer.column]
        best = np.full(kinds, 10**12)
        sets, modes = np.zeros((kinds, size), np.int64), np.zeros((kinds, size), np.int64)
        complete, _ = kernels.least_sets(
            layer.order, price, layer.weight, layer.experts, pay, layer.first, layer.users,
            user_pay, *layer.homes, size, spare, 0, 10**9, STOP, best, sets, modes,
        )  # fmt: skip
        assert complete
        paid = {
            tuple(sorted(row[row >= 0].tolist())): dict(zip(row.tolist(), amount, strict=True))
            for row, amount in zip(layer.experts, pay.tolist(), strict=True)
        }
        costs = {}
        for chosen in itertools.combinations(range(num_experts), size):
            for mode in itertools.product((0, 1), repeat=size):
                if sum(mode) > spare:
                    continue
                mode_of = dict(zip(chosen, mode, strict=True))
                for rank in range(kinds):
                    cost = -sum(int(price[m, e]) for e, m in mode_of.items())
                    for row, at in zip(tokens.tolist(), home.tolist(), strict=True):
                        if by_home and at == rank:
                            continue
                        amount = paid[tuple(sorted(e for e in row if e >= 0))]
                        pays = [amount[e] if m else UNIT for e, m in mode_of.items() if e in row]
                        cost += min(UNIT, sum(pays))
                    costs[chosen, mode, rank] = cost
        for rank in range(kinds):
            assert best[rank] == min(c for (_, _, r), c in costs.items() if r == rank)
            order = np.argsort(sets[rank])
            key = (tuple(sets[rank][order].tolist()), tuple(modes[rank][order].tolist()), rank)
            assert costs[key] == best[rank]
        found = kernels.costs(
            sets, modes, price, layer.weight, layer.first, layer.users, user_pay, *layer.homes,
            kinds,
        )  # fmt: skip
        assert (np.diag(found) == best).all()
        away = layer.away()
        for rank in range(kinds):
            row, mode = rng.permutation(num_experts)[:size], np.zeros(size, np.int64)
            kernels.descend(row, mode, away[rank], price, layer.first, layer.users, user_pay, spare)
            order = np.argsort(row)
            key = (tuple(row[order].tolist()), tuple(mode[order].tolist()), rank)
            assert costs[key] >= best[rank]  # and is a set with no more copies than may be


def test_a_search_that_gives_up_proves_nothing():
    tokens = topic_tokens(4, num_layers=1)[:, 0]
    copies = Copies(layer_tokens(tokens, 16, 4, 5, None), random_rows(16, 4, 5))
    while not copies.done:
        copies.round(0.0, STOP)
    assert copies.best == -np.inf


def random_rows(num_experts, num_ranks, size):
    rows = np.arange(num_ranks * size) % num_experts
    return rows.reshape(size, num_ranks).T.copy()


def test_without_spare_slots_the_bound_is_near_that_of_columns():
    tokens = topic_tokens(0, num_layers=1, num_topics=4)
    problem = make_problem(tokens, 16, 4, 4)
    best = solve(problem, "local_search", seed=0)
    copies = Copies(layer_tokens(tokens[:, 0], 16, 4, 4, None), best.placement.reshape(4, 4))
    while not copies.done and copies.work < 2.0:
        copies.round(2.0, STOP)
    value = best.parts["span"] * len(tokens)
    assert 0.95 * value <= copies.best <= value + 1e-9


@functools.cache
def canned_problem():
    """Some tokens of every canned trace in two layers, 8 ranks of 5 slots."""
    experts, home = [], []
    for folder in sorted(path for path in TRACES.iterdir() if path.is_dir()):
        trace = open_trace(folder).read()
        rows = np.linspace(0, trace.num_tokens - 1, 100).astype(np.int64)
        experts.append(trace.experts[rows][:, 2:4])
        home.append(trace.request[rows].astype(np.int64) % 8)
    tokens = np.concatenate(experts)
    return make_problem(
        tokens, trace.num_experts, 8, 5, home=np.concatenate(home), primary=tokens[:, :, 0],
        batch=np.arange(len(tokens)) // 100,
    )  # fmt: skip


QUICK = ("local_search", "eplb_global", "grace_moe", "tensorrt_llm_cooccurrence")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in sorted(names())],
)
def test_no_method_is_below_the_bound_on_a_canned_trace(name):
    problem = canned_problem()
    try:
        placement = solve(problem, name, seed=1, time_limit=60.0).placement
    except ValueError:
        pytest.skip("the method asks for other ranks or arrays")
    for bound in certify(problem, placement, Budget(effort=1.0), FIGURES):
        assert bound.method == "priced copies"
        assert bound.lower_bound <= bound.value
