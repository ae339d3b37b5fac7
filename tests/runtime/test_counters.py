"""What ranks count while they run is what the replay says of the tokens that they ran."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from placer.cost.batching import recorded_passes
from placer.cost.serving import Server, home_ranks
from placer.cost.walking import Setting, count_batches
from placer.runtime.counters import LINKS
from placer.runtime.launch import launch
from placer.runtime.recording import merge
from placer.trace import DECODE, PREFILL, ModelDims, Trace

from .models import HOMES, NEW_TOKENS, PROMPTS, Reference
from .plans import make_placement
from .work import Case, Ran, run_cases

NUM_RANKS, NODE = 4, 2
NUM_TOKENS = sum(map(len, PROMPTS)) + (NEW_TOKENS - 1) * len(PROMPTS)  # in one layer
WAYS = [
    (kind, dispatch, by_node)
    for kind in ("replicas", "unequal")
    for dispatch, by_node in (("alltoall", False), ("alltoall", True), ("coherent", False))
]


def trace_of(reference: Reference, ranks: list[Ran]) -> Trace:
    return merge(
        itertools.chain.from_iterable(ran.fragments for ran in ranks),
        num_experts=reference.layout.num_experts,
        layer_ids=[layer.layer_id for layer in reference.layout.layers],
        homes=HOMES,
        prompt_lengths=[len(prompt) for prompt in PROMPTS],
        model=ModelDims(),
    )


def replayed(case: Case, trace: Trace, dispatch: str) -> tuple[np.ndarray, np.ndarray]:
    """[L, 2, G, G] hidden states by way, sender and receiver; [L, G] pairs."""
    server = Server(case.placement, dispatch, "local")
    home = home_ranks(trace, case.placement.num_ranks)
    setting = Setting(
        trace, home, server, dispatch, case.by_node, NUM_RANKS, True, increments=np.zeros(0)
    )
    counts = list(count_batches(setting, recorded_passes(trace)))
    return (
        sum(c.pairs_of_ranks.sum(axis=0, dtype=np.int64) for c in counts),
        sum(c.pairs.sum(axis=0, dtype=np.int64) for c in counts),
    )


def by_link(sent: np.ndarray, rank: int) -> np.ndarray:
    """[L, 2, 2] states that a rank sent within its node and to others."""
    same = np.arange(NUM_RANKS) // NODE == rank // NODE
    return np.stack([sent[:, :, rank, same].sum(-1), sent[:, :, rank, ~same].sum(-1)], axis=-1)


@pytest.fixture(scope="module")
def runs(models):
    """[(reference, case, what each rank did)] of `WAYS`, and of a model with one expert a token."""
    plain = models.get("Qwen3Moe")
    single = models.get("Mixtral", num_experts_per_tok=1)
    wanted = [(plain, *way) for way in WAYS] + [
        (single, "random", "coherent", False),
        (single, "random", "alltoall", False),
        (plain, "random", "allgather", False),
    ]
    cases = [
        Case(reference.folder, make_placement(kind, len(reference.layout.layers), 8, 4, NODE),
             dispatch, by_node)
        for reference, kind, dispatch, by_node in wanted
    ]  # fmt: skip
    by_rank = launch(run_cases, NUM_RANKS, (cases,), ranks_per_node=NODE, timeout_s=60)
    return [(wanted[i][0], case, [found[i] for found in by_rank]) for i, case in enumerate(cases)]


@pytest.mark.parametrize("number", range(len(WAYS) + 2))
def test_messages_bytes_and_pairs_are_those_of_the_replay(runs, number):
    reference, case, ranks = runs[number]
    trace = trace_of(reference, ranks)
    assert trace.num_tokens == NUM_TOKENS
    sent = np.zeros((trace.num_layers, 2, NUM_RANKS, NUM_RANKS), np.int64)
    pairs = np.zeros((trace.num_layers, NUM_RANKS), np.int64)
    for phase, dispatch in ((PREFILL, "alltoall"), (DECODE, case.dispatch)):
        part = replayed(case, trace.select(trace.phase == phase), dispatch)
        sent += part[0]
        pairs += part[1]
    state_bytes = reference.layout.hidden_size * 4
    assert sent.sum() > 0
    for rank, ran in enumerate(ranks):
        found = ran.messages[:, :, [LINKS.index("same_node"), LINKS.index("other_node")]]
        np.testing.assert_array_equal(found, by_link(sent, rank))
        np.testing.assert_array_equal(ran.hidden_bytes[:, :, 1:], found * state_bytes)
        np.testing.assert_array_equal(ran.pairs, pairs[:, rank])
    assert not ranks[0].hidden_bytes[:, :, LINKS.index("same_rank")].any()


def test_one_expert_per_token_takes_one_exchange_per_layer_when_tokens_move(runs):
    reference, _, ranks = runs[len(WAYS)]
    num_layers, passes = len(reference.layout.layers), NEW_TOKENS
    for ran in ranks:
        # prefill runs at home, there and back; then one exchange per layer and decode pass
        assert ran.counters["collectives"] == {
            "all_to_all": num_layers * (2 + (passes - 1)),
            "all_gather": passes,
        }


def test_tokens_that_stay_take_two_exchanges_per_layer(runs):
    reference, _, ranks = runs[len(WAYS) + 1]
    expected = {
        "all_to_all": 2 * NEW_TOKENS * len(reference.layout.layers),
        "all_gather": NEW_TOKENS,
    }
    assert all(ran.counters["collectives"] == expected for ran in ranks)


def test_an_all_gather_brings_every_token_to_every_node_once(runs):
    reference, _, ranks = runs[len(WAYS) + 2]
    num_tokens = (NUM_TOKENS) * len(reference.layout.layers)
    nodes = NUM_RANKS // NODE
    total = sum(ran.messages for ran in ranks).sum(axis=0)
    for way in range(2):
        across = num_tokens * (nodes - 1)
        assert total[way, LINKS.index("other_node")] == across
    # all but one's own and those that came over the network oneself
    assert total[0, LINKS.index("same_node")] == num_tokens * (NUM_RANKS - 1) - num_tokens


def test_keys_and_values_are_sent_to_every_node_once_and_on_to_every_rank(runs):
    """Coherent dispatch: each token's keys and values reach all other ranks."""
    reference, case, ranks = runs[WAYS.index(("unequal", "coherent", False))]
    assert case.dispatch == "coherent"
    config = reference.layout.model.config
    width = config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * 4
    num_tokens = NUM_TOKENS
    across = sum(ran.counters["kv_bytes"]["other_node"] for ran in ranks)
    within = sum(ran.counters["kv_bytes"]["same_node"] for ran in ranks)
    assert across == token * num_tokens
    assert across + within == token * num_tokens * (NUM_RANKS - 1)
