"""The independent checker: is a placement sound, and what is it worth?

No solver shares this code. It recomputes everything from the problem's arrays, so its figures are
in-sample: they describe the data that the placement was fitted to.

Which copy serves a token (the replica policy `local` of docs/metrics.md). An expert with one copy
is served there. An expert with several copies is served on the token's home rank if a copy is
there, else on a rank that the token uses anyway (for its single-copy experts, for experts served at
home, or for an earlier expert of its list), else on a rank of a node that it touches anyway (its
home's included), else anywhere; each time on the rank to which the home has sent fewest pairs in
this layer and batch so far, of equal ones the first after the home going round. Tokens are served
in their order; without `batch` the sample is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.problem import Problem
from solvers.result import RequestError

PAIRWISE = {
    "affinity": ("cross_rank_fraction", "affinity between two layers or more"),
    "coactivation": ("coactivation_cut", "coactivation"),
}
"""The figure of an objective that counts pairs of experts, and what it is computed from."""


class BrokenLimit(ValueError):
    """A sound placement that breaks pins, the ranks' slots, the slot budget or the moves."""


def check(problem: Problem, placement: NDArray[np.integer]) -> dict[str, float]:
    """The figures of a placement; ValueError when it is unsound, BrokenLimit when it may not be.

    Args:
        problem: what was to be placed.
        placement: [L, S] logical expert of each slot, -1 = empty.

    Returns:
        imbalance: mean over layers of max / mean rank load (1 for a layer without load).
        imbalance_max: the same of the worst layer.
        imbalance_scenarios: with `scenario_load`: the imbalance averaged over scenarios, each
            workload's counted by `robust`; with replicas, and `tokens`, of the pairs that ranks
            serve. The cap is on this one.
        traffic_workloads: with several workloads: their traffic, as `objective` defines it, by
            `robust`.
        moves: with `current`: copies on ranks that do not hold the expert there.
        slots_filled: with `slot_budget`: the most filled slots of a rank, summed over layers.
        imbalance_served: with `tokens` and replicas: the same as `imbalance`, of the pairs that
            each rank serves when every token chooses its copies, under the problem's dispatch.
        max_rank_load: mean over layers of the busiest rank's load, token-expert pairs.

        From `tokens`, means over tokens and layers (a token without experts in a layer counts, with
        span 0):

        span, node_span: ranks and nodes that serve the token, under the problem's dispatch (with
            replicas the home rank, and so the copy that serves, depends on it).
        messages_alltoall: ranks that serve the token, without its home rank. Without `home` it is
            the expectation over a uniformly random one that does not sway the choice of copies:
            span x (1 - 1/G).
        messages_coherent: the same plus span - 1 for bringing the results to the rank of the
            primary expert (column 0 without `primary`), which becomes the next layer's home.
            Without `home` the first layer's is as above.
        node_messages: the same for nodes, under the problem's dispatch.
        imbalance_batch, imbalance_batch_p95: with `batch`: mean and 95th percentile over batches
            and layers of max / mean rank load within the batch, copies loaded evenly.

        link_cost: with `link_cost`: what the messages of the problem's dispatch cost.

        From `affinity` and `coactivation`:

        cross_rank_fraction: share of the flow between consecutive layers that changes rank. With
            replicas each copy of the first expert serves an equal share of its flow, and flow stays
            if the second expert has a copy on that copy's rank.
        coactivation_cut: share of the co-activated pairs of different experts without a rank that
            holds both.
        span_pairwise, messages_pairwise, node_messages_pairwise: only when `tokens` are absent:
            stand-ins for the exact figures, see `_pairwise_surrogate`.

    Complexity: O(L T (G + K)), with replicas O(L T (G + K C)), C = most copies of an expert.
    """
    copies = _copies(problem, placement)
    rank_load = _rank_load(problem.load, copies)
    imbalance = _imbalance(problem, rank_load)
    figures = {
        "imbalance": float(imbalance.mean()),
        "imbalance_max": float(imbalance.max()),
        "max_rank_load": float((rank_load / problem.fair_share).max(axis=1).mean()),
    }
    figures |= _changes(problem, placement, copies)
    if problem.scenario_load is not None:
        even = np.stack([_rank_load(load, copies) for load in problem.scenario_load])
        figures["imbalance_scenarios"] = _over_scenarios(problem, even)
    if problem.tokens is not None:
        figures |= _token_figures(problem, copies)
        if problem.batch is not None:
            figures |= _batch_figures(problem, copies)
    if problem.affinity is not None and problem.num_layers > 1:
        within = _flow_within(problem.affinity, copies)
        total = float(problem.affinity.sum())
        figures["cross_rank_fraction"] = 1.0 - within / total if total > 0 else 0.0
    if problem.coactivation is not None:
        figures["coactivation_cut"] = _cut(problem.coactivation, copies)[0]
        if problem.tokens is None:
            figures |= _pairwise_surrogate(problem, copies)
    return figures


