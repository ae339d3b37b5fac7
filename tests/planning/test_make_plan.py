"""From traces to a plan: the split, the problem, and what the parts say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import topic_trace
from hypothesis import given
from hypothesis import strategies as st

import solvers
from placer.cluster import PRESETS
from placer.errors import InfeasibleError, PlacerError, TimeLimitError, UsageError
from placer.plan import write_plan
from placer.planning import (
    DEFAULT_NODE_WEIGHT,
    Settings,
    build_problem,
    cap_warnings,
    judging_part,
    make_plan,
    prices,
    run_solver,
    sample_tokens,
    slots_needed,
    split_sources,
)
from placer.trace import MemorySource, ModelDims


def source_of(trace):
    return MemorySource(trace)


def silent(_):
    pass


def test_fit_and_judging_requests_are_disjoint_and_all_there_are(trace):
    parts = split_sources([source_of(trace)], Settings(num_ranks=4))
    fit, judge = parts.fit.request_ids(), parts.judge.request_ids()
    assert np.intersect1d(fit, judge).size == 0
    assert np.union1d(fit, judge).tolist() == trace.requests().tolist()
    assert parts.fit.num_tokens + parts.judge.num_tokens == trace.num_tokens


@pytest.mark.parametrize("holdout", [0.2, 0.5, 0.8])
def test_the_share_held_out_is_the_one_asked_for(trace, holdout):
    parts = split_sources([source_of(trace)], Settings(num_ranks=4, holdout=holdout))
    assert parts.judge.request_ids().size == round(12 * holdout)


def test_in_sample_fits_and_judges_on_everything(trace):
    parts = split_sources([source_of(trace)], Settings(num_ranks=4, in_sample=True))
    assert parts.scope == "in-sample"
    assert parts.fit.num_tokens == parts.judge.num_tokens == trace.num_tokens


def test_a_phase_leaves_its_tokens_only(trace):
    parts = split_sources([source_of(trace)], Settings(num_ranks=4, phase="decode"))
    assert set(np.concatenate([c.phase for c in parts.judge.chunks()])) == {1}


def test_every_source_is_split_by_itself(trace):
    other = topic_trace(seed=1)
    parts = split_sources([source_of(trace), source_of(other)], Settings(num_ranks=4))
    assert [len(entry["fit_requests"]) for entry in parts.inputs] == [16, 16]
    assert parts.judge.request_ids().size == 12


def test_no_trace_and_the_same_trace_twice_are_refused(trace):
    with pytest.raises(UsageError, match="no trace"):
        split_sources([], Settings(num_ranks=4))
    with pytest.raises(UsageError, match="same tokens"):
        split_sources([source_of(trace), source_of(trace)], Settings(num_ranks=4))


def test_the_problem_counts_the_fitted_tokens_only(trace):
    settings = Settings(num_ranks=4, num_nodes=2)
    parts = split_sources([source_of(trace)], settings)
    problem = build_problem(parts.fit, settings, silent)
    tokens = parts.fit.read()
    assert problem.tokens is not None
    assert (problem.tokens == tokens.experts).all()
    load = np.stack([np.bincount(tokens.experts[:, i].ravel(), minlength=16) for i in range(6)])
    assert (problem.load == load).all()
    assert problem.home is not None
    assert (problem.home == tokens.request % 4).all()
    assert (problem.ranks_per_node, problem.node_weight) == (2, DEFAULT_NODE_WEIGHT)


def test_recorded_homes_count_where_these_ranks_exist(trace):
    homed = replace(trace, home=(trace.request * 5 % 8).astype(np.int64))
    for num_ranks, expected in ((8, homed.home), (4, trace.request % 4)):
        problem = build_problem(source_of(homed), Settings(num_ranks=num_ranks), silent)
        assert problem.home is not None
        assert (problem.home == expected).all()


@given(most=st.integers(1, 500))
def test_a_sample_has_a_token_of_every_run_and_is_small_enough(most):
    trace = topic_trace(num_requests=4, prefill=5, decode=3, num_layers=1)
    trace = replace(trace, position=np.arange(trace.num_tokens))
    sample = sample_tokens(MemorySource(trace), most)
    assert 1 <= sample.num_tokens <= max(1, most)
    stride = -(-trace.num_tokens // most)
    run = sample.position // stride
    assert (run == np.arange(run.size)).all()
    assert run.size >= trace.num_tokens // stride


@pytest.mark.parametrize(
    ("experts", "ranks", "asked", "slots"),
    [(16, 4, None, 4), (16, 4, 6, 6), (16, 4, 40, 16), (256, 144, 2, 2), (16, 3, 6, 6)],
)
def test_slots_are_those_asked_for_or_just_enough(experts, ranks, asked, slots):
    assert slots_needed(experts, ranks, asked) == slots


def test_too_few_slots_are_infeasible_and_unequal_division_needs_a_word():
    with pytest.raises(InfeasibleError, match="cannot hold 256 experts"):
        slots_needed(256, 144, 1)
    with pytest.raises(UsageError, match="do not divide"):
        slots_needed(256, 144, None)


def test_messages_between_nodes_cost_what_the_cluster_says():
    two_nodes = replace(PRESETS["h100-nvl8"], num_nodes=2)
    settings = Settings(num_ranks=16, num_nodes=2)
    assert prices(settings, two_nodes, ModelDims())[0] == 450 / 50
    shared = replace(two_nodes, inter_node_scope="node")
    assert prices(settings, shared, ModelDims())[0] == 8 * 450 / 50
    assert prices(replace(settings, node_weight=2.5), two_nodes, ModelDims())[0] == 2.5
    assert prices(Settings(num_ranks=16), None, ModelDims())[0] == 0.0


def test_the_price_of_a_message_is_its_bytes_there_and_back():
    dims = ModelDims(hidden_size=1000, expert_flops_per_token=989e6)
    settings = Settings(num_ranks=8, objective="latency")
    _, load_us, message_us = prices(settings, PRESETS["h100-nvl8"], dims)
    assert load_us == pytest.approx(1.0)  # 989 MFLOP at 989 TFLOP/s
    assert message_us == pytest.approx(2 * 1000 * 2 / 450e9 * 1e6)
    coherent = replace(settings, dispatch="coherent")
    assert prices(coherent, PRESETS["h100-nvl8"], dims)[2] == pytest.approx(message_us / 2)


def test_a_plan_says_where_it_came_from(trace):
    plan = make_plan([source_of(trace)], Settings(num_ranks=4, seed=2, max_imbalance=1.5))
    provenance = plan.provenance
    assert provenance["seed"] == provenance["split"]["seed"] == 2
    assert provenance["inputs"][0]["fingerprint"] == source_of(trace).fingerprint()
    assert provenance["settings"]["max_imbalance"] == 1.5
    assert {"placer", "numpy", "numba"} <= set(provenance["versions"])
    assert plan.layer_ids == tuple(range(1, 7))
    assert plan.certificate["scope"] == "fit"


def test_the_certificate_is_about_the_tokens_fitted_to(trace):
    settings = Settings(num_ranks=4, solver="contiguous")
    plan = make_plan([source_of(trace)], settings)
    parts = split_sources([source_of(trace)], settings)
    problem = build_problem(parts.fit, settings, silent)
    assert plan.certificate["value"] == run_solver(problem, settings).objective


def test_a_plan_is_judged_as_it_was_promised(trace):
    source = source_of(trace)
    plan = make_plan([source], Settings(num_ranks=4, solver="contiguous", phase="decode"))
    part, scope = judging_part(source, plan)
    assert scope == "held-out"
    assert part.num_tokens == plan.prediction["tokens"]
    _, scope = judging_part(source_of(topic_trace(seed=5)), plan)
    assert scope == "unseen"
    in_sample = make_plan([source], Settings(num_ranks=4, solver="contiguous", in_sample=True))
    part, scope = judging_part(source, in_sample)
    assert (scope, part.num_tokens) == ("in-sample", trace.num_tokens)


@pytest.fixture
def ending(monkeypatch):
    """Make every solver end in a way of one's choosing."""

    def choose(error=None, **changes):
        real = solvers.solve

        def fake(*arguments, **options):
            if error is not None:
                raise error
            return replace(real(*arguments, **options), **changes)

        monkeypatch.setattr(solvers, "solve", fake)

    return choose


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (solvers.InfeasibleProblem("no"), InfeasibleError),
        (solvers.NoSolutionFound("late"), TimeLimitError),
        (solvers.RequestError("odd"), UsageError),
    ],
)
def test_errors_of_solvers_become_errors_with_exit_codes(trace, ending, error, expected):
    ending(error=error)
    with pytest.raises(expected, match=str(error)):
        make_plan([source_of(trace)], Settings(num_ranks=4, solver="contiguous"))


