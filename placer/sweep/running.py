"""Running a sweep: the cells that are missing, kept one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from placer.errors import UsageError
from placer.planning import Settings
from placer.sweep.cells import workload
from placer.sweep.grid import Cell, Grid, Shape, jobs
from placer.sweep.store import FORMAT, SCHEMA_VERSION, Store
from placer.sweep.workers import Executor
from placer.trace.source import TraceSource


def run_sweep(
    sources: Sequence[TraceSource],
    settings: Settings,
    grid: Grid,
    folder: Path,
    execute: Executor,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Make every cell that `folder` does not hold yet.

    Args:
        sources: traces of one model.
        settings: what all cells share; its shape is replaced by each cell's.
        grid: the cells.
        folder: where they are kept; a sweep that was cut short goes on.
        execute: where they are made, from `placer.sweep.workers`.
        progress: told what is being done.

    Returns:
        A document: `cells` in the grid's order (those that are finished), how many were `found`
        and how many `made`, and whether Ctrl-C `interrupted`.

    Raises:
        UsageError: no cells; another sweep lies in the folder.
    """
    cells = grid.cells()
    if not cells:
        raise UsageError(
            "no number of nodes divides any number of GPUs", "for example --gpus 8 --nodes 1,2"
        )
    store = Store(folder, sources, settings)
    known = {cell: document for cell in cells if (document := store.get(cell)) is not None}
    missing = [cell for cell in cells if cell not in known]
    found, interrupted = len(known), False
    if missing:
        progress("splitting the requests")
        shared = workload(sources, settings)
        progress(f"{found} of {len(cells)} cells")
        try:
            for made in execute(shared, jobs(missing)):
                for document in made:
                    cell = _cell(document)
                    store.put(cell, document)
                    known[cell] = document
                progress(f"{len(known)} of {len(cells)} cells")
        except KeyboardInterrupt:
            interrupted = True
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "path": str(folder),
        "objective": settings.objective,
        "max_imbalance": settings.max_imbalance,
        "solver": settings.solver,
        "seed": settings.seed,
        "phase": settings.phase,
        "found": found,
        "made": len(known) - found,
        "missing": len(cells) - len(known),
        "interrupted": interrupted,
        "cells": [known[cell] for cell in cells if cell in known],
    }


def _cell(document: dict[str, Any]) -> Cell:
    config = dict(document["config"])
    batch_tokens = config.pop("batch_tokens")
    return Cell(Shape(**config), batch_tokens)
