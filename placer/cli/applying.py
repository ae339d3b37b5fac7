"""`placer apply`: load a model's experts onto ranks as planned, check them, generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placer.cli import on_ranks, options
from placer.errors import UsageError

if TYPE_CHECKING:
    from placer.placement import Placement


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("apply")(apply)


def apply(
    plan_path: options.PlanFile,
    model: on_ranks.ModelFolder,
    prompts: on_ranks.PromptFiles = None,
    prompt: on_ranks.PromptTexts = None,
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
    batch_size: on_ranks.BatchSize = 32,
    dtype: on_ranks.Dtype = "auto",
    device: on_ranks.Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what ranks would load, and load nothing.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="With --dry-run: a plan in use; moves and bytes from it."),
    ] = None,
    timeout: on_ranks.Timeout = 120.0,
    port: on_ranks.MasterPort = 0,
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
    from placer.runtime.applying import Job, apply_on_rank

    job = Job(
        plan=plan,
        plan_name=str(plan_path),
        folder=model,
        dispatch=dispatch.value if dispatch else plan.dispatch,
        deduplicate_nodes=deduplicate_nodes,
        prompts=on_ranks.prompts_of(prompts, prompt),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
    )
    doing = f"load {model} and generate"
    done = on_ranks.run_on_ranks(apply_on_rank, job, plan.placement, timeout, port, doing)
    if done is None:
        return  # another rank than the first, under torchrun
    command = several_hosts(plan.placement, plan_path, model)
    document = {**done, "several_hosts": command}
    hint = _hint(command, plan.placement.num_nodes)
    show(json_output, document, lambda: [*applied_lines(document), "", hint])


def several_hosts(placement: Placement, plan: Path, model: Path) -> str:
    """The command that runs the same on several hosts; with a placeholder where the plan has one.

    What a plan says of nodes decides which messages count as dear, so a plan of one node is not
    spread over several without solving again.
    """
    import shlex

    several = placement.num_nodes > 1
    hosts = str(placement.num_nodes) if several else "N"
    per_host = str(placement.ranks_per_node) if several else f"{placement.num_ranks}/N"
    return (
        f"torchrun --nnodes={hosts} --nproc-per-node={per_host} "
        "--rdzv-backend=c10d --rdzv-endpoint=FIRST_HOST:29500 "
        f"-m placer apply {shlex.quote(str(plan))} "
        f"--model {shlex.quote(str(model))}"
    )


def _hint(command: str, num_nodes: int) -> Any:
    from rich.text import Text

    first = "" if num_nodes > 1 else " (this plan is for one: first placer solve --nodes N)"
    return Text(
        f"on several hosts{first}, on each of them, with the same other options: {command}",
        style="dim",
    )
