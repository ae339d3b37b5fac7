"""Ranks find each other: a store, a sign of life from everybody, then the process group."""

from __future__ import annotations

import datetime
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from placer.errors import PlacerError
from placer.runtime.context import RankContext
from placer.runtime.transport import Transport

_SIOCGIFADDR = 0x8915


class MeetingError(PlacerError):
    """Ranks did not come together."""


@contextmanager
def joined(context: RankContext, device: torch.device) -> Iterator[Transport]:
    """A transport among all ranks; the process group is taken down at the end.

    Args:
        context: who this rank is.
        device: a CUDA device means NCCL, else gloo.

    Raises:
        MeetingError: the store's port is in use or not answered, or a rank did not come in time.
    """
    deadline = time.monotonic() + context.timeout_s
    store = PrefixStore(f"placer/{context.attempt}", _open_store(context))
    _await_everybody(context, store, deadline)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "gloo":
        _choose_interface(context)
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=context.rank,
            world_size=context.num_ranks,
            timeout=datetime.timedelta(seconds=context.timeout_s),
        )
    except RuntimeError as error:
        raise MeetingError(
            f"rank {context.rank}: the ranks cannot connect to each other: {_first_line(error)}",
            "can they reach each other's addresses? GLOO_SOCKET_IFNAME names the interface",
        ) from None
    try:
        yield Transport(context, device)
    finally:
        dist.destroy_process_group()


def serve_store(address: str, port: int, timeout_s: float) -> Any:
    """Open the store that ranks meet at; port 0 takes a free one.

    Raises:
        MeetingError: the port is in use.
    """
    try:
        return TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise MeetingError(
                f"port {port} on {address} is in use",
                "is another run going on? give another port with --master-port",
            ) from None
        raise MeetingError(
            f"a store cannot be opened on {address}:{port}: {_first_line(error)}"
        ) from None


def _open_store(context: RankContext) -> Any:
    if context.serves_store:
        return serve_store(context.address, context.port, context.timeout_s)
    try:
        return TCPStore(
            context.address,
            context.port,
            is_master=False,
            timeout=datetime.timedelta(seconds=context.timeout_s),
        )
    except RuntimeError:
        raise MeetingError(
            f"rank {context.rank}: nobody answered at {context.address}:{context.port} within "
            f"{context.timeout_s:g} s",
            "is rank 0 running, and is this its address and port?",
        ) from None


def _await_everybody(context: RankContext, store: Any, deadline: float) -> None:
    """Wait for every rank's sign of life, and name those that did not give one."""
    store.set(f"here/{context.rank}", b"1")
    keys = [f"here/{rank}" for rank in range(context.num_ranks)]
    try:
        store.wait(keys, datetime.timedelta(seconds=max(0.001, deadline - time.monotonic())))
    except RuntimeError:
        missing = [str(r) for r, key in enumerate(keys) if not _has(store, key)]
        who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(missing)}"
        raise MeetingError(
            f"rank {context.rank}: {who if missing else 'a rank'} did not come within "
            f"{context.timeout_s:g} s",
            f"start all {context.num_ranks} ranks, or look why it ended",
        ) from None


def _has(store: Any, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except RuntimeError:
        return False


def _choose_interface(context: RankContext) -> None:
    """Have gloo listen where the store was reached from, not where the host's name points."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        target = socket.gethostbyname(context.address)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, context.port or 1))
            own = probe.getsockname()[0]
    except OSError:
        return
    for _, name in socket.if_nameindex():
        if _address_of(name) == own:
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def _address_of(interface: str) -> str | None:
    """IPv4 address of a network interface (Linux); None where it has none."""
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            packed = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, packed)[20:24])
    except (OSError, ImportError):
        return None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
