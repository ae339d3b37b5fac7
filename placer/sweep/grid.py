"""`Grid`: the combinations that a sweep goes through."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from placer.plan import Dispatch


@dataclass(frozen=True, order=True)
class Shape:
    """What a plan is solved for.

    Attributes:
        num_ranks, num_nodes: GPUs, and hosts that they are spread over.
        spare_slots: slots of a rank beyond the fewest that hold every expert.
        dispatch: the dispatch model.
        cluster: preset or TOML file; "" = none, no step time.
    """

    num_ranks: int
    num_nodes: int
    spare_slots: int
    dispatch: Dispatch
    cluster: str


@dataclass(frozen=True, order=True)
class Cell:
    """A combination: a plan, and the size of the batches that it is judged in."""

    shape: Shape
    batch_tokens: int

    @property
    def config(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self.shape), "batch_tokens": self.batch_tokens}

    @property
    def name(self) -> str:
        """Of its file: readable, and different for every cell and cluster file's content."""
        shape = self.shape
        cluster = Path(shape.cluster)
        content = cluster.read_bytes() if shape.cluster and cluster.is_file() else b""
        text = json.dumps(self.config, sort_keys=True).encode()
        digest = hashlib.sha256(text + content).hexdigest()[:12]
        head = f"{shape.num_ranks}x{shape.num_nodes}+{shape.spare_slots}-{shape.dispatch}"
        return f"{head}-{self.batch_tokens}-{digest}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values of each dimension; the cells are all their combinations.

    A number of nodes that does not divide the number of ranks is left out.
    """

    num_ranks: Sequence[int]
    num_nodes: Sequence[int] = (1,)
    spare_slots: Sequence[int] = (0,)
    dispatch: Sequence[Dispatch] = ("alltoall",)
    clusters: Sequence[str] = ("",)
    batch_tokens: Sequence[int] = (256,)

    def cells(self) -> list[Cell]:
        """Sorted and distinct; none where no number of nodes divides any number of ranks."""
        return sorted(set(self._all()))

    def _all(self) -> Iterator[Cell]:
        for ranks, nodes, spare, dispatch, cluster, batch in itertools.product(
            self.num_ranks,
            self.num_nodes,
            self.spare_slots,
            self.dispatch,
            self.clusters,
            self.batch_tokens,
        ):
            if ranks % nodes == 0:
                yield Cell(Shape(ranks, nodes, spare, dispatch, cluster), batch)


def jobs(cells: Sequence[Cell]) -> list[tuple[Cell, ...]]:
    """Cells that may share a plan, together: those that differ in cluster and batch size only.

    Larger numbers of ranks come first, because they take longest.
    """
    found: dict[Shape, list[Cell]] = {}
    for cell in sorted(cells):
        found.setdefault(replace(cell.shape, cluster=""), []).append(cell)
    order = sorted(found, key=lambda shape: (-shape.num_ranks, shape))
    return [tuple(found[shape]) for shape in order]
