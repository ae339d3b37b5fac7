"""Every command with files that are missing, of another kind or cut short: a line and a hint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from placer.trace import make_trace, write_npz

from .running import fails, run, succeeds

MODEL = Path(__file__).parents[2] / "examples" / "model"

TAKES_A_TRACE = {
    "inspect": ["inspect", "{}"],
    "analyze": ["analyze", "{}"],
    "solve": ["solve", "{}", "--gpus", 4, "-o", "{out}/p.json"],
    "compare": ["compare", "{}", "--gpus", 4],
    "sweep": ["sweep", "{}", "--gpus", "4", "-o", "{out}/sweep"],
    "evaluate": ["evaluate", "{plan}", "{}"],
    "certify": ["certify", "{plan}", "{}"],
    "report": ["report", "{plan}", "{}", "-o", "{out}/r.html"],
}
TAKES_A_PLAN = {
    "inspect": ["inspect", "{}"],
    "solve": ["solve", "{trace}", "--gpus", 4, "--start", "{}", "-o", "{out}/p.json"],
    "evaluate": ["evaluate", "{}", "{trace}"],
    "baseline": ["evaluate", "{plan}", "{trace}", "--baseline", "{}"],
    "certify": ["certify", "{}", "{trace}"],
    "report": ["report", "{}", "{trace}", "-o", "{out}/r.html"],
    "export": ["export", "{}", "--to", "sglang", "-o", "{out}/s.json"],
    "apply": ["apply", "{}", "--model", MODEL],
    "bench": ["bench", "{}", "--model", MODEL],
}


@pytest.fixture
def places(trace_folder, plan_path, tmp_path):
    """Good files by their name in a command line, and an empty folder for outputs."""
    return {"trace": trace_folder, "plan": plan_path, "out": tmp_path}


def line(template, path, places):
    return [str(part).format(path, **places) for part in template]


@pytest.mark.parametrize("command", TAKES_A_TRACE)
def test_what_is_no_trace_is_named(places, trace_npz, tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("wrong")
    readme = folder / "README.md"
    readme.write_text("# Traces\n")
    cut = folder / "cut.npz"
    cut.write_bytes(trace_npz.read_bytes()[:-100])
    empty = folder / "empty.npz"
    empty.write_bytes(b"")
    (folder / "nothing").mkdir()
    for path, words in (
        (readme, "is no trace"), (cut, "is damaged"), (empty, "not an .npz file"),
        (folder / "nothing", "manifest.json"), (folder / "none", "does not exist"),
    ):  # fmt: skip
        error = fails(5, places["out"], *line(TAKES_A_TRACE[command], path, places))
        assert str(path) in error
        assert words in error


@pytest.mark.parametrize("command", TAKES_A_PLAN)
def test_what_is_no_plan_is_named(places, tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "cut.json").write_text(places["plan"].read_text()[:-100])
    (folder / "other.json").write_text(json.dumps({"format": "placer.comparison"}))
    (folder / "bytes.json").write_bytes(bytes(range(256)))
    for name, words in (
        ("cut.json", "truncated"), ("other.json", "placer.comparison"),
        ("bytes.json", "cannot be read"), ("none.json", "does not exist"),
    ):  # fmt: skip
        error = fails(5, places["out"], *line(TAKES_A_PLAN[command], folder / name, places))
        assert str(folder / name) in error
        assert words in error
        if name != "cut.json":
            assert "placer solve" in error


def test_a_name_that_is_nearly_right_is_put_right(places, tmp_path):
    for name in ("plan.json", "tracing.npz"):
        (tmp_path / name).write_text("")
    wrong = tmp_path / "plam.json"
    assert f"did you mean {tmp_path / 'plan.json'}?" in fails(5, tmp_path, "inspect", wrong)
    elsewhere = tmp_path / "no" / "where.npz"
    assert f"no folder {tmp_path / 'no'}" in fails(5, tmp_path, "inspect", elsewhere)


def test_plan_and_trace_in_the_wrong_order_are_told_apart(places):
    error = fails(5, places["out"], "evaluate", places["trace"], places["plan"])
    assert "expected a plan" in error
    assert "no trace" in fails(5, places["out"], "analyze", places["plan"])


@pytest.mark.parametrize("command", ["analyze", "solve", "compare", "sweep"])
def test_of_several_paths_those_that_can_be_no_trace_are_left_out(
    places, trace_folder, tmp_path_factory, command
):
    folder = tmp_path_factory.mktemp("traces")
    (folder / "good").symlink_to(trace_folder)
    (folder / "README.md").write_text("# Traces\n")
    template = TAKES_A_TRACE[command]
    more = ["--solvers", "contiguous"] if command == "compare" else []
    line = [str(part).format("x", **places) for part in template[2:]]
    outcome = succeeds(command, *sorted(folder.iterdir()), *line, *more)
    (warning,) = outcome.stderr.splitlines()
    assert warning == f"warning: {folder / 'README.md'} is no trace and was left out"
    (folder / "cut.npz").write_bytes(b"PK\x03\x04")
    outcome = run(command, *sorted(folder.iterdir()), *line, "--json", *more)
    assert outcome.exit_code == (2 if command == "solve" else 5)  # solve finds its plan first


IMPOSSIBLE = {
    "no ranks in a sweep": (2, "sweep {trace} --gpus 0 -o {out}/s", "--gpus 4,8"),
    "no numbers in a sweep": (2, "sweep {trace} --gpus x -o {out}/s", "--gpus 4,8"),
    "jobs on ray": (2, "sweep {trace} --gpus 4 --jobs 2 --ray local -o {out}/s", "--jobs"),
    "more ranks than experts": (2, "solve {trace} --gpus 64 -o {out}/p.json", "16"),
    "too few slots": (3, "solve {trace} --gpus 2 --slots-per-rank 7 -o {out}/p.json", "slots"),
    "nodes that do not divide": (
        2,
        "solve {trace} --gpus 4 --nodes 3 -o {out}/p.json",
        "every node",
    ),
    "a cap below 1": (2, "solve {trace} --gpus 4 --max-imbalance 0.9 -o {out}/p.json", "1.10"),
    "a cap that is none": (2, "solve {trace} --gpus 4 --max-imbalance x -o {out}/p.json", "1.10"),
    "moves without a plan": (2, "solve {trace} --gpus 4 --max-moves 3 -o {out}/p.json", "--start"),
    "a pin beyond": (2, "solve {trace} --gpus 4 --pin 99@0 -o {out}/p.json", "EXPERT@RANK"),
    "all held out": (2, "solve {trace} --gpus 4 --holdout 1 -o {out}/p.json", "0.5"),
    "an unknown solver": (2, "solve {trace} --gpus 4 --solver eplbb -o {out}/p.json", "eplb"),
    "an unknown figure": (2, "certify {plan} {trace} --figure spam", "span"),
    "an output in no folder": (2, "solve {trace} --gpus 4 -o {out}/no/p.json", "mkdir"),
    "an unknown cluster": (2, "solve {trace} --gpus 4 --cluster h1000 -o {out}/p.json", "h100"),
    "an unknown engine": (2, "export {plan} --to sglong -o {out}/p.json", "sglang"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_the_impossible_is_refused_with_a_way_out(places, what):
    code, arguments, way_out = IMPOSSIBLE[what]
    assert way_out in fails(code, places["out"], *arguments.format(**places).split())


TINY = {
    "one layer": (40, 1, 8, 2),
    "one expert": (40, 2, 1, 1),
    "one token each": (8, 2, 8, 2),
}


@pytest.mark.parametrize("what", TINY)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_smallest_traces_work_or_are_refused_with_a_hint(tmp_path, what, ranks):
    num_tokens, num_layers, num_experts, top_k = TINY[what]
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((num_tokens, num_layers, num_experts)))[:, :, :top_k]
    trace = make_trace(experts=chosen, num_experts=num_experts, request=np.arange(num_tokens) % 8)
    path, plan = tmp_path / "trace.npz", tmp_path / "plan.json"
    write_npz(trace, path)
    succeeds("inspect", path, "--json").document()
    succeeds("analyze", path, "--json").document()
    if num_experts < ranks:
        fails(2, tmp_path, "solve", path, "--gpus", ranks, "-o", plan)
        return
    succeeds("solve", path, "--gpus", ranks, "-o", plan)
    for command in (
        ["evaluate", plan, path, "--all"],
        ["certify", plan, path, "--seconds", 1],
        ["compare", path, "--gpus", ranks, "--solvers", "contiguous,eplb"],
    ):
        succeeds(*command)
        succeeds(*command, "--json").document()


def test_a_trace_of_one_request_has_nothing_to_hold_out_and_says_so(tmp_path):
    chosen = np.argsort(np.random.default_rng(0).random((20, 2, 8)))[:, :, :2]
    path = tmp_path / "trace.npz"
    write_npz(make_trace(experts=chosen, num_experts=8), path)
    for command in (["solve", path, "-o", tmp_path / "p.json"], ["compare", path]):
        assert "--in-sample" in fails(2, tmp_path, *command, "--gpus", 2)
    succeeds("solve", path, "--gpus", 2, "--in-sample", "-o", tmp_path / "p.json")
