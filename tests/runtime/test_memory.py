"""A rank holds its share of the weights, and takes hardly more while it loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from placer.placement import Placement, contiguous
from placer.runtime.context import RankContext
from placer.runtime.launch import launch
from placer.runtime.loading import load_share
from placer.runtime.memory import LoadMemory
from placer.runtime.rank import open_source

from .plans import make_placement


def load(context: RankContext, folder: Path, placement: Placement) -> LoadMemory:
    source = open_source(folder)
    device = torch.device("cpu")
    return load_share(source.layout, source.mapping, placement, context.rank, device)[1]


def saved(folder: Path, *, per_expert: bool) -> Path:
    """A random model of 270 MB, nine tenths of it experts."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=1000, hidden_size=512, num_hidden_layers=5, num_experts=32,
        num_experts_per_tok=2, moe_intermediate_size=256, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, intermediate_size=512, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder, save_original_format=per_expert)
    return folder


@pytest.mark.parametrize("per_expert", [True, False])
def test_no_rank_takes_more_than_a_tenth_beyond_its_share(tmp_path, per_expert):
    folder = saved(tmp_path / "model", per_expert=per_expert)
    placement = contiguous(5, 32, 2, 16, 2)
    for memory in launch(load, 2, (folder, placement)):
        assert memory.share_bytes > 120e6
        assert memory.tensor_bytes == memory.share_bytes
        assert memory.peak_rss_bytes is not None
        assert memory.peak_rss_bytes < 1.1 * memory.share_bytes


def test_a_share_follows_the_plan_with_replicas_and_empty_slots(models):
    reference = models.get("DeepseekV3")
    for kind in ("replicas", "unequal"):
        placement = make_placement(kind, 2, 8, 4, 2)
        found = launch(load, 4, (reference.folder, placement))
        filled = (placement.physical_to_logical >= 0).reshape(2, 4, -1).sum(axis=(0, 2))
        layout = reference.layout
        expected = [layout.other_bytes + int(n) * layout.expert_bytes for n in filled]
        assert [memory.tensor_bytes for memory in found] == expected
        assert [memory.share_bytes for memory in found] == expected
