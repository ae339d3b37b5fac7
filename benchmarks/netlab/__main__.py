"""Run a command as the ranks of several nodes that slow links join, all on this machine.

    python -m benchmarks.netlab --nodes 2 --ranks-per-node 2 --mbit 30 -- placer bench plan.json ...

Needs Linux, root and iproute2. The command finds RANK, WORLD_SIZE, MASTER_ADDR and the rest in its
environment, as under torchrun. Its exit code is passed on; 124 when the time is up, 2 when the
laboratory cannot be built.
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import NoReturn

from benchmarks.netlab.network import NetlabError, Network, network
from benchmarks.netlab.ranks import run_ranks


def main() -> int:
    """Parse, build, run, take down."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.netlab", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--nodes", type=_count, default=2, help="default 2")
    parser.add_argument("--ranks-per-node", type=_count, default=2, help="default 2")
    parser.add_argument(
        "--mbit", type=_rate, default=30.0, help="rate of a node's link, each way; default 30"
    )
    parser.add_argument(
        "--time-limit", type=_rate, default=600.0, help="seconds for the command; default 600"
    )
    parser.add_argument("command", nargs="+", help="after --: what every rank runs")
    asked = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with network(asked.nodes, asked.mbit) as lab:
            code = run_ranks(lab, asked.ranks_per_node, asked.command, asked.time_limit)
            _tell(lab)
    except NetlabError as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 2
    if code == 124:
        print(f"netlab: the time was up after {asked.time_limit:g} s", file=sys.stderr)
    return code


def _tell(lab: Network) -> None:
    for end in lab.traffic():
        print(
            f"netlab: node {end.node} {end.direction}: {end.wire_bytes:,} bytes on the wire at "
            f"{lab.mbit:g} Mbit/s, held back {end.delayed:,} times, {end.dropped} packets lost",
            file=sys.stderr,
        )


def _leave(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 64")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0.001 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is out of range")
    return value


if __name__ == "__main__":
    sys.exit(main())
