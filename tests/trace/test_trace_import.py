import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from trace_cases import assert_same, python, random_trace, traces, unhurried

from placer.errors import BadFileError, PlacerError, UsageError
from placer.trace import (
    Trace,
    import_npz,
    new_trace_folder,
    open_trace,
    read_npz,
    write_npz,
    write_trace,
)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    write_npz(random_trace(labels=True), tmp_path / "a.npz")
    return tmp_path / "a.npz"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@unhurried
@given(traces())
def test_a_trace_comes_back_from_npz_to_native_to_npz(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace
) -> None:
    folder = tmp_path_factory.mktemp("round")
    write_npz(trace, folder / "a.npz")
    import_npz(folder / "a.npz", folder / "native")
    write_npz(open_trace(folder / "native").read(), folder / "b.npz")
    assert_same(read_npz(folder / "b.npz"), trace)
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()


def test_the_summary_says_what_was_made(npz: Path, tmp_path: Path) -> None:
    summary = import_npz(npz, tmp_path / "t")
    assert summary.path == tmp_path / "t"
    assert (summary.tokens, summary.requests, summary.layers) == (50, 5, 3)
    assert (summary.experts, summary.top_k, summary.has_weights) == (8, 2, False)
    assert summary.warnings == []
    assert names(tmp_path) == ["a.npz", "t"]


def test_unknown_keys_become_a_warning(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", experts=[[0]], num_experts=1, extra=1)
    summary = import_npz(tmp_path / "a.npz", tmp_path / "t")
    assert summary.warnings == ["keys that placer does not know: extra"]


def test_a_bad_file_leaves_nothing_behind(npz: Path, tmp_path: Path) -> None:
    npz.write_bytes(npz.read_bytes()[:-200])
    with pytest.raises(BadFileError):
        import_npz(npz, tmp_path / "t")
    assert names(tmp_path) == ["a.npz"]


def test_a_bad_file_leaves_the_trace_that_was_there(npz: Path, tmp_path: Path) -> None:
    write_trace(random_trace(tokens=9), tmp_path / "t")
    npz.write_bytes(b"PK\x03\x04")
    with pytest.raises(BadFileError):
        import_npz(npz, tmp_path / "t", force=True)
    assert open_trace(tmp_path / "t").num_tokens == 9
    assert names(tmp_path) == ["a.npz", "t"]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_trace_folder(tmp_path / "t") as folder:
            write_trace(random_trace(), folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


_SLOW_IMPORT = """
import sys
from pathlib import Path
from test_trace_store import SMALL, tokens
from placer.trace import TraceWriter, new_trace_folder

with new_trace_folder(Path(sys.argv[1])) as folder:
    with TraceWriter(folder, **SMALL, part_tokens=50) as writer:
        writer.append(**tokens(0, 120))
        print("writing", flush=True)
        sys.stdin.readline()
"""


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    process = python(_SLOW_IMPORT, tmp_path / "t", stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert names(tmp_path) != []
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    assert names(tmp_path) == []


def test_nothing_is_overwritten_without_force(npz: Path, tmp_path: Path) -> None:
    write_trace(random_trace(tokens=9), tmp_path / "t")
    with pytest.raises(UsageError, match="exists already"):
        import_npz(npz, tmp_path / "t")
    assert open_trace(tmp_path / "t").num_tokens == 9
    import_npz(npz, tmp_path / "t", force=True)
    assert open_trace(tmp_path / "t").num_tokens == 50


def test_force_leaves_other_files(npz: Path, tmp_path: Path) -> None:
    target = tmp_path / "t"
    write_trace(random_trace(tokens=9), target)
    (target / "notes.txt").write_text("keep me")
    import_npz(npz, target, force=True)
    assert open_trace(target).num_tokens == 50
    assert (target / "notes.txt").read_text() == "keep me"
    assert names(tmp_path) == ["a.npz", "t"]


def test_an_empty_folder_is_used(npz: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    import_npz(npz, tmp_path / "t")
    assert open_trace(tmp_path / "t").num_tokens == 50


def test_the_current_folder_is_used(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.chdir(tmp_path / "t")
    import_npz(npz, Path("."))
    assert open_trace(tmp_path / "t").num_tokens == 50


def test_a_file_or_a_missing_parent_is_refused(npz: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a file"):
        import_npz(npz, npz, force=True)
    with pytest.raises(UsageError, match="does not exist"):
        import_npz(npz, tmp_path / "no" / "t")


def test_the_new_folder_has_the_usual_permissions(npz: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    import_npz(npz, tmp_path / "t")
    assert (tmp_path / "t").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_place_that_cannot_be_written_is_reported(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("placer.trace.importing.tempfile.mkdtemp", refuse)
    with pytest.raises(PlacerError, match=r"cannot be written: .*Permission denied"):
        import_npz(npz, tmp_path / "t")
