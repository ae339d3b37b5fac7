"""Redundant slots under coherent dispatch: walk, kernel and search against counts from scratch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import solvers
from solvers import check
from solvers.anneal import SQUARE_SHARE, pack_bits
from solvers.anneal_coherent import anneal_layer_coherent
from solvers.budget import Budget
from solvers.coherent import Pursuit, Search
from solvers.coherent_replicas import Filling
from solvers.layers import prepare
from solvers.pacing import FIRST_PART, Pace
from solvers.selection import Caps

from .cases import problem_of, random_tokens, topic_tokens

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def with_replicas(rng, num_experts, num_ranks, width):
    """[S] slots: every expert once, then copies where they fit; some slots stay empty."""
    rows = np.full((num_ranks, width), -1, np.int64)
    order = rng.permutation(num_experts)
    for i, expert in enumerate(order):
        rows[i % num_ranks, i // num_ranks] = expert
    for rank, slot in np.argwhere(rows < 0):
        expert = int(rng.integers(num_experts))
        if expert not in rows[rank] and rng.random() < 0.8:
            rows[rank, slot] = expert
    return rows.reshape(-1)


def filling_of(problem):
    """What judges and anneals the problem's placements, without any search before it."""
    budget = Budget()
    search = Search(prepare(problem), 0, budget, Caps(), ThreadPoolExecutor(1))
    return Filling(search, budget)


@QUICK
@given(seed=st.integers(0, 2**32), nodes=st.booleans(), homes=st.booleans(), parts=st.booleans())
def test_a_walk_counts_what_the_checker_counts(seed, nodes, homes, parts):
    rng = np.random.default_rng(seed)
    tokens = random_tokens(rng, 70, 4, 9, 3, gaps=True)
    options = {"ranks_per_node": 2, "node_weight": 3.0} if nodes else {}
    if homes:
        options["home"] = rng.integers(0, 4, 70)
    if parts:
        options["batch"] = np.arange(70) // 20
        options["scenario"] = rng.integers(0, 2, 70)
        options["scenario"][:2] = 0, 1
        options["scenario_load"] = np.ones((2, 4, 9))
    problem = problem_of(tokens, 9, 4, slots_per_rank=4, dispatch="coherent", **options)
    placement = [with_replicas(rng, 9, 4, 4) for _ in range(4)]
    found = filling_of(problem).judged(placement)
    figures = check.check(problem, np.stack(placement))
    assert found.cost == pytest.approx(check.objective(problem, figures))
    assert found.imbalance == pytest.approx(solvers.capped_imbalance(figures))


