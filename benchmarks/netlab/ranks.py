"""Running one process for each rank in the nodes of a laboratory, for a bounded time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.netlab.network import INTERFACE, Network

MASTER_PORT = 29500  # every laboratory has all ports to itself
_SETTLE_S = 10.0  # for the others after a first rank has failed
_GRACE_S = 5.0  # between asking and killing
_TIMED_OUT = 124  # as timeout(1) has it
_PR_SET_PDEATHSIG = 1


def run_ranks(
    lab: Network, ranks_per_node: int, command: Sequence[str], time_limit_s: float
) -> int:
    """Run the command as every rank; the first exit code that is not 0, or 124 out of time.

    Rank 0 writes to stdout, the others' stdout goes to stderr.

    Args:
        lab: where.
        ranks_per_node: processes in each node; ranks of a node have consecutive numbers.
        command: with its arguments.
        time_limit_s: for all of it.
    """
    deadline = time.monotonic() + time_limit_s
    running: dict[int, subprocess.Popen[bytes]] = {}
    code = 0
    try:
        for rank in range(lab.num_nodes * ranks_per_node):
            running[rank] = _start(lab, ranks_per_node, rank, command)
        while running:
            left = deadline - time.monotonic()
            if left <= 0:
                return code or _TIMED_OUT
            for rank, ended in _wait_any(running, min(left, 0.2)).items():
                del running[rank]
                if ended and not code:
                    code = ended if ended > 0 else 128 - ended
                    deadline = min(deadline, time.monotonic() + _SETTLE_S)
        return code
    finally:
        _end(list(running.values()))


def environment(lab: Network, ranks_per_node: int, rank: int) -> dict[str, str]:
    """What torchrun would set, and the interface that leads to the other nodes."""
    node, local_rank = divmod(rank, ranks_per_node)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(lab.num_nodes * ranks_per_node),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": lab.address(0),
        "MASTER_PORT": str(MASTER_PORT),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
        # torch warns once per connection that the laboratory's addresses have no names
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _start(
    lab: Network, ranks_per_node: int, rank: int, command: Sequence[str]
) -> subprocess.Popen[bytes]:
    namespace = lab.namespace(rank // ranks_per_node)
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, *command],
        env={**os.environ, **environment(lab, ranks_per_node, rank)},
        stdin=subprocess.DEVNULL,
        stdout=None if rank == 0 else sys.stderr.fileno(),
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_any(running: dict[int, subprocess.Popen[bytes]], seconds: float) -> dict[int, int]:
    """Exit codes of the ranks that have ended within some time."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        next(iter(running.values())).wait(seconds)
    codes = {rank: process.poll() for rank, process in running.items()}
    return {rank: code for rank, code in codes.items() if code is not None}


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
