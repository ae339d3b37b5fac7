"""Looking at a model without the tracer, to check the tracer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@contextlib.contextmanager
def inputs_of(modules: dict[int, Any]) -> Iterator[dict[int, list[NDArray[np.float64]]]]:
    """Record the hidden states [N, H] that each module is called with, call by call."""
    seen: dict[int, list[NDArray[np.float64]]] = {key: [] for key in modules}
    handles = []
    for key, module in modules.items():

        def hook(module: Any, args: Any, kwargs: Any, key: int = key) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[key].append(hidden.detach().double().reshape(-1, hidden.shape[-1]).numpy())

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def num_hooks(model: Any) -> int:
    """Hooks on any module of a model, and attributes that a tracer could have left behind."""
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
    wrappers = sum("forward" in module.__dict__ for module in model.modules())
    return hooks + wrappers + ("generate" in model.__dict__)


class Steps:
    """A user's own decoding loop: a prefill, then tokens chosen beforehand, one at a time.

    Args:
        lengths: real tokens of each row's prompt.
        width: columns of the prompt.
        num_steps: decode steps.
        side: where the padding is, "left" or "right".
    """

    def __init__(
        self, lengths: list[int], width: int, num_steps: int, side: str, vocab: int = 90
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        shape = (len(lengths), width)
        self.num_steps = num_steps
        self.tokens = torch.randint(3, vocab, shape, generator=generator)
        self.next = torch.randint(3, vocab, (len(lengths), num_steps), generator=generator)
        self.mask = torch.zeros(shape, dtype=torch.long)
        for row, length in enumerate(lengths):
            columns = slice(width - length, width) if side == "left" else slice(0, length)
            self.mask[row, columns] = 1
        self.tokens[self.mask == 0] = 0

    def run(self, model: Any) -> list[torch.Tensor]:
        """The logits of each pass."""
        mask, logits = self.mask, []
        tokens, cache = self.tokens, None
        for step in range(self.num_steps + 1):
            with torch.no_grad():
                output = model(
                    input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True
                )
            logits.append(output.logits)
            cache = output.past_key_values
            if step < self.num_steps:
                tokens = self.next[:, step : step + 1]
                mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        return logits

    def expected(self) -> dict[str, NDArray[np.int64]]:
        """Request, position, phase and step of the real tokens, in the order of the passes."""
        real = self.mask.numpy().astype(bool)
        rows = np.arange(len(real))
        columns: dict[str, list[NDArray[np.int64]]] = {}

        def add(**values: NDArray[Any]) -> None:
            for name, value in values.items():
                columns.setdefault(name, []).append(np.asarray(value, np.int64))

        request = np.repeat(rows[:, None], real.shape[1], axis=1)
        position = np.cumsum(real, axis=1) - 1
        zeros = np.zeros(int(real.sum()))
        add(request=request[real], position=position[real], phase=zeros, step=zeros)
        for step in range(self.num_steps):
            ones = np.ones(len(rows))
            add(request=rows, position=real.sum(1) + step, phase=ones, step=ones * (step + 1))
        return {name: np.concatenate(parts) for name, parts in columns.items()}
