"""Which tokens are counted, as what, and that tracing leaves nothing behind."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from placer.errors import PlacerError, UsageError
from placer.trace import DECODE, PREFILL, Trace, open_trace
from placer.tracer import capture
from placer.tracer.sequences import Sequences

from .families import Family
from .observe import Steps, num_hooks


@pytest.fixture(scope="module")
def model() -> Any:
    return Family("Qwen3Moe", "Qwen3MoeForCausalLM").build()


def prompt(lengths: list[int], width: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 90, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}


def by_request(trace: Trace) -> dict[int, list[tuple[int, int]]]:
    """Request -> (position, phase) of its tokens, in their order."""
    found: dict[int, list[tuple[int, int]]] = {}
    rows = zip(trace.request.tolist(), trace.position.tolist(), trace.phase.tolist(), strict=True)
    for request, position, phase in rows:
        found.setdefault(request, []).append((position, phase))
    return found


def sequence(num_prompt: int, num_decoded: int) -> list[tuple[int, int]]:
    prefill = [(i, PREFILL) for i in range(num_prompt)]
    return prefill + [(num_prompt + i, DECODE) for i in range(num_decoded)]


def run_and_raise(model: Any, lengths: list[int], error: BaseException) -> None:
    with torch.no_grad():
        model(**prompt(lengths, max(lengths)))
    raise error


def test_generate_counts_prompt_and_fed_tokens(model: Any) -> None:
    inputs = prompt([2, 5], 5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**inputs, **options)
    with capture(model) as tracer:
        traced = model.generate(**inputs, **options)
        model.generate(**prompt([3], 3), **options)
    assert torch.equal(plain, traced)
    assert num_hooks(model) == 0
    # the last generated token is never fed
    assert by_request(tracer.trace()) == {0: sequence(2, 3), 1: sequence(5, 3), 2: sequence(3, 3)}
    assert tracer.trace().step is not None
    assert sorted(set(tracer.trace().step.tolist())) == list(range(8))


def test_rows_that_are_over_are_not_counted(model: Any) -> None:
    lengths = [3, 6, 4, 2]
    inputs = prompt(lengths, 6, seed=5)
    free = model.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=None)
    # end where two rows happen to be at different times
    ends = [int(free[0, 6 + 2]), int(free[2, 6 + 5])]
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}
    with capture(model, weights=True) as tracer:
        model.generate(**inputs, **options)
    batched = tracer.trace()
    counts = set()
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1, 6 - length :] for name, value in inputs.items()}
        with capture(model, weights=True) as tracer:
            model.generate(**alone, **options)
        trace = tracer.trace()
        mine = batched.request == row
        assert batched.position[mine].tolist() == trace.position.tolist()
        assert batched.phase[mine].tolist() == trace.phase.tolist()
        assert np.array_equal(batched.experts[mine], trace.experts)
        counts.add(int((trace.phase == DECODE).sum()))
    assert len(counts) > 1  # rows did end at different times


def test_a_generated_padding_token_is_a_token(model: Any) -> None:
    inputs = prompt([3, 3], 3, seed=5)
    free = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    padding = int(free[0, 4])
    with capture(model) as tracer:
        model.generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=96 if not (free == 96).any() else 95,
            pad_token_id=padding,
        )
    assert by_request(tracer.trace()) == {0: sequence(3, 7), 1: sequence(3, 7)}


def test_generation_config_object_and_model_defaults_are_read(model: Any) -> None:
    inputs = prompt([3, 3], 3, seed=5)
    free = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    config = copy.deepcopy(model.generation_config)
    config.update(eos_token_id=int(free[0, 5]), pad_token_id=0, max_new_tokens=8, do_sample=False)
    with capture(model) as tracer:
        model.generate(**inputs, generation_config=config)
    assert len(by_request(tracer.trace())[0]) < 3 + 7


def test_chunked_prefill_is_prefill_to_its_last_token(model: Any) -> None:
    inputs = prompt([5, 7], 7)
    with capture(model) as tracer:
        model.generate(
            **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, prefill_chunk_size=3
        )
    assert by_request(tracer.trace()) == {0: sequence(5, 2), 1: sequence(7, 2)}


def test_generate_without_a_cache_counts_each_token_once(model: Any) -> None:
    inputs = prompt([2, 4], 4)
    with capture(model) as tracer:
        model.generate(
            **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, use_cache=False
        )
    assert by_request(tracer.trace()) == {0: sequence(2, 2), 1: sequence(4, 2)}


def test_drafted_tokens_are_decode(model: Any) -> None:
    torch.manual_seed(0)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])}
    with capture(model) as tracer:
        model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
            prompt_lookup_num_tokens=3,
        )
    trace = tracer.trace()
    assert set(trace.request.tolist()) == {0}
    assert (trace.position[trace.phase == PREFILL] == np.arange(8)).all()
    assert (trace.position[trace.phase == DECODE] >= 8).all()


def test_beams_belong_to_their_prompt(model: Any) -> None:
    inputs = prompt([4, 4], 4)
    with capture(model) as tracer:
        model.generate(**inputs, max_new_tokens=3, num_beams=3, do_sample=False, eos_token_id=None)
    trace = tracer.trace()
    prefill = trace.select(trace.phase == PREFILL)
    assert sorted(prefill.request.tolist()) == [0] * 12 + [1] * 12


def test_samples_of_a_prompt_are_requests(model: Any) -> None:
    inputs = prompt([3], 3)
    options = {"max_new_tokens": 2, "do_sample": True, "eos_token_id": None}
    with capture(model) as tracer:
        model.generate(**inputs, num_return_sequences=3, **options)
        tracer.requests([9], labels=["code"])
        model.generate(**inputs, num_return_sequences=2, **options)
    trace = tracer.trace()
    assert trace.requests().tolist() == [0, 1, 2, 9]
    assert trace.labels == {9: "code"}


def test_static_cache(model: Any) -> None:
    inputs = prompt([2, 5], 5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with capture(model, weights=True) as tracer:
        model.generate(**inputs, **options)
    dynamic = tracer.trace()
    with capture(model, weights=True) as tracer:
        model.generate(**inputs, **options, cache_implementation="static", disable_compile=True)
    static = tracer.trace()
    assert by_request(static) == by_request(dynamic)
    assert np.array_equal(static.experts, dynamic.experts)


def test_own_loop_with_a_static_cache_and_a_long_mask(model: Any) -> None:
    inputs = prompt([2, 4], 4)
    cache = StaticCache(config=model.config, max_cache_len=16)
    mask = torch.zeros(2, 16, dtype=torch.long)
    mask[:, :4] = inputs["attention_mask"]
    with capture(model) as tracer, torch.no_grad():
        model(input_ids=inputs["input_ids"], attention_mask=mask[:, :4], past_key_values=cache)
        for column in range(4, 7):
            mask[:, column] = 1
            step = torch.full((2, 1), 9)
            model(input_ids=step, attention_mask=mask[:, : column + 1], past_key_values=cache)
    assert by_request(tracer.trace()) == {0: sequence(2, 3), 1: sequence(4, 3)}


def test_a_prompt_of_one_token_is_prefill(model: Any) -> None:
    with capture(model) as tracer, torch.no_grad():
        model(input_ids=torch.tensor([[5], [6]]))
        model.generate(torch.tensor([[7]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert by_request(tracer.trace()) == {0: sequence(1, 0), 1: sequence(1, 0), 2: sequence(1, 2)}


def test_rows_that_other_criteria_end_are_over(model: Any) -> None:
    def stop(tokens: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        is_third = tokens.shape[1] >= 3 + 3
        return torch.tensor([is_third, False])

    inputs = prompt([3, 3], 3, seed=5)
    free = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    padding, end = (i for i in range(1, 97) if not (free == i).any() and i < 90), 95
    with capture(model) as tracer:
        model.generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=next(padding),
            stopping_criteria=[stop],
        )
    # the token that ended the row is fed once
    assert by_request(tracer.trace()) == {0: sequence(3, 3), 1: sequence(3, 7)}


def test_next_turn_of_a_chat_goes_on_with_the_request(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    options = {"do_sample": False, "eos_token_id": None, "past_key_values": cache}
    with capture(model) as tracer:
        first = prompt([4], 4)["input_ids"]
        answer = model.generate(input_ids=first, max_new_tokens=3, **options)
        more = torch.cat([answer, torch.tensor([[11, 12]])], dim=1)
        model.generate(input_ids=more, max_new_tokens=2, **options)
    # the third generated token is fed together with the next turn
    expected = [*sequence(4, 2), (6, PREFILL), (7, PREFILL), (8, PREFILL), (9, DECODE)]
    assert by_request(tracer.trace()) == {0: expected}


def test_rows_that_were_over_go_on_in_the_next_turn(model: Any) -> None:
    inputs = prompt([3, 3], 3, seed=5)
    free = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    options = {"do_sample": False, "past_key_values": DynamicCache(config=model.config)}
    with capture(model) as tracer:
        answer = model.generate(
            **inputs, max_new_tokens=6, eos_token_id=int(free[0, 4]), pad_token_id=0, **options
        )
        more = torch.cat([answer, torch.tensor([[11], [12]])], dim=1)
        mask = torch.ones_like(more)
        mask[0, 5:-1] = 0  # what was padded after the end
        model.generate(
            input_ids=more,
            attention_mask=mask,
            max_new_tokens=3,
            eos_token_id=None,
            **options,
        )
    trace = tracer.trace()
    last_decode = trace.select((trace.phase == DECODE) & (trace.step == trace.step.max()))
    assert last_decode.request.tolist() == [0, 1]


def test_two_batches_in_turn_are_told_apart_by_their_caches(model: Any) -> None:
    with capture(model) as tracer, torch.no_grad():
        a = model(**prompt([2, 3], 3), use_cache=True).past_key_values
        b = model(**prompt([4], 4), use_cache=True).past_key_values
        mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
        step = torch.tensor([[5], [6]])
        model(input_ids=step, attention_mask=mask, past_key_values=a)
        model(input_ids=step[:1], past_key_values=b)
    assert by_request(tracer.trace()) == {
        0: sequence(2, 1),
        1: sequence(3, 1),
        2: sequence(4, 1),
    }


def test_prefix_that_was_not_traced_shifts_positions(model: Any) -> None:
    inputs = prompt([2, 3], 3)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], dim=1)
    with capture(model) as tracer, torch.no_grad():
        tokens = torch.tensor([[5, 6], [7, 8]])
        model(input_ids=tokens, attention_mask=mask, past_key_values=cache)
    assert by_request(tracer.trace()) == {
        0: [(2, PREFILL), (3, PREFILL)],
        1: [(3, PREFILL), (4, PREFILL)],
    }


def test_own_loop_may_say_what_tokens_are(model: Any) -> None:
    with capture(model) as tracer, torch.no_grad():
        tracer.requests([7, 3], labels=["a", None])
        cache = model(**prompt([2, 2], 2), use_cache=True).past_key_values
        tracer.batch(valid=[True, False])
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0]))
        tracer.batch(requests=[7], positions=[3])
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        tracer.batch(phase="decode", requests=[[4, 4, 5]], positions=[[8, 9, 0]])
        model(input_ids=torch.tensor([[5, 6, 7]]))
    trace = tracer.trace()
    assert by_request(trace) == {
        7: sequence(2, 2),
        3: sequence(2, 0),
        4: [(8, DECODE), (9, DECODE)],
        5: [(0, DECODE)],
    }
    assert trace.labels == {7: "a"}


def test_rows_that_were_dropped_silently_are_refused(model: Any) -> None:
    with capture(model) as tracer, torch.no_grad():
        cache = model(**prompt([2, 2], 2), use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(UsageError, match="1 rows of the 2"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    assert by_request(tracer.trace()) == {0: sequence(2, 0), 1: sequence(2, 0)}


def test_positional_arguments_and_embeddings(model: Any) -> None:
    inputs = prompt([2, 3], 3)
    with capture(model) as tracer, torch.no_grad():
        model(inputs["input_ids"], inputs["attention_mask"])
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
        model.model(**inputs)  # the inner model, without its head
    expected = {0: sequence(2, 0), 1: sequence(3, 0)}
    expected |= {2 + i: tokens for i, tokens in expected.items()}
    expected |= {4 + i: expected[i] for i in range(2)}
    assert by_request(tracer.trace()) == expected


def test_square_masks(model: Any) -> None:
    inputs = prompt([2, 3], 3)
    padding = inputs["attention_mask"].bool()
    square = torch.tril(torch.ones(3, 3, dtype=torch.bool)) & padding[:, None, :]
    floating = torch.zeros(2, 1, 3, 3).masked_fill(~square[:, None], torch.finfo().min)
    for mask in (square[:, None], floating):
        with capture(model) as tracer, torch.no_grad():
            model(input_ids=inputs["input_ids"], attention_mask=mask)
        assert by_request(tracer.trace()) == {0: sequence(2, 0), 1: sequence(3, 0)}


def test_packed_rows_are_refused_unless_told(model: Any) -> None:
    tokens = torch.tensor([[5, 6, 7]])
    packed = {"cu_seq_lens_q": torch.tensor([0, 2, 3], dtype=torch.int32)}
    with capture(model) as tracer, torch.no_grad():
        with pytest.raises(UsageError, match="packed"):
            model(input_ids=tokens, **packed)
        tracer.batch(requests=[[0, 0, 1]], positions=[[0, 1, 0]])
        model(input_ids=tokens, **packed)
    assert by_request(tracer.trace()) == {0: sequence(2, 0), 1: sequence(1, 0)}


def test_a_pass_that_fails_is_not_counted(model: Any) -> None:
    def fail(module: Any, args: Any) -> None:
        raise ValueError("broken")

    with capture(model) as tracer, torch.no_grad():
        model(**prompt([2], 2))
        handle = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="broken"):
            model(**prompt([3], 3))
        handle.remove()
        model.model(**prompt([4], 4))
    assert list(by_request(tracer.trace()).values()) == [sequence(2, 0), sequence(4, 0)]


def test_interrupt_inside_a_pass_that_the_user_catches(model: Any) -> None:
    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    with capture(model) as tracer, torch.no_grad():
        for layer in (0, 2):
            handle = model.model.layers[layer].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(**prompt([3], 3))
            handle.remove()
            model(**prompt([4], 4))
    assert list(by_request(tracer.trace()).values()) == [sequence(4, 0)] * 2


def test_an_error_removes_all_hooks_and_keeps_what_was_traced(model: Any) -> None:
    tracer = capture(model)
    with pytest.raises(RuntimeError, match="mine"), tracer:
        run_and_raise(model, [2], RuntimeError("mine"))
    assert num_hooks(model) == 0
    assert by_request(tracer.trace()) == {0: sequence(2, 0)}
    with capture(model), torch.no_grad():  # and it may be captured again
        model(**prompt([2], 2))


def test_error_before_the_first_pass_removes_all_hooks(model: Any) -> None:
    with pytest.raises(RuntimeError), capture(model):
        raise RuntimeError
    assert num_hooks(model) == 0


def test_capturing_twice_is_refused(model: Any) -> None:
    with capture(model) as tracer, torch.no_grad():
        for inside in (model, model.model):
            with pytest.raises(UsageError, match="captured already"), capture(inside):
                pass
        model(**prompt([2], 2))
        with pytest.raises(UsageError, match="captured already"), capture(model):
            pass
    assert tracer.trace().num_tokens == 2
    with pytest.raises(UsageError, match="once"), tracer:
        pass


def test_nothing_traced_is_an_error_only_when_asked_for(model: Any) -> None:
    with capture(model) as tracer:
        pass
    with pytest.raises(PlacerError, match="nothing was traced"):
        tracer.trace()


def test_stream_to_a_folder(model: Any, tmp_path: Path) -> None:
    inputs = prompt([2, 5], 5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with capture(model, weights=True) as tracer:
        model.generate(**inputs, **options)
    expected = tracer.trace()
    with capture(model, tmp_path / "trace", weights=True) as tracer:
        tracer.requests([0, 1], labels=["x", "y"])
        model.generate(**inputs, **options)
        with pytest.raises(UsageError, match="streamed"):
            tracer.trace()
    source = open_trace(tmp_path / "trace")
    assert source.complete
    found = source.read()
    for name in ("experts", "weights", "request", "position", "phase", "step", "layer_ids"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert found.labels == {0: "x", 1: "y"}
    assert found.model == expected.model
    with pytest.raises(UsageError, match="exists already"):
        capture(model, tmp_path / "trace")


def test_interrupt_keeps_the_stream_but_does_not_call_it_whole(model: Any, tmp_path: Path) -> None:
    tracer = capture(model, tmp_path / "trace")
    with pytest.raises(KeyboardInterrupt), tracer:
        run_and_raise(model, [2, 5], KeyboardInterrupt())
    source = open_trace(tmp_path / "trace")
    assert source.num_tokens == 7
    assert not source.complete


def test_models_without_experts_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    dense = LlamaForCausalLM(config)
    with pytest.raises(PlacerError, match="experts") as caught, capture(dense), torch.no_grad():
        dense(input_ids=torch.tensor([[1, 2]]))
    assert "experts=" in caught.value.hint
    assert num_hooks(dense) == 0
    with pytest.raises(PlacerError, match="no mixture-of-experts"):
        capture(torch.nn.Linear(2, 2))


def test_compiled_models_are_refused(model: Any) -> None:
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(UsageError, match="compiled"):
        capture(compiled)


def test_gate_weights_are_kept_only_on_request(model: Any) -> None:
    with capture(model) as tracer, torch.no_grad():
        model(**prompt([2], 2))
    assert tracer.trace().weights is None
    with capture(model, weights=True) as tracer, torch.no_grad():
        model(**prompt([2], 2))
    weights = tracer.trace().weights
    assert weights is not None
    assert (np.diff(weights, axis=2) <= 0).all()
    assert (weights > 0).all()


def test_the_primary_expert_comes_first_where_the_router_does_not_sort() -> None:
    model = Family("DeepseekV3", "DeepseekV3ForCausalLM").build()
    inputs = Steps([6, 6], width=6, num_steps=0, side="left")
    with capture(model, weights=True) as tracer:
        inputs.run(model)
    primary = tracer.trace().primary()
    with capture(model) as tracer:
        inputs.run(model)
    assert np.array_equal(tracer.trace().experts[:, :, 0], primary)


def test_long_runs_are_turned_into_tokens_on_the_way(model: Any) -> None:
    with capture(model) as tracer, torch.no_grad():
        for _ in range(40):
            model(**prompt([2, 1], 2))
        assert tracer.num_tokens > 0
    assert tracer.trace().num_tokens == 120


def test_training_is_not_disturbed(model: Any) -> None:
    inputs = prompt([3, 3], 3)
    model(**inputs).logits.sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with capture(model, weights=True) as tracer:
        model(**inputs).logits.sum().backward()
    traced = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
    assert tracer.trace().num_tokens == 6


def test_code_that_is_compiled_inside_is_refused(model: Any) -> None:
    run = torch.compile(lambda tokens: model(input_ids=tokens).logits, backend="eager")
    with capture(model), torch.no_grad(), pytest.raises(UsageError, match="being compiled"):
        run(torch.tensor([[5, 6]]))


def test_a_forward_that_was_replaced_before_is_put_back(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    original = experts.forward

    def mine(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    experts.forward = mine
    try:
        with capture(model) as tracer, torch.no_grad():
            model(**prompt([2], 2))
            model(**prompt([2], 2))
        assert experts.forward is mine
        assert tracer.trace().num_tokens == 4
    finally:
        del experts.forward


def test_a_forward_that_is_replaced_inside_is_left_alone(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    with capture(model) as tracer, torch.no_grad():
        model(**prompt([2], 2))
        traced = experts.forward

        def mine(*args: Any, **kwargs: Any) -> Any:
            return traced(*args, **kwargs)

        experts.forward = mine
        model(**prompt([2], 2))
    assert tracer.trace().num_tokens == 4
    assert experts.forward is mine
    with torch.no_grad():
        model(**prompt([2], 2))
    assert tracer.trace().num_tokens == 4
    del experts.forward
    assert num_hooks(model) == 0


def test_a_mask_that_is_used_again_is_read_in_time(model: Any) -> None:
    inputs = prompt([2, 3], 3)
    mask = inputs["attention_mask"].clone()
    with capture(model) as tracer, torch.no_grad():
        model(input_ids=inputs["input_ids"], attention_mask=mask)
        mask.zero_()
    assert by_request(tracer.trace()) == {0: sequence(2, 0), 1: sequence(3, 0)}


def test_rejected_columns_are_forgotten() -> None:
    rows = Sequences(np.array([4, 5]))
    valid = np.array([[False, True, True], [True, True, True]])
    assert rows.advance(0, 3, valid).tolist() == [[0, 0, 1], [0, 1, 2]]
    assert rows.advance(3, 4, None).tolist() == [[2, 3, 4, 5], [3, 4, 5, 6]]
    assert rows.advance(5, 1, None).tolist() == [[4], [5]]  # two of the four were kept
    assert rows.advance(2, 2, None).tolist() == [[1, 2], [2, 3]]  # and one of the first three less
    assert rows.advance(8, 1, None).tolist() == [[7], [8]]  # four columns that were not traced
    assert rows.advance(0, 1, None).tolist() == [[0], [0]]


def test_notes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = Family("JetMoe", "JetMoeForCausalLM").build()
    with caplog.at_level(logging.INFO), capture(model), torch.no_grad():
        model(**prompt([2], 2))
    assert "left out" in caplog.text
