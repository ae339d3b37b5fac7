"""Layers that route tokens several times: a row per round in a trace, one per layer in a plan."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from placer.errors import BadFileError
from placer.evaluation import evaluate
from placer.placement import Placement, contiguous
from placer.planning import Settings, build_problem
from placer.trace import MemorySource, make_trace, open_trace, read_npz, write_npz
from placer.trace.importing import write_trace
from placer.trace.rounds import one_row_per_layer, round_names

LAYER_IDS = [3, 3, 4, 7, 7, 7]  # 2, 1 and 3 rounds


def chained_trace(num_tokens: int = 60, **fields: object):
    rng = np.random.default_rng(8)
    noise = rng.gumbel(size=(num_tokens, len(LAYER_IDS), 8)) + np.linspace(1, 0, 8)
    experts = np.argsort(-noise, axis=2)[:, :, :3]
    experts[np.arange(3) >= rng.integers(0, 4, size=(num_tokens, len(LAYER_IDS), 1))] = -1
    return make_trace(
        experts=experts,
        num_experts=8,
        layer_ids=LAYER_IDS,
        request=np.arange(num_tokens) // 6,
        weights=rng.random(experts.shape),
        step=np.arange(num_tokens) // 20,
        **fields,
    )


def test_rounds_have_names_of_their_own() -> None:
    assert round_names(LAYER_IDS) == ["3", "3_2", "4", "7", "7_2", "7_3"]


def test_files_keep_rounds(tmp_path: Path) -> None:
    trace = chained_trace()
    write_npz(trace, tmp_path / "chained.npz")
    write_trace(trace, tmp_path / "chained")
    schema = pq.read_schema(next((tmp_path / "chained").glob("*.parquet")))
    assert {"experts_3", "experts_3_2", "experts_7_3", "weights_7_3"} <= set(schema.names)
    for found in (read_npz(tmp_path / "chained.npz"), open_trace(tmp_path / "chained").read()):
        np.testing.assert_array_equal(found.experts, trace.experts)
        np.testing.assert_array_equal(found.layer_ids, LAYER_IDS)
        np.testing.assert_array_equal(found.weights, trace.weights)


def test_layers_may_not_come_back_after_others() -> None:
    with pytest.raises(BadFileError, match="layer_ids has 3 after 4"):
        make_trace(experts=np.zeros((2, 3, 1), int), num_experts=2, layer_ids=[3, 4, 3])


@pytest.mark.parametrize("max_tokens", [1, 7, 1000])
def test_folding_makes_rounds_tokens(max_tokens: int) -> None:
    trace = chained_trace()
    folded = one_row_per_layer(MemorySource(trace))
    chunks = list(folded.chunks(max_tokens))
    experts = np.concatenate([chunk.experts for chunk in chunks])
    assert folded.layer_ids.tolist() == [3, 4, 7]
    assert folded.num_tokens == len(experts) == 180
    rows = {3: [0, 1], 4: [2], 7: [3, 4, 5]}
    for token, (layer, which) in itertools.product(range(60), enumerate((3, 4, 7))):
        for number in range(3):
            row = experts[3 * token + number, layer].tolist()
            own = rows[which]
            expected = (
                [-1] * 3 if number >= len(own) else trace.experts[token, own[number]].tolist()
            )
            assert row == expected
    columns = next(iter(folded.token_columns(["request", "step"])))
    assert columns["request"].tolist() == [t // 6 for t in range(60) for _ in range(3)]
    assert columns["step"].tolist() == [t // 20 * 3 + n for t in range(60) for n in range(3)]
    assert chunks[0].weights is not None


def test_a_trace_without_rounds_is_left_as_it_is() -> None:
    source = MemorySource(make_trace(experts=np.zeros((2, 3, 1), int), num_experts=2))
    assert one_row_per_layer(source) is source


def by_hand(trace, placement: Placement) -> tuple[float, float, float]:
    """Messages of alltoall and coherent per token-round, and cross-rank fraction."""
    slots = placement.slots_per_rank
    layer_of = {layer: i for i, layer in enumerate(sorted(set(LAYER_IDS)))}
    rank_of = [
        {int(e): s // slots for s, e in enumerate(row) if e >= 0}
        for row in placement.physical_to_logical
    ]
    primary = trace.primary()
    alltoall = coherent = crossing = pairs = 0
    for t in range(trace.num_tokens):
        home = away = int(trace.request[t]) % 2
        before: list[int] = []
        for row, layer in enumerate(LAYER_IDS):
            where = rank_of[layer_of[layer]]
            chosen = [where[e] for e in trace.experts[t, row].tolist() if e >= 0]
            alltoall += len(set(chosen) - {home})
            if chosen:
                coherent += len(set(chosen) - {away}) + len(set(chosen)) - 1
                away = where[int(primary[t, row])]
            pairs += len(before) * len(chosen)
            crossing += sum(a != b for a in before for b in chosen)
            before = chosen
    total = trace.num_tokens * len(LAYER_IDS)
    return alltoall / total, coherent / total, crossing / pairs


def test_replay_follows_a_token_through_all_rounds() -> None:
    trace = chained_trace()
    rng = np.random.default_rng(1)
    placement = Placement(np.stack([rng.permutation(8) for _ in range(3)]), 8, 2, 2)
    found = evaluate(placement, {}, MemorySource(trace), scope="unseen", num_resamples=0)
    alltoall, coherent, crossing = by_hand(trace, placement)
    assert found.metrics["messages_alltoall"]["value"] == pytest.approx(alltoall)
    assert found.metrics["messages_coherent"]["value"] == pytest.approx(coherent)
    assert found.metrics["cross_rank_fraction"]["value"] == pytest.approx(crossing)


def test_a_problem_counts_every_round_once() -> None:
    trace = chained_trace()
    problem = build_problem(MemorySource(trace), Settings(num_ranks=2), lambda _: None)
    rows = [[0, 1], [2], [3, 4, 5]]
    for layer, own in enumerate(rows):
        ids = trace.experts[:, own].ravel()
        np.testing.assert_array_equal(problem.load[layer], np.bincount(ids[ids >= 0], minlength=8))
    from solvers import check

    table = contiguous(3, 8, 2, 4, 2)
    parts = check.check(problem, table.physical_to_logical)
    sent, _, _ = by_hand(trace, table)
    # the solver's mean is over tokens x rounds x layers, rounds that a layer lacks included
    assert check.objective(problem, parts) * 180 * 3 == pytest.approx(sent * 60 * 6)
