"""`placer calibrate`: measure the real process group, write a cluster file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from placer.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("calibrate")(calibrate)


def calibrate(
    gpus: options.Gpus,
    output: Annotated[Path, typer.Option("-o", "--output", help="The cluster file to write.")],
    nodes: options.Nodes = 1,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="DIR",
            help="A checkpoint's folder (its config.json): states and experts of its shape are "
            "measured. Without one, only links are.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")
    ] = "auto",
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Also what every rank can send to every other alone.")
    ] = False,
    repeats: Annotated[int, typer.Option("--repeats", min=3, help="Of every probe.")] = 15,
    force: options.Force = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Measure latency, bandwidth and the experts' computation of the real process group.

    Starts the ranks here (gloo on CPUs, NCCL on GPUs), or is one of them under torchrun. The file
    holds the cost model's parameters and how well they meet the measurements: give it to --cluster.
    Measure on a quiet machine.

    Example: placer calibrate --gpus 2 --model examples/model -o here.toml
    """
    from placer.cluster import write_cluster
    from placer.errors import MissingExtraError
    from placer.files import check_output_file
    from placer.report.calibration import calibration_table, cluster_document
    from placer.report.console import progress_status, show

    check_output_file(output, force)
    try:
        from placer.runtime.calibrate import calibrate as measure
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "trace") from None
    with progress_status() as progress:
        found = measure(
            model,
            gpus,
            nodes,
            name=output.stem,
            dtype=dtype,
            with_pairs=pairs,
            repeats=repeats,
            progress=progress,
        )
    if found is None:  # another rank than the first of a launch
        return
    summary = found.summary()
    write_cluster(output, found.cluster, fit=summary, force=force)
    document = {
        "format": "placer.calibration",
        "schema_version": 1,
        "path": str(output),
        "cluster": cluster_document(found.cluster),
        "fit": summary,
    }
    show(json_output, document, lambda: calibration_table(document))
