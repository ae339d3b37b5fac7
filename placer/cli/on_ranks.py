"""What commands that run a model on ranks share: options, and how ranks are started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from placer.placement import Placement
    from placer.tracer.prompts import Prompt

ModelFolder = Annotated[Path, typer.Option("--model", help="Folder of a Hugging Face checkpoint.")]
PromptFiles = Annotated[
    list[Path] | None,
    typer.Option("--prompts", help=".txt: a prompt a line; .jsonl: {prompt, label}; repeat it."),
]
PromptTexts = Annotated[
    list[str] | None, typer.Option("--prompt", help="A prompt; may be repeated.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts that run together.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, ...")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Timeout = Annotated[
    float, typer.Option("--timeout", min=1, help="Seconds that a rank waits for another one.")
]
MasterPort = Annotated[
    int,
    typer.Option("--master-port", min=0, max=65535, help="Ranks meet here; 0 = a free port."),
]


def prompts_of(files: list[Path] | None, texts: list[str] | None) -> tuple[Prompt, ...]:
    """What both options name, files first."""
    from placer.tracer.prompts import Prompt, read_prompts

    found = [one for path in files or [] for one in read_prompts(path)]
    return tuple(found + [Prompt(text) for text in texts or []])


def run_on_ranks(
    function: Callable[..., dict[str, Any] | None],
    job: Any,
    placement: Placement,
    timeout: float,
    port: int,
    doing: str,
) -> dict[str, Any] | None:
    """The document that rank 0 makes of a job; None on other ranks, under torchrun.

    Args:
        function: called with each rank's context and the job.
        job: what every rank is told.
        placement: says how many ranks there are.
        timeout: seconds that a rank waits for another one.
        port: where local ranks meet.
        doing: shown while local ranks run.
    """
    from placer.report.console import progress_status
    from placer.runtime.context import context_from_environment, is_launched
    from placer.runtime.launch import launch

    if is_launched():
        context = context_from_environment(placement.ranks_per_node, timeout_s=timeout)
        return function(context, job)
    with progress_status() as progress:
        progress(f"{placement.num_ranks} ranks {doing}")
        results = launch(
            function,
            placement.num_ranks,
            (job,),
            ranks_per_node=placement.ranks_per_node,
            timeout_s=timeout,
            port=port,
        )
    return results[0]