@pytest.mark.parametrize(
    ("termination", "expected", "exit_code"),
    [
        ("finished", InfeasibleError, 3),
        ("time_limit", TimeLimitError, 4),
        ("interrupted", PlacerError, 1),
    ],
)
def test_a_broken_cap_means_what_ended_the_search(trace, ending, termination, expected, exit_code):
    ending(status="infeasible", termination=termination)
    settings = Settings(num_ranks=4, solver="contiguous", max_imbalance=1.01)
    with pytest.raises(expected, match=r"imbalance at most 1\.01") as caught:
        make_plan([source_of(trace)], settings)
    assert caught.value.exit_code == exit_code


@pytest.mark.parametrize(
    ("termination", "said", "unsaid"),
    [
        ("finished", "--slots-per-rank", "--time-limit"),
        ("time_limit", "within the time limit", "--slots-per-rank"),
        ("interrupted", "before Ctrl-C", "--slots-per-rank"),
    ],
)
def test_a_broken_default_cap_is_blamed_on_what_ended_the_search(
    trace, ending, termination, said, unsaid
):
    ending(termination=termination)
    settings = Settings(num_ranks=4, solver="contiguous", max_imbalance=1.01, cap_is_default=True)
    (warning,) = cap_warnings(make_plan([source_of(trace)], settings), settings)
    assert said in warning
    assert unsaid not in warning


def test_a_default_cap_that_few_moves_cannot_reach_asks_for_more_of_them(trace, tmp_path):
    start = tmp_path / "start.json"
    contiguous = Settings(num_ranks=4, solver="contiguous")
    write_plan(make_plan([source_of(trace)], contiguous), start)
    settings = Settings(
        num_ranks=4, max_imbalance=1.01, cap_is_default=True, start=str(start), max_moves=0
    )
    (warning,) = cap_warnings(make_plan([source_of(trace)], settings), settings)
    assert "0 moves are too few" in warning


def test_every_request_of_a_batch_is_sampled_whatever_the_stride():
    """Decode tokens come in the order of the batch: a fixed stride would meet the same rows."""
    num_requests, num_steps = 64, 128
    trace = topic_trace(num_requests=num_requests, prefill=0, decode=num_steps, labels=False)
    by_step = np.argsort(trace.position, kind="stable")
    interleaved = replace(
        trace,
        **{
            name: getattr(trace, name)[by_step]
            for name in ("experts", "request", "position", "phase")
        },
        step=None,
    )
    for stride in (8, 16, 32):
        most = interleaved.num_tokens // stride
        sample = sample_tokens(MemorySource(interleaved), most)
        assert sample.num_tokens <= most
        assert len(set(sample.request.tolist())) == num_requests
