"""What one rank decides alone is what the replay says that it decides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.cost.serving import serve_layer

from .cases import random_placement, random_trace
from .reference import tokens_of, walk


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.booleans(),
    model=st.sampled_from(["alltoall", "coherent"]),
    shape=st.sampled_from([(4, 2, 4), (4, 4, 3), (6, 3, 3), (3, 1, 6)]),
)
def test_each_rank_serves_its_own_tokens_as_the_whole_walk_does(seed, weights, model, shape):
    rng = np.random.default_rng(seed)
    num_ranks, ranks_per_node, slots = shape
    trace = random_trace(rng, weights=weights, home_ranks=num_ranks)
    placement = random_placement(
        rng, num_ranks=num_ranks, ranks_per_node=ranks_per_node, slots_per_rank=slots
    )
    batches = rng.integers(0, 3, trace.num_tokens).tolist()
    homes = trace.home.tolist()
    walked = walk(tokens_of(trace), placement, homes, batches, model, "local")
    ranks = placement.ranks_of_experts()
    copies = (ranks >= 0).sum(axis=2).astype(np.int32)
    for batch in range(3):
        for layer in range(placement.num_layers):
            for home in range(num_ranks):
                held = [
                    t
                    for t in range(trace.num_tokens)
                    if batches[t] == batch and walked["home"][t][layer] == home
                ]
                served = serve_layer(
                    trace.experts[held, layer],
                    ranks[layer],
                    copies[layer],
                    home,
                    num_ranks,
                    ranks_per_node,
                )
                found = [[int(rank) for rank in row if rank >= 0] for row in served]
                assert found == [walked["served"][t][layer] for t in held]


def test_a_home_rank_spreads_its_tokens_over_equally_near_copies():
    experts = np.zeros((6, 1), np.int32)  # everyone wants expert 0
    ranks = np.array([[1, 2, 3]], np.int32)
    served = serve_layer(experts, ranks, np.array([3], np.int32), 0, 4, 4)
    assert served[:, 0].tolist() == [1, 2, 3, 1, 2, 3]
    served = serve_layer(experts, ranks, np.array([3], np.int32), 2, 4, 4)
    assert served[:, 0].tolist() == [2] * 6  # a copy at home


@pytest.mark.parametrize(("home", "first"), [(0, 1), (2, 3), (3, 1)])
def test_ties_go_to_the_next_rank_going_round(home, first):
    ranks = np.array([[1, 3]], np.int32) if home != 3 else np.array([[1, 2]], np.int32)
    served = serve_layer(np.zeros((1, 1), np.int32), ranks, np.array([2], np.int32), home, 4, 4)
    assert served.tolist() == [[first]]
