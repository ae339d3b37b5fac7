"""The answer first: can a better placement help this traffic, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORTH = 0.05
"""Imbalance, or share of the messages, below which a gain is called small."""
WORTH_OF_CHANCE = 0.25
"""With many ranks chance keeps few pairs: so much more than that is worth having."""


def verdict(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the figures of an analysis come to, for its first number of ranks.

    Args:
        document: of `placer analyze`: "overall", "routing" and, after --deep, "deep".

    Returns:
        `num_ranks`, `can_help` ("yes", "little" or "unknown"), `by` (what there is to gain:
        "traffic", "balance"), and `reasons`: a sentence for each subject.
    """
    overall, routing, deep = document["overall"], document["routing"], document.get("deep")
    if deep is not None and deep["headroom"] is not None:
        num_ranks = deep["num_ranks"]
        gains, reasons = _from_plans(deep)
    else:
        entry = next(iter(overall["headroom"]), None)
        if entry is None:
            return {"num_ranks": None, "can_help": "unknown", "by": [], "reasons": {}}
        num_ranks = entry["num_ranks"]
        clusters = {c["num_ranks"]: c for c in routing["clusters"]}
        gains, reasons = _from_counts(entry, clusters.get(num_ranks))
    reasons |= _affinity(routing) | _stability(routing) | _decode(routing, overall)
    return {
        "num_ranks": num_ranks,
        "can_help": "yes" if gains else "little",
        "by": gains,
        "reasons": reasons,
    }


def _from_plans(deep: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    found, gains = deep["headroom"], []
    reasons: dict[str, str] = {}
    held_out, balance = found["held_out"], found["balance"]
    figure = deep["headline"]
    if figure != "imbalance":
        change = held_out["change"][figure]
        reasons["traffic"] = (
            f"{_percent(change)} messages than contiguous on held-out requests, imbalance "
            f"{_known(held_out['plan']['imbalance'])} "
            f"({_known(held_out['contiguous']['imbalance'])})"
        )
        certain = change["change"] is not None and (change["change_high"] or 0.0) <= 0
        if certain and -change["change"] > WORTH:
            gains.append("traffic")
    reasons["balance"] = (
        f"contiguous is at imbalance {balance['contiguous']:.2f}; {balance['reached']:.2f} is "
        "reached in-sample"
    )
    if balance["contiguous"] - balance["reached"] > WORTH:
        gains.append("balance")
    return gains, reasons


def _from_counts(
    headroom: Mapping[str, Any], cluster: Mapping[str, Any] | None
) -> tuple[list[str], dict[str, str]]:
    gains: list[str] = []
    reasons: dict[str, str] = {}
    if cluster is not None:
        kept = cluster["kept"]
        chance = max(cluster["kept_at_random"], cluster["kept_by_load"])
        reasons["traffic"] = (
            f"{kept['value']:.0%} of the pairs that fire together can share a rank "
            f"({cluster['kept_at_random']:.0%} at random, at most {cluster['kept_bound']:.0%})"
        )
        least = kept["value"] if kept["low"] is None else kept["low"]
        if least - chance > min(WORTH, WORTH_OF_CHANCE * chance):
            gains.append("traffic")
    before, best = (headroom[name]["mean"] for name in ("imbalance_contiguous", "imbalance_bound"))
    if before is not None and best is not None:
        reasons["balance"] = (
            f"contiguous is at imbalance {before:.2f}; without replicas {best:.2f} at best"
        )
        if before - best > WORTH:
            gains.append("balance")
        elif best > 1 + WORTH:
            reasons["balance"] += ": only replicas help"
    return gains, reasons


def _affinity(routing: Mapping[str, Any]) -> dict[str, str]:
    if not routing["information_by_gap"]:
        return {}
    nearest = routing["information_by_gap"][0]["nmi"]["value"]
    if nearest is None:
        return {}
    use = "coherent dispatch can use it" if nearest > WORTH else "coherent dispatch gains little"
    return {"affinity": f"the next layer's expert is {nearest:.0%} decided by this one's; {use}"}


def _stability(routing: Mapping[str, Any]) -> dict[str, str]:
    found = routing["stability"]
    if found is None:
        return {}
    last = found["by_lag"][-1]["total_variation"]
    if last["value"] is None:
        return {}
    floor = found["floor"]
    lowest = last["value"] if last["low"] is None else last["low"]
    text = (
        f"{last['value']:.0%} of the load moves from the first to the last eighth of the requests"
    )
    text += f" ({floor:.0%} by chance)"
    return {"stability": text + (": refit" if lowest > floor else ": steady")}


def _decode(routing: Mapping[str, Any], overall: Mapping[str, Any]) -> dict[str, str]:
    batches = {entry["batch_tokens"]: entry for entry in routing["activation"]}
    if not batches:
        return {}
    size = min(batches, key=lambda tokens: abs(tokens - 32))
    entry = batches[size]
    if entry["activated"]["value"] is None:
        return {}
    return {
        "decode": f"a batch of {size} tokens reads {entry['activated']['value']:.0f} of the "
        f"{overall['num_experts']} experts, {entry['tokens_per_expert'] or 0:.1f} tokens each"
    }


def _known(figure: Mapping[str, Any]) -> str:
    """Two digits; held-out tokens without load have no imbalance."""
    return "unknown" if figure["value"] is None else f"{figure['value']:.2f}"


def _percent(change: Mapping[str, Any]) -> str:
    """18.7 % fewer [18.2, 19.3]"""
    value = change["change"]
    if value is None:
        return "an unknown number of"
    word = "fewer" if value <= 0 else "more"
    sign = -1 if value <= 0 else 1
    text = f"{100 * abs(value):.1f} % {word}"
    if change["change_low"] is None:
        return text
    ends = sorted(100 * sign * change[name] for name in ("change_low", "change_high"))
    return f"{text} [{ends[0]:.1f}, {ends[1]:.1f}]"
