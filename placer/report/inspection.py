"""What is in a trace, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.report.sheet import Sheet
from placer.wording import counted


def inspection_lines(document: Mapping[str, Any]) -> list[RenderableType]:
    """A table of facts, then what is wrong."""
    table = Sheet(escape(document["path"]), header=False)
    table.add_column(style="dim")
    table.add_column(words=True)
    used = document["experts_used"]
    layer_ids = document["layer_ids"]
    facts = {
        "format": f"{document['file_format']}, {document['bytes_on_disk']:,} bytes",
        "tokens": f"{document['tokens']:,} of {counted(document['requests'], 'request')}",
        "layers": f"{document['layers']} (ids {layer_ids[0]}..{layer_ids[-1]})"
        + (
            f", {len(layer_ids)} routing rounds in all"
            if len(layer_ids) > document["layers"]
            else ""
        ),
        "experts": f"{document['experts']}, top-{document['top_k']}"
        + (f" (used: {used['min']} to {used['max']}, mean {used['mean']:.2f})" if used else ""),
        "phases": ", ".join(f"{n:,} {name}" for name, n in document["phases"].items() if n),
        "forward passes": "not recorded" if document["steps"] is None else f"{document['steps']:,}",
        "gate weights": "yes" if document["has_weights"] else "no",
        "model": ", ".join(
            f"{name} {value}" for name, value in document["model"].items() if value is not None
        )
        or "unknown",
        "fingerprint": document["fingerprint"] or "–",
    }
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    for label, entry in list(document["labels"].items())[:12]:
        count = f"{counted(entry['tokens'], 'token')} of {counted(entry['requests'], 'request')}"
        table.add_row(escape(f"label {label or '(none)'}"), count)
    lines: list[RenderableType] = [table]
    state = "complete" if document["complete"] else "unfinished (readable up to the last part)"
    lines.append(f"{'sound' if document['sound'] else '[red]not sound[/]'}, {state}")
    lines += [f"[yellow]warning:[/] {escape(warning)}" for warning in document["warnings"]]
    lines += [f"[red]problem:[/] {escape(problem)}" for problem in document["problems"]]
    return lines


def load_lines(document: Mapping[str, Any]) -> list[RenderableType]:
    """What is in a load record, and what cannot be known from it."""
    layer_ids, hottest = document["layer_ids"], document["hottest_expert"]
    return [
        f"[bold]{escape(document['path'])}[/]: load of "
        f"{counted(document['layers'], 'layer')} (ids {layer_ids[0]}..{layer_ids[-1]}) x "
        f"{document['experts']} experts in {counted(document['windows'], 'window')}, "
        f"{counted(document['pairs'], 'token-expert pair')}",
        f"hottest expert of a layer / mean: {hottest['mean']:.2f} on average, "
        f"{hottest['max']:.2f} at most",
        f"a load record: {document['not_known']}",
    ]
