"""A rank holds its share of the weights, and takes hardly more while it loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from placer.placement import Placement, contiguous
from placer.runtime.context import RankContext
from placer.runtime.launch import launch
from placer.runtime.loading import load_share, share_bytes
from placer.runtime.memory import LoadMemory, tensor_bytes
from placer.runtime.rank import open_source

from .models import SHIPPED
from .plans import make_placement


def load(
    context: RankContext, folder: Path, placement: Placement, dtype: str = "auto"
) -> LoadMemory:
    source = open_source(folder, dtype)
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


def load_wastefully(context: RankContext, folder: Path, placement: Placement) -> LoadMemory:
    """All experts of a layer are read before the rank's own are kept."""
    source = open_source(folder)
    read_expert = source.mapping.read_expert

    def read_all(parameter, expert, num_experts, shape):
        everything = [read_expert(parameter, e, num_experts, shape) for e in range(num_experts)]
        return everything[expert]

    source.mapping.read_expert = read_all
    device = torch.device("cpu")
    return load_share(source.layout, source.mapping, placement, context.rank, device)[1]


def load_beside(context: RankContext, folder: Path, placements: list[Placement]) -> list[int]:
    """Bytes of the tensors that several placements take together, one after the other."""
    source, device = open_source(folder), torch.device("cpu")
    held, found, others = [], [], None
    for placement in placements:
        model, _ = load_share(
            source.layout, source.mapping, placement, context.rank, device, others
        )
        others = others or model
        held += [*model.parameters(), *model.buffers()]
        found.append(tensor_bytes(held))
    return found


@pytest.mark.parametrize("per_expert", [True, False])
def test_no_rank_takes_more_than_a_tenth_beyond_its_share(tmp_path, per_expert):
    folder = saved(tmp_path / "model", per_expert=per_expert)
    placement = contiguous(5, 32, 2, 16, 2)
    for memory in launch(load, 2, (folder, placement)):
        assert memory.share_bytes > 120e6
        assert memory.tensor_bytes == memory.share_bytes
        assert memory.peak_rss_bytes is not None
        assert memory.peak_rss_bytes < 1.1 * memory.share_bytes


def test_a_rank_that_reads_what_is_not_its_own_is_found_out(tmp_path):
    folder = saved(tmp_path / "model", per_expert=True)
    placement = contiguous(5, 32, 32, 1, 32)
    shared = launch(load, 1, (folder, placement))[0]
    wasteful = launch(load_wastefully, 1, (folder, placement))[0]
    assert shared.peak_rss_bytes < 1.1 * shared.share_bytes
    assert wasteful.tensor_bytes == shared.tensor_bytes
    assert wasteful.peak_rss_bytes > 1.5 * wasteful.share_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_little_is_taken_beyond_a_share_of_a_few_megabytes(dtype):
    """What does not grow with the model: memory that the allocator keeps, pages of code."""
    for memory in launch(load, 4, (SHIPPED, contiguous(8, 32, 4, 8, 4), dtype)):
        assert memory.share_bytes < 8e6
        assert memory.tensor_bytes == memory.share_bytes
        assert memory.peak_rss_bytes < 1.1 * memory.share_bytes + 1e6


def test_placements_side_by_side_share_what_is_not_an_expert(models):
    reference = models.get("DeepseekV3")
    layout = reference.layout
    placements = [make_placement(kind, 2, 8, 2, 2) for kind in ("random", "replicas")]
    found = launch(load_beside, 2, (reference.folder, placements))
    for rank, (first, both) in enumerate(found):
        assert first == share_bytes(layout, placements[0], rank)
        more = share_bytes(layout, placements[1], rank) - layout.other_bytes
        assert both == first + more


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
