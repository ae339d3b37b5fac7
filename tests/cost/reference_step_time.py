"""Section 6 of the design, written a second time: one message and one batch at a time.

Shares no code with placer.cost. docs/metrics.md is its specification.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

from .reference import interleaved, tokens_of, walk


def price(
    trace, placement, cluster, *, dispatch, dims, transport, policy="local", batch_tokens=256,
    mixed=False, tokens_per_rank=None, parts=1,
):  # fmt: skip
    """One dict of parts per batch."""
    tokens = tokens_of(trace)
    homes = [
        token["request"] % placement.num_ranks if token["home"] is None else token["home"]
        for token in tokens
    ]
    if mixed or tokens_per_rank:
        order = interleaved([token["request"] for token in tokens])
        tokens, homes = [tokens[i] for i in order], [homes[i] for i in order]
    members = batches_of(trace, homes, placement.num_ranks, batch_tokens, mixed, tokens_per_rank)
    model = "coherent" if dispatch == "coherent" else "alltoall"
    priced = []
    for batch in members:
        steps = [
            price_batch(part, tokens, homes, model, policy, placement, cluster, dispatch, dims,
                        transport, trace.top_k)
            for part in cut(batch, homes, parts)
        ]  # fmt: skip
        total = {name: sum(step[0][name] for step in steps) for name in steps[0][0]}
        total["total_us"] = total["kv_us"] + overlapped([step[1] for step in steps])
        priced.append(total)
    return priced


def batches_of(trace, homes, num_ranks, batch_tokens, mixed, tokens_per_rank):
    everyone = list(range(len(homes)))
    if tokens_per_rank:
        queues = [[t for t in everyone if homes[t] == rank] for rank in range(num_ranks)]
        members = []
        while min(map(len, queues)) >= tokens_per_rank:
            members.append([t for queue in queues for t in queue[:tokens_per_rank]])
            queues = [queue[tokens_per_rank:] for queue in queues]
        return members
    if trace.step is not None and not mixed:
        steps = trace.step.tolist()
        return [[t for t in everyone if steps[t] == step] for step in sorted(set(steps))]
    complete = max(1, len(homes) // batch_tokens)
    return [everyone[i * batch_tokens : (i + 1) * batch_tokens] for i in range(complete)]


def cut(batch, homes, parts):
    """Parts of a batch: of every home's n tokens, token j goes to part j * parts // n."""
    where = {}
    for home in {homes[t] for t in batch}:
        own = [t for t in batch if homes[t] == home]
        where |= {t: j * parts // len(own) for j, t in enumerate(own)}
    return [[t for t in batch if where[t] == part] for part in range(parts)]


def overlapped(steps):
    """End of a list schedule: one transfer and one computation at a time, parts in order."""
    network = device = 0.0
    done = [0.0] * len(steps)
    for layer in range(len(steps[0])):
        for name in ("dispatch", "compute", "combine"):
            for i, step in enumerate(steps):
                free = device if name == "compute" else network
                done[i] = max(free, done[i]) + step[layer][name]
                if name == "compute":
                    device = done[i]
                else:
                    network = done[i]
    return max(done)


def price_batch(
    members, all_tokens, homes, model, policy, placement, cluster, dispatch, dims, transport,
    top_k,
):  # fmt: skip
    """Sums of the parts, and the times of every layer."""
    tokens = [all_tokens[t] for t in members]
    walked = walk(tokens, placement, [homes[t] for t in members], [0] * len(members), model, policy)
    total = defaultdict(float)
    layers = []
    for l in range(placement.num_layers):  # noqa: E741
        times = {}
        out, back = [], []
        pairs = defaultdict(lambda: defaultdict(int))  # rank -> expert -> pairs
        for t, token in enumerate(tokens):
            ranks = walked["served"][t][l]
            chosen = token["layers"][l]
            for (expert, _), rank in zip(chosen, ranks, strict=True):
                pairs[rank][expert] += 1
            if not ranks:
                continue
            home = walked["home"][t][l]
            gather = home
            if dispatch == "coherent":
                weights = [weight for _, weight in chosen]
                best = 0 if weights[0] is None else weights.index(max(weights))
                gather = ranks[best]
            out += [(home, rank) for rank in sorted(set(ranks))]
            back += [(rank, gather) for rank in sorted(set(ranks))]
            out.append(None)  # end of this token
            back.append(None)
        for part, messages, element in (
            ("dispatch", out, transport.dispatch_element_bytes),
            ("combine", back, transport.combine_element_bytes),
        ):
            size = dims.hidden_size * element
            if dispatch == "allgather":
                wire, latency = all_gather(len(members) * size, cluster)
            else:
                hops = route(messages, cluster, transport, inward=part == "combine")
                wire = transfer(hops, size, cluster)
                latency = 0.0
                if members and (part == "dispatch" or model != "coherent" or top_k > 1):
                    latency = collective(cluster, in_turn=transport.deduplicate_nodes)
            times[part] = wire + latency
            total[f"{part}_us"] += wire + latency
            total["latency_us"] += latency
        work = [
            work_of(rank, list(pairs[rank].values()), cluster, dims)
            for rank in range(placement.num_ranks)
        ]
        busiest, even = max(work), sum(work) / len(work)
        if cluster.ranks_at_full_speed:
            per = cluster.ranks_per_node
            hosts = [
                sum(work[node * per : (node + 1) * per]) / cluster.ranks_at_full_speed
                for node in range(cluster.num_nodes)
            ]
            busiest, even = max(busiest, *hosts), max(even, sum(hosts) / len(hosts))
        times["compute"] = busiest
        total["compute_us"] += busiest
        total["imbalance_us"] += busiest - even
        layers.append(times)
    total["kv_us"] = 0.0
    if dispatch == "coherent":
        wire, latency = all_gather(len(members) * transport.kv_bytes_per_token, cluster)
        total["kv_us"] = wire + latency
        total["latency_us"] += latency
    return dict(total), layers


def figure(cluster, rank, name):
    """A figure of one rank: its own, else the cluster's."""
    for entry in cluster.rank_figures:
        if rank in entry.ranks and getattr(entry, name) is not None:
            return getattr(entry, name)
    return getattr(cluster, name)


def work_of(rank, pairs_of_experts, cluster, dims):
    pairs, experts = sum(pairs_of_experts), len(pairs_of_experts)
    fixed = cluster.compute_latency_us if pairs else 0.0
    if cluster.curve_pairs and cluster.curve_expert_bytes == dims.expert_bytes:
        return fixed + sum(on_curve(count, cluster) for count in pairs_of_experts)
    short, long = sorted((
        pairs * dims.expert_flops_per_token / figure(cluster, rank, "flops") * 1e6,
        experts * dims.expert_bytes / (figure(cluster, rank, "hbm_gbps") * 1e9) * 1e6,
    ))  # fmt: skip
    roofline = long + (1 - cluster.compute_overlap) * short
    return fixed + experts * cluster.expert_latency_us + roofline


def on_curve(count, cluster):
    """Time of an expert with so many pairs, by straight lines between the measured points."""
    points = [(0, 0.0), *zip(cluster.curve_pairs, cluster.curve_us, strict=True)]
    for (few, low), (many, high) in itertools.pairwise(points):
        if count <= many or many == points[-1][0]:  # the last line goes on
            return low + (high - low) * (count - few) / (many - few)
    raise AssertionError


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


def transfer(hops, size, cluster):
    """Time on the most congested link; every link is a key of one dict."""
    per = cluster.ranks_per_node
    busy = defaultdict(float)  # link -> us
    for source, target in hops:
        from_node, to_node = source // per, target // per
        near = from_node == to_node
        if source == target:
            if cluster.same_rank_gbps:
                busy["copy", source] += size / (cluster.same_rank_gbps * 1e9) * 1e6
        elif cluster.pair_gbps is not None:
            time = size / (cluster.pair_gbps[source][target] * 1e9) * 1e6
            busy["out", source] += time
            busy["in", target] += time
        else:
            kind = "intra_node_gbps" if near else "inter_node_gbps"
            shared = not near and cluster.inter_node_scope == "node"
            for way, rank in (("out", source), ("in", target)):
                owner = rank // per if shared else rank
                busy[way, kind, owner] += size / (figure(cluster, rank, kind) * 1e9) * 1e6
        if near and source != target and cluster.intra_node_shared_gbps:
            busy["bus", from_node] += size / (cluster.intra_node_shared_gbps * 1e9) * 1e6
        if cluster.network:
            from_leaf, to_leaf = (
                node // cluster.network.nodes_per_leaf for node in (from_node, to_node)
            )
            if from_leaf != to_leaf:
                busy["up", from_leaf] += size / (uplink(cluster, from_leaf) * 1e9) * 1e6
                busy["down", to_leaf] += size / (uplink(cluster, to_leaf) * 1e9) * 1e6
    return max(busy.values(), default=0.0)


def collective(cluster, *, in_turn):
    """Latency of one collective: of all classes of links that the cluster has."""
    ranks, per = cluster.num_ranks, cluster.ranks_per_node
    if ranks == 1:
        return 0.0
    near = cluster.intra_node_latency_us if per > 1 else 0.0
    far = cluster.inter_node_latency_us if cluster.num_nodes > 1 else 0.0
    if cluster.pair_gbps is not None:
        others = [(i, j) for i in range(ranks) for j in range(ranks) if i != j]
        table = cluster.pair_latency_us
        near = max((table[i][j] for i, j in others if i // per == j // per), default=0.0)
        far = max((table[i][j] for i, j in others if i // per != j // per), default=0.0)
    if cluster.network and cluster.num_nodes > cluster.network.nodes_per_leaf:
        far += cluster.network.spine_latency_us
    return (near + far if in_turn else max(near, far)) + cluster.peer_latency_us * (ranks - 1)


def nodes_below(cluster, leaf):
    per = cluster.network.nodes_per_leaf
    return [node for node in range(cluster.num_nodes) if node // per == leaf]


def uplink(cluster, leaf):
    """GB/s of a leaf's links to the spine."""
    per = cluster.ranks_per_node
    total = 0.0
    for node in nodes_below(cluster, leaf):
        if cluster.inter_node_scope == "node":
            total += cluster.inter_node_gbps
        else:
            ranks = range(node * per, (node + 1) * per)
            total += sum(figure(cluster, rank, "inter_node_gbps") for rank in ranks)
    return total / cluster.network.oversubscription


def all_gather(total, cluster):
    if not total:
        return 0.0, 0.0
    per, nodes = cluster.ranks_per_node, cluster.num_nodes
    ranks = per * nodes
    network = total * (nodes - 1) / nodes / per
    fast = total - total / ranks - network
    times = []
    if cluster.pair_gbps is not None:
        rates = cluster.pair_gbps
        for rank in range(ranks):
            others = [other for other in range(ranks) if other != rank]
            times.append(sum(total / ranks / (rates[rank][other] * 1e3) for other in others))
            times.append(sum(total / ranks / (rates[other][rank] * 1e3) for other in others))
    else:
        crowd = per if cluster.inter_node_scope == "node" else 1
        for rank in range(ranks):
            times.append(network * crowd / (figure(cluster, rank, "inter_node_gbps") * 1e3))
            times.append(fast / (figure(cluster, rank, "intra_node_gbps") * 1e3))
    if cluster.same_rank_gbps:
        times.append(total / ranks / (cluster.same_rank_gbps * 1e3))
    if cluster.intra_node_shared_gbps:
        times.append(fast * per / (cluster.intra_node_shared_gbps * 1e3))
    if cluster.network and nodes > cluster.network.nodes_per_leaf:
        for leaf in range(-(-nodes // cluster.network.nodes_per_leaf)):
            below = len(nodes_below(cluster, leaf))
            incoming = total * (nodes - below) / nodes * below
            times.append(incoming / (uplink(cluster, leaf) * 1e3))
    return max(times), collective(cluster, in_turn=True)
