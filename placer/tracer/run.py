"""`trace_model`: run a Hugging Face model on prompts and trace it into a folder."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from placer.errors import PlacerError, UsageError
from placer.tracer.loading import Loaded, load_model
from placer.tracer.prompts import Prompt, prompt_tokens
from placer.tracer.tracer import Tracer, capture


@dataclass(frozen=True)
class TraceSummary:
    """What was traced.

    Attributes:
        path: the native trace.
        num_prompts: prompts that were run to their end.
        num_tokens: traced tokens.
        layer_ids, num_experts, top_k: as in `Trace`.
        seconds: time that running and tracing took, loading aside.
        notes: what a user should know, one sentence each.
        interrupted: whether Ctrl-C ended the run; what was traced until then is kept.
    """

    path: Path
    num_prompts: int
    num_tokens: int
    layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    seconds: float
    notes: tuple[str, ...]
    interrupted: bool


@dataclass(frozen=True)
class Progress:
    """How far a run is; handed to the progress callback after each forward pass."""

    num_prompts_done: int
    num_prompts: int
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"tracing: {self.num_prompts_done:,} of {self.num_prompts:,} prompts, "
            f"{self.num_tokens:,} tokens"
        )


@contextlib.contextmanager
def _closed_undisturbed(tracer: Tracer) -> Iterator[None]:
    """The tracer's own context, whose end a second Ctrl-C does not break off.

    What is still in memory is written there; it takes a second at most.
    """
    in_main = threading.current_thread() is threading.main_thread()
    with contextlib.ExitStack() as last, tracer:
        try:
            yield
        finally:
            if in_main:
                before = signal.signal(signal.SIGINT, signal.SIG_IGN)
                last.callback(signal.signal, signal.SIGINT, before)


def trace_model(
    model: str,
    prompts: Sequence[Prompt],
    output: Path | str,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    max_prompt_tokens: int | None = None,
    weights: bool = False,
    routers: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    temperature: float = 0.0,
    trust_remote_code: bool = False,
    progress: Callable[[Progress], None] | None = None,
    force: bool = False,
) -> TraceSummary:
    """Generate from every prompt and write the routing of all tokens to a native trace.

    A token is traced when it is fed to the model: those of the prompt as prefill, generated ones
    as decode. The last token of a request is generated but never fed, so it is not in the trace.
    Prompts of like length share a batch. Ctrl-C keeps what was traced so far.

    Args:
        model: id on the hub, or a folder.
        prompts: as `read_prompts` gives them.
        output: folder of the trace.
        max_new_tokens: tokens to generate for each prompt, at most; 1 or more.
        batch_size: prompts that run together, at most.
        max_prompt_tokens: longer prompts are cut off after so many tokens; None leaves them.
        weights: keep gate weights.
        routers: which experts to trace, where a model has several sets (see `capture`).
        device, dtype, trust_remote_code: see `load_model`.
        seed: for sampling.
        temperature: 0 for greedy decoding.
        progress: called after each forward pass.
        force: replace a trace at `output`.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} is {value}, expected 1 or more")
    if temperature < 0:
        raise UsageError(f"temperature is {temperature}, expected 0 or more")
    if not prompts:
        raise UsageError("there are no prompts")
    loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    requests = _number(prompts, loaded, max_prompt_tokens)
    settings = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "max_prompt_tokens": max_prompt_tokens,
        "temperature": temperature,
        "seed": seed,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }
    tracer = capture(
        loaded.model,
        output,
        weights=weights,
        routers=routers,
        force=force,
        source={"kind": "transformers", "model": model, "settings": settings, **_versions()},
    )
    torch.manual_seed(seed)
    run = _Run(loaded, tracer, max_new_tokens, temperature, progress, len(requests))
    start = time.perf_counter()
    interrupted = False
    try:
        with _closed_undisturbed(tracer):
            for first in range(0, len(requests), batch_size):
                run.generate(requests[first : first + batch_size])
    except KeyboardInterrupt:
        interrupted = True
    layout = tracer.layout
    if layout is None:
        raise PlacerError("interrupted before anything was traced")
    return TraceSummary(
        path=Path(output),
        num_prompts=run.num_done,
        num_tokens=tracer.num_tokens,
        layer_ids=layout.layer_ids,
        num_experts=layout.num_experts,
        top_k=layout.top_k,
        seconds=time.perf_counter() - start,
        notes=layout.notes,
        interrupted=interrupted,
    )


@dataclass(frozen=True)
class _Request:
    """A prompt as tokens."""

    number: int
    tokens: list[int]
    label: str | None


class _Run:
    """Generates batch after batch."""

    def __init__(
        self,
        loaded: Loaded,
        tracer: Tracer,
        max_new_tokens: int,
        temperature: float,
        progress: Callable[[Progress], None] | None,
        num_prompts: int,
    ) -> None:
        self.num_done = 0
        self._loaded = loaded
        self._tracer = tracer
        self._progress = progress
        self._num_prompts = num_prompts
        tracer.on_pass = self._report
        self._options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "pad_token_id": loaded.padding,
            "disable_compile": True,
            "num_beams": 1,
        }
        if temperature:
            self._options |= {"do_sample": True, "temperature": temperature}
        else:
            self._options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

    def generate(self, requests: Sequence[_Request]) -> None:
        tokens, mask = _pad([request.tokens for request in requests], self._loaded)
        self._tracer.requests(
            [request.number for request in requests], [request.label for request in requests]
        )
        with torch.no_grad():
            self._loaded.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                **self._options,
            )
        self.num_done += len(requests)
        self._report()

    def _report(self) -> None:
        if self._progress is not None:
            done = Progress(self.num_done, self._num_prompts, self._tracer.num_tokens)
            self._progress(done)


def _number(
    prompts: Sequence[Prompt], loaded: Loaded, max_prompt_tokens: int | None
) -> list[_Request]:
    """Prompts as tokens, by increasing length so that a batch needs little padding."""
    found = []
    for i, prompt in enumerate(prompts):
        tokens = prompt_tokens(prompt, loaded.tokenizer, i)
        if max_prompt_tokens is not None:
            tokens = tokens[:max_prompt_tokens]
        number = i if prompt.request is None else prompt.request
        found.append(_Request(number, tokens, prompt.label))
    seen: set[int] = set()
    for request in found:
        if request.number in seen:
            raise UsageError(
                f"two prompts have request id {request.number}",
                "give each prompt its own, or none of them",
            )
        seen.add(request.number)
    return sorted(found, key=lambda request: len(request.tokens))


def _pad(rows: Sequence[list[int]], loaded: Loaded) -> tuple[Tensor, Tensor]:
    """[B, S] tokens and their mask; padded on the left, on the right for an encoder."""
    width = max(map(len, rows))
    on_right = getattr(loaded.model.config, "is_encoder_decoder", False)
    tokens = torch.full((len(rows), width), loaded.padding, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        here = slice(0, len(row)) if on_right else slice(width - len(row), width)
        tokens[i, here] = torch.tensor(row)
        mask[i, here] = 1
    return tokens.to(loaded.device), mask.to(loaded.device)


def _versions() -> dict[str, str]:
    import transformers

    import placer

    return {
        "placer": placer.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
