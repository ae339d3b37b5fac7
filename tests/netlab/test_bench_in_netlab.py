"""A bench in the laboratory: what crosses the slow link is what the replay says."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.netlab.network import NetlabError, check_requirements
from placer.placement import contiguous
from placer.plan import Plan, write_plan

from .running import ROOT, bench_in_netlab
from .test_netlab import wire_bytes

pytestmark = [
    pytest.mark.netlab,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
        reason="needs the trace extra",
    ),
]


def test_bytes_between_nodes_are_the_replays_and_pass_the_link(tmp_path):
    try:
        check_requirements()
    except NetlabError as error:
        pytest.skip(str(error))
    plan = tmp_path / "plan.json"
    write_plan(Plan(contiguous(8, 32, 4, 8, 2), tuple(range(8))), plan)
    bench = [
        "bench", plan, "--model", ROOT / "examples" / "model", "--dtype", "float32",
        "--baseline", plan, "--prompt", "def main(argument):", "--prompt", "The quick brown fox",
        "--prompt", "int main(void) {", "--prompt", "Es war einmal", "--repeats", 1,
        "--max-new-tokens", 3, "--json",
    ]  # fmt: skip
    document, told = bench_in_netlab(bench, mbit=50)
    runs = 0
    for arm in document["arms"].values():
        assert arm["exact"] == dict.fromkeys(
            ("messages", "hidden_bytes", "routing_bytes", "kv_bytes", "pairs"), True
        )
        crossing = arm["predicted"]["hidden_bytes"]["other_node"]
        assert arm["measured"]["hidden_bytes"]["other_node"] == crossing > 0
        runs += 2 * crossing  # the warm-up and one repeat
    sent = sum(wire_bytes(told, node, "send")[0] for node in range(2))
    assert sent > runs  # beside them routing, headers, proofs and the start of the group
