"""The figures of the page about a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from placer.report.plots import PALETTE, style, to_svg

Document = Mapping[str, Any]


def by_layer(document: Document) -> str:
    """Messages and imbalance of every layer."""
    layers, first = document["layers"], document["compared_with"]
    x = range(len(layers["layer_ids"]))
    with style() as figure_class:
        figure = figure_class(figsize=(9, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, color, line in ((first, PALETTE[6], ":"), ("plan", PALETTE[0], "-")):
            found = layers[name]
            marks = {"color": color, "ls": line, "marker": "o", "ms": 3, "label": name}
            left.plot(x, found["messages"], **marks)
            right.plot(x, [max(row) for row in found["rank_load"]], **marks)
        left.set_title("messages per token")
        right.set_title("busiest rank / mean")
        left.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xlabel("MoE layer")
            _name_layers(axes.set_xticks, layers["layer_ids"])
        left.legend()
        return to_svg(figure, "layers")


def rank_loads(document: Document) -> str:
    """Load of every rank in every layer."""
    layers, first = document["layers"], document["compared_with"]
    loads = [max(map(max, layers[name]["rank_load"])) for name in (first, "plan")]
    most = max(1.01, *loads)  # equal loads, and none, have no range of their own
    with style() as figure_class:
        figure = figure_class(figsize=(9, 3.0), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name in zip(panels, (first, "plan"), strict=True):
            table = list(zip(*layers[name]["rank_load"], strict=True))  # [G][L]
            image = axes.imshow(table, cmap="RdBu_r", vmin=2 - most, vmax=most, aspect="auto",
                                interpolation="nearest")  # fmt: skip
            axes.grid(False)
            axes.set_title(name)
            axes.set_xlabel("MoE layer")
            _name_layers(axes.set_xticks, layers["layer_ids"])
        panels[0].set_ylabel("rank")
        figure.colorbar(image, ax=panels, label="load / mean")
        return to_svg(figure, "loads")


def links(document: Document) -> str:
    """Messages from rank to rank."""
    layers, first = document["layers"], document["compared_with"]
    most = max(max(map(max, layers[name]["links"])) for name in (first, "plan"))
    with style() as figure_class:
        figure = figure_class(figsize=(9, 3.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name in zip(panels, (first, "plan"), strict=True):
            image = axes.imshow(layers[name]["links"], cmap="viridis", vmin=0, vmax=most,
                                interpolation="nearest")  # fmt: skip
            axes.grid(False)
            axes.set_title(name)
            axes.set_xlabel("to rank")
        panels[0].set_ylabel("from rank")
        figure.colorbar(image, ax=panels, label="messages per token")
        return to_svg(figure, "links")


def batches(document: Document) -> str:
    """Imbalance over batches: which share of the batches is below it."""
    layers, first = document["layers"], document["compared_with"]
    kinds = [kind for kind in ("recorded", "mixed") if layers["plan"]["batches"][kind] is not None]
    with style() as figure_class:
        figure = figure_class(figsize=(4.5 * len(kinds), 2.8), layout="constrained")
        for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            for name, color, line in ((first, PALETTE[6], ":"), ("plan", PALETTE[0], "-")):
                values = layers[name]["batches"][kind]
                axes.plot(values, range(101), color=color, ls=line, label=name)
            axes.set_title(layers["plan"]["batches_of"][kind])
            axes.set_xlabel("busiest rank / mean, mean of layers")
            axes.set_ylabel("% of batches below")
        figure.axes[0].legend()
        return to_svg(figure, "batches")


def workloads(document: Document) -> str:
    """Change of messages, and imbalance, of each workload alone."""
    rows, first = document["labels"][::-1], document["compared_with"]
    headline = rows[0]["plan"] and next(iter(rows[0]["plan"]))
    y = range(len(rows))
    with style() as figure_class:
        figure = figure_class(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        changes = [row["change"][headline] for row in rows]
        middle = [100 * (entry["change"] or 0.0) for entry in changes]
        low = [100 * abs(e["change"] - e["change_low"]) if e["change_low"] is not None else 0
               for e in changes]  # fmt: skip
        high = [100 * abs(e["change_high"] - e["change"]) if e["change_high"] is not None else 0
                for e in changes]  # fmt: skip
        left.barh(y, middle, xerr=[low, high], color=PALETTE[0], ecolor=PALETTE[6], height=0.6)
        left.set_yticks(y, [_short(row["label"]) for row in rows])
        left.set_title("change of messages, %" if headline != "imbalance" else "change, %")
        for name, color, mark in ((first, PALETTE[6], "|"), ("plan", PALETTE[0], "o")):
            values = [row[name]["imbalance"]["value"] for row in rows]
            right.plot(values, y, mark, color=color, label=name, ms=7 if mark == "|" else 5)
        right.set_title("imbalance")
        right.legend()
        return to_svg(figure, "workloads")


def coactivation(document: Document) -> str:
    """Which experts fire together: in their order, and in the plan's."""
    example = document["example"]
    pairs, order = example["pairs_per_token"], example["order"]
    turned = [[pairs[a][b] for b in order] for a in order]
    flat = sorted(value for row in pairs for value in row)
    most = flat[int(0.995 * (len(flat) - 1))] or 1.0
    edges = [i for i in range(1, len(order)) if example["rank"][i] != example["rank"][i - 1]]
    with style() as figure_class:
        figure = figure_class(figsize=(9, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, table, title in (
            (panels[0], pairs, "experts in their order"),
            (panels[1], turned, "experts rank by rank, as planned"),
        ):
            image = axes.imshow(table, cmap="viridis", vmin=0, vmax=most, interpolation="nearest")
            axes.grid(False)
            axes.set_title(title)
            axes.set_xticks([])
            axes.set_yticks([])
        for edge in edges:
            panels[1].axhline(edge - 0.5, color="white", lw=0.6)
            panels[1].axvline(edge - 0.5, color="white", lw=0.6)
        figure.colorbar(image, ax=panels, label="tokens that use both, share")
        return to_svg(figure, "coactivation")


def routing(document: Document) -> str | None:
    """Activated experts, information by gap, load over time."""
    found = document["routing"]
    draw = []
    if found["activation"]:
        draw.append(_activation)
    if any(entry["nmi"]["value"] is not None for entry in found["information_by_gap"]):
        draw.append(_gaps)
    if found["stability"] is not None:
        draw.append(_drift)
    if not draw:
        return None
    with style() as figure_class:
        figure = figure_class(figsize=(3 * len(draw), 2.8), layout="constrained")
        for axes, one in zip(figure.subplots(1, len(draw), squeeze=False)[0], draw, strict=True):
            one(axes, found)
        return to_svg(figure, "routing")


def _activation(axes: Any, found: Document) -> None:
    x = [entry["batch_tokens"] for entry in found["activation"]]
    axes.plot(x, [e["activated"]["value"] for e in found["activation"]], "o-", ms=3)
    axes.plot(x, [e["independent"] for e in found["activation"]], ":", color=PALETTE[6])
    axes.set_xscale("log", base=2)
    axes.set_xticks(x[::2], [str(size) for size in x[::2]])
    axes.minorticks_off()
    axes.set_title("experts that a batch activates")
    axes.set_xlabel("tokens (dotted: if independent)")


def _gaps(axes: Any, found: Document) -> None:
    entries = [e for e in found["information_by_gap"] if e["nmi"]["value"] is not None]
    axes.plot([e["gap"] for e in entries], [e["nmi"]["value"] for e in entries], "o-", ms=3)
    axes.set_ylim(bottom=0)
    axes.set_title("information between layers")
    axes.set_xlabel("gap, layers")


def _drift(axes: Any, found: Document) -> None:
    lags = found["stability"]["by_lag"]
    axes.plot([e["lag"] for e in lags], [e["total_variation"]["value"] for e in lags], "o-", ms=3)
    axes.axhline(found["stability"]["floor"], ls=":", color=PALETTE[6])
    axes.set_ylim(bottom=0)
    axes.set_title("share of the load that moves")
    axes.set_xlabel("eighths apart (dotted: chance)")


def _name_layers(set_ticks: Any, layer_ids: list[int]) -> None:
    step = -(-len(layer_ids) // 12)
    at = list(range(0, len(layer_ids), step))
    set_ticks(at, [str(layer_ids[i]) for i in at])


def _short(label: str) -> str:
    text = label if len(label) <= 28 else label[:27] + "…"
    return text.replace("$", r"\$") or "(none)"
