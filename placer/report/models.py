"""A model's dimensions and memory, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.report.sheet import Sheet
from placer.wording import sized


def model_table(document: Mapping[str, Any]) -> list[RenderableType]:
    """A table of dimensions, then what a rank holds."""
    table = Sheet(escape(document["name"]), header=False)
    table.add_column(style="dim")
    table.add_column(words=True)
    moe, layers = document["num_moe_layers"], document["num_layers"]
    facts = {
        "layers": f"{layers}, {moe} with experts",
        "experts": f"{document['num_experts']} per layer, top-{document['top_k']}"
        + (f", in {groups} groups" if (groups := document["num_expert_groups"]) > 1 else ""),
        "hidden size": f"{document['hidden_size']:,}",
        "parameters": f"{count(document['total_params'])}, "
        f"{count(document['other_params'])} of them outside the experts",
        "one expert": f"{_known(document['expert_bytes'])}, "
        f"{count(document['expert_params'])} weights",
        "other weights": _known(document["other_bytes"]),
        "KV of a token": _known(document["kv_bytes_per_token"]),
        "source": document["source"],
    }
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    lines: list[RenderableType] = [table]
    memory = document["memory"]
    if memory is not None:
        lines.append(memory_line(memory))
    return lines


def memory_line(memory: Mapping[str, Any]) -> str:
    """What a rank holds, in one line."""
    parts = [
        f"experts {sized(memory['experts_bytes'])} ({memory['slots_per_rank']} slots per layer, "
        f"replicas {sized(memory['replicas_bytes'])})",
        f"other weights {sized(memory['other_bytes'])}",
        f"KV of {memory['kv_tokens']:,} tokens {sized(memory['kv_bytes'])}",
        f"reserved {sized(memory['reserved_bytes'])}",
    ]
    room = (
        "the memory of a rank is unknown"
        if memory["free_bytes"] is None
        else f"{sized(memory['free_bytes'])} of {sized(memory['memory_bytes'])} stay free"
    )
    return (
        f"modelled, on each of {memory['num_ranks']} ranks of {escape(memory['cluster'])}: "
        f"{', '.join(parts)}; {room}"
    )


def count(number: int) -> str:
    """Weights as people count them."""
    for name, scale in (("billion", 10**9), ("million", 10**6)):
        if number >= scale:
            return f"{number / scale:.2f} {name}"
    return f"{number:,}"


def _known(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else sized(num_bytes)
