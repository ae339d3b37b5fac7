"""The frontier: sorted, undominated, reproducible, and judged on held-out requests."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import topic_trace

import solvers
from placer.errors import UsageError
from placer.plan import read_plan
from placer.planning import Settings, build_problem, make_frontier
from placer.report.frontier import frontier_folder, write_frontier
from placer.trace import MemorySource


@pytest.fixture(scope="module")
def source():
    return MemorySource(topic_trace(num_requests=32, prefill=10, decode=6))


@pytest.fixture(scope="module")
def frontier(source):
    return make_frontier([source], Settings(num_ranks=4))


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_no_point_is_better_than_another_in_both(source, dispatch):
    problem = build_problem(source, Settings(num_ranks=4, dispatch=dispatch), lambda _: None)
    results = solvers.frontier(problem)
    assert len(results) >= 3
    balance = [solvers.capped_imbalance(result.parts) for result in results]
    messages = [result.objective for result in results]
    assert balance == sorted(balance)
    assert messages == sorted(messages, reverse=True)
    assert len(set(messages)) == len(messages)


def test_the_ends_are_as_good_as_solving_for_one_thing_alone(source):
    problem = build_problem(source, Settings(num_ranks=4), lambda _: None)
    results = solvers.frontier(problem)
    least = solvers.solve(problem, "local_search").objective
    assert results[-1].objective <= least * 1.01
    spread = solvers.solve(problem, "contiguous")
    assert solvers.capped_imbalance(results[0].parts) < solvers.capped_imbalance(spread.parts)


@pytest.mark.parametrize("slots", [None, 9])
def test_the_frontier_begins_no_less_balanced_than_a_load_only_plan(source, slots):
    settings = Settings(num_ranks=4, slots_per_rank=slots)
    problem = build_problem(source, settings, lambda _: None)
    results = solvers.frontier(problem)
    judged = replace(problem, resampled=True)
    for name in ("eplb_global", "flashlb", "swift"):
        published = solvers.solve(judged, name)
        balance = solvers.capped_imbalance(published.parts)
        assert solvers.capped_imbalance(results[0].parts) <= balance + 1e-9
        near = [r for r in results if solvers.capped_imbalance(r.parts) <= balance + 0.01]
        assert min(result.objective for result in near) <= published.objective


def test_the_knee_saves_most_for_what_it_gives_up(frontier):
    ends = frontier.points[0].fitted, frontier.points[-1].fitted

    def gain(point):
        saved = (ends[0]["traffic"] - point.fitted["traffic"]) / (
            ends[0]["traffic"] - ends[1]["traffic"]
        )
        paid = (point.fitted["imbalance"] - ends[0]["imbalance"]) / (
            ends[1]["imbalance"] - ends[0]["imbalance"]
        )
        return saved - paid

    assert max(frontier.points, key=gain) is frontier.knee
    assert sum(point.is_knee for point in frontier.points) == 1


def test_points_are_judged_on_held_out_requests_and_peers_with_them(frontier):
    document = frontier.to_document()
    assert document["scope"] == "held-out"
    assert set(document["peers"]) == {"contiguous", "eplb"}
    for point, shown in zip(frontier.points, document["points"], strict=True):
        assert point.plan.prediction["scope"] == "held-out"
        metrics = point.plan.prediction["metrics"]
        assert shown["metrics"]["imbalance"] == metrics["imbalance"]


def test_two_runs_write_the_same_bytes(source, frontier, tmp_path):
    again = make_frontier([source], Settings(num_ranks=4))
    folders = []
    for number, which in enumerate((frontier, again)):
        (tmp_path / str(number)).mkdir()
        folders.append(write_frontier(which, tmp_path / str(number) / "plan.json"))
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == sorted(path.name for path in folders[1].iterdir())
    assert {"frontier.json", "frontier.svg", "plan-00.json"} <= set(names)
    for name in names:
        first, second = ((folder / name).read_text() for folder in folders)
        if name.startswith("plan"):
            first, second = (json.loads(text) | {"timings": None} for text in (first, second))
        assert first == second, name
    assert read_plan(folders[0] / "plan-00.json").placement.problems() == []


def test_a_folder_with_something_in_it_is_not_replaced_silently(frontier, tmp_path):
    folder = frontier_folder(tmp_path / "plan.json")
    folder.mkdir()
    (folder / "plan-99.json").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        write_frontier(frontier, tmp_path / "plan.json")
    assert [path.name for path in folder.iterdir()] == ["plan-99.json"]
    write_frontier(frontier, tmp_path / "plan.json", force=True)
    assert not (folder / "plan-99.json").exists()


def test_allgather_has_no_frontier(source):
    with pytest.raises(UsageError, match="allgather"):
        make_frontier([source], Settings(num_ranks=4, dispatch="allgather"))


def test_a_time_limit_gives_what_was_found(source):
    problem = build_problem(source, Settings(num_ranks=4), lambda _: None)
    results = solvers.frontier(problem, budget=solvers.Budget(0.2))
    assert results
    assert results[0].termination == "time_limit"


def test_a_frontier_keeps_pins_and_leaves_out_a_peer_that_does_not(source):
    frontier = make_frontier([source], Settings(num_ranks=4, pins=("3@2",)))
    assert set(frontier.peers) == {"contiguous"}
    for point in frontier.points:
        ranks = point.plan.placement.physical_to_logical.reshape(source.num_layers, 4, -1)
        assert (ranks[:, 2] == 3).any(axis=1).all()


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_every_point_of_a_frontier_keeps_the_moves(source, dispatch):
    problem = build_problem(source, Settings(num_ranks=4, dispatch=dispatch), lambda _: None)
    current = np.tile(np.arange(problem.num_experts), (problem.num_layers, 1))
    results = solvers.frontier(replace(problem, current=current, max_moves=8))
    assert len(results) >= 2
    assert all(result.parts["moves"] <= 8 for result in results)
