"""The kernel for redundant slots: its running figures against the formulas, from scratch."""

from __future__ import annotations

import numpy as np
import pytest

from solvers import check
from solvers.anneal import SQUARE_SHARE, pack_bits, seeded
from solvers.anneal_replicas import anneal_layer_replicas, learn, refused
from solvers.check_serving import serve
from solvers.copies import common_ranks, has_copy, move_copy, new_copies
from solvers.layers import prepare
from solvers.problem import Problem
from solvers.replica_pricing import DAMPING, SWEEPS, fill_load
from solvers.serving import serve_layer

from .cases import problem_of, random_tokens


def met_from_scratch(where, users, single, num_ranks):
    """Messages of free tokens whose experts meet on a rank, each expert once."""
    free = {
        e: users[e] - set().union(*(single[g] for g in ranks))
        for e, ranks in where.items()
        if len(ranks) > 1
    }
    saved = 0.0
    for e in free:
        left = set(free[e])
        for other in sorted(free):
            common = len(set(where[e]) & set(where[other]))
            if other >= e or not common:
                continue
            chosen = common * (1 / len(where[e]) + 1 / len(where[other])) / 2
            homeless = 1 - len(set(where[e]) | set(where[other])) / num_ranks
            saved += chosen * homeless / (1 - 1 / num_ranks) * len(left & free[other])
            left -= free[other]
    return saved


def figures_from_scratch(tokens, slots, relative, groups, weights, steering):
    """Traffic of a token and rank load / mean [G], as the kernel's module describes them."""
    num_ranks = groups[0]
    width = slots.size // num_ranks
    where = {e: sorted(s // width for s in np.flatnonzero(slots == e)) for e in set(slots) - {-1}}
    users = {e: {t for t, row in enumerate(tokens) if e in row} for e in where}
    traffic = 0.0
    for num_groups, weight in zip(groups, weights, strict=True):
        shrink = num_ranks // num_groups
        single = [set() for _ in range(num_groups)]
        for e, ranks in where.items():
            if len(ranks) == 1:
                single[ranks[0] // shrink] |= users[e]
        total = float(sum(len(tokens_) for tokens_ in single))
        for e, ranks in where.items():
            if len(ranks) > 1:
                held = {g // shrink for g in ranks}
                uncovered = users[e] - set().union(*(single[g] for g in held))
                total += (1 - len(held) / num_groups) / (1 - 1 / num_groups) * len(uncovered)
        if shrink == 1:
            ranks_single = single
            total -= met_from_scratch(where, users, single, num_ranks)
        traffic += weight * total
    load = np.zeros(num_ranks)
    for e, ranks in where.items():
        if len(ranks) == 1:
            load[ranks[0]] += relative[e]
    split = {}
    for e, ranks in where.items():
        if len(ranks) == 1:
            continue
        away = 1 - len(ranks) / num_ranks
        bound = 0.0
        for g in ranks:
            others = set().union(*(ranks_single[h] for h in ranks if h != g))
            share = len((users[e] & ranks_single[g]) - others) / max(1, len(users[e]))
            bound += share
            load[g] += relative[e] * (away * share + 1 / num_ranks)
        split[e] = np.full(len(ranks), relative[e] * away * (1 - bound) / len(ranks))
    for e, parts in split.items():
        load[where[e]] += parts
    for e in sorted(split) * SWEEPS:
        ranks = where[e]
        share = np.exp(-steering * load[ranks])
        change = DAMPING * (split[e].sum() * share / share.sum() - split[e])
        split[e] = split[e] + change
        load[ranks] += change
    return traffic / len(tokens), load


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "seed"),
    [*((8, 4, seed) for seed in range(6)), (140, 70, 0)],  # masks of one word and of two
)
@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize(("proposals", "steering"), [(0, 1.0), (1, 1.0), (40, 6.0), (400, 2.0)])
def test_the_running_figures_are_those_of_the_slots_that_come_back(
    num_experts, num_ranks, seed, num_nodes, proposals, steering
):
    width = 3
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.permutation(num_experts)[:3] for _ in range(90)]).astype(np.int64)
    tokens[:5] = -1
    bits = pack_bits(tokens, num_experts)
    load = np.bincount(tokens[tokens >= 0], minlength=num_experts).astype(float)
    relative = np.append(load / (load.sum() / num_ranks), 0.0)
    slots = np.full((num_ranks, width), -1, np.int64)
    slots[:, :2] = np.arange(num_experts).reshape(num_ranks, 2)
    slots = slots.reshape(-1)
    groups = np.array([num_ranks, num_nodes][: 1 + (num_nodes > 1)], np.int64)
    weights = np.array([1.0, 2.0][: groups.size])
    row_prices = np.repeat(weights, groups)
    best = anneal_layer_replicas(
        bits, np.array([0, bits.shape[1]]), np.array([1 / len(tokens)]), groups, row_prices,
        relative[None], np.array([0.7]), np.ones(num_ranks),
        np.ones((num_experts + 1, num_ranks), bool), 0.0, slots, np.arange(slots.size), 0.3, 0.999,
        proposals, seed, np.arange(num_experts), steering, np.zeros(1, np.int64),
    )  # fmt: skip
    assert set(slots.tolist()) >= set(range(num_experts))
    for row in slots.reshape(num_ranks, width):
        held = row[row >= 0]
        assert len(set(held.tolist())) == held.size
    traffic, load = figures_from_scratch(tokens, slots, relative, groups, weights, steering)
    squares = SQUARE_SHARE * (load**2).mean()
    assert best == pytest.approx(traffic + 0.7 * (load.max() + squares), abs=1e-6)
    if proposals == 400:
        assert (slots >= 0).sum() > num_experts  # replicas were worth it