def objective(problem: Problem, parts: dict[str, float]) -> float:
    """The value of the problem's objective, from the figures that `check` gave.

    affinity: the cross-rank fraction, ExFlow's measure.
    coactivation: the share of co-activated pairs that is cut; a pair of experts weighs as many
        tokens as chose both, over all layers.
    traffic: messages of the problem's dispatch + node_weight x node messages. `allgather` sends
        every token to every rank: G - 1 messages and N - 1 node messages, whatever the placement.
        Without `tokens` the pairwise stand-ins take the place of the exact messages.
        With `link_cost` what the messages cost; of several workloads what `robust` makes of theirs.
    balance: imbalance, over the scenarios where there are any.
    latency: microseconds of the mean layer, over all the tokens that `load` counts:
        latency_load_us x max_rank_load + latency_message_us x traffic x tokens / G.
    """
    if problem.objective == "balance":
        return parts.get("imbalance_scenarios", parts["imbalance"])
    if problem.objective in PAIRWISE:
        figure, array = PAIRWISE[problem.objective]
        if figure not in parts:
            raise RequestError(f"objective {problem.objective!r} needs {array}")
        return parts[figure]
    traffic = _traffic(problem, parts)
    if problem.objective == "traffic":
        return traffic
    tokens_per_rank = num_tokens(problem) / problem.num_ranks
    return (
        problem.latency_load_us * parts["max_rank_load"]
        + problem.latency_message_us * traffic * tokens_per_rank
    )


def num_tokens(problem: Problem) -> float:
    """Tokens that `load` counts: its pairs per layer over the pairs per token.

    `tokens` may be a sample, so their number is not it. Pairs per token come from `tokens`, or from
    `coactivation` as if every token used equally many experts.
    """
    pairs = float(problem.load.sum()) / problem.num_layers
    if problem.tokens is not None:
        per_token = float((problem.tokens >= 0).sum()) / max(
            1, problem.tokens.shape[0] * problem.num_layers
        )
    elif problem.coactivation is not None:
        per_token = float(_experts_per_token(problem.coactivation).mean())
    else:
        raise RequestError(f"objective {problem.objective!r} needs tokens or coactivation")
    return pairs / per_token if per_token > 0 else 0.0


def _traffic(problem: Problem, parts: dict[str, float]) -> float:
    if problem.dispatch == "allgather":
        return problem.num_ranks - 1 + problem.node_weight * (problem.num_nodes - 1)
    if "traffic_workloads" in parts:
        return parts["traffic_workloads"]
    if "link_cost" in parts:
        return parts["link_cost"]
    if f"messages_{problem.dispatch}" in parts:
        messages, nodes = parts[f"messages_{problem.dispatch}"], parts["node_messages"]
    elif "messages_pairwise" in parts:
        messages, nodes = parts["messages_pairwise"], parts["node_messages_pairwise"]
    else:
        raise RequestError(f"objective {problem.objective!r} needs tokens or coactivation")
    return messages + problem.node_weight * nodes


def _imbalance(problem: Problem, rank_load: NDArray[Any]) -> NDArray[np.float64]:
    """[...] max / mean of rank loads [..., G], each by its fair share; 1 without load."""
    mean = rank_load.mean(axis=-1)
    worst = (rank_load / problem.fair_share).max(axis=-1)
    ratio: NDArray[np.float64] = np.divide(worst, mean, out=np.ones_like(mean), where=mean > 0)
    return np.maximum(ratio, 1.0)  # of equal loads rounding makes less


