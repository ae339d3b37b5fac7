"""`trace_model` on a small model with a tokenizer, saved to a folder as a real one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from placer.errors import PlacerError, UsageError
from placer.trace import DECODE, PREFILL, Trace, open_trace
from placer.tracer import Prompt, capture, trace_model
from placer.tracer.run import Progress

from .families import Family
from .test_families import CASES, build

WORDS = [f"w{i}" for i in range(97)]
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w3{% endif %}"
)


def save(model: Any, folder: Path, **tokens: str) -> Path:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", **tokens)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Family("Qwen3Moe", "Qwen3MoeForCausalLM").build()
    model.generation_config.eos_token_id = [2, 5, 22, 35, 60, 61, 62, 63]
    model.generation_config.pad_token_id = None
    return save(model, tmp_path_factory.mktemp("model"), eos_token="w96")


PROMPTS = [
    Prompt("w10 w11 w12 w13 w14 w15", "code"),
    Prompt("w20"),
    Prompt(None, "chat", messages=({"role": "user", "content": "w7 w8"},)),
    Prompt("w30 w31 w32 w33"),
    Prompt("w40 w41"),
]


def tokens_of(trace: Trace, request: int) -> list[tuple[int, int, list[Any]]]:
    mine = trace.select(trace.request == request)
    return list(
        zip(mine.position.tolist(), mine.phase.tolist(), mine.experts.tolist(), strict=True)
    )


def test_batches_give_what_prompts_alone_give(folder: Path, tmp_path: Path) -> None:
    together = trace_model(str(folder), PROMPTS, tmp_path / "a", max_new_tokens=12, batch_size=3)
    alone = trace_model(str(folder), PROMPTS, tmp_path / "b", max_new_tokens=12, batch_size=1)
    traces = [open_trace(summary.path).read() for summary in (together, alone)]
    lengths = {}
    for i, prompt in enumerate(PROMPTS):
        found, expected = (tokens_of(trace, i) for trace in traces)
        assert found == expected
        num_prompt = 3 if prompt.messages else len(str(prompt.text).split())
        phases = [phase for _, phase, _ in found]
        lengths[i] = len(phases) - num_prompt
        assert phases == [PREFILL] * num_prompt + [DECODE] * lengths[i]
        assert [position for position, _, _ in found] == list(range(len(found)))
    assert len(set(lengths.values())) > 1  # some ended early
    assert max(lengths.values()) <= 11
    assert traces[0].labels == {0: "code", 2: "chat"}
    assert together.num_tokens == traces[0].num_tokens == alone.num_tokens
    assert together.num_prompts == 5
    assert not together.interrupted
    assert open_trace(together.path).complete


def test_generated_tokens_are_those_of_generate(folder: Path, tmp_path: Path) -> None:
    summary = trace_model(str(folder), PROMPTS[:1], tmp_path / "t", max_new_tokens=12)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with capture(model) as tracer:
        model.generate(
            input_ids=torch.tensor([[10, 11, 12, 13, 14, 15]]), max_new_tokens=12, do_sample=False
        )
    found = open_trace(summary.path).read()
    assert np.array_equal(found.experts, tracer.trace().experts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_family_runs_from_a_folder(case: Any, tmp_path: Path) -> None:
    model = build(case)
    model.generation_config.eos_token_id = None
    folder = save(model, tmp_path / "model")
    summary = trace_model(str(folder), PROMPTS, tmp_path / "trace", max_new_tokens=3, batch_size=4)
    assert summary.layer_ids == case.layers
    assert summary.num_tokens == (6 + 1 + 3 + 4 + 2) + 5 * 2
    assert summary.num_experts == 8


def test_request_ids_seed_and_sampling(folder: Path, tmp_path: Path) -> None:
    prompts = [Prompt("w9 w8", request=40), Prompt("w9", request=7)]
    options: Any = {"max_new_tokens": 8, "temperature": 1.5, "weights": True}
    first = trace_model(str(folder), prompts, tmp_path / "a", seed=1, **options)
    again = trace_model(str(folder), prompts, tmp_path / "b", seed=1, **options)
    other = trace_model(str(folder), prompts, tmp_path / "c", seed=2, **options)
    a, b, c = (open_trace(summary.path).read() for summary in (first, again, other))
    assert a.requests().tolist() == [7, 40]
    assert a.weights is not None
    assert np.array_equal(a.experts, b.experts)
    assert a.experts.shape != c.experts.shape or not np.array_equal(a.experts, c.experts)


def test_progress_and_cutting_prompts(folder: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    summary = trace_model(
        str(folder),
        PROMPTS,
        tmp_path / "t",
        max_new_tokens=2,
        batch_size=2,
        max_prompt_tokens=2,
        progress=seen.append,
    )
    assert 2 * 4 + 1 <= summary.num_tokens <= 2 * 4 + 1 + 5
    assert seen[0].num_prompts_done == 0
    assert seen[-1].num_prompts_done == seen[-1].num_prompts == 5


def test_interrupt_keeps_what_was_traced(folder: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.num_prompts_done:
            raise KeyboardInterrupt

    summary = trace_model(
        str(folder), PROMPTS, tmp_path / "t", max_new_tokens=4, batch_size=2, progress=stop
    )
    assert summary.interrupted
    assert summary.num_prompts == 2
    source = open_trace(summary.path)
    assert not source.complete
    assert source.num_tokens == summary.num_tokens > 0
    assert set(source.read().request.tolist()) == {1, 4}  # the shortest prompts run first


def test_what_is_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    for options, message in [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"temperature": -1.0}, "temperature"),
        ({"dtype": "float8"}, "dtype"),
        ({"device": "nowhere"}, "device"),
    ]:
        with pytest.raises(UsageError, match=message):
            trace_model(str(folder), PROMPTS, tmp_path / "t", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no prompts"):
        trace_model(str(folder), [], tmp_path / "t")
    twice = [Prompt("w4", request=1), Prompt("w5")]
    with pytest.raises(UsageError, match="two prompts have request id 1"):
        trace_model(str(folder), twice, tmp_path / "t")
    with pytest.raises(PlacerError, match="cannot be loaded"):
        trace_model(str(tmp_path / "none"), PROMPTS, tmp_path / "t")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="exists already"):
        trace_model(str(folder), PROMPTS, tmp_path / "t")
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["mine.txt"]
