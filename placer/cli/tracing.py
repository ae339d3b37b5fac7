"""`placer trace`: run a Hugging Face model and capture its routing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from placer.cli import options


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("trace")(trace)


def trace(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or a name on the hub.")
    ],
    prompts: Annotated[
        list[Path],
        typer.Option(
            "--prompts", help=".txt: a prompt a line; .jsonl: {prompt, label}; repeat it."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the new trace.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Generated tokens of each prompt.")
    ] = 64,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Prompts that run together.")
    ] = 8,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option("--max-prompt-tokens", min=1, help="Cut longer prompts off after so many."),
    ] = None,
    routers: Annotated[
        str | None,
        typer.Option(
            "--routers",
            metavar="REGEX",
            help="Trace the experts whose module path matches, where a model has several sets.",
        ),
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Keep gate weights.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, ...")] = "auto",
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Of sampling; 0 = greedy.")
    ] = 0.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of sampling, with --temperature.")
    ] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.")
    ] = False,
    force: options.Force = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Generate from prompts with a Hugging Face model and record which experts each token takes.

    Written part by part: after Ctrl-C or a crash, what was written can be used.

    Example: placer trace examples/model --prompts examples/prompts/python.jsonl -o trace
    """
    from placer.files import refuse_overwrite
    from placer.report.console import progress_status, show, show_warnings
    from placer.report.tracing import tracing_document, tracing_lines
    from placer.tracer import read_prompts, trace_model

    if not output.is_dir() or any(output.iterdir()):
        refuse_overwrite(output, force)  # before the model is loaded
    asked = [prompt for path in prompts for prompt in read_prompts(path)]
    with progress_status() as progress:
        progress(f"loading {model}")
        summary = trace_model(
            model,
            asked,
            output,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_prompt_tokens=max_prompt_tokens,
            routers=routers,
            weights=weights,
            device=device,
            dtype=dtype,
            seed=seed,
            temperature=temperature,
            trust_remote_code=trust_remote_code,
            force=force,
            progress=lambda state: progress(str(state)),
        )
    cut = ["interrupted: the trace holds what was traced until then"]
    show_warnings([*summary.notes, *(cut if summary.interrupted else [])])
    document = tracing_document(summary)
    show(json_output, document, lambda: tracing_lines(document))
