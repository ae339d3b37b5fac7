"""`placer compare`: solvers side by side on the same held-out tokens."""

from __future__ import annotations

import json

import pytest

import solvers

from .running import fails, succeeds

QUICK = "contiguous,random,eplb,local_search"


def test_every_solver_is_judged_on_the_same_tokens(trace_folder):
    document = succeeds(
        "compare", trace_folder, "--gpus", 4, "--solvers", QUICK, "--json"
    ).document()
    assert [row["solver"] for row in document["rows"]] == QUICK.split(",")
    assert (document["scope"], document["requests"], document["tokens"]) == ("held-out", 6, 192)
    assert document["failed"] == []


def test_a_row_says_what_the_solver_s_own_plan_promises(trace_folder, tmp_path):
    document = succeeds(
        "compare", trace_folder, "--gpus", 4, "--solvers", "local_search", "--json"
    ).document()
    plan = tmp_path / "plan.json"
    succeeds("solve", trace_folder, "--gpus", 4, "--solver", "local_search", "-o", plan)
    prediction = json.loads(plan.read_text())["prediction"]
    assert document["rows"][0]["metrics"] == prediction["metrics"]
    assert document["rows"][0]["change"] == prediction["change"]["contiguous"]


def test_contiguous_does_not_differ_from_itself(trace_folder):
    rows = succeeds(
        "compare", trace_folder, "--gpus", 4, "--solvers", "contiguous", "--json"
    ).document()["rows"]
    assert all(entry["change"] in (0.0, None) for entry in rows[0]["change"].values())


def test_the_search_beats_contiguous_on_held_out_requests(trace_folder):
    rows = succeeds(
        "compare", trace_folder, "--gpus", 4, "--solvers", "contiguous,local_search", "--json"
    ).document()["rows"]
    contiguous, search = (row["metrics"]["messages_alltoall"] for row in rows)
    assert search["high"] < contiguous["low"]


def test_the_table_names_every_solver_and_its_nodes(trace_folder):
    outcome = succeeds(
        "compare", trace_folder, "--gpus", 4, "--nodes", 2, "--solvers", QUICK, "--dispatch",
        "coherent",
    )  # fmt: skip
    for word in (*QUICK.split(","), "node messages", "held-out"):
        assert word in outcome.stdout
    assert outcome.stderr == ""


def failing(problem, seed, budget):
    """Never finds anything."""
    raise solvers.NoSolutionFound("nothing [red]found[/]")


@pytest.fixture
def hopeless():
    """A solver that always fails, known for the length of one test."""
    from solvers import registry

    registry.names()
    registry.register("hopeless", source="a test")(failing)
    yield
    del registry._SOLVERS["hopeless"]


def test_a_solver_that_fails_is_shown_beside_the_others(trace_folder, hopeless):
    base = ("compare", trace_folder, "--gpus", 4, "--solvers", "hopeless,contiguous")
    assert "hopeless: nothing [red]found[/]" in succeeds(*base).stdout
    document = succeeds(*base, "--json").document()
    assert document["failed"] == [{"solver": "hopeless", "error": "nothing [red]found[/]"}]
    assert [row["solver"] for row in document["rows"]] == ["contiguous"]


def test_when_every_solver_fails_so_does_the_command(trace_folder, tmp_path, hopeless):
    error = fails(4, tmp_path, "compare", trace_folder, "--gpus", 4, "--solvers", "hopeless")
    assert "nothing [red]found[/]" in error


def test_solve_with_a_solver_that_finds_nothing_ends_with_4(trace_folder, tmp_path, hopeless):
    error = fails(4, tmp_path, "solve", trace_folder, "--gpus", 4, "--solver", "hopeless", "-o",
                  tmp_path / "plan.json")  # fmt: skip
    assert "--time-limit" in error


@pytest.mark.parametrize("names", ["contiguous,magic", "", "contiguous,"])
def test_an_unknown_solver_is_refused_before_any_work(trace_folder, tmp_path, names):
    error = fails(2, tmp_path, "compare", trace_folder, "--gpus", 4, "--solvers", names)
    assert "no solver is called" in error
    assert "local_search" in error


def test_ranks_that_do_not_divide_are_refused(trace_folder, tmp_path):
    error = fails(2, tmp_path, "compare", trace_folder, "--gpus", 5, "--solvers", QUICK)
    assert "--slots-per-rank 4" in error


@pytest.mark.slow
def test_all_solvers_can_be_compared(trace_folder):
    document = succeeds("compare", trace_folder, "--gpus", 4, "--time-limit", 20, "--json")
    names = {row["solver"] for row in document.document()["rows"]}
    names |= {entry["solver"] for entry in document.document()["failed"]}
    assert names == set(solvers.names()) - {"auto"}
