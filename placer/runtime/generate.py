"""Greedy generation by an expert-parallel group.

Shapes: B requests of a batch, b of them at home on this rank, S columns of the longest prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from placer.errors import UsageError
from placer.plan import Dispatch
from placer.runtime.context_cache import (
    ContextBytes,
    NewContext,
    append_context,
    share_context,
    token_bytes,
)
from placer.runtime.engine import Engine, PassTokens
from placer.runtime.gather import all_gather
from placer.runtime.moving import Mover
from placer.trace import DECODE, PREFILL


@dataclass(frozen=True, eq=False)
class Generation:
    """What a batch became.

    Attributes:
        tokens: of each request, the generated ids, the stop token included.
        logits: (request, number of the generated token) -> [V] on the CPU, for those tokens that
            were made on this rank; empty when they were not asked for.
        num_passes: forward passes, prefill included.
        prefill_seconds, decode_seconds: of this rank, measured.
    """

    tokens: list[list[int]]
    logits: dict[tuple[int, int], Tensor]
    num_passes: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(eq=False)
class _Batch:
    """A batch on its way.

    Attributes:
        prompts: [B].
        homes: [B].
        stops: tokens that end a request.
        tokens: [B] generated so far.
        is_over: [B].
    """

    prompts: list[list[int]]
    homes: np.ndarray
    stops: frozenset[int]
    tokens: list[list[int]] = field(default_factory=list)
    is_over: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in self.prompts]
        self.is_over = np.zeros(len(self.prompts), bool)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(prompt) for prompt in self.prompts], np.int64)

    def add(self, request: int, token: int) -> None:
        self.tokens[request].append(token)
        self.is_over[request] |= token in self.stops

    def last_tokens(self) -> list[int]:
        return [made[-1] for made in self.tokens]


class Generator:
    """Generates with one dispatch model.

    Args:
        engine: one rank's model.
        dispatch: `coherent` runs prefill as `alltoall`, and then moves tokens.
        deduplicate_nodes: under `alltoall`, one copy of a token per other node.
    """

    def __init__(
        self, engine: Engine, dispatch: Dispatch, *, deduplicate_nodes: bool = False
    ) -> None:
        self._engine, self._dispatch = engine, dispatch
        self._by_node = deduplicate_nodes
        self._mover = Mover(engine) if dispatch == "coherent" else None
        self._step = 0

    @property
    def context_bytes(self) -> ContextBytes:
        """Of one token; nothing where tokens stay."""
        if self._mover is None:
            return ContextBytes()
        return token_bytes(self._mover.shapes, self._engine.layout.dtype)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        stop_tokens: frozenset[int] = frozenset(),
        homes: Sequence[int] | None = None,
        keep_logits: bool = False,
    ) -> Generation:
        """Generate for a batch; every rank calls this with the same arguments.

        Args:
            prompts: token ids of each request.
            max_new_tokens: of each request.
            stop_tokens: end a request.
            homes: rank where each request's tokens enter; by default request mod num_ranks.
            keep_logits: return the logits of generated tokens.
        """
        transport = self._engine.group.transport
        if not prompts or not all(len(prompt) for prompt in prompts) or max_new_tokens < 1:
            raise UsageError("there is nothing to generate: no prompt, an empty one, or 0 tokens")
        if homes is None:
            homes = [i % transport.num_ranks for i in range(len(prompts))]
        batch = _Batch([list(p) for p in prompts], np.array(homes, np.int64), stop_tokens)
        run = _Run(self._engine, self._mover, batch, keep_logits, self._step)
        self._engine.choose(self._dispatch, self._by_node)  # generators may share an engine
        counters = self._engine.counters
        with torch.inference_mode():
            start = time.perf_counter()
            counters.phase = PREFILL
            run.prefill()
            middle = time.perf_counter()
            counters.phase = DECODE
            while run.made < max_new_tokens and not batch.is_over.all():
                run.decode()
            end = time.perf_counter()
        self._step += run.made
        return Generation(batch.tokens, run.logits, run.made, middle - start, end - middle)


class _Run:
    """The passes of one batch."""

    def __init__(
        self, engine: Engine, mover: Mover | None, batch: _Batch, keep_logits: bool, step: int
    ) -> None:
        from transformers import DynamicCache

        self._engine, self._mover, self._batch = engine, mover, batch
        self._keep_logits, self._first_step = keep_logits, step
        self._own = np.flatnonzero(batch.homes == engine.group.rank)
        # tokens that move need all keys and values; else the model's own kinds of layers are used
        config = engine.model.config
        self._cache = DynamicCache(config=config) if mover is None else DynamicCache()
        self.logits: dict[tuple[int, int], Tensor] = {}
        self.made = 0

    def prefill(self) -> None:
        """The prompts, at home."""
        engine, batch = self._engine, self._batch
        lengths = batch.lengths
        num_ranks = engine.group.transport.num_ranks
        tokens_of_rank = [int(lengths[batch.homes == r].sum()) for r in range(num_ranks)]
        own_lengths = lengths[self._own]
        width = int(own_lengths.max(initial=0))
        self._mask = _left_padded_mask(own_lengths, width, engine.device)
        chosen = self._stock_pass([batch.prompts[r] for r in self._own], self._mask, tokens_of_rank)
        if self._mover is None:
            self._share_tokens(chosen)
        else:
            self._share_prefill(chosen, tokens_of_rank)

    def decode(self) -> None:
        """One more token for every request that is not over."""
        if self._mover is None:
            self._decode_at_home()
        else:
            self._decode_moving(self._mover)

    def _decode_at_home(self) -> None:
        batch = self._batch
        num_ranks = self._engine.group.transport.num_ranks
        active = ~batch.is_over
        tokens_of_rank = [int((active & (batch.homes == r)).sum()) for r in range(num_ranks)]
        last = batch.last_tokens()
        self._mask = _one_more_column(self._mask)
        chosen = self._stock_pass([[last[r]] for r in self._own], self._mask, tokens_of_rank)
        self._share_tokens(chosen)

    def _stock_pass(
        self, ids: list[list[int]], mask: Tensor, tokens_of_rank: Sequence[int]
    ) -> dict[int, Tensor]:
        """A pass of the stock model over this rank's requests: request -> logits [V]."""
        engine, batch, own = self._engine, self._batch, self._own
        if not len(own):
            engine.begin(None, tokens_of_rank)
            engine.pass_without_tokens()
            return {}
        width = max(len(row) for row in ids)
        padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -width:]
        is_real = (mask[:, -width:] > 0) & torch.from_numpy(~batch.is_over[own]).to(
            engine.device
        ).unsqueeze(1)
        row, column = is_real.nonzero(as_tuple=True)
        tokens = PassTokens(
            is_real.reshape(-1).nonzero().reshape(-1),
            own[row.cpu().numpy()],
            positions[row, column].cpu().numpy(),
            self._first_step + self.made,
        )
        engine.begin(tokens, tokens_of_rank)
        output = engine.model(
            input_ids=padded.to(engine.device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        last = output.logits[:, -1]
        return {int(r): last[i] for i, r in enumerate(own) if not batch.is_over[r]}

    def _share_tokens(self, chosen: dict[int, Tensor]) -> None:
        """Tell all ranks which tokens came next."""
        group = self._engine.group
        made = self._pick(chosen)
        rows = torch.tensor([[r, t] for r, t in made], dtype=torch.int64).reshape(-1, 2)
        message = rows.to(self._engine.device).contiguous().view(torch.uint8)
        most = [int(((self._batch.homes == r) & ~self._batch.is_over).sum())
                for r in range(group.transport.num_ranks)]  # fmt: skip
        with group.counters.timed_context():
            parts, sent = all_gather(
                group.transport, message, most, "the exchange of new tokens", group.counters
            )
        group.counters.control_bytes += 16 * int(sent.sum())
        for part in parts:
            for request, token in part.contiguous().view(torch.int64).reshape(-1, 2).tolist():
                self._batch.add(request, token)
        self.made += 1

    def _share_prefill(self, chosen: dict[int, Tensor], tokens_of_rank: list[int]) -> None:
        """Put the keys and values of all prompts on every rank."""
        from transformers import DynamicCache

        assert self._mover is not None
        batch, own = self._batch, self._own
        new = self._with_next(NewContext(), chosen)
        if len(own):
            row, column = (self._mask > 0).nonzero(as_tuple=True)
            who = torch.from_numpy(own).to(row.device)[row].int()
            for i, layer in enumerate(self._cache.layers):
                new.by_layer[i] = (who, layer.keys[row, :, column], layer.values[row, :, column])
        width = int(batch.lengths.max())
        starts = torch.from_numpy(width - batch.lengths)
        self._cache = DynamicCache()
        self._mask = _left_padded_mask(batch.lengths, width, self._engine.device)
        self._finish_pass(new, tokens_of_rank, starts, width)

    def _decode_moving(self, mover: Mover) -> None:
        engine, batch = self._engine, self._batch
        active = ~batch.is_over
        starts_here = active & (batch.homes == engine.group.rank)
        rows = torch.from_numpy(np.flatnonzero(starts_here)).to(engine.device)
        self._mask = _one_more_column(self._mask)
        positions = self._mask.sum(dim=1, keepdim=True) - 1
        ids = torch.tensor(batch.last_tokens(), device=engine.device)[:, None]
        num_active = int(active.sum())
        inputs = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        ended, logits, new = mover.run(
            inputs,
            self._cache,
            rows,
            positions[:, 0].cpu().numpy(),
            self._first_step + self.made,
            num_active,
        )
        chosen = {int(r): logits[i] for i, r in enumerate(ended.tolist())}
        most = [num_active] * engine.group.transport.num_ranks
        starts = torch.zeros(len(batch.prompts), dtype=torch.int64)
        self._finish_pass(self._with_next(new, chosen), most, starts, 1)

    def _with_next(self, new: NewContext, chosen: dict[int, Tensor]) -> NewContext:
        made = self._pick(chosen)
        device = self._engine.device
        new.rows = torch.tensor([r for r, _ in made], dtype=torch.int32, device=device)
        new.next_tokens = torch.tensor([t for _, t in made], dtype=torch.int64, device=device)
        return new

    def _finish_pass(
        self, new: NewContext, most: Sequence[int], starts: Tensor, width: int
    ) -> None:
        """The one all-gather of the pass: keys, values and next tokens."""
        assert self._mover is not None
        group = self._engine.group
        with group.counters.timed_context():
            found = share_context(
                group.transport, new, self._mover.shapes, self._engine.layout.dtype, most,
                group.counters,
            )  # fmt: skip
        append_context(self._cache, found, starts.to(self._engine.device), width)
        for part in found:
            for request, token in zip(part.rows.tolist(), part.next_tokens.tolist(), strict=True):
                self._batch.add(request, token)
        self.made += 1

    def _pick(self, chosen: dict[int, Tensor]) -> list[tuple[int, int]]:
        """(request, its most likely token); keeps logits if they were asked for."""
        if self._keep_logits:
            for request, logits in chosen.items():
                self.logits[request, self.made] = logits.detach().float().cpu().clone()
        return [(request, int(logits.argmax())) for request, logits in chosen.items()]


def _left_padded_mask(lengths: np.ndarray, width: int, device: torch.device) -> Tensor:
    """[n, width] int64, 1 where a token is."""
    column = np.arange(width)
    return torch.from_numpy((column >= width - lengths[:, None]).astype(np.int64)).to(device)


def _one_more_column(mask: Tensor) -> Tensor:
    return torch.cat((mask, mask.new_ones((len(mask), 1))), dim=1)
