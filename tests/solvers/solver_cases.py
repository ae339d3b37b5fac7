"""Problems to try solvers on, all their placements, and a second writing of the checker's figures.

Nothing here shares code with `solvers`, but for the classes.
"""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from solvers import Problem


def make_problem(
    tokens: np.ndarray, num_experts: int, num_ranks: int, slots_per_rank: int, **others
) -> Problem:
    """A problem whose every array is counted from the tokens [T, L, K]."""
    num_tokens, num_layers, _ = tokens.shape
    load = np.zeros((num_layers, num_experts))
    coactivation = np.zeros((num_layers, num_experts, num_experts))
    affinity = np.zeros((num_layers - 1, num_experts, num_experts))
    primary_affinity = np.zeros_like(affinity)
    primary = others.get("primary")
    for t in range(num_tokens):
        used = [[e for e in tokens[t, layer].tolist() if e >= 0] for layer in range(num_layers)]
        for layer, here in enumerate(used):
            load[layer, here] += 1
            coactivation[layer][np.ix_(here, here)] += 1
            if layer + 1 < num_layers and here:
                after = used[layer + 1]
                first = here[0] if primary is None else primary[t, layer]
                if after:
                    affinity[layer][np.ix_(here, after)] += 1 / (len(here) * len(after))
                    if first >= 0:
                        primary_affinity[layer, first, after] += 1
    arrays = {
        "load": load,
        "coactivation": coactivation,
        "affinity": affinity,
        "primary_affinity": primary_affinity,
        "tokens": tokens,
        "ranks_per_node": num_ranks,
    }
    return Problem(num_ranks=num_ranks, slots_per_rank=slots_per_rank, **{**arrays, **others})


