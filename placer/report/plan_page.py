"""The page about a plan: what it promises, where its load and messages go, how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from placer.report import plan_plots
from placer.report.page import (
    code,
    details,
    figure,
    heading,
    page,
    paragraph,
    table,
    tile,
    tiles,
)
from placer.report.tables import NODE_FIGURES, SHORT, number
from placer.wording import counted

Document = Mapping[str, Any]

_SCOPES = {
    "held-out": "on requests of the trace that the plan was not fitted to (held-out)",
    "unseen": "on a trace that the plan was not fitted to (unseen)",
    "in-sample": "on the tokens that the plan was fitted to (in-sample): expect less elsewhere",
}
_MOST_CELLS = 20000  # of the table of experts


def plan_page(document: Document) -> str:
    """HTML from the document of `placer.studies.plan_report.report_document`."""
    plan = document["plan"]
    name = plan["model"]["name"] or f"{len(plan['layer_ids'])} x {plan['num_experts']} experts"
    title = f"Expert placement of {name} on {plan['num_ranks']} ranks"
    return page(
        title,
        [
            f"<h1>{_escaped(title)}</h1>",
            *_summary(document),
            *_figures(document),
            *_places(document),
            *_batches(document),
            *_workloads(document),
            *_routing(document),
            *_origin(document),
        ],
    )


def _escaped(text: str) -> str:
    from html import escape

    return escape(text)


def _summary(document: Document) -> list[str]:
    plan, judged = document["plan"], document["evaluation"]
    first = document["compared_with"]
    nodes = plan["num_ranks"] // plan["ranks_per_node"]
    filled = sum(slot >= 0 for row in plan["physical_to_logical"] for slot in row)
    replicas = filled / len(plan["layer_ids"]) - plan["num_experts"]
    shape = (
        f"{len(plan['layer_ids'])} MoE layers of {plan['num_experts']} experts on "
        f"{plan['num_ranks']} ranks of {counted(nodes, 'node')}; "
        f"{plan['slots_per_rank']} slots per rank and layer, {replicas:.3g} replicas per layer; "
        f"dispatch {plan['dispatch']}."
    )
    how = (
        f"Figures are modelled by replaying {counted(judged['tokens'], 'token')} of "
        f"{counted(judged['requests'], 'request')}, {_SCOPES[judged['scope']]}; brackets are "
        f"95 % intervals over requests. Compared with: {first}."
    )
    kind = "warning" if judged["scope"] == "in-sample" else "dim"
    change = judged["change"][first]
    items = []
    messages = f"messages_{plan['dispatch']}"
    if messages in judged["metrics"]:
        entry = judged["metrics"][messages]
        items.append(
            tile(_change(change[messages]), f"messages: {_with_interval(entry)} per token-layer",
                 _kind(change[messages], "lower"))
        )  # fmt: skip
    for figure_name, what in (
        ("imbalance", "imbalance (busiest rank / mean)"),
        ("imbalance_mixed_batches_p95", "the same, p95 over mixed batches"),
    ):
        if figure_name in judged["metrics"]:
            before = judged["baselines"][first][figure_name]["value"]
            items.append(
                tile(number(judged["metrics"][figure_name]["value"], 2),
                     f"{what}; {first} {number(before, 2)}", _kind(change[figure_name], "lower"))
            )  # fmt: skip
    timed = document["step_time"]
    if timed and timed["plan"]["total_us"] and timed["contiguous"]["total_us"]:
        ours, theirs = timed["plan"]["total_us"], timed["contiguous"]["total_us"]
        items.append(
            tile(f"{100 * (ours / theirs - 1):+.1f} %",
                 f"modelled step time on {timed['cluster']}: {ours:,.0f} us, contiguous "
                 f"{theirs:,.0f} us", "good" if ours < theirs else "bad")
        )  # fmt: skip
    certificate = plan["certificate"]
    if certificate:
        gap = certificate.get("gap")
        of = certificate.get("bound_of") or "objective"
        what = certificate["objective"] if of == "objective" else of
        items.append(
            tile("no bound" if gap is None else f"{100 * gap:.1f} %",
                 f"proven gap (in-sample) of {what}; {certificate['status']}")
        )  # fmt: skip
    return [paragraph(shape), paragraph(how, kind), tiles(items)]


def _figures(document: Document) -> list[str]:
    from placer.cost import METRICS

    judged = document["evaluation"]
    nodes = judged["metrics"]["node_span"]["value"] != 1.0
    headers = ["figure", "plan"]
    for name in judged["baselines"]:
        headers += [name, "change"]
    rows: list[list[tuple[str, str] | str]] = []
    for info in METRICS:
        entry = judged["metrics"].get(info.name)
        if entry is None or info.name not in SHORT or (info.name in NODE_FIGURES and not nodes):
            continue
        row: list[tuple[str, str] | str] = [SHORT[info.name], _with_interval(entry)]
        for name, figures in judged["baselines"].items():
            change = judged["change"][name][info.name]
            row += [
                number(figures[info.name]["value"]),
                (_change(change, interval=True), _kind(change, info.better)),
            ]
        rows.append(row)
    note = (
        "Green and red: better and worse beyond chance among requests. Messages are per token and "
        "layer. Definitions: docs/metrics.md."
    )
    return [heading("Figures"), table(headers, rows, note)]


def _places(document: Document) -> list[str]:
    first, example = document["compared_with"], document["example"]
    return [
        heading("Where load and messages go"),
        figure(
            plan_plots.by_layer(document),
            f"Messages per token and imbalance of every MoE layer, plan against {first}.",
        ),
        figure(
            plan_plots.rank_loads(document),
            "Token-expert pairs of every rank in every layer, over the mean of the layer. White "
            "is even, red ranks are waited for.",
        ),
        figure(
            plan_plots.links(document),
            "Messages from rank to rank, per token, over all layers"
            + (
                ": to the experts and on to the next home rank."
                if document["plan"]["dispatch"] == "coherent"
                else ", on the way to the experts."
            ),
        ),
        figure(
            plan_plots.coactivation(document),
            f"Experts of layer {example['layer_id']} that fire together: left in their order, "
            f"right rank by rank. {100 * example['kept']:.0f} % of these pairs share a rank.",
        ),
    ]


def _batches(document: Document) -> list[str]:
    if not any(document["layers"]["plan"]["batches"].values()):  # no batch has any load
        return []
    return [
        heading("Batches"),
        paragraph(
            "A layer ends when its busiest rank ends, in every forward pass anew. Experts that "
            "were placed together because they fire together also collide, which an average over "
            "the whole trace hides."
        ),
        figure(
            plan_plots.batches(document),
            "Share of the batches whose imbalance is below a value; further left is better.",
        ),
    ]


def _workloads(document: Document) -> list[str]:
    rows = document["labels"]
    if not rows:
        return []
    first = document["compared_with"]
    headline = next(iter(rows[0]["plan"]))
    cells: list[list[tuple[str, str] | str]] = [
        [
            row["label"],
            f"{row['requests']:,}",
            f"{row['tokens']:,}",
            (_change(row["change"][headline], interval=True),
             _kind(row["change"][headline], "lower")),
            number(row["plan"]["imbalance"]["value"], 2),
            number(row[first]["imbalance"]["value"], 2),
        ]
        for row in rows
    ]  # fmt: skip
    return [
        heading("Workloads"),
        paragraph(
            "Each workload alone. A plan that is even over all of them may be uneven in one."
        ),
        figure(
            plan_plots.workloads(document),
            f"Change of {'messages' if headline != 'imbalance' else 'imbalance'} from {first} "
            "with 95 % intervals, and imbalance, of each workload alone.",
        ),
        table(
            ["workload", "requests", "tokens", f"change from {first}", "imbalance", first],
            cells,
        ),
    ]


def _routing(document: Document) -> list[str]:
    drawn = plan_plots.routing(document)
    found = document["routing"]
    parts = [heading("The traffic itself")]
    sample = found["sample"]
    if drawn is not None:
        parts.append(
            figure(
                drawn,
                "Experts per layer that a batch of many requests activates; how much a primary "
                "expert says about that of a later layer (0 nothing, 1 all); load between windows "
                "of the requests.",
            )
        )
    rows: list[list[tuple[str, str] | str]] = [
        [f"a fixed set for {entry['segment_tokens']} tokens (SRP)", _with_interval(entry["srp"]),
         number(entry["srp_by_chance"])]
        for entry in found["segments"]
    ]  # fmt: skip
    rows += [
        [f"a cache of {entry['cache_experts']} experts a layer: best hit rate (SCH), LRU",
         _with_interval(entry["sch"]), _with_interval(entry["lru"])]
        for entry in found["caches"]
    ]  # fmt: skip
    if rows:
        parts.append(
            table(
                ["offloading", "figure", "by chance, or LRU"],
                rows,
                f"From {sample['tokens']:,} tokens of {sample['requests']:,} requests. "
                "Definitions: docs/analysis.md.",
            )
        )
    return parts


def _origin(document: Document) -> list[str]:
    plan = document["plan"]
    provenance, certificate = plan["provenance"], plan["certificate"]
    rows: list[list[tuple[str, str] | str]] = []
    for entry in provenance.get("inputs", []):
        fingerprint = str(entry.get("fingerprint", ""))[:16]
        tokens = entry.get("tokens")
        size = "" if tokens is None else f", {tokens:,} tokens"
        rows.append(["fitted to", f"{entry.get('name') or 'a trace'} ({fingerprint}…{size})"])
    split = provenance.get("split") or {}
    if split.get("in_sample"):
        rows.append(["split", "none: all requests were fitted to"])
    elif split:
        share = f"{100 * split['holdout']:g} % of the requests held out"
        rows.append(["split", f"{share}, by request, seed {split['seed']}"])
    if provenance.get("solver"):
        seconds = plan["timings"].get("solve_s")
        took = "" if seconds is None else f", {seconds:.1f} s"
        rows.append(["solver", f"{provenance['solver']}, seed {provenance.get('seed', 0)}{took}"])
    settings = provenance.get("settings") or {}
    shown = ("objective", "max_imbalance", "phase", "slots_per_rank", "cluster", "node_weight")
    asked = [f"{name} {settings[name]}" for name in shown if settings.get(name) is not None]
    if asked:
        rows.append(["settings", ", ".join(asked)])
    if certificate:
        bound = certificate["lower_bound"]
        text = f"{certificate['objective']} = {number(certificate['value'], 4)}"
        of = certificate.get("bound_of") or "objective"
        text += "; no bound is proven" if bound is None else (
            f"; {'' if of == 'objective' else of + ' '}at least {number(bound, 4)}, proven"
        )  # fmt: skip
        rows.append(["certificate (in-sample)", f"{text}; {certificate['status']}"])
    versions = provenance.get("versions") or {}
    if versions:
        rows.append(["versions", ", ".join(f"{name} {value}" for name, value in versions.items())])
    parts = [heading("Where the plan comes from")]
    parts.append(table(["", ""], rows) if rows else paragraph("The plan does not say.", "dim"))
    cells = len(plan["layer_ids"]) * len(plan["physical_to_logical"][0])
    if cells <= _MOST_CELLS:
        parts.append(details("Which expert sits on which rank", _slots(plan)))
    command = f"placer evaluate {document['paths']['plan']} {document['paths']['trace']} --all"
    parts += [paragraph("The same figures in a terminal:"), code(command)]
    return parts


def _slots(plan: Document) -> str:
    """A line per layer; ranks apart."""
    size = plan["slots_per_rank"]
    width = len(str(plan["num_experts"] - 1))
    lines = []
    for layer, row in zip(plan["layer_ids"], plan["physical_to_logical"], strict=True):
        ranks = [row[i : i + size] for i in range(0, len(row), size)]
        text = " | ".join(
            " ".join(("·" if e < 0 else str(e)).rjust(width) for e in rank) for rank in ranks
        )
        lines.append(f"layer {layer:>3}: {text}")
    return code("\n".join(lines))


def _with_interval(entry: Document) -> str:
    if entry["value"] is None or entry["low"] is None:
        return number(entry["value"])
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def _change(entry: Document, *, interval: bool = False) -> str:
    if entry["change"] is None:
        return "–"
    text = f"{100 * entry['change']:+.1f} %"
    if not interval or entry["change_low"] is None:
        return text
    return f"{text} [{100 * entry['change_low']:+.1f}, {100 * entry['change_high']:+.1f}]"


def _kind(entry: Document, better: str) -> str:
    """Green or red, where the change is more than chance."""
    low, high = entry["change_low"], entry["change_high"]
    if entry["change"] is None or low is None or low <= 0 <= high:
        return ""
    return "good" if (entry["change"] < 0) == (better == "lower") else "bad"