def placed_with_replicas(rng, num_experts, num_ranks, width):
    """[G, slots] every expert once, then copies here and there."""
    rows = np.full((num_ranks, width), -1, np.int64)
    for place, expert in enumerate(rng.permutation(num_experts)):
        rows[place % num_ranks, place // num_ranks] = expert
    for rank, slot in np.argwhere(rows < 0):
        expert = int(rng.integers(num_experts))
        if expert not in rows[rank] and rng.random() < 0.8:
            rows[rank, slot] = expert
    return rows


def held_by(rows, num_experts):
    """[E, G] whether a rank holds an expert."""
    return np.stack([(rows == expert).any(axis=1) for expert in range(num_experts)])


@pytest.mark.parametrize("num_ranks", [1, 4, 64, 65, 130])
def test_moves_of_copies_leave_what_a_count_of_the_slots_finds(num_ranks):
    rng = np.random.default_rng(num_ranks)
    num_experts, width = 2 * num_ranks, 3
    rows = placed_with_replicas(rng, num_experts, num_ranks, width)
    copies = new_copies(rows.reshape(-1), num_experts, num_ranks, num_ranks)
    for _ in range(300):
        rank, slot = rng.integers(num_ranks), rng.integers(width)
        old, new = rows[rank, slot], rng.integers(-1, num_experts)
        if new in rows[rank] or (old >= 0 and (rows == old).sum() == 1):
            continue
        move_copy(copies, old, rank, -1)
        move_copy(copies, new, -1, rank)
        rows[rank, slot] = new
    held = held_by(rows, num_experts)
    assert (copies.count == held.sum(axis=1)).all()
    several = np.flatnonzero(held.sum(axis=1) > 1)
    assert copies.listed[0] == several.size
    assert copies.listed[1 : several.size + 1].tolist() == several.tolist()
    for expert in range(num_experts):
        ranks = np.flatnonzero(held[expert]).tolist()
        assert sorted(copies.ranks[expert, : len(ranks)].tolist()) == ranks
        assert [g for g in range(num_ranks) if has_copy(copies, expert, g)] == ranks
        other = int(rng.integers(num_experts))
        common = common_ranks(copies.mask[expert], copies.mask[other])
        assert common == (held[expert] & held[other]).sum()


@pytest.mark.parametrize("homes", ["known", "some", "unknown"])
@pytest.mark.parametrize(("num_ranks", "num_nodes"), [(1, 1), (4, 2), (6, 3), (72, 2)])
def test_serving_is_the_checkers_whether_or_not_homes_are_known(num_ranks, num_nodes, homes):
    rng = np.random.default_rng(num_ranks)
    num_experts, count = 9, 120
    rows = placed_with_replicas(rng, num_experts, num_ranks, -(-num_experts // num_ranks) + 1)
    tokens = random_tokens(rng, count, 1, num_experts, 3, gaps=True)[:, 0]
    home = rng.integers(0, num_ranks, count)
    if homes != "known":
        home[: count if homes == "unknown" else count // 2] = -1
        home = rng.permutation(home)
    batch, scenario = np.arange(count) // 50, rng.integers(0, 2, count)
    prices = rng.random((num_ranks + 1, num_ranks + num_nodes))
    load, traffic = np.zeros((2, num_ranks)), np.zeros(2)
    serve_layer(
        tokens, rows.reshape(-1), num_experts, num_nodes, home, batch, scenario, scenario, prices,
        load, traffic,
    )  # fmt: skip
    shrink = num_ranks // num_nodes
    served = serve(tokens, held_by(rows, num_experts), home, batch, shrink)
    expected_load, expected = np.zeros((2, num_ranks)), np.zeros(2)
    for row, start, part in zip(served.tolist(), home.tolist(), scenario, strict=True):
        for rank in row:
            if rank >= 0:
                expected_load[part, rank] += 1
        used = {rank for rank in row if rank >= 0}
        nodes = {rank // shrink for rank in used}
        if start >= 0:
            used, nodes = used - {start}, nodes - {start // shrink}
        rows = [*used, *(num_ranks + n for n in nodes)]
        expected[part] += prices[start, rows].sum()
    assert (load == expected_load).all()
    assert traffic == pytest.approx(expected)


@pytest.mark.parametrize("ranks_per_node", [2, 4])
@pytest.mark.parametrize("homes", [True, False])
def test_a_candidate_costs_over_unequal_links_what_the_checker_says(ranks_per_node, homes):
    """Without homes in units of what is sent by the others, see `Layers.counts_homes`."""
    rng = np.random.default_rng(ranks_per_node)
    tokens = random_tokens(rng, 200, 1, 8, 3)
    cost = 3 * rng.random((4, 4))
    np.fill_diagonal(cost, 0.0)
    home = rng.choice(4, 200, p=[0.5, 0.3, 0.1, 0.1])  # the mean home is not any home
    problem = problem_of(
        tokens, 8, 4, slots_per_rank=3, ranks_per_node=ranks_per_node,
        home=home if homes else None, link_cost=cost,
    )  # fmt: skip
    layers = prepare(problem)
    for _ in range(4):
        slots = placed_with_replicas(rng, 8, 4, 3).reshape(-1)
        value = check.objective(problem, check.check(problem, slots[None]))
        expected = value if homes else value * 4 / 3
        assert layers.candidate(0, slots, 3).traffic[0] == pytest.approx(expected)


def test_serving_without_replicas_is_the_span_less_the_home_rank():
    rng = np.random.default_rng(3)
    tokens = np.stack([rng.permutation(8)[:3] for _ in range(50)]).astype(np.int64)
    home = rng.integers(0, 4, 50)
    load, traffic = np.zeros((2, 4)), np.zeros(2)
    scenario = workload = np.arange(50) % 2
    prices = np.tile([1.0, 1, 1, 1, 10, 10], (5, 1))
    serve_layer(
        tokens, np.arange(8), 8, 2, home, scenario, scenario, workload, prices, load, traffic
    )
    ranks = tokens // 2
    expected = np.zeros(2)
    for t, (used, h) in enumerate(zip(ranks, home, strict=True)):
        nodes = {g // 2 for g in used} - {h // 2}
        expected[t % 2] += len(set(used) - {h}) + 10 * len(nodes)
    assert (traffic == expected).all()
    assert (load == [np.bincount(ranks[c::2].ravel(), minlength=4) for c in (0, 1)]).all()


def test_the_share_of_free_tokens_is_near_that_of_homes_which_count_for_themselves():
    """Two copies of expert 0 on ranks of unlike load; the share that the colder one serves."""
    rng = np.random.default_rng(0)
    count, num_ranks = 40000, 4
    others = rng.choice([1, 2, 3, 4], size=count, p=[0.45, 0.15, 0.2, 0.2])
    used = rng.random(count) < 0.5
    tokens = np.stack([np.where(used, 0, others), np.full(count, -1)], axis=1)
    slots = np.array([0, 1, 0, 2, 3, -1, 4, -1])  # ranks 0 and 1 hold expert 0
    shares = {}
    for size in (8, 64):  # tokens of a home in a batch
        home = np.full(count, 3)
        batch = np.arange(count) // size
        load = np.zeros((1, num_ranks))
        zero = np.zeros(count, np.int64)
        serve_layer(
            tokens, slots, 5, 1, home, batch, zero, zero,
            np.ones((num_ranks + 1, num_ranks)), load, np.zeros(1),
        )  # fmt: skip
        served = load[0] / load.mean()
        relative = np.bincount(tokens[tokens >= 0], minlength=6)[:6] / load.mean()
        problem = Problem(
            load=relative[None, :5], num_ranks=num_ranks, slots_per_rank=2, ranks_per_node=4,
            tokens=tokens[:, None], home=home, batch=batch,
        )  # fmt: skip
        estimate = np.zeros(num_ranks)
        copies = new_copies(slots, 5, num_ranks, 2)
        single = np.append(0.0, relative)[[2, 3, 4, 5]]
        fill_load(
            np.append(relative[:5], 0.0), single, np.full(5, count), copies,
            np.zeros((5, num_ranks), np.int64), np.ones(num_ranks), prepare(problem).steering,
            np.zeros((5, 2)), np.zeros(2), estimate,
        )  # fmt: skip
        shares[size] = served, estimate
    for served, estimate in shares.values():
        assert abs(served[:2] - estimate[:2]).max() < 0.25
    assert shares[8][0][0] > shares[64][0][0]
    assert shares[8][1][0] > shares[64][1][0]


def test_the_screen_refuses_few_of_those_that_would_be_accepted():
    rng = np.random.default_rng(0)
    screen, state = np.array([1e300, 0.0]), seeded(1)
    accepted = lost = unmeasured = 0
    for step in range(1, 30001):
        measured = rng.normal(1.0)
        excess = measured + rng.normal(0.0, 0.5)
        away = refused(screen, excess, state)
        if not away:
            learn(screen, excess, measured, step)
        if step > 5000:
            unmeasured += away
            accepted += measured <= 0
            lost += away and measured <= 0
    assert 0.002 < lost / accepted < 0.04  # KEPT of them are to be measured
    assert unmeasured > 8000
    assert screen[1] == pytest.approx(0.4, abs=0.15)  # the mean of what is between the two
