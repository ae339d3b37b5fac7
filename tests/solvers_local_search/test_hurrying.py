"""Searches in little time: the price is learnt from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

import solvers
from solvers import check, hurrying
from solvers.budget import Budget
from solvers.layers import prepare
from solvers.local_search import Search, caps_of
from solvers.solving import capped_imbalance

from .cases import problem_of, topic_tokens


@dataclass
class StepBudget(Budget):
    """A budget whose clock goes on by one second per question, so that no machine matters."""

    asked: list[int] = field(default_factory=lambda: [0])

    def elapsed(self) -> float:
        self.asked[0] += 1
        return float(self.asked[0])


def spare_problem(**others):
    arguments = {"slots_per_rank": 6, "max_imbalance": 1.1} | others
    return problem_of(topic_tokens(25, num_tokens=300), 16, 4, **arguments)


def test_the_price_of_an_exact_line_is_found():
    def excess(price):
        return 0.3 * price**-0.4

    tried = [3.0]
    for _ in range(6):
        tried.append(hurrying.next_price(tried, [excess(price) for price in tried], 0.1))
    assert excess(tried[-1]) == pytest.approx(0.1, rel=1e-3)


def test_the_price_goes_no_further_than_the_line_is_trusted():
    assert hurrying.next_price([2.0], [5.0], 1e-3) == pytest.approx(2 * np.exp(hurrying.REACH))
    assert hurrying.next_price([2.0], [1e-3], 5.0) == pytest.approx(2 / np.exp(hurrying.REACH))
    assert hurrying.next_price([0.05], [0.0], 0.5) == hurrying.LEAST_PRICE
    assert np.isfinite(hurrying.next_price([1.0, 1.0], [0.2, 0.3], -0.1))


@pytest.mark.parametrize(
    ("change", "seconds", "expected"),
    [
        ({}, 2.0, True),
        ({}, None, False),
        ({"max_imbalance": None}, 2.0, False),
        ({"slots_per_rank": 4}, 2.0, False),
        ({"max_moves": 10, "current": np.tile(np.r_[np.arange(16), [-1] * 8], (5, 1))}, 2.0, False),
    ],
)
def test_only_a_cap_with_replicas_and_little_time_is_hurried(
    monkeypatch, change, seconds, expected
):
    problem = spare_problem(**change)
    layers = prepare(problem)
    monkeypatch.setattr(
        "solvers.hurrying.paced", lambda layers, *_: replace(layers, most_proposals=10)
    )
    search = Search(layers, 0, Budget(seconds))
    assert hurrying.hurries(search, caps_of(problem, layers)) is expected


def test_patient_searches_are_not_hurried(monkeypatch):
    problem = spare_problem()
    layers = prepare(problem)
    monkeypatch.setattr("solvers.hurrying.paced", lambda layers, *_: layers)
    search = Search(layers, 0, Budget(2.0))
    assert not hurrying.hurries(search, caps_of(problem, layers))


def test_a_hurried_search_keeps_the_cap_and_sends_less_than_what_it_borrows():
    problem = spare_problem()
    layers = prepare(problem)
    search = Search(layers, 0, StepBudget(400.0))
    caps = caps_of(problem, layers)
    hurrying.hurry(search, caps)
    assert search.imbalance(caps) <= 1.1 + 1e-9
    placement = np.stack(search.placement(caps))
    parts = check.check(problem, placement)
    eplb = solvers.solve(problem, "eplb_global")
    assert capped_imbalance(parts) <= 1.1 + 1e-9
    assert parts["messages_alltoall"] < 0.9 * eplb.parts["messages_alltoall"]


@pytest.mark.parametrize("seconds", [1.0, 30.0, 60.0])
def test_a_search_that_is_cut_short_has_a_placement_of_every_layer(seconds):
    problem = spare_problem()
    layers = prepare(problem)
    search = Search(layers, 0, StepBudget(seconds))
    caps = caps_of(problem, layers)
    hurrying.hurry(search, caps)
    placement = np.stack(search.placement(caps))
    assert all(set(row.tolist()) >= set(range(16)) for row in placement)
