"""`placer trace`, `doctor` and `demo`: what needs a model, or says whether one can be run."""

from __future__ import annotations

import json

import pytest

import solvers
from placer.demo import find_model
from placer.trace import open_trace

from .running import fails, succeeds, usage_error

WORDS = [*"abcdefghijklmno"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Qwen3-MoE of 2 layers x 8 experts, top-2, with a tokenizer of some words."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *WORDS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    """Five prompts of two workloads."""
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": " ".join(WORDS[i : i + 5]), "label": "even" if i % 2 == 0 else "odd"}
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_model_is_traced_and_its_trace_becomes_a_plan(model_folder, prompts, tmp_path):
    output = tmp_path / "trace"
    outcome = succeeds("trace", model_folder, "--prompts", prompts, "-o", output,
                       "--max-new-tokens", 4, "--batch-size", 2, "--json")  # fmt: skip
    document = outcome.document()
    # 5 words a prompt and 4 new tokens, the last of which is never fed
    assert document["tokens"] == 5 * (5 + 3)
    assert (document["prompts"], document["layers"], document["experts"]) == (5, 2, 8)
    assert document["top_k"] == 2
    assert document["interrupted"] is False
    source = open_trace(output)
    assert source.num_tokens == 40
    assert set(source.request_labels().values()) == {"even", "odd"}
    plan = tmp_path / "plan.json"
    succeeds("solve", output, "--gpus", 2, "--max-imbalance", "none", "-o", plan)
    assert json.loads(plan.read_text())["model"]["hidden_size"] == 16


def test_tracing_for_people_is_one_line_and_weights_are_kept(model_folder, prompts, tmp_path):
    output = tmp_path / "trace"
    outcome = succeeds("trace", model_folder, "--prompts", prompts, "-o", output,
                       "--max-new-tokens", 1, "--weights")  # fmt: skip
    assert "25 tokens of 5 prompts, 2 layers x 8 experts, top-2" in outcome.stdout
    assert open_trace(output).has_weights


def test_the_same_seed_traces_the_same(model_folder, prompts, tmp_path):
    prints = []
    for name in ("a", "b"):
        succeeds("trace", model_folder, "--prompts", prompts, "-o", tmp_path / name,
                 "--max-new-tokens", 3)  # fmt: skip
        prints.append(open_trace(tmp_path / name).fingerprint())
    assert prints[0] == prints[1]


def test_an_existing_trace_is_kept_unless_forced(model_folder, prompts, tmp_path):
    output = tmp_path / "trace"
    command = ("trace", model_folder, "--prompts", prompts, "-o", output, "--max-new-tokens", 1)
    succeeds(*command)
    assert "--force" in fails(2, tmp_path, *command)
    succeeds(*command, "--force")


def test_missing_prompts_and_models_are_errors(model_folder, prompts, tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "trace"
    error = fails(5, tmp_path, "trace", model_folder, "--prompts", tmp_path / "none.txt", "-o",
                  output)  # fmt: skip
    assert "none.txt" in error
    (tmp_path / "empty").mkdir()
    error = fails(1, tmp_path, "trace", tmp_path / "empty", "--prompts", prompts, "-o", output)
    assert "empty cannot be loaded" in error
    usage_error(tmp_path, "trace", model_folder, "--prompts", prompts, "-o", output,
                "--max-new-tokens", 0)  # fmt: skip


def test_doctor_names_versions_and_every_solver():
    document = succeeds("doctor", "--json").document()
    assert [entry["name"] for entry in document["solvers"]] == solvers.names()
    assert document["packages"]["numpy"]
    assert document["cores"] >= 1
    outcome = succeeds("doctor")
    for name in (*solvers.names(), "numpy", "ortools"):
        assert name in outcome.stdout
    assert outcome.stderr == ""


@pytest.mark.slow
def test_the_demo_runs_from_model_to_plan(tmp_path):
    pytest.importorskip("torch")
    if find_model() is None:
        pytest.skip("no model is shipped")
    output = tmp_path / "demo"
    outcome = succeeds("demo", "-o", output)
    assert "to see more: placer evaluate" in outcome.stdout
    assert "local_search" in outcome.stdout.splitlines()[-2]
    succeeds("inspect", output / "trace")
    document = succeeds("evaluate", output / "plan.json", output / "trace", "--json").document()
    assert document["scope"] == "held-out"
    assert document["change"]["contiguous"]["messages_alltoall"]["change"] < 0
    assert "--force" in fails(2, tmp_path, "demo", "-o", output)
