"""`placer import`, `inspect` and `analyze`: sound traces go in, damaged ones are refused."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import topic_trace

from placer.trace import open_trace, write_npz
from placer.trace.importing import write_trace

from .running import fails, run, succeeds


def test_an_import_says_the_same_as_its_file(trace_npz, tmp_path):
    output = tmp_path / "trace"
    document = succeeds("import", trace_npz, "-o", output, "--json").document()
    assert document == {
        "kind": "trace", "path": str(output), "tokens": 384, "requests": 12, "layers": 6,
        "experts": 16, "top_k": 4, "has_weights": False, "warnings": [],
    }  # fmt: skip
    assert open_trace(output).fingerprint() == open_trace(trace_npz).fingerprint()
    assert open_trace(output).request_labels() == open_trace(trace_npz).request_labels()


def test_an_import_for_people_is_one_line(trace_npz, tmp_path):
    outcome = succeeds("import", trace_npz, "--from", "npz", "-o", tmp_path / "a[red]b")
    assert "a[red]b: 384 tokens of 12 requests, 6 layers x 16 experts, top-4" in outcome.stdout


def test_a_trace_is_replaced_only_with_force(trace_npz, tmp_path):
    output = tmp_path / "trace"
    succeeds("import", trace_npz, "-o", output)
    assert "--force" in fails(2, tmp_path, "import", trace_npz, "-o", output)
    other = tmp_path / "other.npz"
    write_npz(topic_trace(num_requests=3), other)
    succeeds("import", other, "-o", output, "--force")
    assert open_trace(output).num_tokens == 96


def npz_with(trace_npz, folder, **changes):
    """A copy of the interchange trace with arrays replaced, or removed where None."""
    arrays = dict(np.load(trace_npz)) | changes
    path = folder / "bad.npz"
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def out_of_range(arrays):
    experts = arrays["experts"].copy()
    experts[7, 2, 1] = 16
    return {"experts": experts}


def nan_weights(arrays):
    weights = np.ones(arrays["experts"].shape, np.float32)
    weights[5, 1, 0] = np.nan
    return {"weights": weights}


def twice(arrays):
    experts = arrays["experts"].copy()
    experts[3, 0, 1] = experts[3, 0, 0]
    return {"experts": experts}


BAD = {
    "ids out of range": (out_of_range, ["expert id 16", "token 7", "layer 3"]),
    "NaN weights": (nan_weights, ["token 5", "layer 2", "nan"]),
    "an expert twice": (twice, ["stands twice", "token 3", "layer 1"]),
    "layers of different expert counts": (
        lambda _: {"num_experts": np.array([16, 16, 8, 16, 16, 16])},
        ["layer 1 has 16 experts and layer 3 has 8", "one trace for each group"],
    ),
    "no tokens": (
        lambda a: (
            {k: a[k][:0] for k in ("experts", "request", "position", "phase", "step")}
            | {"request_label": None}
        ),
        ["holds no tokens"],
    ),
    "no experts": (lambda _: {"experts": None}, ["has no experts"]),
    "experts as floats": (lambda a: {"experts": a["experts"] * 1.0}, ["expected integers"]),
    "a phase that does not exist": (
        lambda a: {"phase": np.full(len(a["phase"]), 3)},
        ["phase of token 0 is 3"],
    ),
    "a request for fewer tokens": (lambda a: {"request": a["request"][:-1]}, ["request is"]),
    "pickled objects": (
        lambda a: {"experts": np.array([{"a": 1}], dtype=object)},
        ["no Python objects"],
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_trace_is_refused_by_every_command_that_reads_it(trace_npz, tmp_path, what):
    damage, words = BAD[what]
    path = npz_with(trace_npz, tmp_path, **damage(dict(np.load(trace_npz))))
    for command in (
        ["import", path, "-o", tmp_path / "trace"],
        ["solve", path, "--gpus", 4, "-o", tmp_path / "plan.json"],
        ["analyze", path, "--npz", tmp_path / "counts.npz"],
    ):
        outcome = run(*command)
        assert outcome.exit_code == 5
        assert outcome.stdout == ""
        assert outcome.stderr.startswith("error: ")
        assert str(path) in outcome.stderr
        for word in words:
            assert word in outcome.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["bad.npz"]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "missing"])
def test_a_file_that_is_no_trace_is_refused(trace_npz, tmp_path, damage):
    path = tmp_path / "bad.npz"
    if damage == "truncated":
        path.write_bytes(trace_npz.read_bytes()[:-900])
    elif damage == "foreign":
        path.write_text("a,b,c\n1,2,3\n")
    elif damage == "empty":
        path.write_bytes(b"")
    for command in (
        ["import", path, "-o", tmp_path / "trace"],
        ["solve", path, "--gpus", 4, "-o", tmp_path / "plan.json"],
        ["compare", path, "--gpus", 4],
        ["analyze", path],
    ):
        outcome = run(*command)
        assert outcome.exit_code == 5
        assert outcome.stdout == ""
        assert str(path) in outcome.stderr.splitlines()[0]
        assert not (tmp_path / "trace").exists()
        assert not (tmp_path / "plan.json").exists()


@pytest.fixture
def damaged_folder(trace_folder, tmp_path):
    """The native trace with a part cut short."""
    folder = tmp_path / "trace"
    folder.mkdir()
    for path in trace_folder.iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content[:-100] if path.suffix == ".parquet" else content)
    return folder


@pytest.fixture
def scratched_folder(trace, tmp_path):
    """A native trace with a byte of a part changed: found only by going through it."""
    folder = tmp_path / "trace"
    write_trace(trace, folder)
    part = folder / "part-0-00000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 4] ^= 0xFF
    part.write_bytes(content)
    return folder


def test_a_truncated_part_of_a_native_trace_is_named(damaged_folder, tmp_path):
    for command in (
        ["solve", damaged_folder, "--gpus", 4, "-o", tmp_path / "plan.json"],
        ["analyze", damaged_folder],
    ):
        outcome = run(*command)
        assert outcome.exit_code == 5
        assert outcome.stdout == ""
        assert ".parquet" in outcome.stderr.splitlines()[0]
    assert not (tmp_path / "plan.json").exists()


def test_inspect_describes_both_kinds_of_trace(trace_folder, trace_npz):
    native = succeeds("inspect", trace_folder, "--json").document()
    npz = succeeds("inspect", trace_npz, "--json").document()
    assert native["sound"]
    assert npz["sound"]
    for key in ("tokens", "requests", "layers", "experts", "top_k", "fingerprint", "phases"):
        assert native[key] == npz[key]
    assert native["phases"] == {"prefill": 240, "decode": 144}
    text = succeeds("inspect", trace_folder).stdout
    for word in ("384 of 12 requests", "16, top-4", "240 prefill", "label code", "sound, complete"):
        assert word in text


def test_inspect_reads_a_trace_by_its_manifest(trace_folder):
    by_manifest = succeeds("inspect", trace_folder / "manifest.json", "--json").document()
    assert by_manifest["tokens"] == 384


def test_inspect_reports_an_unsound_trace_with_exit_code_5(scratched_folder):
    outcome = run("inspect", scratched_folder, "--json")
    assert outcome.exit_code == 5
    assert "is not sound" in outcome.stderr
    document = outcome.document()
    assert document["sound"] is False
    assert ".parquet" in document["problems"][0]
    assert "not sound" in run("inspect", scratched_folder).stdout


def test_inspect_describes_a_plan(plan_path):
    document = succeeds("inspect", plan_path, "--json").document()
    assert (document["kind"], document["sound"], document["num_ranks"]) == ("plan", True, 4)
    assert "6 layers x 16 experts on 4 ranks" in succeeds("inspect", plan_path).stdout


def test_inspect_refuses_what_is_neither(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    for name in ("notes.txt", "folder", "none"):
        outcome = run("inspect", tmp_path / name)
        assert outcome.exit_code == 5
        assert name in outcome.stderr


def test_analyze_says_what_is_in_the_routing(trace_folder):
    document = succeeds("analyze", trace_folder, "--json").document()
    assert document["overall"]["num_tokens"] == 384
    assert set(document["labels"]) == {"code", "prose", "maths"}
    ranks = [entry["num_ranks"] for entry in document["overall"]["headroom"]]
    assert ranks == [8, 4]
    text = succeeds("analyze", trace_folder, "--gpus", 2).stdout
    assert "384 tokens" in text
    assert "prose" in text


def test_analyze_narrows_to_a_phase(trace_folder, tmp_path):
    document = succeeds("analyze", trace_folder, "--phase", "decode", "--json").document()
    assert document["overall"]["num_tokens"] == 144
    path = tmp_path / "prefill.npz"
    source = open_trace(trace_folder).read()
    write_npz(source.select(source.phase == 0), path)
    assert "no tokens of phase decode" in fails(2, tmp_path, "analyze", path, "--phase", "decode")


def test_analyze_writes_its_graph_and_counts_once(trace_folder, tmp_path):
    graph, counts = tmp_path / "graph.graphml", tmp_path / "counts.npz"
    command = ("analyze", trace_folder, "--graphml", graph, "--npz", counts)
    succeeds(*command)
    assert ElementTree.parse(graph).getroot().tag.endswith("graphml")
    assert np.load(counts)["coactivation"].diagonal(0, 1, 2).sum() == 384 * 6 * 4
    assert "--force" in fails(2, tmp_path, *command)
    succeeds(*command, "--force")
