"""`placer doctor`: versions, solvers, devices, what works here."""

from __future__ import annotations

from typing import Any

import typer

from placer.cli import options

CORE = ("numpy", "scipy", "numba", "networkx", "ortools", "pulp", "pyarrow", "pydantic")
EXTRA = {"torch": "trace", "transformers": "trace", "safetensors": "trace"}


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("doctor")(doctor)


def doctor(json_output: options.JsonOutput = False) -> None:
    """Say what is installed, which solvers there are, and what works on this machine."""
    from placer.report.console import show
    from placer.report.doctor import doctor_tables

    document = diagnose()
    show(json_output, document, lambda: doctor_tables(document))


def diagnose() -> dict[str, Any]:
    """Versions, solvers, devices."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import solvers
    from placer import __version__
    from placer.demo import find_model

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = {name: version_of(name) for name in (*CORE, *EXTRA)}
    model = find_model()
    return {
        "placer": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "packages": packages,
        "missing_extras": sorted({EXTRA[n] for n in EXTRA if packages[n] is None}),
        "devices": devices() if packages["torch"] else [],
        "demo_model": None if model is None else str(model),
        "solvers": [
            {
                "name": name,
                "summary": solvers.get(name).summary,
                "source": solvers.get(name).source,
                "replicates": solvers.get(name).replicates,
            }
            for name in solvers.names()
        ],
    }


def devices() -> list[dict[str, Any]]:
    """CUDA devices that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": torch.cuda.get_device_name(i),
            "memory_bytes": torch.cuda.get_device_properties(i).total_memory,
        }
        for i in range(torch.cuda.device_count())
    ]
