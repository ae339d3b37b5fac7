"""Readers: how to get expert ids and gate weights out of one call of one module.

`classify_call` and `classify_output` look at the values of a first call, on which they may wait
for the device; the reader that they return only picks tensors, and never waits.

Shapes: N tokens of a forward pass, K experts per token, E experts. A reader returns expert ids
[..., K] (N rows in all) and gate weights of the same shape, or None for those. An id below 0 or
of E and above means: unused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

Routing: TypeAlias = tuple[Tensor, Tensor | None]
Extract: TypeAlias = Callable[[tuple[Any, ...], Mapping[str, Any], Any], Any]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Place(NamedTuple):
    """Where in a call a value is: `source` is "args", "kwargs" or "output"."""

    source: str
    keys: tuple[int | str, ...]

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        value: Any = {"args": args, "kwargs": kwargs, "output": output}[self.source]
        for key in self.keys:
            value = value[key]
        return value


@dataclass(frozen=True)
class ReadIds:
    """The ids themselves are an argument or an output."""

    ids: Place
    weights: Place | None
    rank = 0

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Routing:
        ids = self.ids.get(args, kwargs, output)
        weights = None if self.weights is None else self.weights.get(args, kwargs, output)
        return (ids, weights) if ids.dim() > 1 else (ids[:, None], _column(weights))


@dataclass(frozen=True)
class ReadMask:
    """A 0/1 integer for each token and expert; a token that fits nowhere has none."""

    mask: Place
    weights: Place | None
    top_k: int
    rank = 1

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Routing:
        mask = self.mask.get(args, kwargs, output)
        chosen, ids = mask.reshape(-1, mask.shape[-1]).topk(self.top_k, dim=-1)
        ids = ids.masked_fill(chosen == 0, -1)
        weights = None if self.weights is None else self.weights.get(args, kwargs, output)
        if weights is not None:
            weights = weights.reshape(-1, weights.shape[-1])
            if weights.shape[-1] != self.top_k:
                weights = weights.gather(1, ids.clamp(min=0))
        return ids, weights


@dataclass(frozen=True)
class ReadSorted:
    """Tokens are handed over grouped by expert.

    `order` [N K] holds, group after group, the index (token K + column) of each pair, `sizes` is
    a list of E group sizes, `gates` [N K] are the weights in the same order.
    """

    order: Place
    sizes: Place
    gates: Place | None
    top_k: int
    rank = 2

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Routing:
        order = self.order.get(args, kwargs, output)
        sizes = torch.tensor(self.sizes.get(args, kwargs, output), device=order.device)
        experts = torch.arange(len(sizes), device=order.device)
        grouped = torch.repeat_interleave(experts, sizes, output_size=order.numel())
        ids = torch.empty_like(grouped).scatter_(0, order, grouped).view(-1, self.top_k)
        if self.gates is None:
            return ids, None
        gates = self.gates.get(args, kwargs, output)
        return ids, torch.empty_like(gates).scatter_(0, order, gates).view(-1, self.top_k)


@dataclass(frozen=True)
class ReadScores:
    """A score for each token and expert, exactly zero where the expert is not chosen."""

    scores: Place
    top_k: int
    rank = 3

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Routing:
        scores = self.scores.get(args, kwargs, output)
        weights, ids = scores.reshape(-1, scores.shape[-1]).topk(self.top_k, dim=-1)
        return ids.masked_fill(weights == 0, -1), weights


@dataclass(frozen=True)
class ReadWith:
    """The user's own function of (args, kwargs, output), returning ids or (ids, weights)."""

    extract: Extract
    rank = 0

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Routing:
        found = self.extract(args, kwargs, output)
        ids, weights = found if isinstance(found, tuple | list) else (found, None)
        return (ids, weights) if ids.dim() > 1 else (ids[:, None], _column(weights))


