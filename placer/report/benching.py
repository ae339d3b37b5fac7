"""What a bench measured, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.report.sheet import Sheet
from placer.report.tables import LINKS, titled
from placer.wording import counted

_BY_LAYER = ("dispatch", "compute", "combine")
_PREDICTED, _NONE = ("predicted", "error"), ("", "")
_PARTS = (*_BY_LAYER, "context")


def bench_lines(document: Mapping[str, Any]) -> list[RenderableType]:
    """For people."""
    lines: list[RenderableType] = [
        f"[bold]{escape(document['plan'])}[/] on {escape(document['model'])}: "
        f"{counted(document['num_ranks'], 'rank')}, {document['ranks_per_node']} per node; "
        f"{counted(document['requests'], 'request')}, "
        f"{counted(document['prompt_tokens'], 'prompt token')}, "
        f"{document['max_new_tokens']} new each; {counted(document['repeats'], 'repeat')} "
        f"in turn after {counted(document['warm_ups'], 'warm-up')}",
    ]
    lines += _speed(document)
    lines += _phases(document)
    lines += _times(document)
    lines += _traffic(document)
    lines += _layers(document)
    lines += _promised(document)
    return lines


def _speed(document: Mapping[str, Any]) -> list[RenderableType]:
    once = document["repeats"] == 1
    table = Sheet(keys=2)
    table.add_column("placement")
    table.add_column("dispatch")
    for name in ("tokens/s", "plan's speed-up"):
        table.add_column(name, justify="right")
        if not once:
            table.add_column("range", justify="right", joined=True)
    for name in _PREDICTED if document["cluster"] else ():
        table.add_column(name, justify="right")
    for name, arm in document["arms"].items():
        measured, factor = arm["measured"], arm.get("plan_against_it")
        row = [escape(name), arm["dispatch"], f"{measured['tokens_per_second']:.2f}"]
        row += [] if once else [_range(measured["tokens_per_second_range"])]
        if factor:
            row.append(f"{factor['measured']:.3f}x")
            row += [] if once else [_range(factor["measured_range"], 3)]
            if factor["predicted"] is not None:
                row += [f"{factor['predicted']:.3f}x", f"{factor['error']:+.1%}"]
        table.add_row(*row)
    how = "of one repeat" if once else "medians, and of the ratio within a repeat"
    predicted = (
        "predicted: modelled time of what is modelled below, plus the measured rest of the same "
        "dispatch"
        if document["cluster"]
        else "give --cluster for what the cost model predicts"
    )
    return titled("speed", table, f"measured: generated tokens / wall time, {how}; {predicted}")


def _phases(document: Mapping[str, Any]) -> list[RenderableType]:
    """Of each phase: seconds, how many times as fast the plan is, and what was predicted."""
    table = Sheet(keys=2)
    table.add_column("placement")
    table.add_column("dispatch")
    for phase in ("prefill", "decode"):
        predicted = _PREDICTED if document["cluster"] else ()
        for name in (phase, "plan's speed-up", *predicted):
            table.add_column(name, justify="right", joined=name != phase)
    for name, arm in document["arms"].items():
        row = [escape(name), arm["dispatch"]]
        for phase in ("prefill", "decode"):
            row.append(f"{arm['measured'][f'{phase}_seconds']:.3f} s")
            factor = arm.get("plan_against_it", {}).get("by_phase", {}).get(phase)
            row.append(f"{factor['measured']:.3f}x" if factor else "")
            if document["cluster"]:
                known = factor is not None and factor["predicted"] is not None
                row += (
                    [f"{factor['predicted']:.3f}x", f"{factor['error']:+.1%}"] if known else _NONE
                )
        table.add_row(*row)
    medians = "" if document["repeats"] == 1 else ", medians"
    caption = (
        f"measured{medians}; coherent prefills as alltoall does and then shares keys and values"
    )
    return titled("phases", table, caption)


def _times(document: Mapping[str, Any]) -> list[RenderableType]:
    table = Sheet()
    for name in ("placement", *_PARTS, "together", "rest", "wall"):
        table.add_column(name, justify="left" if name == "placement" else "right")
    for name, arm in document["arms"].items():
        measured, predicted, error = arm["measured"], arm["predicted"]["seconds"], arm["error"]
        times = measured["seconds"]
        layers = sum(times[part] for part in _PARTS)
        table.add_row(
            escape(name), *(f"{times[part]:.3f}" for part in _PARTS), f"{layers:.3f}",
            f"{times['rest']:.3f}", f"{measured['wall_seconds']:.3f}",
        )  # fmt: skip
        if predicted is None or error is None:
            continue
        modelled = [predicted[part] for part in _PARTS]
        modelled.append(sum(modelled))
        of = [error[part] for part in (*_PARTS, "modelled")]
        table.add_row(
            "[dim]  modelled[/]", *(f"[dim]{value:.3f} ({off:+.0%})[/]"
                                    for value, off in zip(modelled, of, strict=True)),
            "", f"[dim]({error['wall']:+.0%})[/]",
        )  # fmt: skip
    caption = (
        "seconds, mean over ranks, waiting for other ranks included; context: the exchanges that "
        "end passes (next tokens; under coherent also keys and values); in brackets: the error"
    )
    return titled("times", table, caption)


def _traffic(document: Mapping[str, Any]) -> list[RenderableType]:
    table = Sheet()
    for name in ("placement", *(f"messages, {text}" for text in LINKS.values()),
                 "MB, same node", "MB, other node", "KV MB, other node", "imbalance",
                 "as replayed"):  # fmt: skip
        table.add_column(name, justify="left" if name == "placement" else "right")
    for name, arm in document["arms"].items():
        measured = arm["measured"]
        exact = all(arm["exact"].values())
        table.add_row(
            escape(name),
            *(f"{measured['messages'][link]:,}" for link in LINKS),
            *(f"{measured['hidden_bytes'][link] / 1e6:.3f}" for link in ("same_node",
                                                                        "other_node")),
            f"{measured['kv_bytes']['other_node'] / 1e6:.3f}",
            f"{measured['imbalance']:.3f}",
            "[green]exactly[/]" if exact else "[red]no[/]",
        )  # fmt: skip
    caption = (
        "counted by all ranks in one repeat, there and back; MB of hidden states alone; KV: keys "
        "and values; as replayed: messages and bytes of each link (those of routing and KV too), "
        "and pairs of each layer and rank, are the replay's"
    )
    return titled("sent", table, caption)


def _layers(document: Mapping[str, Any]) -> list[RenderableType]:
    table = Sheet()
    table.add_column("layer", justify="right")
    for name in document["arms"]:
        table.add_column(escape(name), justify="right")
    arms = document["arms"].values()
    count = len(next(iter(arms))["measured"]["seconds_by_layer"]["dispatch"])
    for i in range(count):
        table.add_row(
            str(i),
            *(
                " / ".join(
                    f"{1e3 * arm['measured']['seconds_by_layer'][part][i]:.0f}"
                    for part in _BY_LAYER
                )
                for arm in arms
            ),
        )
    return titled("by MoE layer", table, "measured milliseconds: dispatch / compute / combine")


def _promised(document: Mapping[str, Any]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    promised = document["plan_prediction"]
    if promised is not None:
        lines.append(
            f"the plan promised {promised['value']:.3f} messages per token and layer "
            f"({promised['scope']}); measured here: {promised['measured']:.3f} "
            f"({promised['error']:+.1%})"
        )
    others = [n for n, arm in document["arms"].items() if not arm["same_tokens_as_plan"]]
    if others:
        lines.append(
            f"[yellow]other tokens were generated than under the plan (rounding):[/] "
            f"{escape(', '.join(others))}"
        )
    return lines


def _range(values: list[float], digits: int = 2) -> str:
    return f"{values[0]:.{digits}f}–{values[1]:.{digits}f}"
