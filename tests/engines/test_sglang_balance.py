"""`sglang_balancedness` is what SGLang's own code makes of the same loads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm_plans.balance_cases import passes

from .released import released

pytestmark = pytest.mark.engines
torch = pytest.importorskip("torch")


@pytest.mark.parametrize("seed", range(3))
def test_placer_prints_the_balancedness_that_sglang_logs(monkeypatch, seed):
    nothing = SimpleNamespace()
    distribution = released(
        monkeypatch,
        "sglang.srt.eplb.expert_distribution",
        {
            "sglang.srt.environ": {"envs": nothing},
            "sglang.srt.model_executor.forward_batch_info": {
                "ForwardBatch": nothing,
                "ForwardMode": nothing,
            },
            "sglang.srt.observability.metrics_collector": {
                "STAT_LOGGER_ROLE_EXPERT_DISPATCH": "",
                "ExpertDispatchCollector": nothing,
                "resolve_collector_class": nothing,
            },
            "sglang.srt.runtime_context": dict.fromkeys(
                (
                    "get_device",
                    "get_exec",
                    "get_platform",
                    "get_schedule",
                    "logs_expert_balancedness_to_server_log",
                    "reports_expert_balancedness",
                )
            ),
            "sglang.srt.utils": {
                "Withable": list,  # a generic class, only subscripted here
                "get_device": None,
                "get_int_env_var": None,
            },
        },
    )
    figures, loads = passes(seed)
    rates = distribution.compute_utilization_rate(torch.from_numpy(loads))
    logged = [float(rate.mean()) for rate in rates]
    expected = sum(logged) / len(logged)
    assert figures["sglang_balancedness"]["value"] == pytest.approx(expected, rel=1e-6)
    assert figures["sglang_balancedness"]["batches"] == "recorded forward passes"
