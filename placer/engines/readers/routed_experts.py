"""Responses of vLLM or SGLang that carry the routing of their tokens.

A file of JSON lines, a JSON array or one JSON object; each a response as the server sent it:

- vLLM (`--enable-return-routed-experts`): `choices[].routed_experts`, the base64 of a .npy
  [tokens, hidden layers, k] (`vllm/utils/serial_utils.py: numpy2base64`, 0.32);
- SGLang (`--enable-return-routed-experts`, `return_routed_experts` in the request):
  `meta_info.routed_experts`, or `sglext.routed_experts` of its OpenAI endpoints, the base64 of bare
  int32 (`sglang/srt/managers/detokenizer_manager.py`, 0.5.23), so that k must be said.

Tokens are those of the prompt and all generated ones but the last, which no router saw. Rows of
dense layers hold zeros. A key `label` beside them names the workload of a request.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.engines.readers.common import existing_file, moe_layers, number_of_experts
from placer.engines.records import Hints, Recorded
from placer.errors import BadFileError, UsageError
from placer.trace.checks import make_trace
from placer.trace.model import DECODE, PREFILL

_NPY = b"\x93NUMPY"


@dataclass(frozen=True, eq=False)
class _Sequence:
    """One generated sequence.

    Attributes:
        experts: [tokens, layers, k].
        prompt: tokens of the prompt, or None where the response does not say.
        generated: tokens that were generated, or None.
        label: workload, "" for none.
    """

    experts: NDArray[np.integer]
    prompt: int | None
    generated: int | None
    label: str


def read(path: Path, hints: Hints) -> Recorded:
    """Read responses; each choice is a request."""
    num_experts = number_of_experts(hints, None, str(path))
    found = [
        one for where, item in _items(existing_file(path)) for one in _sequences(item, where, hints)
    ]
    if not found:
        raise BadFileError(
            f"{path} holds no routed_experts",
            "serve with --enable-return-routed-experts (SGLang: return_routed_experts as well)",
        )
    shapes = {one.experts.shape[1:] for one in found}
    if len(shapes) > 1:
        raise BadFileError(f"{path}: responses differ in layers or experts per token: {shapes}")
    experts = np.concatenate([one.experts for one in found])
    used = (experts != 0).any(axis=(0, 2)) | (experts.shape[2] == 1)
    rows, ids, warnings = moe_layers(used, hints, str(path))
    request = np.repeat(np.arange(len(found)), [len(one.experts) for one in found])
    position = np.concatenate([_start(one) + np.arange(len(one.experts)) for one in found])
    phase = np.concatenate(
        [
            np.where(
                _start(one) + np.arange(len(one.experts))
                < (len(one.experts) if one.prompt is None else one.prompt),
                PREFILL,
                DECODE,
            )
            for one in found
        ]
    )
    if any(one.prompt is None for one in found):
        warnings.append("some responses do not say how long the prompt was: all of it is prefill")
    if experts.shape[2] == 1 and hints.layer_ids is None:
        warnings.append("with one expert per token, dense layers cannot be told: say --layer-ids")
    warnings.append("no gate weights: the first expert of a token counts as its primary")
    trace = make_trace(
        experts=experts[:, rows],
        num_experts=num_experts,
        layer_ids=ids,
        request=request,
        position=position,
        phase=phase,
        labels={number: one.label for number, one in enumerate(found) if one.label},
        where=str(path),
    )
    return Recorded(trace, warnings)


def _start(one: _Sequence) -> int:
    """Position of the first row: the beginning of the prompt may have been left out."""
    if one.prompt is None or one.generated is None:
        return 0
    return max(0, one.prompt + one.generated - 1 - len(one.experts))


def _items(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The responses of a file, each with its place."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFileError(f"{path} cannot be read: {error}") from None
    try:
        whole = json.loads(text)
        items = list(enumerate(whole if isinstance(whole, list) else [whole], 1))
        unit = "response"
    except ValueError:
        items, unit = [], "line"
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                items.append((number, json.loads(line)))
            except ValueError as error:
                raise BadFileError(f"{path}, line {number}: not JSON: {error}") from None
    for number, item in items:
        if not isinstance(item, dict):
            raise BadFileError(f"{path}, {unit} {number}: expected a response, a JSON object")
        yield f"{path}, {unit} {number}", item


def _sequences(item: dict[str, Any], where: str, hints: Hints) -> Iterator[_Sequence]:
    label = item.get("label") or ""
    if not isinstance(label, str):
        raise BadFileError(f"{where}: label is {label!r}, expected a string")
    meta = _object(item, "meta_info")
    if meta.get("routed_experts") is not None:
        prompt, generated = meta.get("prompt_tokens"), meta.get("completion_tokens")
        yield _sequence(meta["routed_experts"], prompt, generated, label, where, hints)
        return
    usage = _object(item, "usage")
    prompt = usage.get("prompt_tokens")
    extra = _object(item, "sglext").get("routed_experts")
    if extra is not None:
        yield _sequence(extra, prompt, usage.get("completion_tokens"), label, where, hints)
        return
    choices = item.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(one, dict) for one in choices):
        raise BadFileError(f"{where}: choices is no list of objects")
    for choice in choices:
        if choice.get("routed_experts") is None:
            continue
        tokens = choice.get("token_ids")
        if isinstance(tokens, list):
            generated = len(tokens)
        else:
            generated = usage.get("completion_tokens") if len(choices) == 1 else None
        yield _sequence(choice["routed_experts"], prompt, generated, label, where, hints)


def _sequence(
    encoded: Any, prompt: Any, generated: Any, label: str, where: str, hints: Hints
) -> _Sequence:
    lengths = [None if n is None else n for n in (prompt, generated)]
    for length in lengths:
        if length is not None and (type(length) is not int or length < 0):
            raise BadFileError(f"{where}: a number of tokens is {length!r}")
    prompt, generated = lengths
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise BadFileError(f"{where}: routed_experts is no base64: {error}") from None
    if data.startswith(_NPY):
        experts = _npy(data, where)
    else:
        experts = _bare(data, prompt, generated, where, hints)
    most = None if prompt is None or generated is None else prompt + generated
    if most is not None and len(experts) > most:
        raise BadFileError(f"{where}: routing of {len(experts)} tokens, expected at most {most}")
    return _Sequence(experts, prompt, generated, label)


def _npy(data: bytes, where: str) -> NDArray[np.integer]:
    try:
        experts: NDArray[np.integer] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadFileError(f"{where}: routed_experts is damaged: {error}") from None
    if experts.ndim != 3 or experts.dtype.kind not in "iu":
        raise BadFileError(
            f"{where}: routed_experts is {experts.dtype} of shape {experts.shape}, expected "
            "integers [tokens, layers, k]"
        )
    return experts


def _bare(
    data: bytes, prompt: int | None, generated: int | None, where: str, hints: Hints
) -> NDArray[np.integer]:
    """SGLang's int32: the number of tokens is known from the lengths, k must be said."""
    if hints.top_k is None:
        raise UsageError(
            f"{where}: SGLang's routing does not say how many experts a token uses", "--top-k K"
        )
    if prompt is None or generated is None:
        raise BadFileError(f"{where}: SGLang's routing needs prompt_tokens and completion_tokens")
    if len(data) % 4:
        raise BadFileError(f"{where}: routed_experts has {len(data)} bytes, no whole int32")
    flat = np.frombuffer(data, "<i4")
    tokens = prompt + generated - 1
    per_token = flat.size // max(tokens, 1)
    if tokens < 1 or flat.size != tokens * per_token or per_token % hints.top_k or not per_token:
        raise BadFileError(
            f"{where}: routed_experts holds {flat.size} ids, which {tokens} tokens x top-"
            f"{hints.top_k} do not divide",
            "is --top-k right, and was the routing asked for from the first token on?",
        )
    return flat.reshape(tokens, -1, hints.top_k)


def _object(item: dict[str, Any], key: str) -> dict[str, Any]:
    value = item.get(key)
    return value if isinstance(value, dict) else {}