def topic_tokens(
    seed: int,
    num_tokens: int = 600,
    num_layers: int = 6,
    num_experts: int = 16,
    top_k: int = 2,
    num_topics: int = 4,
) -> np.ndarray:
    """[T, L, K] tokens whose hidden topic has a few favourite experts in every layer."""
    rng = np.random.default_rng([seed, 1618])  # numbers that no solver happens to draw as well
    favourites = np.stack(
        [
            rng.permutation(num_experts).reshape(num_topics, num_experts // num_topics)
            for _ in range(num_layers)
        ]
    )
    tokens = np.empty((num_tokens, num_layers, top_k), np.int16)
    for t in range(num_tokens):
        topic = min(int(rng.integers(num_topics)), int(rng.integers(num_topics)))
        for layer in range(num_layers):
            stray = rng.integers(10) < 3
            pool = np.arange(num_experts) if stray else favourites[layer, topic]
            tokens[t, layer] = rng.permutation(pool)[:top_k]
    return tokens


@st.composite
def problems(
    draw,
    max_experts: int = 9,
    max_ranks: int = 5,
    max_spare: int = 2,
    max_layers: int = 3,
    max_tokens: int = 12,
    max_k: int = 4,
) -> Problem:
    """Small problems of all shapes, every array given or derived."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_experts = draw(st.integers(1, max_experts))
    num_ranks = draw(st.integers(1, max_ranks))
    slots = math.ceil(num_experts / num_ranks) + draw(st.integers(0, max_spare))
    divisors = [d for d in range(1, num_ranks + 1) if num_ranks % d == 0]
    num_layers = draw(st.integers(1, max_layers))
    top_k = draw(st.integers(1, min(max_k, num_experts)))
    num_tokens = draw(st.integers(1, max_tokens))
    ragged = draw(st.booleans())
    tokens = np.full((num_tokens, num_layers, top_k), -1, np.int16)
    primary = np.full((num_tokens, num_layers), -1, np.int16)
    for t, layer in itertools.product(range(num_tokens), range(num_layers)):
        used = int(rng.integers(0, top_k + 1)) if ragged else top_k
        tokens[t, layer, :used] = rng.permutation(num_experts)[:used]
        if used:
            primary[t, layer] = tokens[t, layer, rng.integers(used)]
    return make_problem(
        tokens,
        num_experts,
        num_ranks,
        slots,
        ranks_per_node=draw(st.sampled_from(divisors)),
        primary=primary if draw(st.booleans()) else None,
        home=rng.integers(0, num_ranks, num_tokens) if draw(st.booleans()) else None,
        batch=np.sort(rng.integers(0, 3, num_tokens)),
        dispatch=draw(st.sampled_from(["alltoall", "coherent", "allgather"])),
        objective=draw(st.sampled_from(["traffic", "balance", "latency"])),
        node_weight=draw(st.sampled_from([0.0, 2.5])),
        latency_load_us=0.25,
        latency_message_us=1.5,
    )


def random_placement(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """A sound placement with some of the spare slots used, in random order."""
    num_ranks, slots = problem.num_ranks, problem.slots_per_rank
    table = np.full((problem.num_layers, num_ranks, slots), -1, np.int64)
    for layer in range(problem.num_layers):
        held = [[] for _ in range(num_ranks)]
        for expert in rng.permutation(problem.num_experts).tolist():
            free = [g for g in range(num_ranks) if len(held[g]) < slots]
            held[free[rng.integers(len(free))]].append(expert)
        for g in range(num_ranks):
            others = [e for e in range(problem.num_experts) if e not in held[g]]
            extra = rng.permutation(others)[: rng.integers(0, slots - len(held[g]) + 1)]
            row = [*held[g], *extra.tolist()]
            row += [-1] * (slots - len(row))
            table[layer, g] = rng.permutation(row)
    return table.reshape(problem.num_layers, -1)


def layer_placements(problem: Problem) -> list[np.ndarray]:
    """Every sound placement [S] of one layer, copies included, up to the order within a rank."""
    rows = _layer_placements(problem.num_experts, problem.num_ranks, problem.slots_per_rank)
    return [np.array(row, np.int64) for row in rows]


@functools.cache
def _layer_placements(num_experts: int, num_ranks: int, slots: int) -> list[tuple[int, ...]]:
    ranks = range(num_ranks)
    choices = [c for n in ranks for c in itertools.combinations(ranks, n + 1)]
    found: list[tuple[int, ...]] = []

    def place(expert: int, held: list[list[int]]) -> None:
        if expert == num_experts:
            found.append(tuple(e for row in held for e in row + [-1] * (slots - len(row))))
            return
        for copies in choices:
            if all(len(held[g]) < slots for g in copies):
                place(expert + 1, [row + [expert] * (g in copies) for g, row in enumerate(held)])

    place(0, [[] for _ in ranks])
    return found


def all_placements(problem: Problem):
    """Every sound placement [L, S]."""
    for rows in itertools.product(layer_placements(problem), repeat=problem.num_layers):
        yield np.stack(rows)


def reference(problem: Problem, placement: np.ndarray) -> dict[str, float]:
    """What `solvers.check.check` should give, with sets and loops."""
    ranks, layers = range(problem.num_ranks), range(problem.num_layers)
    slots = problem.slots_per_rank
    where = [
        {
            e: {s // slots for s, held in enumerate(placement[layer].tolist()) if held == e}
            for e in range(problem.num_experts)
        }
        for layer in layers
    ]
    load = [[0.0] * problem.num_ranks for _ in layers]
    for layer in layers:
        for e, copies in where[layer].items():
            for g in copies:
                load[layer][g] += problem.load[layer, e] / len(copies)
    ratio = [max(row) / (sum(row) / len(row)) if sum(row) > 0 else 1.0 for row in load]
    figures = {
        "imbalance": sum(ratio) / len(ratio),
        "imbalance_max": max(ratio),
        "max_rank_load": sum(max(row) for row in load) / len(load),
    }
    total = count = 0.0
    for layer in layers[:-1]:
        for i, j in itertools.product(range(problem.num_experts), repeat=2):
            flow = problem.affinity[layer, i, j]
            both = where[layer][i] & where[layer + 1][j]
            total += flow
            count += flow * (1 - len(both) / len(where[layer][i]))
    if problem.num_layers > 1:
        figures["cross_rank_fraction"] = count / total if total else 0.0
    total = count = 0.0
    for layer in layers:
        for i, j in itertools.combinations(range(problem.num_experts), 2):
            total += problem.coactivation[layer, i, j]
            if not where[layer][i] & where[layer][j]:
                count += problem.coactivation[layer, i, j]
    figures["coactivation_cut"] = count / total if total else 0.0

    node = lambda g: g // problem.ranks_per_node  # noqa: E731

    def serve(experts, layer, home, counts):
        served = {}
        start = 0 if home is None else home
        running = counts.setdefault(home, [0] * problem.num_ranks)
        copies = where[layer]
        for e in experts:
            if home is not None and home in copies[e]:
                served[e] = home
            elif len(copies[e]) == 1:
                (served[e],) = copies[e]
            if e in served:
                running[served[e]] += 1
        for e in experts:
            if e not in served:
                used = set(served.values())
                nodes = {node(g) for g in used} | ({node(home)} if home is not None else set())
                near = {g for g in copies[e] if node(g) in nodes}
                candidates = copies[e] & used or near or copies[e]
                served[e] = min(
                    candidates, key=lambda g: (running[g], (g - start) % problem.num_ranks)
                )
                running[served[e]] += 1
        return served

    sums = dict.fromkeys(("span", "node_span", "alltoall", "coherent", "node_messages"), 0.0)
    pairs = {d: [[0] * problem.num_ranks for _ in layers] for d in ("alltoall", "coherent")}
    counts = {}  # (dispatch, layer) -> batch, home -> rank -> pairs
    for t in range(len(problem.tokens)):
        batch = 0 if problem.batch is None else int(problem.batch[t])
        first_home = None if problem.home is None else int(problem.home[t])
        for dispatch in ("alltoall", "coherent"):
            own = dispatch == problem.dispatch or (
                dispatch == "alltoall" and problem.dispatch == "allgather"
            )
            home = first_home
            for layer in layers:
                experts = [e for e in problem.tokens[t, layer].tolist() if e >= 0]
                now = counts.setdefault((dispatch, layer, home, batch), {})
                served = serve(experts, layer, home, now)
                for rank in served.values():
                    pairs[dispatch][layer][rank] += 1
                used = set(served.values())
                nodes = {node(g) for g in used}
                if home is None:
                    away = sum(len(used - {g}) for g in ranks) / problem.num_ranks
                    nodes_away = sum(len(nodes - {n}) for n in range(problem.num_nodes))
                    nodes_away /= problem.num_nodes
                else:
                    away, nodes_away = len(used - {home}), len(nodes - {node(home)})
                if dispatch == "coherent":
                    away += max(0, len(used) - 1)
                    nodes_away += max(0, len(nodes) - 1)
                    if problem.primary is None:
                        primary = experts[0] if experts else -1
                    else:
                        primary = int(problem.primary[t, layer])
                    home = served[primary] if primary >= 0 else home
                    home = 0 if home is None else home
                sums[dispatch] += away
                if own:
                    sums["span"] += len(used)
                    sums["node_span"] += len(nodes)
                    sums["node_messages"] += nodes_away
    size = len(problem.tokens) * problem.num_layers
    figures |= {
        "span": sums["span"] / size,
        "node_span": sums["node_span"] / size,
        "messages_alltoall": sums["alltoall"] / size,
        "messages_coherent": sums["coherent"] / size,
        "node_messages": sums["node_messages"] / size,
    }
    if any(len(copies) > 1 for layer in layers for copies in where[layer].values()):
        own = pairs["coherent" if problem.dispatch == "coherent" else "alltoall"]
        ratio = [max(row) / (sum(row) / len(row)) if sum(row) else 1.0 for row in own]
        figures["imbalance_served"] = sum(ratio) / len(ratio)
    ratios = []
    for number, layer in itertools.product(sorted(set(problem.batch.tolist())), layers):
        row = [0.0] * problem.num_ranks
        for t in np.nonzero(problem.batch == number)[0]:
            for e in problem.tokens[t, layer].tolist():
                for g in where[layer].get(e, ()):
                    row[g] += 1 / len(where[layer][e])
        if sum(row) > 0:
            ratios.append(max(row) / (sum(row) / len(row)))
    figures["imbalance_batch"] = float(np.mean(ratios)) if ratios else 1.0
    figures["imbalance_batch_p95"] = float(np.quantile(ratios, 0.95)) if ratios else 1.0
    return figures


def split_by_request(
    path: Path, num_ranks: int, max_tokens: int, slots_per_rank: int | None = None, **others
) -> tuple[Problem, Problem]:
    """Problems of a random half of a trace's requests and of the other half."""
    with np.load(path) as trace:
        experts, request = trace["experts"], trace["request"].astype(np.int64)
        num_experts = int(trace["num_experts"])
    rng = np.random.default_rng(0)
    requests = rng.permutation(np.unique(request))
    train = np.isin(request, requests[: requests.size // 2])
    halves = []
    for part in (train, ~train):
        rows = np.sort(rng.permutation(np.nonzero(part)[0])[:max_tokens])
        halves.append(
            make_problem(
                experts[rows],
                num_experts,
                num_ranks,
                slots_per_rank or -(-num_experts // num_ranks),
                home=request[rows] % num_ranks,
                **others,
            )
        )
    return halves[0], halves[1]
