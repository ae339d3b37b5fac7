"""`vllm_balancedness` is what vLLM's own code makes of the same loads; run by `make test-vllm`."""

from __future__ import annotations

import pytest

from .balance_cases import passes

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("seed", range(3))
def test_placer_prints_the_balancedness_that_vllm_logs(seed):
    import torch
    from vllm.distributed.eplb.eplb_state import _compute_eplb_load_stats

    figures, loads = passes(seed)
    logged = []
    for load in loads:
        average, peak = _compute_eplb_load_stats(torch.from_numpy(load).float())
        logged.append(float(average / peak))
    assert figures["vllm_balancedness"]["value"] == pytest.approx(
        sum(logged) / len(logged), rel=1e-6
    )
