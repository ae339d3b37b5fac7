"""`Cluster`: ranks, nodes, links and devices that a plan is made for; presets and TOML files."""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from placer.errors import BadFileError, InfeasibleError, UsageError
from placer.files import atomic_path

FORMAT = "placer.cluster"
SCHEMA_VERSION = 1
NetworkScope = Literal["rank", "node"]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes x ranks with their links and devices.

    Bandwidths are in GB/s (10^9 bytes per second), in one direction; links are full duplex.

    Attributes:
        name: of the preset or file.
        num_nodes: N.
        ranks_per_node: ranks that share fast links.
        intra_node_gbps: what one rank can send (and receive) over its fast links.
        intra_node_latency_us: of one transfer over them, launch included.
        inter_node_gbps: what one rank, or one node, can send (and receive) over the network.
        inter_node_scope: whether `inter_node_gbps` belongs to each `rank` or is shared by a
            whole `node`.
        inter_node_latency_us: of one transfer over the network, launch included.
        memory_bytes: memory of one rank's device; None = unknown.
        hbm_gbps: bandwidth of that memory; None = unknown.
        flops: peak floating-point operations per second of one rank; None = unknown.
        source: where the figures come from.
    """

    name: str
    num_nodes: int
    ranks_per_node: int
    intra_node_gbps: float
    intra_node_latency_us: float
    inter_node_gbps: float
    inter_node_latency_us: float
    inter_node_scope: NetworkScope = "rank"
    memory_bytes: int | None = None
    hbm_gbps: float | None = None
    flops: float | None = None
    source: str = ""

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    def __post_init__(self) -> None:
        if min(self.num_nodes, self.ranks_per_node) < 1:
            raise UsageError("num_nodes and ranks_per_node must be at least 1")
        for name in ("intra_node_gbps", "inter_node_gbps", "memory_bytes", "hbm_gbps", "flops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value}, expected a positive number")
        for name in ("intra_node_latency_us", "inter_node_latency_us"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.inter_node_scope not in get_args(NetworkScope):
            raise UsageError(
                f"inter_node_scope is {self.inter_node_scope!r}, expected rank or node"
            )


_ASSUMED = "latencies are assumed (no datasheet gives them): measure yours"


def _gpu_node(
    name: str,
    source: str,
    *,
    ranks: int,
    intra_node_gbps: float,
    inter_node_gbps: float,
    memory_gb: int,
    hbm_gbps: float,
    teraflops: float,
) -> Cluster:
    return Cluster(
        name=name,
        num_nodes=1,
        ranks_per_node=ranks,
        intra_node_gbps=intra_node_gbps,
        intra_node_latency_us=5.0,
        inter_node_gbps=inter_node_gbps,
        inter_node_latency_us=15.0,
        memory_bytes=memory_gb * 10**9,
        hbm_gbps=hbm_gbps,
        flops=teraflops * 1e12,
        source=f"{source}; {_ASSUMED}",
    )


# Link figures of datasheets count both directions together: halved here. FLOPs: dense BF16.
PRESETS: dict[str, Cluster] = {
    cluster.name: cluster
    for cluster in (
        _gpu_node(
            "a100-nvl8",
            "NVIDIA A100 80GB SXM datasheet (2.039 TB/s, 312 TFLOPS, NVLink 600 GB/s), "
            "DGX A100: one 200 Gb/s ConnectX-6 per GPU",
            ranks=8,
            intra_node_gbps=300.0,
            inter_node_gbps=25.0,
            memory_gb=80,
            hbm_gbps=2039.0,
            teraflops=312.0,
        ),
        _gpu_node(
            "h100-nvl8",
            "NVIDIA H100 SXM datasheet (80 GB, 3.35 TB/s, 989 TFLOPS dense, NVLink 900 GB/s), "
            "DGX H100: one 400 Gb/s ConnectX-7 per GPU",
            ranks=8,
            intra_node_gbps=450.0,
            inter_node_gbps=50.0,
            memory_gb=80,
            hbm_gbps=3350.0,
            teraflops=989.0,
        ),
        _gpu_node(
            "h200-nvl8",
            "NVIDIA H200 SXM datasheet (141 GB, 4.8 TB/s, 989 TFLOPS dense, NVLink 900 GB/s), "
            "DGX H200: one 400 Gb/s ConnectX-7 per GPU",
            ranks=8,
            intra_node_gbps=450.0,
            inter_node_gbps=50.0,
            memory_gb=141,
            hbm_gbps=4800.0,
            teraflops=989.0,
        ),
        _gpu_node(
            "b200-nvl8",
            "NVIDIA DGX B200 datasheet (8 GPUs: 1,440 GB, 64 TB/s, 72 PFLOPS sparse FP8 = 18 "
            "dense BF16, NVLink 14.4 TB/s), one 400 Gb/s ConnectX-7 per GPU",
            ranks=8,
            intra_node_gbps=900.0,
            inter_node_gbps=50.0,
            memory_gb=180,
            hbm_gbps=8000.0,
            teraflops=2250.0,
        ),
        _gpu_node(
            "gb200-nvl72",
            "NVIDIA GB200 NVL72 datasheet (72 GPUs: 13.4 TB, 576 TB/s, 360 PFLOPS sparse BF16, "
            "NVLink 130 TB/s), one 400 Gb/s ConnectX-7 per GPU; a node is an NVLink domain",
            ranks=72,
            intra_node_gbps=900.0,
            inter_node_gbps=50.0,
            memory_gb=186,
            hbm_gbps=8000.0,
            teraflops=2500.0,
        ),
        _gpu_node(
            "mi300x-8",
            "AMD Instinct MI300X data sheet (192 GB, 5.3 TB/s, 1307 TFLOPS dense, 7 Infinity "
            "Fabric links of 128 GB/s), one 400 Gb/s NIC per GPU",
            ranks=8,
            intra_node_gbps=448.0,
            inter_node_gbps=50.0,
            memory_gb=192,
            hbm_gbps=5300.0,
            teraflops=1307.0,
        ),
        Cluster(
            name="local-cpu",
            num_nodes=1,
            ranks_per_node=8,
            intra_node_gbps=2.0,
            intra_node_latency_us=100.0,
            inter_node_gbps=1.0,
            inter_node_latency_us=200.0,
            hbm_gbps=10.0,
            flops=5e10,
            source="assumed, for processes on one machine: measure yours",
        ),
    )
}


def load_cluster(
    name_or_path: str | Path,
    *,
    num_nodes: int | None = None,
    ranks_per_node: int | None = None,
) -> Cluster:
    """A preset by name, or a cluster from a TOML file, cut to so many nodes and ranks.

    Args:
        name_or_path: a key of PRESETS, or the path of a TOML file.
        num_nodes: replaces the cluster's own number.
        ranks_per_node: replaces the cluster's own number; a GPU node has no more than that.

    Raises:
        UsageError: neither a preset nor a file; or more ranks per node than a node has.
        BadFileError: the file is not a cluster.
    """
    cluster = PRESETS.get(str(name_or_path))
    if cluster is None:
        path = Path(name_or_path)
        if path.suffix != ".toml" and not path.is_file():
            raise UsageError(
                f"{name_or_path} is neither a cluster preset nor a TOML file",
                f"presets: {', '.join(PRESETS)}",
            )
        cluster = read_cluster(path)
    most = cluster.ranks_per_node
    if ranks_per_node is not None and ranks_per_node > most and cluster.name != "local-cpu":
        raise UsageError(
            f"a node of {cluster.name} has {most} ranks, not {ranks_per_node}",
            "use more nodes, or describe your cluster in a TOML file",
        )
    return replace(
        cluster,
        num_nodes=cluster.num_nodes if num_nodes is None else num_nodes,
        ranks_per_node=most if ranks_per_node is None else ranks_per_node,
    )


def read_cluster(path: Path) -> Cluster:
    """Read a TOML file: `format`, `schema_version` and the attributes of `Cluster` as keys.

    Raises:
        BadFileError: missing, not TOML, a key is unknown, missing or of the wrong type.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadFileError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadFileError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise BadFileError(f"{path} is not valid TOML: {error}") from None
    found = document.pop("format", None)
    if found != FORMAT:
        raise BadFileError(
            f"{path} is not a cluster file (its format says {found!r})",
            f'it must begin with format = "{FORMAT}"',
        )
    version = document.pop("schema_version", None)
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise BadFileError(
            f"{path} has schema_version {version!r}, this placer reads {SCHEMA_VERSION}"
        )
    document.setdefault("name", path.stem)
    _check_keys(path, document)
    try:
        return Cluster(**document)
    except UsageError as error:
        raise BadFileError(f"{path}: {error.message}", error.hint) from None


