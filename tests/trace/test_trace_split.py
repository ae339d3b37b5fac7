from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placer.errors import UsageError
from placer.trace import split_requests

ids = st.lists(st.integers(0, 2**62), min_size=2, max_size=60, unique=True)
holdouts = st.floats(0.01, 0.99)


@given(ids, st.integers(-5, 2**70), holdouts)
def test_every_request_is_on_exactly_one_side(
    requests: list[int], seed: int, holdout: float
) -> None:
    split = split_requests(requests, seed=seed, holdout=holdout)
    assert split.fit.size >= 1
    assert split.held_out.size >= 1
    assert sorted([*split.fit.tolist(), *split.held_out.tolist()]) == sorted(requests)
    assert split.fit.tolist() == sorted(split.fit.tolist())
    assert split.held_out.tolist() == sorted(split.held_out.tolist())
    assert abs(split.held_out.size - len(requests) * holdout) <= 1


@given(ids, st.integers(0, 99), st.randoms(), st.booleans())
def test_neither_order_nor_repetition_matters(
    requests: list[int], seed: int, random: np.random.Generator, labelled: bool
) -> None:
    labels = {request: f"{request % 3}" for request in requests} if labelled else None
    again = [*requests, *requests[:3]]
    random.shuffle(again)
    first = split_requests(requests, seed=seed, labels=labels)
    second = split_requests(np.array(again), seed=seed, labels=labels)
    assert first.fit.tolist() == second.fit.tolist()


@given(
    st.lists(st.sampled_from(["a", "b", "c", ""]), min_size=2, max_size=80),
    st.integers(0, 99),
    holdouts,
)
def test_each_label_is_divided_as_the_whole(names: list[str], seed: int, holdout: float) -> None:
    labels = {request: name for request, name in enumerate(names) if name}
    split = split_requests(range(len(names)), seed=seed, holdout=holdout, labels=labels)
    held_out = Counter(names[request] for request in split.held_out.tolist())
    share = split.held_out.size / len(names)
    for name, count in Counter(names).items():
        assert abs(held_out[name] - share * count) < 1


def test_the_seed_decides() -> None:
    outcomes = {tuple(split_requests(range(20), seed=seed).fit) for seed in range(50)}
    assert len(outcomes) > 45


def test_every_request_is_as_likely_to_be_held_out() -> None:
    """The share over many seeds, within four standard deviations of a half."""
    counts = np.zeros(10)
    for seed in range(2000):
        counts[split_requests(range(10), seed=seed).held_out] += 1
    assert np.abs(counts / 2000 - 0.5).max() < 4 * 0.5 / np.sqrt(2000)


def test_single_requests_of_many_labels_are_spread_by_the_seed() -> None:
    """Where no label can be divided, no label is always on the same side."""
    labels = {request: str(request) for request in range(6)}
    sides = [split_requests(range(6), seed=seed, labels=labels).held_out for seed in range(60)]
    assert {side.size for side in sides} == {3}
    assert set(np.concatenate(sides).tolist()) == set(range(6))


def test_the_split_is_the_same_in_every_release() -> None:
    assert split_requests(range(10), seed=0).held_out.tolist() == [0, 3, 4, 5, 9]


@pytest.mark.parametrize("requests", [[], [4], [4, 4, 4]])
def test_fewer_than_two_requests_cannot_be_split(requests: list[int]) -> None:
    with pytest.raises(UsageError, match="two or more") as caught:
        split_requests(requests, seed=0)
    assert "--in-sample" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("holdout", [0, 1, -0.5, 1.5, float("nan")])
def test_the_share_lies_between_0_and_1(holdout: float) -> None:
    with pytest.raises(UsageError, match="holdout is"):
        split_requests(range(9), seed=0, holdout=holdout)
