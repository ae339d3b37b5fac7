"""Tiny randomly initialised models of every MoE family that the installed transformers has.

`SMALL` shrinks any configuration by the names of its fields; `OVERRIDES` holds what a family wants
otherwise. Only text models are built; for a vision-language family, its text part.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import transformers

NUM_EXPERTS = 8

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "max_seq_len": 128,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,
}

_MLA = {"num_key_value_heads": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    "AXK1": _MLA,
    "AXK2": _MLA,
    "BailingHybrid": _MLA | {"layer_group_size": 2},
    "Dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 16,
            "moe_num_experts": NUM_EXPERTS,
            "moe_top_k": 3,
        },
    },
    "DeepseekV2": _MLA
    | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "n_shared_experts": 1},
    "DeepseekV3": _MLA | {"n_group": 4, "topk_group": 2, "n_shared_experts": 1},
    "DeepseekV32": _MLA,
    "Doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 3},
    "Dots1": {"n_shared_experts": 1},
    "Dots3Note": _MLA,
    "Gemma4": {
        "enable_moe_block": True,
        "top_k_experts": 3,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    },
    "Glm4MoeLite": _MLA,
    "GlmMoeDsa": _MLA,
    "GraniteMoeHybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "shared_intermediate_size": 24,
    },
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts_per_tok": 2},
    "JetMoe": {"kv_channels": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "KimiLinear": _MLA
    | {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "Llama4": {"num_experts_per_tok": 1, "intermediate_size_mlp": 24},
    "LongcatFlash": _MLA | {"zero_expert_num": 2, "expert_ffn_hidden_size": 16, "moe_topk": 3},
    "Mistral4": _MLA,
    "Mixtral": {"num_experts_per_tok": 2},
    "NemotronH": {
        "layer_types": ["mamba", "moe", "attention", "moe"],
        "mamba_head_dim": 8,
        "mamba_num_heads": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "Phimoe": {"num_experts_per_tok": 2},
    "Qwen4Exp": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "Zaya": {"num_experts_per_tok": 1},
}


CAUSAL = [
    "AXK1",
    "AXK2",
    "Afmoe",
    "AriaText",
    "BailingHybrid",
    "Beam",
    "Cohere2Moe",
    "Dbrx",
    "DeepseekV2",
    "DeepseekV3",
    "DeepseekV32",
    "DeepseekV4",
    "Dots1",
    "Dots3Note",
    "Ernie4_5_Moe",
    "ExaoneMoe",
    "FlexOlmo",
    "Flint",
    "Gemma4",
    "Glm4Moe",
    "Glm4MoeLite",
    "GlmMoeDsa",
    "GptOss",
    "GraniteMoe",
    "GraniteMoeHybrid",
    "GraniteMoeSWA",
    "GraniteMoeShared",
    "HYV3",
    "HYV4",
    "HunYuanMoEV1",
    "Inkling",
    "Inkling2",
    "Jamba",
    "KimiLinear",
    "Kolibri1",
    "Laguna",
    "Lfm2Moe",
    "LongcatFlash",
    "Mellum",
    "MiMoV2Flash",
    "MiniMax",
    "MiniMaxM2",
    "MiniMaxM3VL",
    "Mistral4",
    "Mixtral",
    "NemotronH",
    "Olmoe",
    "Phimoe",
    "Qwen2Moe",
    "Qwen3Moe",
    "Qwen3Next",
    "Qwen3_5Moe",
    "Qwen4Exp",
    "SolarOpen",
    "Zaya",
]
SLOW = {  # large even when they are small
    "DeepseekV4", "DeepseekV32", "Dots3Note", "GlmMoeDsa", "HYV4", "Inkling", "Inkling2",
    "LongcatFlash", "MiniMaxM3VL", "NemotronH", "Qwen3Next", "Qwen3_5Moe", "Qwen4Exp", "Zaya",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: its model class, and how to make it small."""

    name: str
    model_class: str

    def values(self, config_class: Any, **overrides: Any) -> dict[str, Any]:
        """The fields of a small configuration."""
        fields = _fields(config_class)
        values = {name: value for name, value in SMALL.items() if name in fields}
        return values | OVERRIDES.get(self.name, {}) | overrides

    def config(self, **overrides: Any) -> Any:
        config_class = getattr(transformers, self.model_class).config_class
        return config_class(**self.values(config_class, **overrides))

    def build(self, seed: int = 0, **overrides: Any) -> Any:
        config = self.config(**overrides)
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(config)
        return model.eval()


def _fields(config_class: type) -> set[str]:
    names = set(inspect.signature(config_class.__init__).parameters)
    if dataclasses.is_dataclass(config_class):
        names |= {field.name for field in dataclasses.fields(config_class)}
    return names