def write_cluster(path: Path, cluster: Cluster, *, force: bool = False) -> None:
    """Write a TOML file that `read_cluster` reads back to an equal cluster."""
    lines = [f'format = "{FORMAT}"', f"schema_version = {SCHEMA_VERSION}"]
    for field in fields(Cluster):
        value = getattr(cluster, field.name)
        if value is not None:
            text = json.dumps(value) if isinstance(value, str) else repr(value)
            lines.append(f"{field.name} = {text}")
    with atomic_path(path, force=force) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def fits(
    cluster: Cluster,
    *,
    num_layers: int,
    slots_per_rank: int,
    expert_bytes: int,
    other_bytes: int = 0,
) -> int | None:
    """Bytes that stay free on a rank, or None where the cluster's memory is unknown.

    A rank holds num_layers * slots_per_rank * expert_bytes of experts, and `other_bytes` of
    everything else (attention, KV cache, activations).

    Raises:
        InfeasibleError: they do not fit; the message says by how much.
    """
    if cluster.memory_bytes is None:
        return None
    slot_bytes = num_layers * expert_bytes
    experts_bytes = slots_per_rank * slot_bytes
    free = cluster.memory_bytes - experts_bytes - other_bytes
    if free >= 0:
        return free
    most = max(0, (cluster.memory_bytes - other_bytes) // slot_bytes)
    rest = f" beside {_gigabytes(other_bytes)} of other data" if other_bytes else ""
    raise InfeasibleError(
        f"the experts of a rank take {_gigabytes(experts_bytes)} ({num_layers} layers x "
        f"{slots_per_rank} slots x {_gigabytes(expert_bytes)}){rest}; a rank of {cluster.name} "
        f"has {_gigabytes(cluster.memory_bytes)}: {_gigabytes(-free)} too much",
        f"at most {most} slots per rank fit; use more ranks or fewer slots per rank",
    )


def _check_keys(path: Path, document: dict[str, Any]) -> None:
    numbers = "a number"
    expected = {"int": "an integer", "float": numbers, "str": "a string"}
    known = {field.name: str(field.type) for field in fields(Cluster)}
    for key, value in document.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise BadFileError(f"{path}: unknown key {key!r}", hint)
        kind = known[key].removesuffix(" | None")
        wanted = expected.get(kind, "a string")
        right = {
            "an integer": isinstance(value, int) and not isinstance(value, bool),
            numbers: isinstance(value, int | float) and not isinstance(value, bool),
            "a string": isinstance(value, str),
        }[wanted]
        if not right:
            raise BadFileError(f"{path}: {key} is {value!r}, expected {wanted}")
    required = [field.name for field in fields(Cluster) if field.default is MISSING]
    missing = [key for key in required if key not in document]
    if missing:
        raise BadFileError(f"{path}: {', '.join(missing)} missing")


def _gigabytes(number: int) -> str:
    """Bytes as people read them; small amounts in MB."""
    return f"{number / 1e9:.2f} GB" if number >= 10**9 else f"{number / 1e6:.2f} MB"