@dataclass(frozen=True)
class ReadAgain:
    """Runs a block's router once more on what the block was given."""

    router: nn.Module
    hidden: Place
    reader: Reader
    rank = 4

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Routing:
        hidden = self.hidden.get(args, kwargs, output)
        with torch.no_grad():
            found = self.router(hidden.reshape(-1, hidden.shape[-1]))
        return self.reader((), {}, found)


Reader: TypeAlias = ReadIds | ReadMask | ReadSorted | ReadScores | ReadWith | ReadAgain


def classify_call(
    num_experts: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Reader | None:
    """The reader for a call of a stack that was handed expert ids, or None if it was not."""
    values = [*_walk("args", args), *_walk("kwargs", kwargs)]
    floats = [(place, v) for place, v in values if _is_float(v)]
    hidden = next((v for _, v in floats if v.dim() >= 2), None)
    if hidden is None:
        return None
    num_tokens = hidden.numel() // hidden.shape[-1]
    weights = [(place, v) for place, v in floats if v is not hidden]
    return _read_ids(num_experts, num_tokens, values, weights) or _read_mask(
        num_experts, num_tokens, values, weights
    )


def classify_lookup(args: tuple[Any, ...]) -> Reader | None:
    """The reader for a look-up in a table whose rows are experts."""
    is_ids = len(args) == 1 and _is_integer(args[0]) and args[0].dim() >= 2
    return ReadIds(Place("args", (0,)), None) if is_ids else None


def classify_output(
    num_experts: int, num_tokens: int | None, output: Any, expected_top_k: int = 0
) -> Reader | None:
    """The reader for a module whose output says where tokens go, or None if it does not."""
    values = list(_walk("output", (output,) if isinstance(output, Tensor) else output))
    if isinstance(output, Tensor):
        values = [(Place("output", ()), output)]
    floats = [(place, v) for place, v in values if _is_float(v)]
    return (
        _read_sorted(num_experts, values, floats)
        or _read_ids(num_experts, num_tokens, values, floats)
        or _read_scores(num_experts, num_tokens, floats, expected_top_k)
    )


def find_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Place, Tensor] | None:
    """The first floating-point argument with two axes or more, and its place."""
    for place, value in [*_walk("args", args), *_walk("kwargs", kwargs)]:
        if _is_float(value) and value.dim() >= 2:
            return place, value
    return None


def num_classes(output: Any) -> int:
    """The last axis of the first floating-point matrix in a router's output, 0 if there is none."""
    values = (output,) if isinstance(output, Tensor) else output
    floats = (v for _, v in _walk("output", values) if _is_float(v) and v.dim() >= 2)
    return next((v.shape[-1] for v in floats), 0)


