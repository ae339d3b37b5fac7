"""What a limited run rehearses: the same kernels, for the same types, off the budget's clock."""

from __future__ import annotations

import numba
import numpy as np
import pytest

import solvers
from solvers import (
    anneal,
    anneal_coherent,
    anneal_replicas,
    registry,
    serving,
    swapping,
    walking,
)
from solvers.rehearsing import miniature, rehearse

from .cases import problem_of, topic_tokens

# no kernel calls another of these
KERNELS = [
    (anneal, "anneal_layer"),
    (anneal, "pack_bits"),
    (anneal_coherent, "anneal_layer_coherent"),
    (anneal_replicas, "anneal_layer_replicas"),
    (serving, "serve_layer"),
    (swapping, "anneal_swaps"),
    (walking, "copies_of"),
    (walking, "walk_tokens"),
]


@pytest.fixture
def called(monkeypatch):
    """Set of (kernel, types of its arguments), filled as kernels are called."""
    found = set()

    def recorded(name, kernel):
        def call(*arguments):
            found.add((name, *map(str, map(numba.typeof, arguments))))
            return kernel(*arguments)

        return call

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    monkeypatch.setattr("solvers.rehearsing._rehearsed", set())
    return found


def pairs_of(tokens, num_experts):
    """Co-activation and affinity of tokens [T, L, K]."""
    used = np.zeros((*tokens.shape[:2], num_experts))
    np.put_along_axis(used, tokens, 1.0, axis=2)
    return {
        "coactivation": np.einsum("tli,tlj->lij", used, used),
        "affinity": np.einsum("tli,tlj->lij", used[:, :-1], used[:, 1:]),
        "primary_affinity": np.einsum("tli,tlj->lij", used[:, :-1], used[:, 1:]),
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"slots_per_rank": 5, "ranks_per_node": 2, "node_weight": 4.0},
        {"dispatch": "coherent"},
        {"dispatch": "coherent", "slots_per_rank": 5},
        {"slots_per_rank": 6, "slot_budget": 26},
        {"objective": "coactivation"},
        {"scenario_load": "folds", "slots_per_rank": 5},
    ],
    ids=str,
)
def test_a_rehearsal_compiles_all_that_the_run_will_call(called, options):
    tokens = topic_tokens(0).astype(np.int16)
    options = {"max_imbalance": 1.1} | pairs_of(tokens, 16) | options
    if "scenario_load" in options:
        options["scenario"] = np.arange(len(tokens)) % 2
        used = [problem_of(tokens[part::2], 16, 4).load for part in (0, 1)]
        options["scenario_load"] = np.array(used)
    problem = problem_of(tokens, 16, 4, home=np.arange(len(tokens)) % 4, **options)
    rehearse(problem, registry.get("auto"), solvers.Budget(1.0))
    rehearsed = set(called)
    called.clear()
    solvers.solve(problem, "auto")
    assert called
    assert called <= rehearsed


def test_a_rehearsal_takes_no_time_of_the_limit_and_happens_once(monkeypatch, called):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    problem = problem_of(topic_tokens(0), 16, 4)
    limited = solvers.Budget(10.0)
    runs = []

    def slow(small, seed, few):
        runs.append(small.num_experts)
        now[0] += 60.0
        return solvers.get("contiguous").function(small, seed, few)

    entry = registry.Solver("slow", slow, "", "a test", (), False, True, False, ())
    for _ in range(2):
        rehearse(problem, entry, limited)
    assert limited.remaining() == pytest.approx(10.0)
    assert runs == [miniature(problem).num_experts]
    now[0] += 4.0
    assert limited.remaining() == pytest.approx(6.0)


def test_the_bound_of_a_problem_too_large_for_its_time_is_lower_and_true():
    problem = problem_of(topic_tokens(1), 16, 8, home=np.zeros(600, np.int64))
    over = solvers.Budget()
    over.stop()
    cut, whole = (solvers.bounds.lower_bound(problem, b) for b in (over, None))
    assert 0 < cut < whole
