"""Folds, batches and workloads, counted one token at a time."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from conftest import topic_trace

from placer.errors import UsageError
from placer.planning import Settings, build_problem, make_plan, split_sources
from placer.planning.posing import pinned
from placer.planning.scenarios import batch_scenarios, request_scenarios, workloads_of
from placer.trace import MemorySource

NOTHING = lambda _: None  # noqa: E731


@pytest.fixture(scope="module")
def source():
    return MemorySource(topic_trace(num_requests=64, prefill=4, decode=4))


def load_of(source, scenario_of_token, count):
    """[C, L, E] by a loop over tokens."""
    trace = source.read()
    load = np.zeros((count, trace.num_layers, source.num_experts))
    for t in range(trace.num_tokens):
        for layer in range(trace.num_layers):
            for expert in trace.experts[t, layer]:
                if expert >= 0 and scenario_of_token[t] >= 0:
                    load[scenario_of_token[t], layer, expert] += 1
    return load


def test_folds_are_of_equally_many_whole_requests(source):
    found = request_scenarios(source, Settings(num_ranks=4))
    assert len(found.load) == 24  # parts, dealt out to three folds
    assert set(Counter(found.of_request.tolist()).values()) == {2, 3}
    assert sorted(Counter((found.of_request % 3).tolist()).values()) == [21, 21, 22]
    of_token = found.of(source.read().request)
    assert (found.load == load_of(source, of_token, 24)).all()


def test_few_requests_make_one_scenario():
    few = MemorySource(topic_trace(num_requests=12))
    assert request_scenarios(few, Settings(num_ranks=4)) is None


def test_a_seed_makes_other_folds_and_the_same_ones_again(source):
    first, again, other = (
        request_scenarios(source, Settings(num_ranks=4, seed=seed)).of_request for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_labels_are_workloads_and_folds_are_within_them(source):
    found = request_scenarios(source, Settings(num_ranks=4, robust="worst"))
    assert found.names == ("code", "maths", "prose")
    labels = source.request_labels()
    in_workload = defaultdict(set)
    for request, scenario in zip(found.requests.tolist(), found.of_request, strict=True):
        in_workload[found.workload[scenario]].add(labels[request])
    assert [in_workload[w] for w in range(3)] == [{"code"}, {"maths"}, {"prose"}]
    assert Counter(found.workload.tolist()) == {0: 2, 1: 2, 2: 2}  # 21 requests: 2 folds


def test_a_plan_for_several_workloads_is_balanced_over_the_folds_of_each(source):
    problem = build_problem(source, Settings(num_ranks=4, robust="worst"), NOTHING)
    assert problem.folds
    assert problem.num_workloads == 3
    settings = Settings(num_ranks=4, robust="worst", in_sample=True, max_imbalance=1.5)
    parts = make_plan([source], settings).certificate["parts"]
    assert parts["imbalance_scenarios"] <= 1.5 + 1e-9


def test_several_traces_are_workloads():
    parts = [MemorySource(topic_trace(seed=seed, num_requests=20)) for seed in (1, 2)]
    whole = split_sources(parts, Settings(num_ranks=4)).fit
    names, workload = workloads_of(whole)
    assert len(names) == 2
    assert np.bincount(workload).tolist() == [10, 10]
    assert (np.diff(workload) >= 0).all()


def test_one_workload_is_not_several():
    single = MemorySource(topic_trace(num_requests=20, labels=False))
    with pytest.raises(UsageError, match="one workload only"):
        request_scenarios(single, Settings(num_ranks=4, robust="mean"))


def test_batches_are_whole_forward_passes(source):
    found = batch_scenarios(source, Settings(num_ranks=4, profile_tokens=200))
    trace = source.read()
    by_step = defaultdict(list)
    for t in range(trace.num_tokens):
        by_step[int(trace.step[t])].append(t)
    sizes = {len(tokens) for tokens in by_step.values()}
    count = Counter(found.of_sample.tolist())
    assert set(count) == set(range(len(found.load)))
    assert set(count.values()) <= sizes
    for scenario in count:
        step = set(found.sample.step[found.of_sample == scenario].tolist())
        assert len(step) == 1
        assert count[scenario] == len(by_step[step.pop()])
    sample = MemorySource(found.sample)
    assert (found.load == load_of(sample, found.of_sample, len(found.load))).all()


@pytest.mark.parametrize("over", ["requests", "batches", "workloads", "trace"])
def test_the_problem_carries_its_scenarios(source, over):
    settings = Settings(num_ranks=4, balance_over=over, max_imbalance=1.3)
    problem = build_problem(source, settings, NOTHING)
    assert (np.diff(problem.batch) >= 0).all()
    if over == "trace":
        assert problem.scenario_load is None
        return
    assert problem.scenario.shape == (len(problem.tokens),)
    per_token = problem.scenario_load.sum(axis=(1, 2))
    assert (np.bincount(problem.scenario) * 6 * 4 <= per_token).all()


def test_balancing_over_batches_makes_their_imbalance_less():
    source = MemorySource(topic_trace(seed=3, num_requests=128, prefill=4, decode=8))
    plans = [
        make_plan([source], Settings(num_ranks=4, balance_over=over, max_imbalance=cap))
        for over, cap in (("trace", 1.1), ("batches", 1.35))
    ]
    of_trace, of_batches = (
        plan.prediction["metrics"]["imbalance_batches_mean"]["value"] for plan in plans
    )
    assert of_batches < of_trace


def test_a_robust_plan_says_how_each_workload_fares(source):
    plan = make_plan([source], Settings(num_ranks=4, robust="worst", max_imbalance=1.5))
    rows = plan.prediction["workloads"]
    assert set(rows) == {"code", "maths", "prose"}
    assert sum(row["tokens"] for row in rows.values()) == plan.prediction["tokens"]
    whole = plan.prediction["metrics"]["messages_alltoall"]["value"]
    values = [row["metrics"]["messages_alltoall"]["value"] for row in rows.values()]
    assert min(values) <= whole <= max(values)


def test_robust_and_batches_exclude_each_other(source):
    settings = Settings(num_ranks=4, robust="mean", balance_over="batches")
    with pytest.raises(UsageError, match="not both"):
        build_problem(source, settings, NOTHING)


def test_pins_are_read_by_real_layer_numbers():
    table = pinned(["3@1", "12: 5@0"], [11, 12], 8, 4)
    expected = np.full((2, 8), -1)
    expected[:, 3] = 1
    expected[1, 5] = 0
    assert (table == expected).all()
    assert pinned([], [11, 12], 8, 4) is None
    for wrong in ("3", "x@1", "8@0", "9:3@0", "3@-1"):
        with pytest.raises(UsageError, match="pin"):
            pinned([wrong], [11, 12], 8, 4)


def test_pins_to_ranks_that_do_not_exist_are_refused(source):
    with pytest.raises(UsageError, match=r"'3@4' names a rank beyond 0\.\.3"):
        build_problem(source, Settings(num_ranks=4, pins=("3@4",)), NOTHING)


@pytest.mark.parametrize("second", ["3@2", "12:3@0"])
def test_two_ranks_for_one_expert_are_refused_and_a_repeated_pin_is_not(second):
    with pytest.raises(UsageError, match="two ranks for expert 3"):
        pinned(["3@1", second], [11, 12], 8, 4)
    table = pinned(["3@1", "12:3@1"], [11, 12], 8, 4)
    assert (table[:, 3] == 1).all()
