"""Nodes as network namespaces: each joined to a switch by a virtual link of a given rate.

    node 0 (namespace) -- veth, tc tbf both ways -- switch (namespace, a bridge) -- ... -- node 1

What two ranks of one node say to each other stays on the loopback of its namespace, unshaped.
What leaves a node passes its link: the token bucket filter on the node's end delays what it sends,
the one on the switch's end what it receives. Links have a rate and no delay of their own. Nothing
outside these namespaces is touched: no address, route or link of the machine itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

INTERFACE = "net0"
_PORT = "port"
_BRIDGE = "bridge0"
_MTU = 1500
_QUEUE_BYTES = 16 * 2**20  # so that a link delays and never drops
_NAME = re.compile(r"netlab-(\d+)-\w+")


class NetlabError(Exception):
    """The laboratory cannot be built here; the text says what is missing."""


@dataclass(frozen=True)
class Traffic:
    """What passed one end of a node's link, counted by the kernel, headers of TCP and IP included.

    Attributes:
        node: number of the node.
        direction: "send" or "receive", seen from the node.
        wire_bytes: bytes on the link.
        delayed: how often the filter had to hold data back.
        dropped: packets that were lost.
    """

    node: int
    direction: str
    wire_bytes: int
    delayed: int
    dropped: int


@dataclass(frozen=True)
class Network:
    """A laboratory that stands.

    Attributes:
        name: common start of its namespaces' names.
        num_nodes: N.
        mbit: rate of each node's link, each way, in 10^6 bits per second.
    """

    name: str
    num_nodes: int
    mbit: float

    def namespace(self, node: int) -> str:
        return f"{self.name}-node{node}"

    @property
    def switch(self) -> str:
        return f"{self.name}-switch"

    def address(self, node: int) -> str:
        """IPv4 address of a node, known only inside the laboratory."""
        return f"10.0.{node // 250}.{node % 250 + 1}"

    def traffic(self) -> list[Traffic]:
        """What has passed the links so far."""
        found = []
        for node in range(self.num_nodes):
            ends = (("send", self.namespace(node), INTERFACE),
                    ("receive", self.switch, f"{_PORT}{node}"))  # fmt: skip
            for direction, namespace, device in ends:
                text = _run("tc", "-n", namespace, "-s", "-j", "qdisc", "show", "dev", device)
                tbf = next(entry for entry in json.loads(text) if entry["kind"] == "tbf")
                found.append(
                    Traffic(node, direction, tbf["bytes"], tbf["overlimits"], tbf["drops"])
                )
        return found


@contextlib.contextmanager
def network(num_nodes: int, mbit: float) -> Iterator[Network]:
    """Build a laboratory, and take it down whatever happens.

    Args:
        num_nodes: N.
        mbit: rate of each node's link.

    Raises:
        NetlabError: not root, no iproute2, or a kernel without one of the parts.
    """
    check_requirements()
    remove_leftovers()
    lab = Network(f"netlab-{os.getpid()}", num_nodes, mbit)
    try:
        _build(lab)
        yield lab
    finally:
        for namespace in (*map(lab.namespace, range(num_nodes)), lab.switch):
            _remove(namespace)


def check_requirements() -> None:
    """Raise NetlabError, with what to do, where the laboratory cannot be built."""
    if os.name != "posix" or not hasattr(os, "geteuid"):
        raise NetlabError("network namespaces need Linux")
    if os.geteuid() != 0:
        raise NetlabError("network namespaces need root: run this with sudo, or in a container "
                          "with --privileged")  # fmt: skip
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise NetlabError(f"`{program}` is not installed: apt-get install iproute2")


def remove_leftovers() -> None:
    """Remove laboratories whose process was killed before it could."""
    for line in _run("ip", "netns", "list").splitlines():
        match = _NAME.match(line)
        if match and not os.path.exists(f"/proc/{match[1]}"):
            _remove(match[0])


def _build(lab: Network) -> None:
    _needs("network namespaces (CONFIG_NET_NS)", "ip", "netns", "add", lab.switch)
    _needs("bridges (CONFIG_BRIDGE)",
           "ip", "-n", lab.switch, "link", "add", _BRIDGE, "type", "bridge")  # fmt: skip
    _run("ip", "-n", lab.switch, "link", "set", _BRIDGE, "up")
    for node in range(lab.num_nodes):
        namespace, port = lab.namespace(node), f"{_PORT}{node}"
        _run("ip", "netns", "add", namespace)
        _needs("virtual links (CONFIG_VETH)", "ip", "-n", lab.switch, "link", "add", port,
               "type", "veth", "peer", "name", INTERFACE, "netns", namespace)  # fmt: skip
        _run("ip", "-n", lab.switch, "link", "set", port, "master", _BRIDGE, "up")
        _run("ip", "-n", namespace, "link", "set", "lo", "up")
        address = f"{lab.address(node)}/16"
        _run("ip", "-n", namespace, "address", "add", address, "dev", INTERFACE)
        _run("ip", "-n", namespace, "link", "set", INTERFACE, "up")
        for where, device in ((namespace, INTERFACE), (lab.switch, port)):
            _shape(where, device, lab.mbit)


def _shape(namespace: str, device: str, mbit: float) -> None:
    rate = max(1, round(mbit * 1e6))
    burst = max(2 * _MTU, round(rate / 8 / 1000))  # two packets, or what a millisecond carries
    _needs("token bucket filters (CONFIG_NET_SCH_TBF)",
           "tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf",
           "rate", f"{rate}bit", "burst", str(burst), "limit", str(_QUEUE_BYTES))  # fmt: skip


def _remove(namespace: str) -> None:
    """End what still runs in a namespace, and remove it with its links."""
    pids = _try("ip", "netns", "pids", namespace)
    for pid in pids.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), 9)
    _try("ip", "netns", "delete", namespace)


def _needs(what: str, *command: str) -> None:
    done = _try(*command)
    if done.returncode:
        raise NetlabError(f"this kernel or container lacks {what}: {_said(done)}")


def _run(*command: str) -> str:
    done = _try(*command)
    if done.returncode:
        raise NetlabError(f"`{' '.join(command)}` failed: {_said(done)}")
    return done.stdout


def _try(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
