"""The doctor's findings for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from placer.report.sheet import Sheet


def doctor_tables(document: Mapping[str, Any]) -> list[RenderableType]:
    """Versions, devices, solvers."""
    packages = Sheet()
    packages.add_column("package")
    packages.add_column("version")
    for name, found in document["packages"].items():
        packages.add_row(name, found or "[yellow]not installed[/]")
    solvers = Sheet("solvers")
    for header in ("name", "replicas", "source", "what it does"):
        solvers.add_column(header, words=header in ("source", "what it does"))
    for entry in document["solvers"]:
        replicas = "yes" if entry["replicates"] else ""
        solvers.add_row(entry["name"], replicas, entry["source"], entry["summary"])
    lines: list[RenderableType] = [
        f"placer {document['placer']}, Python {document['python']}, {document['cores']} cores",
        packages,
    ]
    found = ", ".join(device["name"] for device in document["devices"])
    lines.append(f"CUDA devices: {found or 'none; the CPU works for everything'}")
    lines.append(f"model for the demo: {document['demo_model'] or 'not shipped with this install'}")
    lines += [
        f"[yellow]tracing needs an extra:[/] pip install 'moe-placer\\[{extra}]'"
        for extra in document["missing_extras"]
    ]
    return [*lines, solvers]