def _read_ids(
    num_experts: int,
    num_tokens: int | None,
    values: Sequence[tuple[Place, Any]],
    weights: Sequence[tuple[Place, Tensor]],
) -> Reader | None:
    candidates: list[tuple[bool, ReadIds]] = []
    for place, value in values:
        if not _is_integer(value) or value.numel() == 0:
            continue
        top_k = value.shape[-1] if value.dim() > 1 else 1
        if num_tokens not in (None, value.numel() // top_k) or top_k > num_experts:
            continue
        beside = [where for where, v in weights if v.shape == value.shape]
        if (value.dim() == 1 and not beside) or not _may_be_ids(value, top_k, num_experts):
            continue
        candidates.append((bool(beside), ReadIds(place, beside[-1] if beside else None)))
    candidates.sort(key=lambda candidate: not candidate[0])
    return candidates[0][1] if candidates else None


def _may_be_ids(value: Tensor, top_k: int, num_experts: int) -> bool:
    """Whether each row holds different ids, where those outside 0..E-1 mean unused."""
    rows = value.detach().reshape(-1, top_k).long()
    used = (rows >= 0) & (rows < num_experts)
    # experts that compute nothing come after the real ones: allow as many as there are
    if not bool(used.any()) or int(rows.min()) < -1 or int(rows.max()) >= 2 * num_experts:
        return False
    ordered, order = rows.sort(dim=-1)
    repeats = (ordered[:, 1:] == ordered[:, :-1]) & used.gather(1, order)[:, 1:]
    return not bool(repeats.any())


def _read_mask(
    num_experts: int,
    num_tokens: int,
    values: Sequence[tuple[Place, Any]],
    weights: Sequence[tuple[Place, Tensor]],
) -> Reader | None:
    for place, value in values:
        if not _is_integer(value) or value.dim() < 2 or value.shape[-1] != num_experts:
            continue
        mask = value.detach().reshape(-1, num_experts)
        if len(mask) != num_tokens or int(mask.min()) < 0 or int(mask.max()) > 1:
            continue
        dense = [(where, v) for where, v in weights if v.shape == value.shape]
        if dense:  # the weights say more: where several are chosen, the mask may hold the first
            where, scores = dense[-1]
            return ReadScores(where, min(num_experts, max(2, _most_nonzero(scores))))
        top_k = int(mask.sum(dim=-1).max())
        beside = [w for w, v in weights if v.numel() == num_tokens * top_k]
        return ReadMask(place, beside[-1] if beside else None, top_k)
    return None


def _most_nonzero(scores: Tensor) -> int:
    return int((scores.detach().reshape(-1, scores.shape[-1]) != 0).sum(dim=-1).max())


def _read_sorted(
    num_experts: int,
    values: Sequence[tuple[Place, Any]],
    floats: Sequence[tuple[Place, Tensor]],
) -> Reader | None:
    for sizes_at, sizes in values:
        is_sizes = isinstance(sizes, list) and len(sizes) == num_experts
        if not is_sizes or not all(isinstance(size, int) for size in sizes):
            continue
        num_pairs = sum(sizes)
        tokens = [v.numel() // v.shape[-1] for _, v in floats if v.shape[-1] == num_experts]
        for order_at, order in values:
            if not _is_integer(order) or order.dim() != 1 or order.numel() != num_pairs:
                continue
            expected = torch.arange(num_pairs, device=order.device)
            if not torch.equal(order.detach().long().sort().values, expected):
                continue
            top_k = num_pairs // tokens[0] if tokens and tokens[0] else 0
            if top_k and top_k * tokens[0] == num_pairs:
                gates = [w for w, v in floats if v.shape == order.shape]
                return ReadSorted(order_at, sizes_at, gates[0] if gates else None, top_k)
    return None


def _read_scores(
    num_experts: int,
    num_tokens: int | None,
    floats: Sequence[tuple[Place, Tensor]],
    expected_top_k: int,
) -> Reader | None:
    for place, value in floats:
        if value.dim() < 2 or value.shape[-1] != num_experts:
            continue
        scores = value.detach().reshape(-1, num_experts)
        if num_tokens not in (None, len(scores)) or len(scores) == 0:
            continue
        top_k = _most_nonzero(scores)
        if 1 <= top_k < num_experts and bool((scores >= 0).all()):
            return ReadScores(place, max(top_k, expected_top_k))
    return None


def _walk(source: str, values: Any) -> Iterator[tuple[Place, Any]]:
    """Values of a tuple, list or mapping, and of those inside it, with their places."""
    if isinstance(values, Mapping):
        items: list[tuple[int | str, Any]] = list(values.items())
    elif isinstance(values, tuple | list):
        items = list(enumerate(values))
    else:
        return
    for key, value in items:
        yield Place(source, (key,)), value
        if isinstance(value, tuple | Mapping):
            for place, inner in _walk(source, value):
                yield Place(source, (key, *place.keys)), inner


def _column(weights: Tensor | None) -> Tensor | None:
    return weights[:, None] if weights is not None and weights.dim() == 1 else weights


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _INTEGERS and value.dim() >= 1


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point and value.dim() >= 1
