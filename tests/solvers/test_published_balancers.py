"""SGLang's, TensorRT-LLM's and vllm-ascend's balancers: worked by hand, and their own rules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import make_problem, problems, topic_tokens

from solvers import Problem, solve
from solvers.batch_loads import load_over_batches
from solvers.check import check
from solvers.published import flashlb, sglang_vec, swift, tensorrt_llm


def problem_of(load, num_ranks, slots_per_rank, **others):
    return Problem(
        load=np.atleast_2d(np.asarray(load, np.float64)),
        num_ranks=num_ranks,
        slots_per_rank=slots_per_rank,
        objective="balance",
        **{"ranks_per_node": num_ranks, **others},
    )


def series_problem(loads, num_ranks, slots_per_rank, **others):
    """One layer; loads [B, E]: so many tokens of one expert each, batch by batch."""
    loads = np.asarray(loads)
    pairs = [(b, e) for b, row in enumerate(loads) for e, n in enumerate(row) for _ in range(n)]
    batch, experts = np.array(pairs).T
    return problem_of(
        loads.sum(axis=0),
        num_ranks,
        slots_per_rank,
        tokens=experts[:, None, None].astype(np.int16),
        batch=batch,
        **others,
    )


def ranks_of(result, problem):
    table = result.placement.reshape(problem.num_layers, problem.num_ranks, -1)
    return [[sorted(row.tolist()) for row in layer] for layer in table]


def test_loads_over_batches_are_counted_batch_by_batch():
    tokens = np.array([[[0, 2]], [[1, -1]], [[0, 1]]], np.int16)
    problem = make_problem(tokens, 3, 1, 3, batch=np.array([4, 4, 9]))
    assert load_over_batches(problem).tolist() == [[[1, 1, 1]], [[1, 1, 0]]]
    assert (load_over_batches(problem).sum(axis=0) == problem.load).all()


# sglang_vec: one spare slot. The steps' maxima add up to 8 + 6 = 14 without a replica; expert 0's
# brings them to 4 + 6, expert 1's to 8 + 3, though expert 1 carries more over both steps.
PEAKS = [[8, 4, 1], [0, 6, 1]]


def test_sglang_replicates_what_lowers_the_sum_of_the_steps_maxima():
    problem = series_problem(PEAKS, 2, 2)
    assert sglang_vec.replicate_over_steps(np.array(PEAKS, float), 4, 2).tolist() == [0, 1, 2, 0]
    result = solve(problem, "sglang_vec")
    # shares 4, 10, 2: dealt 1 -> rank 0, 0 -> rank 1, and back: 0 -> rank 1, 2 -> rank 0; rank 1
    # then trades a 0 for 1 or for 2, either way with 14 on the busier rank
    assert result.placement.tolist() == [[0, 2, 1, 0]]
    assert result.notes == {"policy": "global", "batches": 2, "doubles_parted": 1}
    assert np.bincount(solve(problem, "eplb").placement[0]).tolist() == [1, 2, 1]


def test_sglang_deals_copies_in_a_snake():
    table, _ = sglang_vec.balance_over_steps(np.array([[6.0, 5, 4, 3, 2, 1]]), 2, 3)
    assert table.tolist() == [[0, 3, 4], [1, 2, 5]]


def test_sglang_keeps_groups_on_their_node():
    rng = np.random.default_rng(0)
    loads = rng.integers(1, 30, (5, 16))
    problem = series_problem(loads, 8, 3, ranks_per_node=2, num_groups=8)
    result = solve(problem, "sglang_vec")
    assert result.notes["policy"] == "hierarchical"
    nodes = [set((node // 2).tolist()) for node in result.placement[0].reshape(4, 6)]
    assert all(len(groups) == 2 for groups in nodes)
    assert set().union(*nodes) == set(range(8))


# flashlb: four experts of equal mean; 0 and 2 are busy together, so are 1 and 3.
ANTI = [[10, 2, 10, 2], [2, 10, 2, 10], [10, 2, 10, 2], [2, 10, 2, 10]]


def test_flashlb_puts_experts_together_that_are_busy_in_turn():
    problem = series_problem(ANTI, 2, 2)
    result = solve(problem, "flashlb")
    assert ranks_of(result, problem) == [[[0, 3], [1, 2]]]
    assert result.parts["imbalance_batch"] == 1.0
    assert solve(problem, "eplb").parts["imbalance_batch"] == pytest.approx(20 / 12)


def test_flashlb_risk_is_mean_and_deviation_of_a_rank():
    """Recompute the risks of a deployment step by step, and follow the greedy rule."""
    loads = np.random.default_rng(1).gamma(2.0, size=(6, 7))
    search = flashlb.Search(loads, 3, 3)
    copies = np.array([2, 1, 1, 1, 2, 1, 1])
    table = [[], [], []]
    for expert in np.argsort(-(loads.mean(axis=0) / copies), kind="stable"):
        for _ in range(copies[expert]):
            risk = {}
            for rank, held in enumerate(table):
                if len(held) < 3 and expert not in held:
                    series = sum(loads[:, e] / copies[e] for e in [*held, expert])
                    risk[rank] = series.mean() + flashlb.Z * series.std(ddof=1)
            table[min(risk, key=risk.get)].append(int(expert))
    assert [row[row >= 0].tolist() for row in search.deploy(copies)] == table
    copied = np.bincount([e for row in table for e in row], minlength=7)
    ranks = np.stack([sum(loads[:, e] / copied[e] for e in row) for row in table])
    ratio = (ranks.max(axis=0) * 3 + 0.01) / (ranks.sum(axis=0) + 0.01)
    assert search.score(copies) == pytest.approx(ratio.mean())


def test_flashlb_search_is_no_worse_than_the_min_max_rule():
    rng = np.random.default_rng(2)
    for _ in range(20):
        search = flashlb.Search(rng.gamma(0.4, size=(8, 12)) + 0.1, 4, 5)
        plain = search.spread(np.arange(12), search.num_spare)[-1]
        found = np.bincount(search.run().ravel() + 1, minlength=13)[1:]
        assert found.sum() <= 20
        assert search.score(found) <= search.score(plain) + 1e-12


def test_flashlb_sums_batches_into_at_most_64_windows():
    loads = np.arange(130.0)[:, None, None]
    assert flashlb.windows(loads).ravel().tolist() == [4.0 * i + 5 for i in range(64)]
    assert flashlb.windows(loads[:5]).ravel().tolist() == [0, 1, 2, 3, 4]


def test_tensorrt_packs_heaviest_first_and_replicates_the_later_of_equals():
    assert tensorrt_llm.count_copies(np.array([4.0, 4, 2]), 4, 2).tolist() == [1, 2, 1]
    assert tensorrt_llm.count_copies(np.zeros(3), 5, 2).tolist() == [2, 2, 1]
    problem = problem_of([9, 7, 6, 4, 3, 1], 2, 3)
    assert solve(problem, "tensorrt_llm").placement.tolist() == [[0, 3, 4, 1, 2, 5]]


def test_tensorrt_collects_what_fires_together_up_to_its_share():
    """Two of three slots, and 8 of the mean load 10, may be filled by co-occurrence."""
    together = np.ones((1, 6, 6))
    together[0, 0, 4] = together[0, 4, 0] = 9
    together[0, 1, 5] = together[0, 5, 1] = 8
    problem = problem_of([5, 3, 3, 3, 3, 3], 2, 3, coactivation=together)
    result = solve(problem, "tensorrt_llm_cooccurrence")
    # 0 with 4 is 8; 1 with 5 is 6; then 2 to the lighter rank 1, and 3 to rank 0
    assert result.placement.tolist() == [[0, 4, 3, 1, 5, 2]]


def test_swift_exchanges_one_pair_between_two_ranks():
    """Ranks carry 12 and 4; 8 against 3 leaves 9 at most, and nobody may send twice."""
    result = solve(problem_of([8, 4, 3, 1], 2, 2), "swift")
    assert result.placement.tolist() == [[2, 1, 0, 3]]


def test_swift_starts_from_the_placement_in_use_and_moves_little():
    load = np.random.default_rng(0).gamma(0.5, size=(4, 32)) + 0.01
    problem = problem_of(load, 8, 5)
    current = solve(problem, "eplb").placement
    drifted = problem_of(load * np.random.default_rng(1).uniform(0.7, 1.4, load.shape), 8, 5)
    kept = Problem(**{**vars(drifted), "current": current})
    result = solve(kept, "swift")
    assert result.parts["imbalance"] < 0.97 * check(kept, current)["imbalance"]
    assert 0 < result.parts["moves"] < 4 * 8 * 3
    anew = solve(kept, "eplb")
    assert result.parts["moves"] < 0.5 * anew.parts["moves"]


def test_swift_starts_without_one_as_vllm_does():
    problem = problem_of(np.ones((1, 6)), 2, 4)
    assert swift.initial(problem).tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
    assert swift.initial(problem_of(np.ones((1, 2)), 2, 3)).tolist() == [[0, 1, -1, 1, 0, -1]]


@settings(max_examples=100, deadline=None)
@given(problems(max_spare=3))
def test_swift_is_never_worse_than_where_it_starts(problem):
    before = swift.initial(problem).reshape(problem.num_layers, problem.num_ranks, -1)
    after = solve(problem, "swift").placement.reshape(before.shape)
    for old, new, load in zip(before, after, problem.load, strict=True):
        assert swift.rank_load(new, load).max() <= swift.rank_load(old, load).max() + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    problems(max_experts=8, max_ranks=4, max_spare=3),
    st.sampled_from(
        ["sglang_vec", "flashlb", "tensorrt_llm", "tensorrt_llm_cooccurrence", "swift"]
    ),
)
def test_balancers_place_soundly_and_repeat_themselves(problem, solver):
    first, second = solve(problem, solver), solve(problem, solver)  # which checks them
    assert first.placement.tobytes() == second.placement.tobytes()


@pytest.mark.parametrize("solver", ["tensorrt_llm", "flashlb", "swift"])
def test_names_of_experts_do_not_matter(solver):
    rng = np.random.default_rng(5)
    tokens = topic_tokens(5, num_layers=1, num_experts=16)
    batch = np.arange(600) // 40
    load = rng.gamma(0.7, size=(1, 16))  # no two alike
    loads = rng.gamma(0.7, size=(15, 16))
    name = rng.permutation(16)
    if solver == "flashlb":
        plain = flashlb.Search(loads, 4, 5).run()
        renamed = flashlb.Search(loads[:, np.argsort(name)], 4, 5).run()
        assert (np.where(plain >= 0, name[plain], -1) == renamed).all()
        return
    if solver == "swift":
        current = np.arange(16)[None]
        plain = swift.Exchange(current.reshape(4, 4), load[0]).run()
        renamed = swift.Exchange(name[current].reshape(4, 4), load[0, np.argsort(name)]).run()
        assert (name[plain] == renamed).all()
        return
    problem = make_problem(tokens, 16, 4, 5, batch=batch)
    plain = solve(Problem(**{**vars(problem), "load": load}), solver)
    renamed = solve(Problem(**{**vars(problem), "load": load[:, np.argsort(name)]}), solver)
    assert (name[plain.placement] == renamed.placement).all()
