"""Section 5 of the design, written a second time: sets, dicts and loops, no arrays, no haste.

Shares no code with placer.cost. docs/metrics.md is its specification.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict


def evaluate(
    trace, placement, *, dispatch="alltoall", policy="local", batch_tokens=256, ignore_home=False
):
    """name -> value (None where undefined) of every figure."""
    tokens = tokens_of(trace)
    homes = [
        token["request"] % placement.num_ranks
        if token["home"] is None or ignore_home
        else token["home"]
        for token in tokens
    ]
    if trace.step is not None:
        batches = [token["step"] for token in tokens]
        dropped = None
    else:
        batches = [i // batch_tokens for i in range(len(tokens))]
        dropped = unfinished(len(tokens), batch_tokens)
    walks = {
        model: walk(tokens, placement, homes, batches, model, policy)
        for model in ("alltoall", "coherent")
    }
    main = walks["coherent" if dispatch == "coherent" else "alltoall"]
    out = {
        "span": mean([len(set(r)) for r in flat(main["served"])]),
        "node_span": mean([len(nodes(r, placement)) for r in flat(main["served"])]),
    }
    for model in ("alltoall", "coherent"):
        out[f"messages_{model}"] = messages(walks[model], model, lambda rank: rank)
        out[f"node_messages_{model}"] = messages(
            walks[model], model, lambda rank: rank // placement.ranks_per_node
        )
    out |= crossings(main["served"], "rank", lambda rank: rank)
    out |= crossings(main["served"], "node", lambda rank: rank // placement.ranks_per_node)
    whole = loads_of(main["served"], [0] * len(tokens), placement)[0] if tokens else []
    out["imbalance"] = mean([max(row) / average(row) for row in whole if sum(row)])
    out["balancedness"] = ratio(sum(average(row) for row in whole), sum(max(r) for r in whole))
    out |= batch_figures(main["served"], batches, dropped, placement, "imbalance_batches")
    out |= engine_figures(main["served"], batches, dropped, placement)
    order = interleaved([token["request"] for token in tokens])
    mixed_batches = [i // batch_tokens for i in range(len(tokens))]
    mixed = walk(
        [tokens[i] for i in order],
        placement,
        [homes[i] for i in order],
        mixed_batches,
        "coherent" if dispatch == "coherent" else "alltoall",
        policy,
    )
    out |= batch_figures(
        mixed["served"],
        mixed_batches,
        unfinished(len(tokens), batch_tokens),
        placement,
        "imbalance_mixed_batches",
    )
    return out


def tokens_of(trace):
    tokens = []
    for t in range(trace.num_tokens):
        layers = []
        for l in range(trace.num_layers):  # noqa: E741
            used = []
            for k in range(trace.top_k):
                expert = int(trace.experts[t, l, k])
                if expert >= 0:
                    weight = None if trace.weights is None else float(trace.weights[t, l, k])
                    used.append((expert, weight))
            layers.append(used)
        tokens.append(
            {
                "layers": layers,
                "request": int(trace.request[t]),
                "position": int(trace.position[t]),
                "home": None if trace.home is None else int(trace.home[t]),
                "step": None if trace.step is None else int(trace.step[t]),
            }
        )
    return tokens


def walk(tokens, placement, homes, batches, model, policy):
    """Serve every token; served[t][l] = ranks in column order, home[t][l] = home on entry."""
    copies = [defaultdict(list) for _ in range(placement.num_layers)]
    for l in range(placement.num_layers):  # noqa: E741
        for slot, expert in enumerate(placement.physical_to_logical[l].tolist()):
            if expert >= 0:
                copies[l][expert].append(slot // placement.slots_per_rank)
    running = defaultdict(int)  # (batch, layer, home, rank) -> pairs
    served, home_on_entry = [], []
    for t, token in enumerate(tokens):
        home = homes[t]
        served.append([])
        home_on_entry.append([])
        for l, used in enumerate(token["layers"]):  # noqa: E741
            where = [sorted(copies[l][expert]) for expert, _ in used]
            if policy == "round_robin":
                turn = token["request"] + token["position"]
                ranks = [places[turn % len(places)] for places in where]
            else:
                count = [running[batches[t], l, home, g] for g in range(placement.num_ranks)]
                ranks = serve_local(where, home, count, placement.ranks_per_node)
                for rank in ranks:
                    running[batches[t], l, home, rank] += 1
            served[t].append(ranks)
            home_on_entry[t].append(home)
            if model == "coherent" and used:
                best = 0
                for i, (_, weight) in enumerate(used):
                    if weight is not None and weight > used[best][1]:
                        best = i
                home = ranks[best]
    return {"served": served, "home": home_on_entry}


def serve_local(where, home, count, ranks_per_node):
    ranks = [None] * len(where)

    def take(i, rank):
        ranks[i] = rank
        count[rank] += 1

    for i, places in enumerate(where):
        if home in places:
            take(i, home)
    for i, places in enumerate(where):
        if ranks[i] is None and len(places) == 1:
            take(i, places[0])
    for i, places in enumerate(where):
        if ranks[i] is None:
            used = {rank for rank in ranks if rank is not None}
            touched = {rank // ranks_per_node for rank in used | {home}}
            candidates = (
                [rank for rank in places if rank in used]
                or [rank for rank in places if rank // ranks_per_node in touched]
                or places
            )
            round_from_home = [*range(home, len(count)), *range(home)]
            take(i, min(candidates, key=lambda rank: (count[rank], round_from_home.index(rank))))
    return ranks


def messages(walked, model, place):
    counts = []
    for t, layers in enumerate(walked["served"]):
        for l, ranks in enumerate(layers):  # noqa: E741
            reached = {place(rank) for rank in ranks}
            sent = len(reached - {place(walked["home"][t][l])})
            if model == "coherent" and reached:
                sent += len(reached) - 1
            counts.append(sent)
    return mean(counts)


def crossings(served, what, place):
    apart, pairs, shares = 0, 0, []
    for layers in served:
        for here, there in itertools.pairwise(layers):
            if here and there:
                different = sum(place(a) != place(b) for a in here for b in there)
                apart += different
                pairs += len(here) * len(there)
                shares.append(different / (len(here) * len(there)))
    return {
        f"cross_{what}_fraction": ratio(apart, pairs),
        f"cross_{what}_fraction_per_token": mean(shares),
    }


def loads_of(served, batches, placement):
    """batch -> [layer][rank] pairs."""
    loads = {}
    for t, layers in enumerate(served):
        table = loads.setdefault(
            batches[t], [[0] * placement.num_ranks for _ in range(placement.num_layers)]
        )
        for l, ranks in enumerate(layers):  # noqa: E741
            for rank in ranks:
                table[l][rank] += 1
    return loads


def complete_batches(served, batches, dropped, placement):
    loads = loads_of(served, batches, placement)
    return [
        table
        for batch, table in loads.items()
        if batch != dropped and any(sum(row) for row in table)
    ]


def batch_figures(served, batches, dropped, placement, prefix):
    values = [
        mean([max(row) / average(row) for row in table if sum(row)])
        for table in complete_batches(served, batches, dropped, placement)
    ]
    return {f"{prefix}_mean": mean(values), f"{prefix}_p95": quantile(values, 0.95)}


def engine_figures(served, batches, dropped, placement):
    tables = complete_batches(served, batches, dropped, placement)
    sglang = [mean([(average(row) + 1e-5) / (max(row) + 1e-5) for row in t]) for t in tables]
    pooled = [sum(average(row) for row in t) / sum(max(row) for row in t) for t in tables]
    by_layer = []
    for l in range(placement.num_layers):  # noqa: E741
        ratios = [max(t[l]) / average(t[l]) - 1 for t in tables if sum(t[l])]
        if ratios:
            by_layer.append(mean(ratios))
    return {
        "vllm_balancedness": mean(pooled),
        "sglang_balancedness": mean(sglang),
        "tensorrt_llm_imbalance_ratio": mean(by_layer),
    }


def interleaved(requests):
    queues = {}
    for i, request in enumerate(requests):
        queues.setdefault(request, []).append(i)
    order = []
    turn = 0
    while len(order) < len(requests):
        order += [queue[turn] for queue in queues.values() if turn < len(queue)]
        turn += 1
    return order


def unfinished(num_tokens, batch_tokens):
    """Number of the incomplete last batch when there is another, else None."""
    full, rest = divmod(num_tokens, batch_tokens)
    return full if full and rest else None


def flat(served):
    return [ranks for layers in served for ranks in layers]


def nodes(ranks, placement):
    return {rank // placement.ranks_per_node for rank in ranks}


def average(values):
    return sum(values) / len(values)


def mean(values):
    return math.fsum(values) / len(values) if values else None


def ratio(above, below):
    return above / below if below else None


def quantile(values, q):
    """Linear interpolation between order statistics (numpy's default, type 7)."""
    if not values:
        return None
    values = sorted(values)
    place = q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])