class Layer:
    """One layer with tokens on ranks, and the formulas of the kernel's module in sets."""

    def __init__(self, seed, num_nodes):
        self.rng = rng = np.random.default_rng(seed)
        self.num_experts, self.num_ranks, self.width, self.num_tokens = 8, 4, 3, 90
        self.tokens = random_tokens(rng, self.num_tokens, 1, self.num_experts, 3, gaps=True)[:, 0]
        self.where = rng.integers(0, self.num_ranks, self.num_tokens)
        self.shrink = self.num_ranks // num_nodes
        self.num_rows = self.num_ranks + (num_nodes if num_nodes > 1 else 0)
        self.row_prices = np.repeat([1.0, 2.5], [self.num_ranks, self.num_rows - self.num_ranks])
        self.slots = with_replicas(rng, self.num_experts, self.num_ranks, self.width)
        self.saving = rng.random((self.num_rows, self.num_tokens)) < 0.3
        self.paying = (rng.random((self.num_rows, self.num_tokens)) < 0.2) & ~self.saving
        self.paying[self.num_ranks :] = False
        self.loads = rng.random((2, self.num_experts + 1))
        self.loads[:, -1] = 0.0
        self.load_prices = np.array([0.3, 0.7])
        self.served = 1 + rng.random((2, self.num_ranks))
        self.held = rng.random((self.num_experts + 1, self.num_ranks)) < 0.5
        self.held[-1] = True
        self.users = [{t for t in range(90) if e in self.tokens[t]} for e in range(8)]
        self.primary = [{t for t in range(90) if self.tokens[t, 0] == e} for e in range(8)]

    def rows_of(self, rank):
        """The rows of a rank: its own, and its node's."""
        return [rank] + ([self.num_ranks + rank // self.shrink] * (self.num_rows > self.num_ranks))

    def at(self, row):
        """Tokens that enter the layer on a rank, or on a node."""
        group = self.where if row < self.num_ranks else self.where // self.shrink
        return set(np.flatnonzero(group == row - (0 if row < self.num_ranks else self.num_ranks)))

    def leave(self, tokens, rank):
        """What the next layer saves if these tokens enter it on a rank."""
        chosen = sorted(tokens)
        return sum(
            self.row_prices[row]
            * (int(self.saving[row, chosen].sum()) - int(self.paying[row, chosen].sum()))
            for row in self.rows_of(rank)
        )

    def figures(self, slots):
        """Traffic of a token, and [scenarios, G] rank load."""
        ranks = {e: [] for e in range(self.num_experts)}
        for slot, expert in enumerate(slots):
            if expert >= 0:
                ranks[int(expert)].append(slot // self.width)
        once = [set() for _ in range(self.num_rows)]
        for e, holders in ranks.items():
            for rank in holders:
                sure = self.users[e] if len(holders) == 1 else self.users[e] & self.at(rank)
                for row in self.rows_of(rank):
                    once[row] |= sure
        total = sum(
            price * (2 * len(row) - len(row & self.at(i)))
            for i, (row, price) in enumerate(zip(once, self.row_prices, strict=True))
        )
        load = np.zeros((2, self.num_ranks))
        for e, holders in ranks.items():
            if len(holders) == 1:
                total -= self.leave(self.primary[e], holders[0])
                load[:, holders[0]] += self.loads[:, e]
                continue
            here = [self.at(rank) for rank in holders]
            away = self.users[e] - set().union(*here)
            covering = {t: [g for g in holders if t in once[g]] for t in away}
            alone = [sum(c == [g] for c in covering.values()) for g in holders]
            fixed = [len(self.users[e] & h) + n for h, n in zip(here, alone, strict=True)]
            if self.num_rows > self.num_ranks:
                node_of = [self.rows_of(g)[1] for g in holders]
                touched = {row: once[row] | self.at(row) for row in node_of}
                for t in (t for t in away if not covering[t]):
                    near = [row for row in touched if t in touched[row]]
                    if len(near) == 1:
                        copies = [i for i, row in enumerate(node_of) if row == near[0]]
                        for i in copies:
                            fixed[i] += 1 / len(copies)
            free = len(self.users[e]) - sum(fixed)
            for g, n in zip(holders, fixed, strict=True):
                load[:, g] += self.loads[:, e] * (n + free / len(holders)) / len(self.users[e])
            for g, h in zip(holders, here, strict=True):
                total -= self.leave(self.primary[e] & h, g)
            for t in self.primary[e] & away:
                options = covering[t][:1] or holders
                total -= sum(self.leave({t}, g) for g in options) / len(options)
            bare = {t for t in away if not covering[t]}
            for level in range(len(self.rows_of(0))):
                rows = [self.rows_of(g)[level] for g in holders]
                price = np.mean([self.row_prices[row] for row in rows])
                new = bare - set().union(*(once[row] for row in rows)) if level else bare
                near = set().union(*(self.at(row) for row in rows)) if level else set()
                total += price * (2 * len(new) - len(new & near))
        return total / self.num_tokens, load

    def cost(self, slots, missed):
        """What the kernel minimises."""
        traffic, load = self.figures(slots)
        load = load + missed
        balance = load.max(axis=1) + SQUARE_SHARE * (load**2).mean(axis=1)
        rank = np.arange(slots.size) // self.width
        moves = sum(not self.held[e, g] for e, g in zip(slots, rank, strict=True) if e >= 0)
        return traffic + float(balance @ self.load_prices) + 0.01 * moves

    def bits(self, members):
        """[rows, W] of booleans [rows, T]."""
        ids = np.where(members.T, np.arange(len(members)), -1).astype(np.int64)
        return pack_bits(ids, len(members))[:-1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("proposals", [0, 1, 40, 400])
def test_the_running_cost_is_that_of_the_slots_that_come_back(seed, num_nodes, proposals):
    layer = Layer(seed, num_nodes)
    home = np.array([[t in layer.at(row) for t in range(90)] for row in range(layer.num_rows)])
    missed = layer.served - layer.figures(layer.slots)[1]
    before = layer.cost(layer.slots, missed)
    result = layer.slots.copy()
    primary = pack_bits(np.ascontiguousarray(layer.tokens[:, :1]), 8)
    best = anneal_layer_coherent(
        pack_bits(layer.tokens, 8), primary, np.array([0, 2]), np.array([1 / 90]), 4,
        layer.row_prices, layer.loads, layer.load_prices, np.ones(4), layer.held, 0.01, result,
        np.arange(12), 0.02, 0.99, proposals, seed, np.arange(8), layer.bits(home),
        layer.bits(layer.saving), layer.bits(layer.paying), layer.served, np.zeros(1, np.int64),
    )  # fmt: skip
    assert best == pytest.approx(layer.cost(result, missed))
    assert best <= before + 1e-12
    assert set(result) - {-1} == set(range(8))
    for rank in result.reshape(4, 3):
        held = rank[rank >= 0]
        assert len(set(held)) == held.size
    if proposals == 400:
        assert best < before


@QUICK
@given(seed=st.integers(0, 2**32))
def test_what_the_next_layer_costs_by_where_it_is_entered(seed):
    """Exact for tokens that use at most one expert with several copies."""
    rng = np.random.default_rng(seed)
    tokens = random_tokens(rng, 60, 2, 8, 3, gaps=True)
    problem = problem_of(tokens, 8, 4, slots_per_rank=3, dispatch="coherent")
    slots = with_replicas(rng, 8, 4, 3)
    holders = [set(np.flatnonzero(slots == e) // 3) for e in range(8)]
    gain, loss = filling_of(problem).entering(1, [slots, slots])
    for token, row in enumerate(tokens[:, 1]):
        used = [holders[e] for e in row if e >= 0]
        several = [ranks for ranks in used if len(ranks) > 1]
        if len(several) > 1:
            continue
        certain = set().union(*(ranks for ranks in used if len(ranks) == 1))

        def paid(home, certain=certain, several=several):
            """Twice the ranks, less one where the home is among them."""
            serving = set(certain)
            for ranks in several:
                if home in ranks:
                    serving.add(home)
                elif not ranks & serving:
                    serving.add(min(ranks))
            return 2 * len(serving) - (home in serving)

        for home in range(4):
            word, bit = token // 64, np.uint64(token % 64)
            saved = int(gain[home, word] >> bit & np.uint64(1))
            more = int(loss[home, word] >> bit & np.uint64(1))
            assert paid(home) == paid(None) - saved + more


def test_redundant_slots_save_messages_and_imbalance():
    base = problem_of(topic_tokens(31, num_tokens=400), 16, 4, dispatch="coherent",
                      home=np.arange(400) % 4, max_imbalance=1.1)  # fmt: skip
    without = solvers.solve(base, "local_search")
    spare = solvers.solve(replace(base, slots_per_rank=5), "local_search")
    assert spare.status == without.status == "feasible"
    assert spare.objective < 0.9 * without.objective
    assert (spare.placement >= 0).sum() > 5 * 16
    copied = solvers.solve(replace(base, slots_per_rank=5), "tensorrt_llm")
    assert spare.objective < copied.objective


def test_with_hardly_any_time_it_is_no_worse_than_what_it_borrows(monkeypatch):
    monkeypatch.setattr(Filling, "run", lambda self, prices, number, placement, heat: [placement])
    monkeypatch.setattr("solvers.coherent.anneal", lambda layers, layer, slots, *_, **__: slots)
    problem = problem_of(topic_tokens(32, num_tokens=300), 16, 4, dispatch="coherent",
                         home=np.arange(300) % 4, slots_per_rank=5)  # fmt: skip
    lent = solvers.solve(problem, "eplb_global")
    problem = replace(problem, max_imbalance=solvers.capped_imbalance(lent.parts))
    in_use = np.column_stack([np.arange(16).reshape(4, 4), np.full(4, -1)]).reshape(-1)
    for current in (None, np.tile(in_use, (5, 1))):
        result = solvers.solve(replace(problem, current=current), "local_search")
        assert result.status != "infeasible"
        assert result.objective <= lent.objective + 1e-9


def test_out_of_time_only_the_end_of_an_anneal_is_judged(monkeypatch):
    problem = problem_of(topic_tokens(33, num_tokens=200), 16, 4, dispatch="coherent",
                         home=np.arange(200) % 4, slots_per_rank=5)  # fmt: skip
    filling = filling_of(problem)
    start = filling.search.starts()
    filling.visited = [filling.judged(start)]
    monkeypatch.setattr(Filling, "run", lambda *_: [start] * 4)
    prices = filling.layers.uniform_prices(1.0)
    filling.improved(prices, 1, first=False)
    assert len(filling.visited) == 5
    filling.budget.stop()
    filling.improved(prices, 2, first=False)
    assert len(filling.visited) == 6


def test_an_expert_that_everybody_uses_gets_copies():
    rng = np.random.default_rng(11)
    others = rng.integers(1, 16, (400, 2, 1))
    tokens = np.concatenate([np.zeros_like(others), others], axis=2)
    problem = problem_of(tokens, 16, 4, home=np.arange(400) % 4, slots_per_rank=5,
                         dispatch="coherent")  # fmt: skip
    result = solvers.solve(problem, "local_search")
    assert (result.placement == 0).sum(axis=1).min() > 1


def test_the_price_of_imbalance_rises_where_the_cap_is_broken():
    def after(imbalance, floor=0.0):
        pursuit = Pursuit(2.0, floor, cap=1.1)
        pursuit.tell(imbalance)
        return pursuit.price

    assert after(1.2) > 2.0 > after(1.05)
    assert after(3.0) == 6.0
    assert after(1.01, floor=1.5) == 1.5


def test_the_price_of_imbalance_rises_faster_where_the_last_rise_brought_little():
    pursuit = Pursuit(2.0, 0.0, cap=1.1)
    pursuit.tell(1.12)
    factor = pursuit.price / 2.0
    pursuit.tell(1.119)
    assert pursuit.price > 2.0 * factor**3
    pursuit.tell(1.09)
    falling = pursuit.price
    pursuit.tell(1.12)
    assert pursuit.price > falling


@QUICK
@given(seed=st.integers(0, 2**32))
def test_coupled_layers_are_annealed_for_the_whole_and_for_what_folds_leave(seed):
    rng = np.random.default_rng(seed)
    tokens = random_tokens(rng, 90, 2, 8, 3)
    scenario = np.concatenate([np.arange(3), rng.integers(0, 3, 87)])
    loads = np.stack(
        [[np.bincount(tokens[scenario == c, i].ravel(), minlength=8) for i in range(2)]
         for c in range(3)]
    ).astype(float)  # fmt: skip
    problem = problem_of(tokens, 8, 4, dispatch="coherent", scenario=scenario,
                         scenario_load=loads, folds=True)  # fmt: skip
    layers = prepare(problem)
    mine = layers.annealed(loads)
    np.testing.assert_array_equal(mine[0], loads.sum(axis=0))
    np.testing.assert_array_equal(mine[1:], loads.sum(axis=0) - loads)
    assert layers.load_prices(layers.uniform_prices(6.0)).tolist() == [3.0, 1.0, 1.0, 1.0]
    apart = prepare(replace(problem, dispatch="alltoall"))
    np.testing.assert_array_equal(apart.annealed(loads), loads.sum(axis=0)[None])
    assert apart.load_prices(apart.uniform_prices(6.0)).tolist() == [6.0]


def test_an_anneal_with_a_time_limit_spreads_it_over_its_parts(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("solvers.budget.working_s", lambda: now[0])
    pace = Pace(Budget(100.0, _start=0.0), parts=10, usual=8000, share=0.5)
    taken = []
    for _ in range(10):
        taken.append(pace.steps())
        now[0] += taken[-1] * 0.005  # 40 s where there is time
    assert taken[0] == 8000 // FIRST_PART
    assert now[0] == pytest.approx(50.0, rel=0.02)
    plenty = Pace(Budget(), parts=2, usual=8000)
    assert [plenty.steps(), plenty.steps()] == [8000, 8000]
