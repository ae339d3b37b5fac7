"""Judging a plan beside baselines on the same tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placer.evaluation import evaluate, homes_fit
from placer.placement import Placement, contiguous
from placer.trace import MemorySource


@pytest.fixture
def placements():
    """Contiguous, and the same with experts 0 and 15 of every layer changing places."""
    plain = contiguous(6, 16, 4, 4, 4)
    table = plain.physical_to_logical.copy()
    table[:, [0, 15]] = table[:, [15, 0]]
    return plain, Placement(table, 16, 4, 4)


def test_a_change_is_relative_to_the_baseline(trace, placements):
    plain, swapped = placements
    found = evaluate(swapped, {"contiguous": plain}, MemorySource(trace), scope="unseen")
    ours = found.metrics["span"]["value"]
    theirs = found.baselines["contiguous"]["span"]["value"]
    assert found.changes["contiguous"]["span"]["change"] == pytest.approx(ours / theirs - 1)
    assert (found.requests, found.tokens) == (12, 384)


def test_relabelling_ranks_changes_no_figure_that_knows_no_home(trace, placements):
    plain, _ = placements
    order = np.array([2, 0, 3, 1])
    table = plain.physical_to_logical.reshape(6, 4, 4)[:, order].reshape(6, 16)
    found = [
        evaluate(which, {}, MemorySource(trace), scope="unseen", num_resamples=0).metrics
        for which in (plain, Placement(table, 16, 4, 4))
    ]
    for name in ("span", "cross_rank_fraction", "imbalance", "balancedness"):
        assert found[0][name]["value"] == pytest.approx(found[1][name]["value"], rel=1e-12)


def test_the_order_of_chunks_and_no_baselines_are_no_matter(trace, placements):
    document = evaluate(
        placements[0], {}, MemorySource(trace), scope="held-out", num_resamples=0
    ).to_document()
    assert document["baselines"] == document["change"] == {}
    assert document["format"] == "placer.evaluation"
    assert document["modelled"] is True


def test_recorded_homes_count_only_where_every_rank_exists(trace, placements):
    plain, _ = placements
    homed = replace(trace, home=(trace.request % 3 + 1).astype(np.int64))
    source = MemorySource(homed)
    assert homes_fit(source, 4)
    assert not homes_fit(source, 3)
    assert not homes_fit(MemorySource(trace), 4)
    recorded = evaluate(plain, {}, source, scope="unseen", num_resamples=0)
    assert recorded.home == "recorded"
    two_ranks = contiguous(6, 16, 2, 8, 2)
    fallen_back = evaluate(two_ranks, {}, source, scope="unseen", num_resamples=0)
    assert fallen_back.home == "request"
    assert fallen_back.metrics == (
        evaluate(two_ranks, {}, MemorySource(trace), scope="unseen", num_resamples=0).metrics
    )
    # plan and baseline see the same homes
    assert evaluate(plain, {"two": two_ranks}, source, scope="unseen").home == "request"
