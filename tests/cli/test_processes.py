"""The command as a process of its own: streams, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import topic_trace

from placer.plan import read_plan
from placer.trace import write_npz

ROOT = Path(__file__).resolve().parents[2]

# Registers a solver that presses Ctrl-C itself, at a known point, then runs `placer`.
PROGRAM = """
import os, signal, sys
from solvers import Solution, get, register

@register("interrupted", source="a test")
def interrupted(problem, seed, budget):
    "Ctrl-C while solving."
    for _ in range({presses}):
        os.kill(os.getpid(), signal.SIGINT)
    assert budget.expired()
    return get("{solver}").function(problem, seed, budget)

from placer.cli.app import main
main()
"""

# Presses Ctrl-C once, when the plan is found and is being judged, then runs `placer`.
LATE_PROGRAM = """
import os, signal
from placer.planning import making

presses = [1]

def interrupted(*arguments, judge=making.evaluate, **options):
    if presses:
        presses.pop()
        os.kill(os.getpid(), signal.SIGINT)
    return judge(*arguments, **options)

making.evaluate = interrupted
from placer.cli.app import main
main()
"""

# Registers a solver with a defect, then runs `placer`.
BROKEN_PROGRAM = """
from solvers import register

@register("broken", source="a test")
def broken(problem, seed, budget):
    "Reads what is no number."
    return int("no number")

from placer.cli.app import main
main()
"""


def placer(*arguments: object, program: str | None = None) -> subprocess.CompletedProcess[str]:
    how = ["-m", "placer"] if program is None else ["-c", program]
    return subprocess.run(
        [sys.executable, *how, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    ("solver", "dispatch"),
    [("local_search", "alltoall"), ("local_search", "coherent"), ("contiguous", "coherent")],
)
def test_ctrl_c_writes_the_best_plan_so_far(trace_folder, tmp_path, solver, dispatch):
    path = tmp_path / "plan.json"
    done = placer(
        "solve", trace_folder, "--gpus", 4, "--solver", "interrupted", "--max-imbalance", "none",
        "--dispatch", dispatch, "-o", path, "--json",
        program=PROGRAM.format(presses=1, solver=solver),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(path)
    assert read_plan(path).placement.problems() == []
    if solver == "local_search":
        assert json.loads(path.read_text())["certificate"]["termination"] == "interrupted"


@pytest.mark.parametrize("options", [["--solver", "eplb"], ["--pareto", "--time-limit", "0.1"]])
def test_ctrl_c_while_a_plan_is_judged_does_not_lose_it(trace_folder, tmp_path, options):
    path = tmp_path / "plan.json"
    done = placer(
        "solve", trace_folder, "--gpus", 4, *options, "-o", path, "--json", program=LATE_PROGRAM
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert read_plan(path).placement.problems() == []


@pytest.mark.parametrize(
    ("presses", "options"),
    [
        (2, ["--max-imbalance", "none"]),
        (1, ["--max-imbalance", "1.0001"]),  # what it has by then breaks the cap
    ],
)
def test_ctrl_c_before_there_is_a_plan_ends_with_1_and_no_file(
    trace_folder, tmp_path, presses, options
):
    done = placer(
        "solve", trace_folder, "--gpus", 4, "--solver", "interrupted", *options, "-o",
        tmp_path / "plan.json", "--json",
        program=PROGRAM.format(presses=presses, solver="local_search"),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: interrupted")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_defect_of_a_solver_looks_like_a_defect(trace_folder, tmp_path):
    done = placer(
        "solve", trace_folder, "--gpus", 4, "--robust", "worst", "--solver", "broken", "-o",
        tmp_path / "plan.json", "--json",
        program=BROKEN_PROGRAM,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Traceback")
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: internal error: ValueError: invalid literal")
    assert "report it" in hint
    assert list(tmp_path.iterdir()) == []


def test_stdout_is_one_document_and_stderr_empty(trace_folder, tmp_path):
    path = tmp_path / "plan.json"
    done = placer("solve", trace_folder, "--gpus", 4, "-o", path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "placer.plan"
    assert done.stderr == ""
    small = tmp_path / "small.npz"
    write_npz(topic_trace(num_layers=2, num_experts=8, top_k=2), small)
    done = placer("compare", small, "--gpus", 2, "--solvers", "contiguous,exflow", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "placer.comparison"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("exit_code", "arguments"),
    [
        (0, ["--version"]),
        (2, ["solve"]),
        (2, ["no-such-command"]),
        (2, ["solve", "TRACE", "--gpus", "5", "-o", "PLAN"]),
        (3, ["solve", "TRACE", "--gpus", "4", "--slots-per-rank", "2", "-o", "PLAN"]),
        (5, ["inspect", "PLAN"]),
    ],
)
def test_the_process_ends_with_the_exit_code_of_the_design(
    trace_folder, tmp_path, exit_code, arguments
):
    names = {"TRACE": trace_folder, "PLAN": tmp_path / "plan.json"}
    done = placer(*[names.get(argument, argument) for argument in arguments])
    assert done.returncode == exit_code
    assert "Traceback" not in done.stderr
    assert (done.stdout == "") == (exit_code != 0)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_closes_the_pipe_is_no_traceback(trace_folder):
    command = subprocess.Popen(
        [sys.executable, "-m", "placer", "analyze", str(trace_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()
    errors = command.stderr.read()
    command.wait()
    command.stderr.close()
    assert "Traceback" not in errors
