"""Where cells are made: in this process, in processes of this machine, on a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from placer.errors import MissingExtraError, PlacerError
from placer.sweep.cells import Workload, run_job
from placer.sweep.grid import Cell

Job = tuple[Cell, ...]
Made = list[dict[str, Any]]
Executor = Callable[[Workload, Sequence[Job]], Iterator[Made]]

_shared: Workload | None = None


def in_this_process(shared: Workload, todo: Sequence[Job]) -> Iterator[Made]:
    """One after the other."""
    for job in todo:
        yield run_job(shared, job)


def in_processes(number: int) -> Executor:
    """So many at once, each in a process of its own with one thread."""

    def execute(shared: Workload, todo: Sequence[Job]) -> Iterator[Made]:
        if min(number, len(todo)) <= 1:
            yield from in_this_process(shared, todo)
            return
        pool = ProcessPoolExecutor(
            min(number, len(todo)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(shared,),
        )
        finished = False
        try:
            futures = [pool.submit(_run, job) for job in todo]
            for future in as_completed(futures):
                yield future.result()
            finished = True
        except BrokenProcessPool:
            raise PlacerError(
                "a process that made cells was killed (out of memory?); finished cells are kept",
                "run the same command again, with fewer --jobs",
            ) from None
        finally:
            children = [] if finished else list((pool._processes or {}).values())
            pool.shutdown(wait=finished, cancel_futures=True)
            for child in children:
                child.terminate()

    return execute


def _start(shared: Workload) -> None:
    """In a new process: Ctrl-C is the parent's business, and threads would fight for the cores."""
    global _shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    _shared = shared


def _run(job: Job) -> Made:
    assert _shared is not None
    return run_job(_shared, job)


def on_ray(address: str) -> Executor:
    """On a Ray cluster, one core a job; "local" starts one on this machine.

    The trace travels through Ray's object store; placer must be installed on the nodes.

    Raises:
        MissingExtraError: ray is not installed.
        PlacerError: no cluster answers at the address.
    """

    def execute(shared: Workload, todo: Sequence[Job]) -> Iterator[Made]:
        try:
            import ray
        except ImportError:
            raise MissingExtraError("ray", "ray") from None
        _check_answers(address)
        try:
            ray.init(
                address=None if address == "local" else address,
                log_to_driver=False,
                configure_logging=False,
                include_dashboard=False if address == "local" else None,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _no_cluster(address, str(error)) from None
        try:
            kept = ray.put(shared)
            task = ray.remote(num_cpus=1, max_retries=2)(run_job)
            waiting = [task.remote(kept, job) for job in todo]
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1)
                yield ray.get(done[0])
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.RaySystemError) as error:
            raise PlacerError(
                f"a Ray worker failed: {error}", "finished cells are kept; run the command again"
            ) from None
        finally:
            ray.shutdown()

    return execute


def _check_answers(address: str) -> None:
    """Raise PlacerError when nothing listens there: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str, reason: str) -> PlacerError:
    return PlacerError(
        f"no Ray cluster answers at {address}: {reason.splitlines()[0]}",
        "ray start --head on one machine; or --ray local",
    )
