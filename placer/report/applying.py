"""What applying a plan did, or would do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from placer.report.sheet import Sheet
from placer.report.tables import LINKS, titled
from placer.wording import counted, sized

_SHOWN = 10


def applied_lines(document: Mapping[str, Any]) -> list[RenderableType]:
    """For people."""
    lines: list[RenderableType] = [
        f"[bold]{escape(document['plan'])}[/] on {escape(document['model'])}: "
        f"{counted(document['num_ranks'], 'rank')}, {_dispatch(document)} dispatch, "
        f"{document['dtype']}",
        f"{counted(document['slots_checked'], 'slot holds', 'slots hold')} what the plan puts "
        "there (checksums against the checkpoint)",
    ]
    table = Sheet()
    for name in ("rank", "node", "experts", "share", "tensors", "peak RSS", "of share", "load"):
        table.add_column(name, justify="right")
    for rank in document["ranks"]:
        peak = rank["peak_rss_bytes"]
        table.add_row(
            str(rank["rank"]),
            str(rank["node"]),
            f"{rank['experts']:,}",
            sized(rank["share_bytes"]),
            sized(rank["tensor_bytes"]),
            "" if peak is None else sized(peak),
            "" if peak is None else f"{peak / rank['share_bytes']:.2f}",
            f"{rank['load_seconds']:.1f} s",
        )
    caption = (
        "measured while loading; share: weights that the plan gives the rank; tensors: what it "
        "holds, to the byte; peak RSS: the most resident memory above what the process had before"
    )
    lines += titled("memory", table, caption)
    if document["requests"]:
        lines += _traffic(document)
        lines += _texts(document)
    return lines


def dry_run_lines(document: Mapping[str, Any]) -> list[RenderableType]:
    """For people."""
    table = Sheet()
    for name in ("rank", "node", "experts", "share"):
        table.add_column(name, justify="right")
    moves = document.get("moves")
    if moves:
        table.add_column("to fetch", justify="right")
    for rank in document["ranks"]:
        row = [str(rank["rank"]), str(rank["node"]), f"{rank['experts']:,}"]
        row.append(sized(rank["share_bytes"]))
        if moves:
            row.append(f"{moves['moves_of_ranks'][rank['rank']]:,}")
        table.add_row(*row)
    head = f"{escape(document['plan'])} on {escape(document['model'])}, {document['dtype']}"
    caption = (
        f"an expert has {sized(document['expert_bytes'])}, everything else "
        f"{sized(document['other_bytes'])}; nothing was loaded"
    )
    lines = titled(head, table, caption)
    if moves:
        lines.append(
            f"{counted(moves['moves'], 'copy', 'copies')} of experts to fetch, "
            f"{sized(moves['bytes'])}: "
            f"{moves['moves_same_node']:,} from ranks of the same node, "
            f"{moves['moves_other_node']:,} from other nodes; {moves['kept']:,} stay, "
            f"{moves['dropped']:,} are dropped; the busiest rank fetches "
            f"{sized(moves['most_bytes_of_a_rank'])}"
        )
    return lines


def _dispatch(document: Mapping[str, Any]) -> str:
    how = ", one copy per node," if document["deduplicate_nodes"] else ""
    return f"{document['dispatch']}{how}"


def _traffic(document: Mapping[str, Any]) -> list[RenderableType]:
    """Counted bytes and times, summed over ranks."""
    counters = [rank["counters"] for rank in document["ranks"]]
    table = Sheet()
    table.add_column("link")
    for name in ("messages", "hidden states", "routing", "keys and values"):
        table.add_column(name, justify="right")
    for link, shown in LINKS.items():
        table.add_row(
            shown,
            f"{sum(c['messages'][link] for c in counters):,}",
            *(
                sized(sum(c[name][link] for c in counters))
                for name in ("hidden_bytes", "routing_bytes", "kv_bytes")
            ),
        )
    new_tokens = sum(len(request["tokens"]) for request in document["requests"])
    prefill = max(rank["prefill_seconds"] for rank in document["ranks"])
    decode = max(rank["decode_seconds"] for rank in document["ranks"])
    parts = {
        part: max(c["seconds"][part] for c in counters)
        for part in ("dispatch", "compute", "combine")
    }
    caption = (
        f"measured; {new_tokens:,} new tokens, prefill {prefill:.2f} s, decode {decode:.2f} s; "
        "slowest rank's "
        + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
        + "; collectives of a rank: "
        + ", ".join(f"{count:,} {name}" for name, count in counters[0]["collectives"].items())
    )
    return titled("sent by all ranks", table, caption)


def _texts(document: Mapping[str, Any]) -> list[RenderableType]:
    lines: list[RenderableType] = [""]
    for request in document["requests"][:_SHOWN]:
        prompt = request["prompt"] or f"({request['prompt_tokens']} tokens)"
        lines.append(f"[dim]{escape(prompt)}[/]{escape(request['text'])}")
    more = len(document["requests"]) - _SHOWN
    if more > 0:
        lines.append(f"[dim]... and {more:,} more (--json has all)[/]")
    return lines
