"""The example of docs/cost-model.md: computed again, and every result stands in the text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from placer.cluster import Network, load_cluster
from placer.cost import Transport, measure, replay, step_time
from placer.models import load_shape
from placer.placement import contiguous
from placer.trace.model import Trace

TEXT = (Path(__file__).parents[2] / "docs" / "cost-model.md").read_text(encoding="utf-8")
PLACEMENT = contiguous(1, 32, 4, 8, 2)
CLUSTER = load_cluster("h100-nvl8", num_nodes=2, ranks_per_node=2)


def example() -> Trace:
    experts = [[0, 1, 8, 16], [9, 10, 0, 24], [17, 0, 1, 25], [24, 25, 26, 2]]
    for token, chosen in enumerate(experts):
        assert f"| {token} | {token} | {', '.join(map(str, chosen))} |" in TEXT
    return Trace(
        experts=np.array(experts, np.int16)[:, None],
        num_experts=32,
        layer_ids=np.array([0]),
        request=np.arange(4),
        position=np.zeros(4, np.int64),
        phase=np.ones(4, np.uint8),
    )


def priced(cluster=CLUSTER, **options):
    dims = load_shape("gpt-oss-20b").dims
    return step_time(example(), PLACEMENT, cluster, dims=dims, mixed_batches=False, **options)


def said(value: float, digits: int = 4) -> str:
    """The number as the text has it; fails where it does not."""
    text = f"{value:.{digits}f}"
    assert text in TEXT, text
    return text


def test_the_counts_of_the_example():
    found = measure(replay(example(), PLACEMENT), num_resamples=0).values
    assert (found["span"], found["messages_alltoall"], found["imbalance"]) == (2.75, 1.75, 1.5)
    assert "/ 4 = 2.75, messages = (2 + 2 + 2 + 1) / 4 = 1.75" in TEXT
    assert "imbalance = 6 / 4 = 1.5" in TEXT


def test_the_prices_of_the_example():
    found = priced()
    said(found.dispatch_us[0])
    said(found.compute_us[0])
    said(found.imbalance_us[0])
    assert f"**{said(found.total_us[0])} us**" in TEXT
    assert found.total_us[0] == pytest.approx(2 * (15 + 2 * 5760 / 50e3) + 3 * 13_223_790 / 3350e3)
    shares = found.shares()
    for name in ("latency", "compute", "imbalance", "transfer"):
        assert f"{shares[name]:.1%} {name}".replace("%", " %") in TEXT
    assert found.summary()["bottleneck"]["rank"]["name"] == "0"


def test_node_level_copies_in_the_example():
    found = priced(transport=Transport(deduplicate_nodes=True))
    said(found.dispatch_us[0])
    assert f"**{said(found.total_us[0])} us**" in TEXT


def test_an_oversubscribed_spine_in_the_example():
    leaves = Network(nodes_per_leaf=1, oversubscription=4.0, spine_latency_us=5.0)
    found = priced(replace(CLUSTER, network=leaves))
    said(found.dispatch_us[0])
    assert f"**{said(found.total_us[0])} us**" in TEXT
    assert f"`{found.summary()['bottleneck']['link']['name']}`" in TEXT