def _over_scenarios(problem: Problem, rank_load: NDArray[Any]) -> float:
    """Imbalance of rank loads [C, L, G]: means over layers and scenarios, workloads by `robust`."""
    of_scenario = _imbalance(problem, problem.judged(rank_load)).mean(axis=1)
    workload = problem.workload_of_judged
    of_workload = np.bincount(workload, of_scenario) / np.bincount(workload)
    return float(problem.aggregate(of_workload))


def _changes(
    problem: Problem, placement: NDArray[np.integer], copies: NDArray[np.bool_]
) -> dict[str, float]:
    """Moves and filled slots; BrokenLimit where what the problem allows is not kept."""
    filled = (placement.reshape(problem.num_layers, problem.num_ranks, -1) >= 0).sum(axis=2)
    if (filled > problem.slots_of_ranks).any():
        layer, rank = np.argwhere(filled > problem.slots_of_ranks)[0]
        raise BrokenLimit(
            f"layer {layer}: rank {rank} fills {filled[layer, rank]} slots, "
            f"it has {problem.slots_of_ranks[layer, rank]}"
        )
    if problem.pinned is not None:
        for layer, expert in np.argwhere(problem.pinned >= 0):
            if not copies[layer, expert, problem.pinned[layer, expert]]:
                raise BrokenLimit(
                    f"layer {layer}: expert {expert} is not on rank "
                    f"{problem.pinned[layer, expert]}, to which it is pinned"
                )
    figures: dict[str, float] = {}
    if problem.slot_budget is not None:
        figures["slots_filled"] = float(filled.sum(axis=0).max())
        if figures["slots_filled"] > problem.slot_budget:
            raise BrokenLimit(
                f"a rank fills {figures['slots_filled']:.0f} slots over all layers, "
                f"the budget is {problem.slot_budget}"
            )
    if problem.current is not None:
        before = _copies(problem, problem.current)
        figures["moves"] = float((copies & ~before).sum())
        if problem.max_moves is not None and figures["moves"] > problem.max_moves:
            raise BrokenLimit(f"{figures['moves']:.0f} moves, at most {problem.max_moves} allowed")
    return figures


