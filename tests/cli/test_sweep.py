"""`placer sweep`: every combination once, kept one by one, the same wherever it is made."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
from pathlib import Path

import pytest

from placer.errors import PlacerError
from placer.planning import Settings, open_traces
from placer.sweep import running, workers
from placer.sweep.grid import Cell, Grid, Shape, jobs
from placer.sweep.running import run_sweep

from .running import fails, succeeds, usage_error

OPTIONS = ["--gpus", "2,4", "--spare-slots", "0,1"]


@pytest.fixture(scope="module")
def made(trace_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "sweep"
    outcome = succeeds(
        "sweep", trace_folder, *OPTIONS, "--jobs", 1, "--cluster", ",h100-nvl8",
        "--batch-tokens", "16,64", "-o", folder, "--json",
    )  # fmt: skip
    return folder, outcome.document()


def figures(document):
    """Cells without what differs between runs."""
    return [{**cell, "seconds": None} for cell in document["cells"]]


def test_a_grid_has_every_combination_that_nodes_divide():
    grid = Grid(num_ranks=(4, 6), num_nodes=(1, 4), spare_slots=(0, 1), batch_tokens=(8, 8, 2))
    cells = grid.cells()
    shapes = {(c.shape.num_ranks, c.shape.num_nodes) for c in cells}
    assert shapes == {(4, 1), (4, 4), (6, 1)}
    assert len(cells) == 3 * 2 * 2
    assert len({c.name for c in cells}) == 12
    assert [len(job) for job in jobs(cells)] == [2] * 6
    assert jobs(cells)[0][0].shape.num_ranks == 6


def test_a_cluster_file_that_changed_is_another_cell(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text("a = 1")
    cell = Cell(Shape(4, 1, 0, "alltoall", str(path)), 64)
    before = cell.name
    path.write_text("a = 2")
    assert cell.name != before


def test_every_cell_is_what_solve_and_evaluate_find(made, trace_folder, tmp_path):
    folder, document = made
    assert document["made"] == 16
    assert document["found"] == document["missing"] == 0
    assert len(list((folder / "cells").glob("*.json"))) == 16
    plan = tmp_path / "plan.json"
    succeeds("solve", trace_folder, "--gpus", 4, "--slots-per-rank", 5, "-o", plan)
    judged = succeeds("evaluate", plan, trace_folder, "--batch-tokens", 16, "--json").document()
    wanted = {"num_ranks": 4, "num_nodes": 1, "spare_slots": 1, "dispatch": "alltoall",
              "cluster": "", "batch_tokens": 16}  # fmt: skip
    cell = next(c for c in document["cells"] if c["config"] == wanted)
    for name, entry in cell["result"]["figures"].items():
        expected = judged["metrics"][name]
        assert {key: entry[key] for key in ("value", "low", "high")} == {
            key: expected[key] for key in ("value", "low", "high")
        }
        change = judged["change"]["contiguous"][name]
        assert entry["change"] == change["change"]
        assert entry["contiguous"] == change["baseline"]
    certificate = json.loads(plan.read_text())["certificate"]
    assert cell["result"]["certificate"]["value"] == certificate["value"]
    timed = next(c for c in document["cells"] if c["config"] == {**wanted, "cluster": "h100-nvl8"})
    assert timed["result"]["figures"] == cell["result"]["figures"]
    assert timed["result"]["step_time"]["plan_us"] > 0
    assert cell["result"]["step_time"] is None


def test_the_table_the_csv_and_the_plot(made, trace_folder):
    folder, document = made
    rows = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert len(rows) == 16
    for row, cell in zip(rows, document["cells"], strict=True):
        assert int(row["num_ranks"]) == cell["config"]["num_ranks"]
        found = float(row["messages_alltoall_change"])
        assert found == cell["result"]["figures"]["messages_alltoall"]["change"]
    svg = (folder / "sweep.svg").read_text()
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "change of messages" in svg
    outcome = succeeds(
        "sweep", trace_folder, *OPTIONS, "--cluster", ",h100-nvl8", "--batch-tokens", "16,64",
        "-o", folder,
    )  # fmt: skip
    lines = outcome.stdout.splitlines()
    assert max(len(line.rstrip()) for line in lines if "written" not in line) <= 120
    assert sum(line.startswith(("2 ", "4 ")) for line in lines) == 16


def test_a_sweep_goes_on_where_it_was_cut(made, trace_folder, tmp_path, monkeypatch):
    folder = tmp_path / "sweep"
    shutil.copytree(made[0], folder)
    removed = sorted((folder / "cells").glob("*.json"))[:3]
    removed[0].write_text(removed[0].read_text()[:40])  # half-written by a crash of the machine
    for path in removed[1:]:
        path.unlink()
    document = succeeds(
        "sweep", trace_folder, "--gpus", "2,4", "--spare-slots", "0,1",
        "--cluster", ",h100-nvl8", "--batch-tokens", "16,64", "-o", folder, "--jobs", 1, "--json",
    ).document()  # fmt: skip
    assert (document["found"], document["made"]) == (13, 3)
    assert figures(document) == figures(made[1])


def test_ctrl_c_keeps_finished_cells(trace_folder, tmp_path):
    sources = open_traces([trace_folder])
    settings = Settings(num_ranks=2)
    grid = Grid(num_ranks=(2, 4), batch_tokens=(16,))

    def interrupted(text):
        if text == "1 of 2 cells":
            signal.raise_signal(signal.SIGINT)

    folder = tmp_path / "sweep"
    document = run_sweep(sources, settings, grid, folder, workers.in_this_process, interrupted)
    assert document["interrupted"]
    assert (document["made"], document["missing"]) == (1, 1)
    again = run_sweep(sources, settings, grid, folder, workers.in_this_process)
    assert (again["found"], again["made"]) == (1, 1)


def test_processes_make_the_same_cells(made, trace_folder, tmp_path):
    document = succeeds(
        "sweep", trace_folder, "--gpus", "2,4", "--batch-tokens", "16",
        "--jobs", 2, "-o", tmp_path / "sweep", "--json",
    ).document()  # fmt: skip
    expected = [
        cell
        for cell in figures(made[1])
        if cell["config"]["spare_slots"] == 0
        and cell["config"]["batch_tokens"] == 16
        and cell["config"]["cluster"] == ""
    ]
    assert figures(document) == expected


def test_a_process_that_dies_is_reported(trace_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_run", die)
    sources = open_traces([trace_folder])
    with pytest.raises(PlacerError, match="was killed") as caught:
        run_sweep(
            sources, Settings(num_ranks=2), Grid(num_ranks=(2, 4)), tmp_path / "sweep",
            workers.in_processes(2),
        )  # fmt: skip
    assert "--jobs" in caught.value.hint


def die(job):
    import os

    os.kill(os.getpid(), signal.SIGKILL)


def test_impossible_cells_say_why_and_do_not_stop_the_rest(trace_folder, tmp_path):
    document = succeeds(
        "sweep", trace_folder, "--gpus", "4,16", "--nodes", "1,3", "--cluster", "h100-nvl8",
        "--spare-slots", "0,20", "--jobs", 1, "-o", tmp_path / "s", "--json",
    ).document()  # fmt: skip
    outcomes = {
        (c["config"]["num_ranks"], c["config"]["spare_slots"]): c["error"]
        for c in document["cells"]
    }
    assert outcomes[4, 0] is None
    assert "more than 16 experts" in outcomes[4, 20]["message"]
    assert outcomes[4, 20]["exit_code"] == 3
    assert "a node of h100-nvl8 has 8 ranks" in outcomes[16, 0]["message"]
    assert len(outcomes) == 4  # 3 nodes divide neither
    text = succeeds(
        "sweep", trace_folder, "--gpus", "4,16", "--nodes", "1,3", "--cluster", "h100-nvl8",
        "--spare-slots", "0,20", "-o", tmp_path / "s",
    ).stdout  # fmt: skip
    assert "no plan for 1 cell: a node of h100-nvl8 has 8 ranks, not 16" in text


def test_allgather_is_about_balance(trace_folder, tmp_path):
    cell = succeeds(
        "sweep", trace_folder, "--gpus", 4, "--dispatch", "allgather",
        "--jobs", 1, "-o", tmp_path / "s", "--json",
    ).document()["cells"][0]  # fmt: skip
    assert cell["result"]["headline"] == "imbalance"
    assert cell["result"]["certificate"]["objective"] == "balance"


def test_what_makes_no_sense_is_refused(made, trace_folder, tmp_path):
    folder = made[0]
    assert "whole numbers" in fails(2, folder, "sweep", trace_folder, "--gpus", "4,x", "-o", folder)
    fails(2, folder, "sweep", trace_folder, "--gpus", "0", "-o", folder)
    fails(2, folder, "sweep", trace_folder, "--gpus", "4", "--dispatch", "x", "-o", folder)
    fails(2, folder, "sweep", trace_folder, "--gpus", "4", "--nodes", "3", "-o", folder)
    message = fails(2, folder, "sweep", trace_folder, "--gpus", "4", "--seed", 5, "-o", folder)
    assert "other settings" in message
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    fails(2, tmp_path, "sweep", trace_folder, "--gpus", "4", "-o", tmp_path / "full")
    fails(2, tmp_path, "sweep", trace_folder, "--gpus", "4", "-o", tmp_path / "no" / "where")
    fails(2, tmp_path, "sweep", trace_folder, "--gpus", "4", "-o", tmp_path / "full" / "note")
    fails(5, tmp_path, "sweep", tmp_path / "none", "--gpus", "4", "-o", tmp_path / "s")
    fails(2, tmp_path, "sweep", trace_folder, "--gpus", "4", "--jobs", 2, "--ray", "local",
          "-o", tmp_path / "s")  # fmt: skip
    usage_error(tmp_path, "sweep", trace_folder, "-o", tmp_path / "s")


def test_a_damaged_sweep_is_refused(made, trace_folder, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(made[0], folder)
    (folder / "sweep.json").write_text("{")
    fails(5, folder, "sweep", trace_folder, *OPTIONS, "-o", folder)


def test_without_ray_the_extra_is_named(trace_folder, tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def missing(name, *arguments, **more):
        if name == "ray":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    message = fails_but_keeps(
        "sweep", trace_folder, "--gpus", "4", "--ray", "local", "-o", tmp_path / "s"
    )
    assert "moe-placer[ray]" in message


def fails_but_keeps(*arguments) -> str:
    from .running import run

    outcome = run(*arguments)
    assert outcome.exit_code == 1
    assert outcome.stdout == ""
    return outcome.stderr


def test_the_document_of_a_cell_names_its_cell(made):
    for cell in made[1]["cells"]:
        name = running._cell(cell).name
        assert (made[0] / "cells" / f"{name}.json").is_file()
        assert Path(name).name == name
