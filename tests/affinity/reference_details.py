"""The figures of `placer.affinity.details`, written plainly: loops, lists and dictionaries."""

from __future__ import annotations

import math
from collections import Counter


def requests_of(trace):
    """request -> its tokens in order, each a list of layers of lists of experts."""
    order = sorted(range(trace.num_tokens), key=lambda t: (trace.request[t], trace.position[t]))
    found = {}
    for t in order:
        token = [[e for e in row if e >= 0] for row in trace.experts[t].tolist()]
        found.setdefault(int(trace.request[t]), []).append(token)
    return found


def srp(trace, length):
    """(SRP, threshold, predictions / uses): every threshold is tried on every window."""
    windows = []
    for tokens in requests_of(trace).values():
        for layer in range(trace.num_layers):
            for first in range(len(tokens) - length + 1):
                uses = Counter(e for t in tokens[first : first + length] for e in t[layer])
                windows += [uses[e] for e in range(trace.num_experts)]
    best = (-1.0, 0, 0.0)
    for threshold in range(length + 1):
        predicted = [n for n in windows if n >= threshold]
        matches, predictions, uses = sum(predicted), length * len(predicted), sum(windows)
        f1 = 2 * matches / (predictions + uses)
        if f1 > best[0]:
            best = (f1, threshold, predictions / uses)
    return best


def hit_rate(trace, size, horizon):
    """Hits / uses of a cache that evicts by uses ahead (horizon > 0) or by recency."""
    hits = uses = 0
    for tokens in requests_of(trace).values():
        for layer in range(trace.num_layers):
            sequence = [t[layer] for t in tokens]
            cache = []  # least recently served first
            for i, chosen in enumerate(sequence):
                before = set(cache)
                uses += len(chosen)
                hits += sum(e in before for e in chosen)
                for j, e in enumerate(chosen):
                    if e in cache:
                        cache.remove(e)
                    elif len(cache) < size:
                        hits += 1
                    else:
                        ahead = chosen[j + 1 :] + [
                            v for t in sequence[i + 1 : i + horizon] for v in t
                        ]
                        counts = [ahead.count(v) if horizon else 0 for v in cache]
                        cache.pop(counts.index(min(counts)))
                    cache.append(e)
    return hits / uses


def mean_activated(trace, batch_tokens, phase=1):
    """Mean over batches and layers of the distinct experts, one token of each request in turn."""
    decode = {}
    for t in sorted(range(trace.num_tokens), key=lambda t: trace.position[t]):
        if trace.phase[t] == phase:
            decode.setdefault(int(trace.request[t]), []).append(trace.experts[t].tolist())
    turns = max(len(tokens) for tokens in decode.values())
    order = [decode[r][i] for i in range(turns) for r in sorted(decode) if i < len(decode[r])]
    batches = [
        order[first : first + batch_tokens]
        for first in range(0, len(order) - batch_tokens + 1, batch_tokens)
    ]
    counts = [
        len({e for token in batch for e in token[layer] if e >= 0})
        for batch in batches
        for layer in range(trace.num_layers)
    ]
    return sum(counts) / len(counts)


def nmi(pairs):
    """I / min(H, H') of a list of pairs, without a correction for chance."""
    n = len(pairs)
    both, left, right = Counter(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    information = sum(c / n * math.log2(c * n / (left[a] * right[b])) for (a, b), c in both.items())

    def entropy(counts):
        return -sum(c / n * math.log2(c / n) for c in counts.values())

    return information / min(entropy(left), entropy(right))


def kept_share(trace, groups_by_layer, requests):
    """Share of co-activated pairs inside groups, over the tokens of some requests."""
    kept = total = 0
    for request, tokens in requests_of(trace).items():
        if request not in requests:
            continue
        for token in tokens:
            for layer, chosen in enumerate(token):
                for i, a in enumerate(chosen):
                    for b in chosen[i + 1 :]:
                        total += 1
                        kept += groups_by_layer[layer][a] == groups_by_layer[layer][b]
    return kept, total
