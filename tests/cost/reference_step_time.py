"""Section 6 of the design, written a second time: one message and one batch at a time.

Shares no code with placer.cost. docs/metrics.md is its specification.
"""

from __future__ import annotations

from collections import defaultdict

from .reference import interleaved, tokens_of, walk


def price(
    trace, placement, cluster, *, dispatch, dims, transport, policy="local", batch_tokens=256,
    mixed=False,
):  # fmt: skip
    """One dict of parts per batch."""
    tokens = tokens_of(trace)
    homes = [
        token["request"] % placement.num_ranks if token["home"] is None else token["home"]
        for token in tokens
    ]
    if mixed:
        order = interleaved([token["request"] for token in tokens])
        tokens, homes = [tokens[i] for i in order], [homes[i] for i in order]
    if trace.step is not None and not mixed:
        batches = [token["step"] for token in tokens]
        wanted = sorted(set(batches))
    else:
        batches = [i // batch_tokens for i in range(len(tokens))]
        wanted = list(range(max(1, len(tokens) // batch_tokens)))
    model = "coherent" if dispatch == "coherent" else "alltoall"
    walked = walk(tokens, placement, homes, batches, model, policy)
    return [
        price_batch(
            [t for t in range(len(tokens)) if batches[t] == batch],
            tokens, walked, placement, cluster, dispatch, dims, transport,
        )
        for batch in wanted
    ]  # fmt: skip


def price_batch(members, tokens, walked, placement, cluster, dispatch, dims, transport):
    total = defaultdict(float)
    for l in range(placement.num_layers):  # noqa: E741
        out, back = [], []
        pairs, used = defaultdict(int), defaultdict(set)
        for t in members:
            ranks = walked["served"][t][l]
            chosen = tokens[t]["layers"][l]
            for (expert, _), rank in zip(chosen, ranks, strict=True):
                pairs[rank] += 1
                used[rank].add(expert)
            if not ranks:
                continue
            home = walked["home"][t][l]
            gather = home
            if dispatch == "coherent":
                weights = [weight for _, weight in chosen]
                best = 0 if weights[0] is None else weights.index(max(weights))
                gather = ranks[best]
            out += [(home, rank) for rank in sorted(set(ranks)) if rank != home]
            back += [(rank, gather) for rank in sorted(set(ranks)) if rank != gather]
            out.append(None)  # end of this token
            back.append(None)
        for part, messages, element in (
            ("dispatch_us", out, transport.dispatch_element_bytes),
            ("combine_us", back, transport.combine_element_bytes),
        ):
            size = dims.hidden_size * element
            if dispatch == "allgather":
                wire, latency = all_gather(len(members) * size, cluster)
            else:
                hops = route(messages, cluster, transport, inward=part == "combine_us")
                wire, latency = transfer(hops, size, cluster, transport)
            total[part] += wire + latency
            total["latency_us"] += latency
        total["compute_us"] += max(
            max(
                pairs[rank] * dims.expert_flops_per_token / cluster.flops * 1e6,
                len(used[rank]) * dims.expert_bytes / (cluster.hbm_gbps * 1e9) * 1e6,
            )
            for rank in range(placement.num_ranks)
        )
    total["kv_us"] = 0.0
    if dispatch == "coherent":
        wire, latency = all_gather(len(members) * transport.kv_bytes_per_token, cluster)
        total["kv_us"] = wire + latency
        total["latency_us"] += latency
    total["total_us"] = sum(
        total[part] for part in ("dispatch_us", "compute_us", "combine_us", "kv_us")
    )
    return dict(total)


def route(messages, cluster, transport, *, inward):
    """Hops (from, to) of the messages; None separates tokens."""
    per = cluster.ranks_per_node
    hops, sent = [], set()
    for message in messages:
        if message is None:
            sent = set()
            continue
        source, target = message
        if source // per == target // per or not transport.deduplicate_nodes:
            hops.append(message)
            continue
        if inward:  # gathered on the source's node, then one copy over the network
            relay = source // per * per + target % per
            network, local = (relay, target), (source, relay)
        else:  # one copy over the network, then passed on within the target's node
            relay = target // per * per + source % per
            network, local = (source, relay), (relay, target)
        if network not in sent:
            sent.add(network)
            hops.append(network)
        if local[0] != local[1]:
            hops.append(local)
    return hops


def transfer(hops, size, cluster, transport):
    per = cluster.ranks_per_node
    sent, received = defaultdict(float), defaultdict(float)
    links = set()
    for source, target in hops:
        near = source // per == target // per
        links.add("near" if near else "far")
        shared = not near and cluster.inter_node_scope == "node"
        sent[near, source // per if shared else source] += size
        received[near, target // per if shared else target] += size
    wire = 0.0
    for table in (sent, received):
        for (near, _), amount in table.items():
            gbps = cluster.intra_node_gbps if near else cluster.inter_node_gbps
            wire = max(wire, amount / (gbps * 1e9) * 1e6)
    latencies = [
        *([cluster.intra_node_latency_us] if "near" in links else []),
        *([cluster.inter_node_latency_us] if "far" in links else []),
    ]
    if not latencies:
        return wire, 0.0
    return wire, sum(latencies) if transport.deduplicate_nodes else max(latencies)


def all_gather(total, cluster):
    if not total:
        return 0.0, 0.0
    per, nodes = cluster.ranks_per_node, cluster.num_nodes
    network = total * (nodes - 1) / nodes / per
    fast = total - total / (per * nodes) - network
    crowd = per if cluster.inter_node_scope == "node" else 1
    wire = max(
        network * crowd / (cluster.inter_node_gbps * 1e9) * 1e6,
        fast / (cluster.intra_node_gbps * 1e9) * 1e6,
    )
    latency = (cluster.intra_node_latency_us if per > 1 else 0.0) + (
        cluster.inter_node_latency_us if nodes > 1 else 0.0
    )
    return wire, latency
