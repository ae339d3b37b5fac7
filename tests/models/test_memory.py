"""What a rank holds, and by how much it does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placer.cluster import RankFigures, load_cluster
from placer.errors import InfeasibleError, UsageError
from placer.models import PRESETS, check_memory, memory_of

DEEPSEEK = PRESETS["deepseek-v3"]


def test_the_memory_of_a_rank_by_hand():
    cluster = load_cluster("h200-nvl8", num_nodes=4)
    found = memory_of(DEEPSEEK, cluster, 9, kv_tokens=1000)
    assert found.experts_bytes == 58 * 9 * 44_050_944
    assert found.replicas_bytes == 58 * (32 * 9 - 256) * 44_050_944 // 32
    assert found.other_bytes == DEEPSEEK.other_bytes
    assert found.kv_bytes == 1000 * 70_272
    assert found.reserved_bytes == 14_100_000_000
    assert found.free_bytes == 141 * 10**9 - found.used_bytes > 0
    assert check_memory(DEEPSEEK, cluster, 9, kv_tokens=1000) == found


def test_a_plan_that_does_not_fit_is_refused_with_by_how_much():
    cluster = load_cluster("h100-nvl8", num_nodes=2)
    # 80 - 8 reserved - 19.08 of other weights = 52.92 GB for experts; 21 slots take 53.65
    assert check_memory(DEEPSEEK, cluster, 20).free_bytes > 0
    with pytest.raises(InfeasibleError) as caught:
        check_memory(DEEPSEEK, cluster, 21)
    assert "53.65 GB (58 layers x 21 slots x 44.05 MB)" in caught.value.message
    assert "19.08 GB of other weights, 8.00 GB reserved" in caught.value.message
    assert "736.18 MB too much" in caught.value.message
    assert "at most 20 slots per rank fit" in caught.value.hint


def test_keys_and_values_count():
    cluster = load_cluster("h100-nvl8", num_nodes=2)
    free = check_memory(DEEPSEEK, cluster, 16).free_bytes
    most = free // DEEPSEEK.kv_bytes_per_token
    check_memory(DEEPSEEK, cluster, 16, kv_tokens=most)
    with pytest.raises(InfeasibleError, match=r"of KV \([\d,]+ tokens\)"):
        check_memory(DEEPSEEK, cluster, 16, kv_tokens=most + 1)


def test_the_smallest_rank_decides():
    cluster = replace(
        load_cluster("h100-nvl8", num_nodes=2),
        rank_figures=(RankFigures(ranks=(3,), memory_bytes=40 * 10**9),),
    )
    with pytest.raises(InfeasibleError, match="rank 3 of h100-nvl8 has"):
        check_memory(DEEPSEEK, cluster, 16)


def test_weights_that_every_rank_holds_can_be_too_many_by_themselves():
    cluster = replace(load_cluster("h100-nvl8"), memory_bytes=20 * 10**9)
    with pytest.raises(InfeasibleError, match=r"take 19.08 GB on every rank.*1\.08 GB too much"):
        check_memory(DEEPSEEK, cluster, 32)


def test_what_is_unknown_is_said():
    cluster = load_cluster("h100-nvl8")
    with pytest.raises(UsageError, match="expert_bytes of x is not known"):
        memory_of(replace(DEEPSEEK, name="x", expert_bytes=None), cluster, 32)
    with pytest.raises(UsageError, match="kv_bytes_per_token of x is not known"):
        memory_of(replace(DEEPSEEK, name="x", kv_bytes_per_token=None), cluster, 32, kv_tokens=1)
    assert memory_of(DEEPSEEK, load_cluster("local-cpu"), 32).free_bytes is None
    with pytest.raises(UsageError, match="reserve 1"):
        memory_of(DEEPSEEK, cluster, 32, reserve=1.0)


def test_where_no_slot_fits_the_rest_is_blamed():
    h100 = load_cluster("h100-nvl8", num_nodes=2)
    with pytest.raises(InfeasibleError, match="too much") as caught:
        check_memory(PRESETS["deepseek-v3"], h100, 16, kv_tokens=10**7)
    assert "KV (10,000,000 tokens)" in caught.value.hint
    assert "slots per rank fit" not in caught.value.hint
