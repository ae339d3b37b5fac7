"""What a tracing run made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.markup import escape

from placer.wording import counted

if TYPE_CHECKING:
    from placer.tracer import TraceSummary


def tracing_document(summary: TraceSummary) -> dict[str, Any]:
    """The summary as JSON."""
    return {
        "path": str(summary.path),
        "prompts": summary.num_prompts,
        "tokens": summary.num_tokens,
        "layers": len(summary.layer_ids),
        "layer_ids": [int(i) for i in summary.layer_ids],
        "experts": summary.num_experts,
        "top_k": summary.top_k,
        "seconds": round(summary.seconds, 3),
        "interrupted": summary.interrupted,
        "notes": list(summary.notes),
    }


def tracing_lines(document: Mapping[str, Any]) -> list[RenderableType]:
    """One line for people."""
    return [
        f"[bold]{escape(document['path'])}[/]: {counted(document['tokens'], 'token')} of "
        f"{counted(document['prompts'], 'prompt')}, {counted(document['layers'], 'layer')} x "
        f"{document['experts']} experts, top-{document['top_k']}, in {document['seconds']:.1f} s"
    ]
