"""`placer apply`: load a model's experts onto ranks as planned, check them, generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placer.cli import options
from placer.errors import UsageError

if TYPE_CHECKING:
    from placer.placement import Placement
    from placer.runtime.applying import Job


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("apply")(apply)


def apply(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    model: Annotated[Path, typer.Option("--model", help="Folder of a Hugging Face checkpoint.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompts", help=".txt: a prompt a line; .jsonl: {prompt, label}; repeat it."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A prompt; may be repeated.")
    ] = None,
    dispatch: Annotated[
        options.DispatchName | None,
        typer.Option("--dispatch", help="How tokens travel, instead of the plan's own."),
    ] = None,
    deduplicate_nodes: Annotated[
        bool,
        typer.Option(
            "--deduplicate-nodes", help="alltoall: one copy of a token per other node, passed on."
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Generated tokens of each prompt.")
    ] = 32,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Prompts that run together.")
    ] = 32,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, ...")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what ranks would load, and load nothing.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="With --dry-run: a plan in use; moves and bytes from it."),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=1, help="Seconds that a rank waits for another one."),
    ] = 120.0,
    port: Annotated[
        int,
        typer.Option("--master-port", min=0, max=65535, help="Ranks meet here; 0 = a free port."),
    ] = 0,
    json_output: options.JsonOutput = False,
) -> None:
    """Load a model's experts onto ranks as planned, prove that they are there, and generate.

    Starts one local process for each rank. On several hosts, run it under torchrun on each of
    them instead; the last line says how.

    Example: placer apply plan.json --model examples/model --prompt "def main"
    """
    from placer.plan import read_plan
    from placer.report.applying import applied_lines, dry_run_lines
    from placer.report.console import show
    from placer.runtime import check_installed

    check_installed()
    plan = read_plan(plan_path)
    if against is not None and not dry_run:
        raise UsageError("--against compares plans", "give --dry-run as well")
    if dry_run:
        from placer.runtime.applying import plan_of_loading

        other = None if against is None else read_plan(against)
        document = plan_of_loading(plan, str(plan_path), model, dtype, other)
        show(json_output, document, lambda: dry_run_lines(document))
        return
    from placer.runtime.applying import Job
    from placer.tracer.prompts import Prompt, read_prompts

    asked = [one for path in prompts or [] for one in read_prompts(path)]
    asked += [Prompt(text) for text in prompt or []]
    job = Job(
        plan=plan,
        plan_name=str(plan_path),
        folder=model,
        dispatch=dispatch.value if dispatch else plan.dispatch,
        deduplicate_nodes=deduplicate_nodes,
        prompts=tuple(asked),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    done = _run(job, timeout, port)
    if done is None:
        return  # another rank than the first, under torchrun
    command = several_hosts(plan.placement, plan_path, model)
    document = {**done, "several_hosts": command}
    show(json_output, document, lambda: [*applied_lines(document), "", _hint(command)])


def several_hosts(placement: Placement, plan: Path, model: Path) -> str:
    """The command that runs the same on several hosts."""
    import shlex

    return (
        f"torchrun --nnodes={placement.num_nodes} --nproc-per-node={placement.ranks_per_node} "
        "--rdzv-backend=c10d --rdzv-endpoint=FIRST_HOST:29500 "
        f"-m placer apply {shlex.quote(str(plan))} "
        f"--model {shlex.quote(str(model))}"
    )


def _hint(command: str) -> Any:
    from rich.text import Text

    return Text(
        f"on several hosts, on each of them, with the same other options: {command}", style="dim"
    )


def _run(job: Job, timeout: float, port: int) -> dict[str, Any] | None:
    from placer.report.console import progress_status
    from placer.runtime.applying import apply_on_rank
    from placer.runtime.context import context_from_environment, is_launched
    from placer.runtime.launch import launch

    placement = job.plan.placement
    if is_launched():
        context = context_from_environment(placement.ranks_per_node, timeout_s=timeout)
        return apply_on_rank(context, job)
    with progress_status() as progress:
        progress(f"{placement.num_ranks} ranks load {job.folder} and generate")
        results = launch(
            apply_on_rank,
            placement.num_ranks,
            (job,),
            ranks_per_node=placement.ranks_per_node,
            timeout_s=timeout,
            port=port,
        )
    return results[0]
