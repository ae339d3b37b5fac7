"""Starting ranks as local processes, watching them, and leaving none behind.

Processes come from a fork server that has loaded torch once. When one fails, the others are ended:
first asked, then killed; the error names the rank that failed first and its cause. When the
launcher itself dies, ranks notice that their pipe closed and end too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from placer.errors import PlacerError, TimeLimitError
from placer.runtime.context import DEFAULT_TIMEOUT_S, RankContext
from placer.runtime.meeting import serve_store
from placer.runtime.transport import PeerLostError

_GRACE_S = 5.0  # between asking a process to end and killing it
_SETTLE_S = 2.0  # for other ranks' accounts after a first failure
_PRELOAD = ["placer.runtime.preload"]

Result = TypeVar("Result")


class RankFailedError(PlacerError):
    """A rank ended without a result."""


@dataclass
class _Rank:
    rank: int
    process: Any
    pipe: Connection
    is_done: bool = False
    result: Any = None
    failure: PlacerError | None = None


def launch(
    function: Callable[..., Result],
    num_ranks: int,
    arguments: Sequence[Any] = (),
    *,
    ranks_per_node: int | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    time_limit_s: float | None = None,
    port: int = 0,
) -> list[Result]:
    """Run `function(context, *arguments)` in one local process for each rank.

    Args:
        function: importable by name; its result, and the arguments, are pickled.
        num_ranks: G.
        arguments: the same for all ranks.
        ranks_per_node: ranks that count as one node; by default all.
        timeout_s: how long a rank waits for another one.
        time_limit_s: for the whole run; None for no limit.
        port: of the store that ranks meet at; 0 takes a free one.

    Returns:
        The results by rank.

    Raises:
        PlacerError: what the first rank that failed raised, with its rank; other ranks are ended.
        RankFailedError: a rank was killed or raised something unexpected.
        TimeLimitError: the time limit passed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    store = serve_store("127.0.0.1", port, timeout_s)
    ranks: list[_Rank] = []
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    try:
        for rank in range(num_ranks):
            where = RankContext(
                rank, num_ranks, ranks_per_node or num_ranks, rank, "127.0.0.1", store.port,
                serves_store=False, local_size=num_ranks, timeout_s=timeout_s,
            )  # fmt: skip
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_run_rank, args=(function, where, tuple(arguments), theirs), daemon=True
            )
            process.start()
            theirs.close()
            ranks.append(_Rank(rank, process, ours))
        _watch(ranks, deadline)
    finally:
        _end_all(ranks)
    failed = [rank for rank in ranks if rank.failure is not None]
    if failed:
        failure = min(failed, key=_how_secondary).failure
        assert failure is not None
        raise failure
    if not all(rank.is_done for rank in ranks):
        raise TimeLimitError(f"the ranks did not end within {time_limit_s:g} s")
    return [rank.result for rank in ranks]


def _how_secondary(rank: _Rank) -> int:
    """Who is to blame first: a rank that crashed, one that has a cause, one that lost another."""
    if isinstance(rank.failure, RankFailedError):
        return 0
    return 2 if isinstance(rank.failure, PeerLostError) else 1


def _watch(ranks: list[_Rank], deadline: float | None) -> None:
    """Wait until all have ended, or shortly after one has failed, or the time is up."""
    running = {rank.pipe: rank for rank in ranks}
    while running:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        for pipe in wait(list(running), left):
            assert isinstance(pipe, Connection)
            rank = running.pop(pipe)
            _hear(rank)
            if rank.failure is not None:
                settled = time.monotonic() + _SETTLE_S
                deadline = settled if deadline is None else min(deadline, settled)


def _hear(rank: _Rank) -> None:
    """Take what a rank says last."""
    try:
        kind, value = rank.pipe.recv()
    except (EOFError, OSError):
        rank.process.join(_GRACE_S)
        code = rank.process.exitcode
        how = f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        rank.failure = RankFailedError(
            f"rank {rank.rank} {how}", "was there enough memory? see the log above"
        )
        return
    if kind == "result":
        rank.result, rank.is_done = value, True
    else:
        rank.failure = _rebuilt(*value)


def _end_all(ranks: list[_Rank]) -> None:
    for rank in ranks:
        if rank.process.is_alive() and not rank.is_done:
            rank.process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
        rank.pipe.close()


def _run_rank(
    function: Callable[..., Any], context: RankContext, arguments: tuple[Any, ...], pipe: Connection
) -> None:
    """What a rank's process does."""
    import torch

    torch.set_num_threads(1)  # as torchrun has it; the ranks share this machine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher hears it, and ends us
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout belongs to the launcher
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    message: tuple[str, Any]
    try:
        message = ("result", function(context, *arguments))
    except PlacerError as error:
        said = error.message
        named = said if said.startswith("rank ") else f"rank {context.rank}: {said}"
        message = ("failure", (type(error), named, error.hint))
    except BaseException as error:
        traceback.print_exc()
        cause = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        message = ("failure", (RankFailedError, f"rank {context.rank}: {cause}", ""))
    with contextlib.suppress(BrokenPipeError):
        pipe.send(message)
    pipe.close()


def _rebuilt(kind: type[PlacerError], message: str, hint: str) -> PlacerError:
    """An error of another process; its class may take other arguments than these."""
    error = kind.__new__(kind)
    PlacerError.__init__(error, message, hint)
    return error


def _end_with(pipe: Connection) -> None:
    """End this process when the launcher's end of the pipe closes."""
    with contextlib.suppress(OSError, EOFError, ValueError):
        pipe.poll(None)
        os._exit(1)
