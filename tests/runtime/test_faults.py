"""Whatever goes wrong: one line that names the rank and the cause, and no process left behind."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import transformers

from placer.errors import BadFileError, PlacerError, TimeLimitError
from placer.runtime.checksums import WrongExpertError
from placer.runtime.launch import RankFailedError, launch
from placer.runtime.meeting import MeetingError
from placer.runtime.transport import PeerLostError

from . import faulty
from .plans import make_placement


@pytest.fixture
def pids(tmp_path):
    """A folder where ranks leave their process ids; at the end none of them may be alive."""
    folder = tmp_path / "pids"
    folder.mkdir()
    yield folder
    found = [int(path.read_text()) for path in folder.iterdir()]
    assert found
    assert [pid for pid in found if psutil.pid_exists(pid)] == []


@pytest.fixture(scope="module")
def plain(models):
    return models.get("Qwen3Moe")


def placement_of(reference, num_ranks):
    layout = reference.layout
    return make_placement("random", len(layout.layers), layout.num_experts, num_ranks, num_ranks)


def failure_of(kind, function, num_ranks, *arguments, **options) -> PlacerError:
    with pytest.raises(kind) as caught:
        launch(function, num_ranks, arguments, **options)
    assert "\n" not in caught.value.message
    return caught.value


def test_a_killed_rank_is_named_and_the_others_end(plain, pids):
    arguments = (pids, plain.folder, placement_of(plain, 3), 2, signal.SIGKILL)
    error = failure_of(RankFailedError, faulty.signal_in_a_layer, 3, *arguments)
    assert error.message == "rank 2 was killed by SIGKILL"
    assert len(list(pids.iterdir())) == 3


def test_a_rank_that_does_not_answer_is_named_with_the_layer(plain, pids):
    arguments = (pids, plain.folder, placement_of(plain, 2), 1, signal.SIGSTOP)
    error = failure_of(PeerLostError, faulty.signal_in_a_layer, 2, *arguments, timeout_s=8)
    assert error.message == (
        "rank 0: rank 1 did not answer within 8 s during the combine of MoE layer 2"
    )


def test_a_rank_that_never_comes_is_named(pids):
    error = failure_of(MeetingError, faulty.expect_one_more, 2, pids, timeout_s=8)
    assert error.message.endswith("rank 2 did not come within 8 s")
    assert error.hint


def test_a_store_that_nobody_opened_is_named(pids):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    error = failure_of(MeetingError, faulty.meet_nobody, 1, pids, port, timeout_s=1)
    assert error.message == f"rank 0: nobody answered at 127.0.0.1:{port} within 1 s"


def test_a_port_in_use_is_named(pids):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = failure_of(MeetingError, faulty.open_the_port, 1, pids, port, timeout_s=1)
        assert error.message == f"rank 0: port {port} on 127.0.0.1 is in use"
        error = failure_of(MeetingError, faulty.open_the_port, 1, pids, port, port=port)
        assert error.message == f"port {port} on 127.0.0.1 is in use"


def test_rank_0_can_open_the_store_itself(pids):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert launch(faulty.open_the_port, 2, (pids, port), timeout_s=30) == [None, None]


def test_a_bug_on_one_rank_is_named(pids):
    error = failure_of(RankFailedError, faulty.divide_by_zero, 2, pids, 1)
    assert error.message == "rank 1: ZeroDivisionError: division by zero"


def test_ranks_are_ended_when_the_time_is_up(pids):
    # long enough for both to have started
    error = failure_of(TimeLimitError, faulty.hang, 2, pids, time_limit_s=10)
    assert error.message == "the ranks did not end within 10 s"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ranks_end_with_the_launcher(pids, number):
    program = (
        "from pathlib import Path\n"
        "from placer.runtime.launch import launch\n"
        "from tests.runtime import faulty\n"
        "if __name__ == '__main__':\n"
        f"    launch(faulty.hang, 2, (Path({str(pids)!r}),))\n"
    )
    script = pids.parent / "script.py"
    script.write_text(program)
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"}, stderr=subprocess.DEVNULL,
    ) as launcher:  # fmt: skip
        assert launcher.poll() is None
        family = psutil.Process(launcher.pid)
        deadline = 0
        while len(list(pids.iterdir())) < 2:  # each look waits for the file system
            deadline += 1
            assert launcher.poll() is None
            psutil.cpu_percent(interval=0.2)
            assert deadline < 600
        children = family.children(recursive=True)
        launcher.send_signal(number)
        launcher.wait(30)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def sharded(reference, folder: Path) -> Path:
    """The same checkpoint in several files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(reference.folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_a_sharded_checkpoint_is_read_and_what_it_lacks_is_named(plain, tmp_path):
    whole = sharded(plain, tmp_path / "whole")
    placement = placement_of(plain, 2)
    assert launch(faulty.load, 2, (whole, placement)) == [24, 24]
    shard = sorted(whole.glob("*.safetensors"))[1]

    def damaged(name: str) -> tuple[Path, Path]:
        copy = tmp_path / name
        shutil.copytree(whole, copy)
        return copy, copy / shard.name

    folder, file = damaged("missing")
    file.unlink()
    error = failure_of(BadFileError, faulty.load, 2, folder, placement)
    assert error.message in {f"rank {r}: {file} does not exist" for r in (0, 1)}
    folder, file = damaged("cut")
    file.write_bytes(file.read_bytes()[:-10])
    error = failure_of(BadFileError, faulty.load, 2, folder, placement)
    assert f"{file} cannot be read" in error.message
    folder, file = damaged("other")
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], file)
    error = failure_of(BadFileError, faulty.load, 2, folder, placement)
    assert f"{file} does not hold" in error.message


def test_checksums_find_experts_in_the_wrong_slots(plain):
    placement = placement_of(plain, 2)
    error = failure_of(WrongExpertError, faulty.load_and_swap, 2, plain.folder, placement, 1)
    expert = int(placement.physical_to_logical[1, placement.slots_per_rank])
    assert f"rank 1 holds other weights in slot {placement.slots_per_rank} of layer 1" in (
        error.message
    )
    assert f"those of expert {expert}," in error.message
    assert "2 of 24 slots are wrong" in error.message
