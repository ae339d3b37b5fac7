"""Every solver on the canned traces: the values that it always had, and better than contiguous."""

from __future__ import annotations

import json

import pytest

import solvers

from .golden import INSTANCES, SEEDS, VALUES, contiguous_figures, figures_of

NAMES = sorted(path.stem for path in VALUES.glob("*.json"))
LONG = ("exflow", "exflow_bisection", "exflow_top1", "moetuner")  # seconds of integer programs


def marks_of(name: str, seed: int) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if name in LONG or seed != SEEDS[0] else []


CASES = [
    pytest.param(name, instance, seed, marks=marks_of(name, seed))
    for name in NAMES
    for instance in INSTANCES
    for seed in SEEDS
]
MINIMISED = {  # the figure that a method minimises, or that its objective comes to here
    "eplb": "imbalance",
    "eplb_global": "imbalance",
    "exflow": "cross_rank_fraction",
    "exflow_bisection": "cross_rank_fraction",
    "exflow_one_stage": "cross_rank_fraction",
    "exflow_top1": "cross_rank_fraction",
    "flashlb": "imbalance_batch",
    "grace_moe": "coactivation_cut",
    "moetuner": "imbalance",
    "occult": "coactivation_cut",
    "sem_moe": "messages_alltoall",
    "sglang_topology": "messages_alltoall",
    "sglang_vec": "imbalance_batch",
    "swift": "imbalance",
    "tensorrt_llm": "imbalance",
    "tensorrt_llm_cooccurrence": "coactivation_cut",
}


@pytest.mark.parametrize(("name", "instance", "seed"), CASES)
def test_golden_values(name, instance, seed):
    golden = json.loads((VALUES / f"{name}.json").read_text())[instance][str(seed)]
    figures = figures_of(name, instance, seed)
    assert figures == pytest.approx(golden, abs=2e-4), (
        f"{name} has changed; if that was meant: python tests/golden/golden.py {name}"
    )


def test_every_published_method_has_golden_values():
    published = {name for name in solvers.names() if solvers.get(name).source != "placer"}
    assert published - {"exflow_pulp"} <= set(NAMES)  # which is exflow:cbc


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("name", sorted(MINIMISED))
def test_no_method_is_worse_than_contiguous_on_what_it_minimises(name, instance):
    golden = json.loads((VALUES / f"{name}.json").read_text())[instance]
    figure = MINIMISED[name]
    for figures in golden.values():
        assert figures[figure] < contiguous_figures(instance)[figure]
