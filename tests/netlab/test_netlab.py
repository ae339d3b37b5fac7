"""The laboratory: what crosses nodes passes a slow link, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.netlab.network import NetlabError, check_requirements, network

ROOT = Path(__file__).parents[2]
PAYLOAD = 400_000

SENDER = """
import os, socket, sys, time
rank, to = int(os.environ["RANK"]), int(sys.argv[1])
if rank == 0:
    with socket.create_server((os.environ["MASTER_ADDR"], 5000)) as server:
        connection, _ = server.accept()
        print(sum(len(part) for part in iter(lambda: connection.recv(65536), b"")))
elif rank == to:
    while True:
        try:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], 5000))
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    connection.sendall(bytes(int(sys.argv[2])))
    connection.close()
"""

WAIT = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def arguments(*command: str, time_limit: float = 60) -> list[str]:
    return [
        sys.executable, "-m", "benchmarks.netlab", "--nodes", "2", "--ranks-per-node", "2",
        "--mbit", "20", "--time-limit", str(time_limit), "--", sys.executable, "-c", *command,
    ]  # fmt: skip


def run(*command: str, time_limit: float = 60) -> tuple[int, str, str]:
    done = subprocess.run(
        arguments(*command, time_limit=time_limit),
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def namespaces_of(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if line.startswith(f"netlab-{pid}-")]


def is_gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that nobody has waited for counts as ended)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture(autouse=True)
def _possible():
    try:
        check_requirements()
    except NetlabError as error:
        pytest.skip(str(error))


def wire_bytes(stderr: str, node: int, direction: str) -> tuple[int, int]:
    """Bytes on a link, and how often they were held back."""
    line = next(li for li in stderr.splitlines() if f"node {node} {direction}:" in li)
    words = line.replace(",", "").split()
    return int(words[4]), int(words[words.index("back") + 1])


@pytest.mark.netlab
def test_what_another_node_sends_passes_a_slow_link():
    code, stdout, stderr = run(SENDER, "2", str(PAYLOAD))
    assert (code, stdout) == (0, f"{PAYLOAD}\n")
    for node, direction in ((1, "send"), (0, "receive")):
        crossed, delayed = wire_bytes(stderr, node, direction)
        assert PAYLOAD < crossed < 1.1 * PAYLOAD
        assert delayed > 0
    assert wire_bytes(stderr, 0, "send")[0] < 0.1 * PAYLOAD


@pytest.mark.netlab
def test_what_the_same_node_sends_does_not():
    code, stdout, stderr = run(SENDER, "1", str(PAYLOAD))
    assert (code, stdout) == (0, f"{PAYLOAD}\n")
    for node in range(2):
        for direction in ("send", "receive"):
            assert wire_bytes(stderr, node, direction)[0] < 0.1 * PAYLOAD


@pytest.mark.netlab
def test_a_failing_rank_ends_the_others_and_gives_its_exit_code():
    fail = "import os, sys; sys.exit(7) if os.environ['RANK'] == '3' else None"
    assert run(fail)[0] == 7


@pytest.mark.netlab
def test_out_of_time_is_124_and_nothing_stays():
    code, stdout, stderr = run(WAIT, time_limit=3)
    assert code == 124
    assert "the time was up after 3 s" in stderr
    assert is_gone(int(stdout))


@pytest.mark.netlab
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_laboratory_is_taken_down(number):
    lab = subprocess.Popen(arguments(WAIT), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert lab.stdout is not None
    pid = int(lab.stdout.readline())
    assert namespaces_of(lab.pid)
    lab.send_signal(number)
    assert lab.wait(60) == 128 + number
    assert not namespaces_of(lab.pid)
    assert is_gone(pid)


@pytest.mark.netlab
def test_a_killed_laboratory_is_removed_by_the_next_one():
    lab = subprocess.Popen(arguments(WAIT), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert lab.stdout is not None
    pid = int(lab.stdout.readline())
    lab.kill()
    lab.wait(60)
    assert namespaces_of(lab.pid)
    with network(1, 100):
        assert not namespaces_of(lab.pid)
    assert is_gone(pid)
    assert not namespaces_of(os.getpid())


@pytest.mark.netlab
def test_an_error_inside_takes_it_down_too():
    built = []

    def build_and_fail() -> None:
        with network(3, 100) as lab:
            built.extend(namespaces_of(os.getpid()))
            assert len({lab.address(node) for node in range(3)}) == 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build_and_fail()
    assert len(built) == 4
    assert not namespaces_of(os.getpid())


@pytest.mark.netlab
def test_without_root_it_says_so():
    os.seteuid(65534)
    try:
        with pytest.raises(NetlabError, match="need root"), network(1, 100):
            pass
    finally:
        os.seteuid(0)
