"""Split over ranks in any way, a model computes what it computes alone."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from placer.errors import PlacerError
from placer.runtime.launch import launch

from .models import FAMILIES, NEW_TOKENS, PROMPTS, Models, Reference
from .plans import KINDS, make_placement
from .work import Case, Ran, run_cases

TOLERANCE = 1e-5
DISPATCHES = (("alltoall", False), ("alltoall", True), ("coherent", False), ("allgather", False))


def case_of(
    reference: Reference, kind: str, dispatch: str, by_node: bool, num_ranks: int, node: int
) -> Case:
    layout = reference.layout
    placement = make_placement(kind, len(layout.layers), layout.num_experts, num_ranks, node)
    return Case(reference.folder, placement, dispatch, by_node)


def check_equal(reference: Reference, case: Case, ranks: list[Ran]) -> None:
    what = f"{reference.folder.name} {case.dispatch} by_node={case.by_node}"
    seen = {}
    for ran in ranks:
        assert ran.tokens == reference.tokens, what
        assert not seen.keys() & ran.logits.keys(), what
        seen |= ran.logits
    assert set(seen) == set(itertools.product(range(len(PROMPTS)), range(NEW_TOKENS))), what
    worst = max(
        float(np.abs(value - reference.logits[key].numpy()).max()) for key, value in seen.items()
    )
    assert worst < TOLERANCE, f"{what}: {worst}"


def run_all(
    models: Models,
    wanted: list[tuple[str, str, str, bool]],
    num_ranks: int,
    node: int,
    **overrides: float,
) -> None:
    references = [models.get(family, **overrides) for family, *_ in wanted]
    cases = [
        case_of(reference, kind, dispatch, by_node, num_ranks, node)
        for reference, (_, kind, dispatch, by_node) in zip(references, wanted, strict=True)
    ]
    by_rank = launch(run_cases, num_ranks, (cases,), ranks_per_node=node, timeout_s=60)
    for i, (reference, case) in enumerate(zip(references, cases, strict=True)):
        check_equal(reference, case, [found[i] for found in by_rank])


def test_every_family_dispatch_and_kind_of_plan_occurs_on_four_ranks(models):
    """A few of all combinations, so that each pair of family and dispatch, and of dispatch and
    kind of plan, is among them; the slow test runs all."""
    wanted = [
        (family, KINDS[(i + 2 * j) % len(KINDS)], dispatch, by_node)
        for i, family in enumerate(FAMILIES)
        for j, (dispatch, by_node) in enumerate(DISPATCHES)
    ]
    run_all(models, wanted, num_ranks=4, node=2)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_one_and_two_ranks(models, num_ranks):
    wanted = [
        ("Qwen3Moe", kind, dispatch, by_node)
        for kind, (dispatch, by_node) in zip(KINDS, itertools.cycle(DISPATCHES), strict=False)
    ]
    run_all(models, wanted, num_ranks, num_ranks)


def test_the_shipped_model_on_four_ranks(models):
    run_all(models, [("shipped", "replicas", *way) for way in DISPATCHES[1:3]], 4, 2)


def test_requests_end_at_a_stop_token_each_at_its_own_time(models):
    reference = models.get("Qwen3Moe")
    stop = reference.tokens[1][1]
    expected = [made[: made.index(stop) + 1] if stop in made else made for made in reference.tokens]
    assert len({len(made) for made in expected}) > 1
    cases = [
        dataclasses.replace(
            case_of(reference, "random", *way, num_ranks=2, node=1), stops=frozenset([stop])
        )
        for way in DISPATCHES
    ]
    for found in launch(run_cases, 2, (cases,), ranks_per_node=1, timeout_s=60):
        for ran in found:
            assert ran.tokens == expected


def test_tokens_do_not_move_where_a_layer_is_built_otherwise(models):
    """Granite multiplies what comes out of a block before it is added."""
    reference = models.get("GraniteMoe", residual_multiplier=0.5)
    run_all(models, [("GraniteMoe", "random", "alltoall", False)], 2, 2, residual_multiplier=0.5)
    case = case_of(reference, "random", "coherent", False, 2, 2)
    with pytest.raises(PlacerError, match="its output is not residual stream") as refused:
        launch(run_cases, 2, ([case],), timeout_s=60)
    assert "--dispatch alltoall" in refused.value.hint


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "node"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("family", [*FAMILIES, "shipped"])
def test_all_combinations(models, family, num_ranks, node):
    wanted = [(family, kind, *way) for kind in KINDS for way in DISPATCHES]
    run_all(models, wanted, num_ranks, node)