def _copies(problem: Problem, placement: NDArray[np.integer]) -> NDArray[np.bool_]:
    """[L, E, G] whether a rank holds an expert; ValueError if the placement is unsound."""
    num_layers, num_experts, num_ranks = problem.num_layers, problem.num_experts, problem.num_ranks
    if placement.shape != (num_layers, problem.num_slots):
        raise ValueError(
            f"placement has shape {placement.shape}, expected {(num_layers, problem.num_slots)}"
        )
    if not np.issubdtype(placement.dtype, np.integer):
        raise ValueError(f"placement has dtype {placement.dtype}, expected integers")
    if placement.min() < -1 or placement.max() >= num_experts:
        raise ValueError(
            f"placement has experts {placement.min()}..{placement.max()}, "
            f"expected -1..{num_experts - 1}"
        )
    layer, slot = np.nonzero(placement >= 0)
    count = np.zeros((num_layers, num_experts, num_ranks), np.int32)
    np.add.at(count, (layer, placement[layer, slot], slot // problem.slots_per_rank), 1)
    if (count > 1).any():
        bad_layer, expert, rank = np.argwhere(count > 1)[0]
        raise ValueError(f"layer {bad_layer}: rank {rank} holds expert {expert} twice")
    missing = np.argwhere(~count.any(axis=2))
    if missing.size:
        raise ValueError(f"layer {missing[0][0]}: no slot holds expert {missing[0][1]}")
    return count.astype(bool)


def _rank_load(load: NDArray[np.float64], copies: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[L, G] load of each rank, a replicated expert's split evenly over its copies."""
    share: NDArray[np.float64] = np.einsum("le,leg->lg", load / copies.sum(axis=2), copies)
    return share


def _of_nodes(of_ranks: NDArray[np.bool_], num_nodes: int) -> NDArray[np.bool_]:
    """[..., N] whether anything is true of a node's ranks, from [..., G]."""
    by_node = of_ranks.reshape(*of_ranks.shape[:-1], num_nodes, -1)
    found = by_node[..., 0].copy()
    for place in range(1, by_node.shape[-1]):  # `any` over a short last axis takes thrice as long
        found |= by_node[..., place]
    return found


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Who serves the tokens of a layer.

    Attributes:
        rank: [T, K] the rank that serves each expert, -1 = unused.
        used: [T, G] whether a token uses a rank.
        used_nodes: [T, N] the same for nodes.
        ranks, nodes: [T] how many.
    """

    rank: NDArray[np.int64]
    used: NDArray[np.bool_]
    used_nodes: NDArray[np.bool_]
    ranks: NDArray[np.int64]
    nodes: NDArray[np.int64]


@dataclass
class _Served:
    """Sums over layers, of one dispatch.

    Attributes:
        span, node_span: over all tokens.
        messages, node_messages, cost: [W] over the tokens of each workload; the cost is that of
            the messages by `link_cost`, 0 without.
        pairs: [C, L, G] pairs that each rank serves, by scenario (C = 1 without).
    """

    span: int
    node_span: int
    messages: NDArray[np.float64]
    node_messages: NDArray[np.float64]
    cost: NDArray[np.float64]
    pairs: NDArray[np.int64]

    @classmethod
    def nothing(cls, problem: Problem) -> _Served:
        scenarios = 1 if problem.scenario_load is None else len(problem.scenario_load)
        pairs = np.zeros((scenarios, problem.num_layers, problem.num_ranks), np.int64)
        messages, node_messages, cost = np.zeros((3, problem.num_workloads))
        return cls(0, 0, messages, node_messages, cost, pairs)

    def add(
        self,
        problem: Problem,
        layer: int,
        chosen: _Chosen,
        home: NDArray[np.int64] | None,
        after: NDArray[np.int64] | None = None,
    ) -> None:
        """Count a layer.

        Args:
            chosen: who serves its tokens.
            home: [T] from where they come, None = from anywhere.
            after: [T] with coherent dispatch: where results are brought.
        """
        workload, used, ranks, nodes = (
            problem.token_workload,
            chosen.used,
            chosen.ranks,
            chosen.nodes,
        )
        row = np.arange(len(used))

        def of_workloads(figure: NDArray[Any]) -> NDArray[np.float64]:
            return np.bincount(workload, figure, minlength=problem.num_workloads).astype(np.float64)

        scenario = np.zeros(len(used), np.int64) if problem.scenario is None else problem.scenario
        size = problem.num_ranks
        pair = (scenario[:, None] * size + chosen.rank)[chosen.rank >= 0]
        count = np.bincount(pair, minlength=len(self.pairs) * size)
        self.pairs[:, layer] = count.reshape(-1, size)
        self.span += int(ranks.sum())
        self.node_span += int(nodes.sum())
        if home is None:
            self.messages += of_workloads(ranks * (1 - 1 / size))
            self.node_messages += of_workloads(nodes * (1 - 1 / problem.num_nodes))
        else:
            self.messages += of_workloads(ranks - used[row, home])
            at_home = chosen.used_nodes[row, home // problem.ranks_per_node]
            self.node_messages += of_workloads(nodes - at_home)
        if after is not None:
            active = ranks > 0
            self.messages += of_workloads(ranks - active)
            self.node_messages += of_workloads(nodes - active)
        if problem.link_cost is not None:
            from_home = problem.link_cost.mean(axis=0)[None]
            if home is not None:
                from_home = problem.link_cost[home]
            self.cost += of_workloads((used * from_home).sum(axis=1))
            if after is not None:
                self.cost += of_workloads((used * problem.link_cost.T[after]).sum(axis=1))


def _token_figures(problem: Problem, copies: NDArray[np.bool_]) -> dict[str, float]:
    assert problem.tokens is not None
    count = max(1, problem.tokens.shape[0] * problem.num_layers)
    alltoall, coherent = _serve(problem, copies)
    own = coherent if problem.dispatch == "coherent" else alltoall
    figures = {
        "span": own.span / count,
        "node_span": own.node_span / count,
        "messages_alltoall": float(alltoall.messages.sum()) / count,
        "messages_coherent": float(coherent.messages.sum()) / count,
        "node_messages": float(own.node_messages.sum()) / count,
    }
    traffic = own.messages + problem.node_weight * own.node_messages
    if problem.link_cost is not None:
        figures["link_cost"] = float(own.cost.sum()) / count
        traffic = own.cost
    if problem.num_workloads > 1:
        tokens_of = np.bincount(problem.token_workload, minlength=problem.num_workloads)
        per_token = traffic / (tokens_of * problem.num_layers)
        figures["traffic_workloads"] = float(problem.aggregate(per_token))
    if (copies.sum(axis=2) > 1).any():
        figures["imbalance_served"] = float(_imbalance(problem, own.pairs.sum(axis=0)).mean())
        if problem.scenario is not None:
            figures["imbalance_scenarios"] = _over_scenarios(problem, own.pairs)
    return figures


def _serve(problem: Problem, copies: NDArray[np.bool_]) -> tuple[_Served, _Served]:
    """Send every token through every layer, with alltoall and with coherent dispatch."""
    tokens = problem.tokens
    assert tokens is not None
    home = None if problem.home is None else problem.home.astype(np.int64)
    alltoall, coherent = _Served.nothing(problem), _Served.nothing(problem)
    moved = home
    for layer in range(problem.num_layers):
        experts = tokens[:, layer, :]
        chosen = _choose_copies(problem, experts, copies[layer], home)
        alltoall.add(problem, layer, chosen, home)
        if moved is not home and (copies[layer].sum(axis=1) > 1).any():
            chosen = _choose_copies(problem, experts, copies[layer], moved)
        after = _rank_of_primary(problem, layer, experts, chosen.rank, moved)
        coherent.add(problem, layer, chosen, moved, after)
        moved = after
    return alltoall, coherent


def _choose_copies(
    problem: Problem,
    experts: NDArray[np.integer],
    copies: NDArray[np.bool_],
    home: NDArray[np.int64] | None,
) -> _Chosen:
    """Serve each token of one layer, see the module's docstring for the rule.

    Args:
        experts: [T, K] experts of each token, -1 = unused.
        copies: [E, G] whether a rank holds an expert.
        home: [T] home ranks, or None.
    """
    if (copies.sum(axis=1) > 1).any():
        from solvers.check_serving import serve

        homes = np.full(len(experts), -1, np.int64) if home is None else home
        batch = np.zeros(len(experts), np.int64) if problem.batch is None else problem.batch
        experts = np.ascontiguousarray(experts, np.int64)
        served = serve(experts, copies, homes, batch, problem.ranks_per_node)
    else:
        served = np.where(experts >= 0, copies.argmax(axis=1)[experts], -1)
    used = _marked(served, copies.shape[1])
    used_nodes = _of_nodes(used, problem.num_nodes)
    return _Chosen(served, used, used_nodes, used.sum(axis=1), used_nodes.sum(axis=1))


def _marked(served: NDArray[np.int64], num_ranks: int) -> NDArray[np.bool_]:
    """[T, G] whether a token is served by a rank, from [T, K] the ranks that serve it or -1."""
    used = np.zeros((len(served), num_ranks + 1), bool)
    row = np.arange(len(served))
    for k in range(served.shape[1]):
        used[row, served[:, k]] = True  # -1 marks the last column
    return np.ascontiguousarray(used[:, :num_ranks])


def _rank_of_primary(
    problem: Problem,
    layer: int,
    experts: NDArray[np.integer],
    served: NDArray[np.int64],
    home: NDArray[np.int64] | None,
) -> NDArray[np.int64]:
    """[T] where each token's hidden state is after the layer.

    A token without experts stays where it is; if nobody knows where that is, on rank 0.
    """
    if problem.primary is None:
        rank = served[:, 0]
    else:
        is_primary = (experts == problem.primary[:, layer, None]) & (experts >= 0)
        row = np.arange(len(experts))
        rank = np.where(is_primary.any(axis=1), served[row, is_primary.argmax(axis=1)], -1)
    stay = np.zeros_like(rank) if home is None else home
    return np.where(rank >= 0, rank, stay)


def _batch_figures(problem: Problem, copies: NDArray[np.bool_]) -> dict[str, float]:
    tokens, batch = problem.tokens, problem.batch
    assert tokens is not None
    assert batch is not None
    num_layers, num_experts, _ = copies.shape
    _, number = np.unique(batch, return_inverse=True)
    num_batches = int(number.max(initial=-1)) + 1
    ratios = []
    for layer in range(num_layers):
        experts = tokens[:, layer, :]
        key = (number[:, None] * num_experts + experts)[experts >= 0]
        load = np.bincount(key, minlength=num_batches * num_experts).reshape(num_batches, -1)
        rank_load = (load / copies[layer].sum(axis=1)) @ copies[layer]
        ratios.append(_imbalance(problem, rank_load[rank_load.sum(axis=1) > 0]))
    ratio = np.concatenate(ratios)
    if ratio.size == 0:
        return {"imbalance_batch": 1.0, "imbalance_batch_p95": 1.0}
    return {
        "imbalance_batch": float(ratio.mean()),
        "imbalance_batch_p95": float(np.quantile(ratio, 0.95)),
    }


def _flow_within(affinity: NDArray[np.float64], copies: NDArray[np.bool_]) -> float:
    """Flow that stays on a rank: sum of affinity_ij x |ranks of i and j| / |ranks of i|."""
    total = 0.0
    for layer, flow in enumerate(affinity):
        first, second = copies[layer].astype(np.float64), copies[layer + 1].astype(np.float64)
        total += float((flow * ((first / first.sum(axis=1, keepdims=True)) @ second.T)).sum())
    return total


def _cut(
    coactivation: NDArray[np.float64], copies: NDArray[np.bool_]
) -> tuple[float, NDArray[np.float64]]:
    """Share of pairs of different experts without a common rank: of all layers, and [L] of each."""
    pairs, cut = np.zeros(len(copies)), np.zeros(len(copies))
    for layer, together in enumerate(coactivation):
        held = copies[layer].astype(np.float64)
        apart = (held @ held.T) == 0
        pairs[layer] = together.sum() - np.trace(together)
        cut[layer] = (together * apart).sum()
    share = np.divide(cut, pairs, out=np.zeros_like(cut), where=pairs > 0)
    return (float(cut.sum() / pairs.sum()) if pairs.sum() > 0 else 0.0), share


def _experts_per_token(coactivation: NDArray[np.float64]) -> NDArray[np.float64]:
    """[L] experts per token, as if all tokens used equally many: pairs / load = k - 1."""
    load = np.trace(coactivation, axis1=1, axis2=2)
    pairs = coactivation.sum(axis=(1, 2)) - load
    others: NDArray[np.float64] = np.divide(pairs, load, out=np.zeros_like(pairs), where=load > 0)
    return 1.0 + others


def _pairwise_surrogate(problem: Problem, copies: NDArray[np.bool_]) -> dict[str, float]:
    """Stand-ins for span and messages where only pair counts are known.

    With k experts per token and x the share of co-activated pairs cut, the span is taken to be
    1 + (k - 1) x: linear in the pairs kept, exact when all or none are. alltoall sends
    span x (1 - 1/G) messages. coherent sends 2 span - 1 - P(the home rank is used); the last is
    span / G, at most 1, in the first layer and where `primary_affinity` is absent, else
    min(1, m span / k), where m is the mean number of experts on the home rank (span / k is the
    reciprocal of the mean number of experts on a used rank).
    """
    coactivation = problem.coactivation
    assert coactivation is not None
    per_token = _experts_per_token(coactivation)

    def of_groups(held: NDArray[np.bool_]) -> tuple[float, float]:
        num_groups = held.shape[2]
        _, share = _cut(coactivation, held)
        span = 1.0 + (per_token - 1.0) * share
        if problem.dispatch != "coherent":
            return float(span.mean()), float(span.mean()) * (1 - 1 / num_groups)
        at_home = np.minimum(1.0, span / num_groups)
        if problem.primary_affinity is not None:
            for layer, flow in enumerate(problem.primary_affinity):
                total = float(flow.sum()) / per_token[layer + 1]
                if total > 0:
                    within = _flow_within(flow[None], held[layer : layer + 2]) / total
                    at_home[layer + 1] = min(1.0, within * span[layer + 1] / per_token[layer + 1])
        return float(span.mean()), float((2 * span - 1 - at_home).mean())

    nodes = _of_nodes(copies, problem.num_nodes)
    span, messages = of_groups(copies)
    _, node_messages = of_groups(nodes)
    return {
        "span_pairwise": span,
        "messages_pairwise": messages,
        "node_messages_pairwise": node_messages,
    }
