"""Whole searches: sound, deterministic, within their cap, better than contiguous."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import solvers
from solvers import Budget, check
from solvers.coherent import coherent_traffic, match_labels
from solvers.layers import prepare
from solvers.local_search import LADDER, Search, local_search

from .cases import group_of, groups_used, problem_of, random_tokens, topic_tokens

QUICK = settings(max_examples=12, deadline=None)


@st.composite
def problems(draw):
    """Random tokens on few ranks: divisible or not, spare slots, one or two nodes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_ranks = draw(st.sampled_from([1, 2, 3, 4, 6]))
    num_experts = draw(st.integers(2, 14))
    nodes = 2 if num_ranks % 2 == 0 and draw(st.booleans()) else 1
    tokens = random_tokens(
        rng,
        draw(st.integers(1, 80)),
        draw(st.integers(1, 3)),
        num_experts,
        2,
        gaps=draw(st.booleans()),
    )
    return problem_of(
        tokens,
        num_experts,
        num_ranks,
        slots_per_rank=min(num_experts, -(-num_experts // num_ranks) + draw(st.integers(0, 2))),
        ranks_per_node=num_ranks // nodes,
        node_weight=3.0 if nodes == 2 else 0.0,
        dispatch=draw(st.sampled_from(["alltoall", "coherent", "allgather"])),
        objective=draw(st.sampled_from(["traffic", "balance"])),
        max_imbalance=draw(st.sampled_from([None, 1.2, 2.0])),
    )


@QUICK
@given(problem=problems(), seed=st.integers(0, 5))
def test_every_placement_is_sound_and_its_cap_kept_or_said_to_be_broken(problem, seed):
    result = solvers.solve(problem, "local_search", seed=seed)
    assert result.placement.shape == (problem.num_layers, problem.num_slots)
    parts = check.check(problem, result.placement)  # raises where it is unsound
    imbalance = parts.get("imbalance_served", parts["imbalance"])
    cap = problem.max_imbalance
    broken = cap is not None and imbalance > cap * (1 + 1e-9)
    assert (result.status == "infeasible") == broken


@pytest.mark.parametrize(("seed", "slots"), [(0, 5), (1, 5), (2, 5), (3, 6)])
def test_spare_slots_do_not_break_a_cap_that_is_kept_without_them(seed, slots):
    tokens = topic_tokens(seed, num_tokens=200)
    home = np.arange(200) % 4
    for width in (4, slots):
        problem = problem_of(tokens, 16, 4, slots_per_rank=width, max_imbalance=1.1, home=home)
        assert solvers.solve(problem, "local_search", seed=0).status == "feasible"


@QUICK
@given(problem=problems())
def test_alltoall_without_a_cap_is_never_worse_than_contiguous(problem):
    fewest = -(-problem.num_experts // problem.num_ranks)
    problem = replace(
        problem, dispatch="alltoall", objective="traffic", max_imbalance=None,
        slots_per_rank=fewest,
    )  # fmt: skip
    ours, theirs = (solvers.solve(problem, name) for name in ("local_search", "contiguous"))
    assert ours.objective <= theirs.objective + 1e-9


@pytest.mark.parametrize("cap", [1.05, 1.2, 1.5])
@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_a_cap_that_can_be_kept_is_kept_and_traffic_still_falls(dispatch, cap):
    problem = problem_of(topic_tokens(0), 16, 4, dispatch=dispatch, max_imbalance=cap)
    ours = solvers.solve(problem, "local_search")
    assert ours.status == "feasible"
    assert ours.parts["imbalance"] <= cap * (1 + 1e-9)
    contiguous = solvers.solve(replace(problem, max_imbalance=None), "contiguous")
    assert ours.objective < 0.88 * contiguous.objective


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_topics_are_found_when_no_cap_forbids_it(dispatch):
    """Sixteen experts in four groups that fire together, on four ranks."""
    problem = problem_of(topic_tokens(1), 16, 4, dispatch=dispatch)
    ours, theirs = (solvers.solve(problem, name) for name in ("local_search", "contiguous"))
    assert ours.objective < 0.65 * theirs.objective
    assert ours.parts["span"] < 0.75 * theirs.parts["span"]


def test_a_looser_cap_never_costs_traffic():
    problem = problem_of(topic_tokens(2), 16, 4)
    values = [
        solvers.solve(replace(problem, max_imbalance=cap), "local_search").objective
        for cap in (1.02, 1.1, 1.3, None)
    ]
    assert values == sorted(values, reverse=True)


def test_a_cap_below_the_floor_is_infeasible_and_says_how_close_it_came():
    load = np.ones((2, 8))
    load[:, 0] = 20  # one expert alone carries twice the mean rank load
    problem = replace(problem_of(topic_tokens(3, num_layers=2, num_experts=8), 8, 4), load=load,
                      max_imbalance=1.5)  # fmt: skip
    result = solvers.solve(problem, "local_search")
    floor = 20 / (27 / 4)
    assert result.status == "infeasible"
    assert result.parts["imbalance"] >= floor - 1e-9


def test_two_nodes_are_told_apart():
    problem = problem_of(topic_tokens(4), 16, 4, ranks_per_node=2, node_weight=8.0)
    flat = solvers.solve(replace(problem, node_weight=0.0), "local_search")
    aware = solvers.solve(problem, "local_search")
    assert aware.parts["node_messages"] < flat.parts["node_messages"]
    assert aware.objective < check.objective(problem, check.check(problem, flat.placement))


def in_pairs(experts):
    """Every way to put them on ranks of two slots and nodes of two ranks, but for names."""
    if len(experts) <= 2:
        return [experts]
    first, *rest = experts
    found = []
    for others in combinations(rest, len(experts) // 2 - 1):
        here, there = [first, *others], [e for e in rest if e not in others]
        found += [one + other for one in in_pairs(here) for other in in_pairs(there)]
    return found


@pytest.mark.parametrize("seed", [13, 15, 19, 23])
def test_the_least_traffic_of_two_nodes_is_found(seed):
    """Of eight experts on four ranks, every placement tried."""
    tokens = topic_tokens(seed, 80, num_layers=1, num_experts=8, top_k=2, num_topics=3)
    weight = [1.0, 2.0, 4.0][seed % 3]
    problem = problem_of(tokens, 8, 4, ranks_per_node=2, node_weight=weight)
    least = min(
        check.objective(problem, check.check(problem, np.array([placement])))
        for placement in in_pairs(list(range(8)))
    )
    assert solvers.solve(problem, "local_search").objective == pytest.approx(least)


@pytest.mark.parametrize("slots", [2, 3])
def test_without_homes_a_candidate_is_worth_what_the_objective_says(slots):
    rng = np.random.default_rng(slots)
    tokens = random_tokens(rng, 100, 1, 8, 3, gaps=True)
    problem = problem_of(tokens, 8, 4, slots_per_rank=slots, ranks_per_node=2, node_weight=3.0)
    layers = prepare(problem)
    rows = np.pad(rng.permutation(8).reshape(4, 2), ((0, 0), (0, slots - 2)), constant_values=-1)
    if slots > 2:
        rows[:, 2] = np.roll(rows[:, 0], 1)
    candidate = layers.candidate(0, rows.reshape(-1), slots)
    figures = check.check(problem, rows.reshape(1, -1))
    assert candidate.traffic[0] * (1 - 1 / 4) == pytest.approx(check.objective(problem, figures))


def test_balance_alone_reaches_the_even_load_that_exists():
    load = np.tile(np.array([9.0, 1, 8, 2, 7, 3, 6, 4]), (3, 1))
    problem = solvers.Problem(
        load=load, num_ranks=4, slots_per_rank=2, ranks_per_node=4, objective="balance"
    )
    result = solvers.solve(problem, "local_search")
    assert result.objective == pytest.approx(1.0)
    assert result.status == "optimal"


def test_latency_weighs_load_against_messages():
    tokens = topic_tokens(5)
    base = problem_of(tokens, 16, 4, objective="latency")
    cheap_links = solvers.solve(
        replace(base, latency_load_us=1.0, latency_message_us=1e-6), "local_search"
    )
    dear_links = solvers.solve(
        replace(base, latency_load_us=1e-6, latency_message_us=1.0), "local_search"
    )
    assert cheap_links.parts["imbalance"] < dear_links.parts["imbalance"]
    assert dear_links.parts["messages_alltoall"] < cheap_links.parts["messages_alltoall"]


@pytest.mark.parametrize("seed", [3, 5, 8, 35])
def test_the_least_latency_is_found_where_half_of_the_experts_are_at_home(seed):
    """On two ranks, every placement of eight experts tried."""
    tokens = topic_tokens(seed, 120, num_layers=1, num_experts=8, top_k=2, num_topics=3)
    cost = float(np.random.default_rng(seed).uniform(0.2, 1.0))
    problem = problem_of(
        tokens, 8, 2, objective="latency", latency_load_us=cost, latency_message_us=1.0
    )
    placements = [
        np.array([[*first, *sorted(set(range(8)) - set(first))]])
        for first in combinations(range(8), 4)
    ]
    least = min(check.objective(problem, check.check(problem, p)) for p in placements)
    assert solvers.solve(problem, "local_search").objective == pytest.approx(least)


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
@pytest.mark.parametrize("slots", [4, 5])
def test_the_same_seed_gives_the_same_placement(dispatch, slots):
    problem = problem_of(
        topic_tokens(6, num_tokens=200), 16, 4, dispatch=dispatch, max_imbalance=1.2,
        slots_per_rank=slots,
    )  # fmt: skip
    first, again = (solvers.solve(problem, "local_search", seed=3) for _ in range(2))
    assert (first.placement == again.placement).all()
    assert first.objective == again.objective


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_an_expired_budget_gives_a_sound_placement(dispatch):
    problem = problem_of(topic_tokens(7, num_tokens=100), 16, 4, dispatch=dispatch)
    result = solvers.solve(problem, "local_search", budget=Budget(0.0))
    assert result.termination == "time_limit"
    assert result.status == "feasible"


def test_a_stopped_budget_ends_the_search_as_interrupted():
    budget = Budget()
    budget.stop()
    result = solvers.solve(problem_of(topic_tokens(8), 16, 4), "local_search", budget=budget)
    assert result.termination == "interrupted"


@QUICK
@given(seed=st.integers(0, 2**32), nodes=st.booleans())
def test_coherent_traffic_equals_a_direct_count(seed, nodes):
    rng = np.random.default_rng(seed)
    tokens = random_tokens(rng, 50, 3, 8, 3, gaps=True)
    problem = problem_of(tokens, 8, 4, dispatch="coherent", ranks_per_node=2 if nodes else 4,
                         node_weight=2.0 if nodes else 0.0)  # fmt: skip
    placement = [rng.permutation(8) for _ in range(3)]
    expected = 0.0
    for groups, weight in [(4, 1.0), (2, 2.0)][: 1 + nodes]:
        where = [group_of(slots, groups) for slots in placement]
        for token in tokens:
            for layer in range(3):
                used = groups_used(token[layer], where[layer])
                expected += weight * 2 * len(used)
                if layer > 0 and token[layer - 1, 0] >= 0:
                    expected -= weight * (where[layer - 1][int(token[layer - 1, 0])] in used)
    found = coherent_traffic(prepare(problem), placement)
    assert found.sum() == pytest.approx(expected / (50 * 3))


@QUICK
@given(seed=st.integers(0, 2**32), ranks_per_node=st.sampled_from([4, 2]))
def test_aligning_relabels_ranks_and_nothing_else(seed, ranks_per_node):
    rng = np.random.default_rng(seed)
    tokens = topic_tokens(seed % 100, num_tokens=120, num_layers=4, num_experts=8)
    problem = problem_of(tokens, 8, 4, dispatch="coherent", ranks_per_node=ranks_per_node)
    layers = prepare(problem)
    before = [rng.permutation(8) for _ in range(4)]
    after = match_labels(layers, before)
    for old, new in zip(before, after, strict=True):
        assert {frozenset(r) for r in old.reshape(4, 2)} == {
            frozenset(r) for r in new.reshape(4, 2)
        }
        nodes = 4 // ranks_per_node
        assert {frozenset(n) for n in old.reshape(nodes, -1)} == {
            frozenset(n) for n in new.reshape(nodes, -1)
        }
    if ranks_per_node == 4:
        now, then = (coherent_traffic(layers, which)[0] for which in (after, before))
        assert now <= then + 1e-12


def test_relabelling_the_ranks_changes_no_value_of_the_search():
    """Without home ranks, which rank is called which is nobody's business."""
    problem = problem_of(topic_tokens(9, num_tokens=150), 16, 4, max_imbalance=1.3)
    result = solvers.solve(problem, "local_search")
    order = np.array([3, 1, 0, 2])
    moved = result.placement.reshape(5, 4, 4)[:, order].reshape(5, 16)
    parts = check.check(problem, moved)
    assert check.objective(problem, parts) == pytest.approx(result.objective)
    assert parts["imbalance"] == pytest.approx(result.parts["imbalance"])


def test_a_replica_pays_for_an_expert_that_everybody_uses():
    """Expert 0 is in every token; with a spare slot per rank it can be everywhere."""
    rng = np.random.default_rng(11)
    others = rng.integers(1, 16, (400, 2, 1))
    tokens = np.concatenate([np.zeros_like(others), others], axis=2)
    problem = problem_of(tokens, 16, 4, home=np.arange(400) % 4)
    without = solvers.solve(problem, "local_search")
    spare = solvers.solve(replace(problem, slots_per_rank=5), "local_search")
    assert spare.objective < 0.75 * without.objective
    assert (spare.placement == 0).sum(axis=1).min() > 1


def test_the_solver_itself_returns_a_solution_for_one_rank():
    problem = problem_of(topic_tokens(10, num_tokens=20), 16, 1)
    solution = local_search(problem, 0, Budget())
    assert sorted(solution.placement[0]) == list(range(16))


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_a_cap_binds_the_objective_latency_as_well(dispatch):
    """Messages are dear and load is cheap: only the cap keeps the ranks balanced."""
    options = {"dispatch": dispatch, "objective": "latency", "max_imbalance": 1.1}
    prices = {"latency_load_us": 0.01, "latency_message_us": 1.0}
    problem = problem_of(topic_tokens(1), 16, 4, **options, **prices)
    assert solvers.solve(problem, "local_search").status == "feasible"


def test_a_problem_without_tokens_is_one_of_load_alone():
    tokens = topic_tokens(1)
    problem = problem_of(tokens, 16, 4, objective="balance")
    empty = replace(problem, tokens=tokens[:0], primary=tokens[:0, :, 0])
    assert empty.tokens is None
    assert solvers.solve(empty, "local_search").parts["imbalance"] < 1.1


def scenarios_of(problem, num_scenarios, **others):
    """The problem with its tokens dealt out to scenarios by their first expert."""
    scenario = problem.tokens[:, 0, 0] % num_scenarios
    load = np.zeros((num_scenarios, problem.num_layers, problem.num_experts))
    for layer in range(problem.num_layers):
        for column in problem.tokens[:, layer].T:
            np.add.at(load[:, layer], (scenario, column), 1)
    return replace(problem, scenario_load=load, scenario=scenario, **others)


@pytest.mark.parametrize("slots", [4, 5])
def test_the_cap_binds_over_the_scenarios(slots):
    base = problem_of(topic_tokens(12), 16, 4, slots_per_rank=slots, max_imbalance=1.5)
    result = solvers.solve(scenarios_of(base, 3), "local_search")
    assert result.status == "feasible"
    assert result.parts["imbalance_scenarios"] <= 1.5 + 1e-9
    flat = solvers.solve(base, "local_search")
    assert check.check(scenarios_of(base, 3), flat.placement)["imbalance_scenarios"] > 1.5


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_the_worst_workload_fares_better_when_it_is_asked_for(dispatch):
    """Two workloads whose tokens have nothing in common; one is a tenth of the other."""
    tokens = np.concatenate([topic_tokens(13, num_tokens=600), topic_tokens(14, num_tokens=60)])
    base = problem_of(tokens, 16, 4, dispatch=dispatch)
    second = (np.arange(660) >= 600).astype(np.int64)
    load = np.zeros((2, 5, 16))
    for layer in range(5):
        np.add.at(load[:, layer], (second[:, None], tokens[:, layer]), 1)
    together = replace(base, scenario_load=load, scenario=second, workload=np.arange(2))
    worst = replace(together, robust="worst")
    ours = solvers.solve(worst, "local_search").objective
    for other in (base, together):  # by tokens; by the mean over workloads
        placement = solvers.solve(other, "local_search").placement
        assert ours <= check.objective(worst, check.check(worst, placement)) + 1e-9
    pooled = solvers.solve(base, "local_search").placement
    assert ours < check.objective(worst, check.check(worst, pooled)) - 0.02


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_moves_stay_within_their_number_and_each_more_helps(dispatch):
    base = problem_of(topic_tokens(15), 16, 4, dispatch=dispatch)
    current = np.tile(np.arange(16), (5, 1))
    values = []
    for most in (0, 10, 30, None):
        problem = replace(base, current=current, max_moves=most)
        result = solvers.solve(problem, "local_search")
        assert most is None or result.parts["moves"] <= most
        values.append(result.objective)
    assert values == sorted(values, reverse=True)
    assert values[0] > values[1] > values[3]


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
@pytest.mark.parametrize("slots", [4, 6])
def test_pins_and_unequal_ranks_are_kept(dispatch, slots):
    base = problem_of(topic_tokens(16), 16, 4, dispatch=dispatch, slots_per_rank=slots)
    pinned = np.full((5, 16), -1)
    pinned[:, 3], pinned[2, 8] = 0, 3
    room = np.tile([slots, slots, slots, 4], (5, 1))
    problem = replace(base, pinned=pinned, rank_slots=room)
    result = solvers.solve(problem, "local_search")  # the checker would refuse it
    assert result.objective < solvers.solve(base, "contiguous").objective


def test_a_faster_rank_is_given_more_load():
    tokens = topic_tokens(17)
    problem = replace(
        problem_of(tokens[:0], 16, 4, objective="balance", slots_per_rank=8),
        load=np.arange(1.0, 81).reshape(5, 16),
        rank_speed=np.array([3.0, 1, 1, 1]),
    )
    result = solvers.solve(problem, "local_search")
    alike = solvers.solve(replace(problem, rank_speed=None), "local_search")
    assert result.objective < 1.1
    assert check.check(problem, alike.placement)["imbalance"] > 1.4


def test_a_slot_budget_goes_to_the_layers_that_gain_most():
    """Layer 0 has an expert that all tokens use; in the others all are alike."""
    rng = np.random.default_rng(18)
    tokens = rng.integers(1, 16, (500, 4, 2))
    tokens[:, 0, 0] = 0
    base = problem_of(tokens, 16, 4, slots_per_rank=6, home=np.arange(500) % 4)
    problem = replace(base, slot_budget=4 * 4 + 1)
    result = solvers.solve(problem, "local_search")
    filled = (result.placement.reshape(4, 4, 6) >= 0).sum(axis=2).max(axis=1)
    assert filled.tolist() == [5, 4, 4, 4]


def test_messages_over_slow_links_are_avoided():
    """One rank is far away: the experts that few tokens use belong there."""
    cost = np.ones((4, 4)) - np.eye(4)
    cost[:, 3] = cost[3] = 10.0
    cost[3, 3] = 0.0
    rng = np.random.default_rng(19)
    rare = rng.random((600, 5, 1)) < 0.1  # such tokens use experts 0, 4, 8 and 12
    tokens = np.where(rare, 4 * rng.integers(0, 4, (600, 5, 1)), rng.integers(0, 16, (600, 5, 1)))
    base = problem_of(np.where(~rare & (tokens % 4 == 0), tokens + 1, tokens), 16, 4,
                      home=np.arange(600) % 3)  # fmt: skip
    problem = replace(base, link_cost=cost)
    result = solvers.solve(problem, "local_search")
    blind = solvers.solve(base, "local_search")
    assert result.objective < 0.9 * check.objective(problem, check.check(problem, blind.placement))


def test_a_longer_time_limit_goes_on_searching_until_it_no_longer_pays():
    problem = problem_of(topic_tokens(20, num_tokens=200), 16, 4, max_imbalance=1.1)
    short = solvers.solve(problem, "local_search")
    longer = solvers.solve(problem, "local_search", time_limit=30.0)
    assert longer.objective <= short.objective + 1e-9


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent", "allgather"])
def test_a_placement_in_use_may_have_replicas_whether_or_not_the_search_places_any(dispatch):
    base = problem_of(topic_tokens(21, num_tokens=150), 16, 4, slots_per_rank=5, dispatch=dispatch)
    rows = np.arange(16).reshape(4, 4)
    current = np.tile(np.column_stack([rows, [15, 0, 1, 2]]).reshape(-1), (5, 1))
    for most in (None, 6):
        problem = replace(base, current=current, max_moves=most, objective="balance")
        result = solvers.solve(problem, "local_search")  # the checker refuses doubles
        assert most is None or result.parts["moves"] <= most
    unmoved = solvers.solve(replace(base, current=current, max_moves=0), "local_search")
    assert unmoved.parts["moves"] == 0


def test_of_replicas_in_use_the_pinned_copy_stays():
    base = problem_of(topic_tokens(21, num_tokens=80), 16, 4, slots_per_rank=5, dispatch="coherent")
    rows = np.arange(16).reshape(4, 4)
    current = np.tile(np.column_stack([rows, [15, 0, 1, 2]]).reshape(-1), (5, 1))
    pinned = np.full((5, 16), -1)
    pinned[:, 0] = 1  # its second copy
    problem = replace(base, current=current, pinned=pinned, max_moves=0)
    assert solvers.solve(problem, "local_search").parts["moves"] == 0


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_a_slot_budget_allows_for_unequal_ranks_and_pins(dispatch):
    """A layer may need more slots on a rank than an even share of the experts."""
    tokens = topic_tokens(22, num_tokens=150, num_layers=3, num_experts=8)
    base = problem_of(tokens, 8, 4, dispatch=dispatch, slots_per_rank=3)
    unequal = replace(base, rank_slots=np.tile([1, 2, 3, 3], (3, 1)))
    pinned = np.full((3, 8), -1)
    pinned[0, :3] = 0
    for problem, least in ((unequal, 9), (replace(base, pinned=pinned), 7)):
        result = solvers.solve(replace(problem, slot_budget=least), "local_search")
        assert result.parts["slots_filled"] <= least
        with pytest.raises(solvers.InfeasibleProblem, match="budget"):
            solvers.solve(replace(problem, slot_budget=least - 1), "local_search")


@pytest.mark.parametrize("dispatch", ["alltoall", "coherent"])
def test_pins_that_need_more_moves_than_allowed_are_infeasible(dispatch):
    base = problem_of(topic_tokens(23, num_tokens=100), 16, 4, dispatch=dispatch)
    pinned = np.full((5, 16), -1)
    pinned[:, 15] = 0
    current = np.tile(np.arange(16), (5, 1))
    problem = replace(base, pinned=pinned, current=current, max_moves=4)
    with pytest.raises(solvers.InfeasibleProblem, match="at most 4 allowed"):
        solvers.solve(problem, "local_search")
    swapped = solvers.solve(replace(problem, max_moves=10), "local_search")  # 2 a layer
    assert swapped.parts["moves"] == 10


def test_a_rank_that_lost_slots_hands_on_no_more_than_it_must():
    base = problem_of(topic_tokens(24, num_tokens=100), 16, 4, slots_per_rank=5)
    rows = np.column_stack([np.arange(16).reshape(4, 4), [15, 0, 1, 2]])
    current = np.tile(rows.reshape(-1), (5, 1))
    room = np.tile([3, 5, 5, 5], (5, 1))  # what goes has another copy
    pinned = np.full((5, 16), -1)
    pinned[:, 1] = pinned[:, 3] = 0
    problem = replace(base, current=current, rank_slots=room, pinned=pinned, max_moves=0)
    assert solvers.solve(problem, "local_search").parts["moves"] == 0


def test_a_cap_that_moves_could_keep_does_not_break_the_number_of_moves():
    """All the load is on one rank; a swap, two moves, would halve the imbalance of 8."""
    tokens = (np.arange(200) % 2)[:, None, None]
    problem = problem_of(tokens, 16, 8, current=np.arange(16)[None], max_moves=1, max_imbalance=4.0)
    result = solvers.solve(problem, "local_search")
    assert result.status == "infeasible"
    assert result.parts["moves"] == 0
    allowed = solvers.solve(replace(problem, max_moves=2), "local_search")
    assert allowed.parts["imbalance"] == 4.0
    assert allowed.status != "infeasible"


def test_links_without_cost_leave_the_worst_workload_defined():
    tokens = topic_tokens(24, num_tokens=60)
    base = problem_of(tokens, 16, 4, dispatch="coherent", link_cost=np.zeros((4, 4)))
    problem = scenarios_of(base, 2, workload=np.arange(2), robust="worst")
    result = solvers.solve(problem, "local_search")
    assert result.objective == 0.0


@pytest.mark.parametrize("change", [(0, 1), (0, 99), (0, -1)])
def test_a_placement_in_use_must_be_sound(change):
    current = np.tile(np.arange(16), (5, 1))
    current[2, change[0]] = change[1]
    with pytest.raises(ValueError, match="current"):
        problem_of(topic_tokens(25, num_tokens=10), 16, 4, current=current)


@pytest.mark.parametrize(("per_expert", "number", "around"), [(100, 10, 3), (20, 4, 1)])
def test_where_anneals_are_short_fewer_prices_are_tried(monkeypatch, per_expert, number, around):
    problem = problem_of(topic_tokens(22, num_tokens=80), 16, 4, max_imbalance=1.1)
    search = Search(prepare(problem), 0, Budget())
    monkeypatch.setattr(
        "solvers.local_search.paced",
        lambda layers, *_: replace(layers, most_proposals=16 * per_expert),
    )
    tried = []
    monkeypatch.setattr(search, "extend", lambda wanted, *_: tried.extend(wanted))
    search.begin(0.0, True)
    assert len(tried) == number
    assert sum(tried[0].imbalance) == 0.0
    assert sum(tried[-1].imbalance) == LADDER[-1]
    assert len(search.around) == around


def test_anneals_of_a_round_begin_from_what_was_there_before_it(monkeypatch):
    """Whatever thread ends first: else two runs with one seed differ."""
    seen = {}
    favourite = Search.favourite

    def noted(search, layer, width, price):
        seen.setdefault((search.rounds, layer), set()).add(len(search.pools[layer]))
        return favourite(search, layer, width, price)

    monkeypatch.setattr(Search, "favourite", noted)
    tokens = topic_tokens(25, num_tokens=150)
    solvers.solve(problem_of(tokens, 16, 4, max_imbalance=1.01), "local_search")
    assert len(seen) == 2 * 5  # layers, in the rounds that go on from candidates
    assert all(len(sizes) == 1 for sizes in seen.values())


@pytest.mark.parametrize("seed", [1, 2])
def test_first_experts_alone_travel_no_more_than_in_exflow(seed):
    """ExFlow's own setting: one expert a layer, coherent dispatch."""
    num_tokens, num_layers, num_experts, liked = 600, 8, 24, 4
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, num_experts, (num_tokens, num_layers, 1))
    for layer in range(1, num_layers):
        follow = rng.integers(0, num_experts, (num_experts, liked))
        after = follow[tokens[:, layer - 1, 0], rng.integers(0, liked, num_tokens)]
        usual = rng.random(num_tokens) < 0.7
        tokens[usual, layer, 0] = after[usual]
    flow = np.zeros((num_layers - 1, num_experts, num_experts))
    for layer in range(num_layers - 1):
        np.add.at(flow[layer], (tokens[:, layer, 0], tokens[:, layer + 1, 0]), 1)
    problem = problem_of(tokens, num_experts, 6, dispatch="coherent", affinity=flow,
                         primary_affinity=flow, home=np.arange(num_tokens) % 6)  # fmt: skip
    mine, theirs = (solvers.solve(problem, name) for name in ("local_search", "exflow_top1"))
    assert mine.objective <= theirs.objective + 1e-9
