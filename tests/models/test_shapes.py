"""Presets are what published configurations give; a checkpoint has the shape of its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from placer.errors import BadFileError, PlacerError, UsageError
from placer.models import PRESETS, load_shape
from placer.models.storage import FP8_BLOCKS, MXFP4, storage_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "model"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
DEEPSEEK = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 3, "n_group": 8,
    "quantization_config": FP8,
}  # fmt: skip
QWEN = {
    "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS = {
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_experts_per_tok": 4,
    "tie_word_embeddings": False, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
MIXTRAL = {
    "vocab_size": 32000, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
LLAMA = {
    "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192,
    "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40,
    "num_key_value_heads": 8, "head_dim": 128, "num_experts_per_tok": 1,
}  # fmt: skip
GLM = {
    "vocab_size": 151552, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "attention_bias": True, "n_group": 1,
    "tie_word_embeddings": False,
}  # fmt: skip
# name -> model type, published configuration, billions of parameters that its authors publish
PUBLISHED = {
    "deepseek-v3": ("deepseek_v3", DEEPSEEK, 671),
    "kimi-k2": ("deepseek_v3", DEEPSEEK | {
        "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_routed_experts": 384, "n_group": 1, "first_k_dense_replace": 1}, 1026),
    "qwen3-235b-a22b": ("qwen3_moe", QWEN | {
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 94, "num_attention_heads": 64}, 235),
    "qwen3-30b-a3b": ("qwen3_moe", QWEN | {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32}, 30.5),
    "gpt-oss-20b": ("gpt_oss", GPT_OSS | {
        "num_hidden_layers": 24, "num_local_experts": 32}, 20.9),
    "gpt-oss-120b": ("gpt_oss", GPT_OSS | {
        "num_hidden_layers": 36, "num_local_experts": 128}, 116.8),
    "mixtral-8x7b": ("mixtral", MIXTRAL | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32}, 46.7),
    "mixtral-8x22b": ("mixtral", MIXTRAL | {
        "hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56,
        "num_attention_heads": 48}, 140.6),
    "llama-4-scout": ("llama4_text", LLAMA | {
        "num_local_experts": 16, "interleave_moe_layer_step": 1}, 107.8),
    "llama-4-maverick": ("llama4_text", LLAMA | {
        "num_local_experts": 128, "interleave_moe_layer_step": 2}, 400.7),
    "glm-4.5": ("glm4_moe", GLM | {
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 92, "n_routed_experts": 160, "first_k_dense_replace": 3,
        "use_qk_norm": True}, 352.8),
    "glm-4.5-air": ("glm4_moe", GLM | {
        "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 46, "n_routed_experts": 128, "first_k_dense_replace": 1,
        "use_qk_norm": False}, 106.9),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_preset_is_what_its_published_configuration_gives(name):
    transformers = pytest.importorskip("transformers")
    from placer.models.config import shape_of_config

    kind, values, billions = PUBLISHED[name]
    values = dict(values)
    quantization = values.pop("quantization_config", None)
    config = transformers.CONFIG_MAPPING[kind](**values)
    if quantization:
        config.quantization_config = quantization
    found = shape_of_config(config, name, PRESETS[name].source)
    assert found == PRESETS[name]
    assert found.total_params == pytest.approx(billions * 1e9, rel=2e-3)


def test_every_preset_is_published_above_or_the_same_as_another():
    assert set(PRESETS) - set(PUBLISHED) == {"deepseek-r1"}
    assert replace(PRESETS["deepseek-r1"], name="", source="") == replace(
        PRESETS["deepseek-v3"], name="", source=""
    )


def test_keys_and_values_are_counted_by_hand():
    assert PRESETS["mixtral-8x7b"].kv_bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert PRESETS["deepseek-v3"].kv_bytes_per_token == 61 * (512 + 64) * 2  # one latent per layer


def test_a_checkpoint_has_the_shape_of_its_weights():
    pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors")
    shape = load_shape(EXAMPLE)
    stored = 0
    for file in EXAMPLE.glob("*.safetensors"):
        with safetensors.safe_open(str(file), "pt") as tensors:
            names = tensors.keys()
            stored += sum(prod(tensors.get_slice(n).get_shape()) for n in names)
    assert shape.total_params == stored
    assert shape.num_moe_layers == 8
    assert (shape.num_experts, shape.top_k, shape.hidden_size) == (32, 4, 128)
    assert shape.dims.expert_flops_per_token == 2 * shape.expert_params


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "cannot be read"),
        ('{"model_type": "no_such_model"}', "cannot be read"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_a_bad_file(tmp_path, config, message):
    pytest.importorskip("transformers")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadFileError, match=message):
        load_shape(tmp_path)


def test_a_model_without_experts_is_refused(tmp_path):
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    with pytest.raises(PlacerError, match="has no experts"):
        load_shape(tmp_path)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError) as caught:
        load_shape("deepseek-v33")
    assert "did you mean deepseek-v3?" in caught.value.hint


def test_quantised_weights_take_what_their_format_says():
    assert storage_of(None).expert_bytes == 2
    assert storage_of(FP8).expert_bytes == FP8_BLOCKS
    mxfp4 = storage_of({"quant_method": "mxfp4"})
    assert (mxfp4.expert_bytes, mxfp4.linear_bytes) == (MXFP4, 2.0)
    assert MXFP4 == 4.25 / 8
    assert storage_of({"quant_method": "gptq", "bits": 4, "group_size": 128}).expert_bytes < 0.55
    assert storage_of({"quant_method": "something new"}) is None
    assert not storage_of(FP8 | {"modules_to_not_convert": ["model.gate"]}).converts("model.gate.w")
