"""What is in a trace, and is it sound: one pass over all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.errors import BadFileError
from placer.trace import layout
from placer.trace.fingerprint import Fingerprint
from placer.trace.model import PHASE_NAMES, Trace
from placer.trace.native import NativeSource
from placer.trace.opening import open_trace
from placer.trace.source import TraceSource
from placer.wording import counted

_FEW_TOKENS = 32  # too few to call a routing suspicious


def inspect_trace(path: Path | str) -> dict[str, Any]:
    """Go through a trace and say what it holds, as a JSON document.

    Files that cannot be opened as a trace raise; what is found wrong on the way (a page that
    fails its checksum, an expert id out of range) ends the pass and is listed in `problems`,
    and the counts are then those of the tokens before it.

    Returns:
        `sound` is False when there are `problems`; `warnings` need not worry anybody, but
        should be read. `experts_used` counts the experts of a token in a layer.

    Raises:
        BadFileError: missing, truncated, or not a trace.
    """
    source = open_trace(path)
    counts = _Counts(source)
    problems: list[str] = []
    labels: dict[int, str] = {}
    try:
        for chunk in source.chunks():
            counts.add(chunk)
        labels = source.request_labels()
    except BadFileError as error:
        problems.append(error.message)
    assert source.path is not None
    document: dict[str, Any] = {
        "kind": "trace",
        "file_format": "npz",
        "path": str(path),
        "complete": source.complete,
        "sound": not problems,
        "tokens": counts.tokens,
        "requests": len(counts.requests.ids),
        "layers": int(np.unique(source.layer_ids).size),
        "layer_ids": source.layer_ids.tolist(),
        "experts": source.num_experts,
        "top_k": source.top_k,
        "experts_used": counts.experts_used(),
        "phases": dict(zip(PHASE_NAMES, counts.phases.tolist(), strict=True)),
        "labels": counts.requests.by_label(labels),
        "steps": len(counts.steps) if source.has_step else None,
        "has_weights": source.has_weights,
        "has_home": source.has_home,
        "model": asdict(source.model),
        "bytes_on_disk": sum(file.stat().st_size for file in _files(source.path)),
        "fingerprint": None if problems else counts.digest.hexdigest(),
        "warnings": [*source.warnings, *counts.warnings()],
        "problems": problems,
    }
    if isinstance(source, NativeSource):
        document |= {
            "file_format": "native",
            "parts": source.num_parts,
            "ranks": source.ranks,
            "source": source.manifest.source,
        }
    return document


class _Counts:
    """What is counted in the pass; memory grows with requests and steps, not with tokens."""

    def __init__(self, source: TraceSource) -> None:
        self._source = source
        self.tokens = 0
        self.phases = np.zeros(len(PHASE_NAMES), np.int64)
        self.steps = np.empty(0, np.int64)
        self.requests = _Requests()
        self.digest = Fingerprint(source.num_experts, source.layer_ids)
        self._used = np.zeros(source.top_k + 1, np.int64)  # token-layers by number of experts
        self._largest = -1
        self._first: NDArray[np.integer] | None = None
        self._constant = np.ones(source.num_layers, bool)

    def add(self, chunk: Trace) -> None:
        self.tokens += chunk.num_tokens
        self.phases += np.bincount(chunk.phase, minlength=len(PHASE_NAMES))
        if chunk.step is not None:
            self.steps = np.union1d(self.steps, chunk.step)
        self.requests.add(chunk)
        self.digest.update(chunk)
        used = (chunk.experts >= 0).sum(axis=2)
        self._used += np.bincount(used.reshape(-1), minlength=len(self._used))
        self._largest = max(self._largest, int(chunk.experts.max()))
        if self._first is None:
            self._first = chunk.experts[0]
        self._constant &= (chunk.experts == self._first).all(axis=(0, 2))

    def experts_used(self) -> dict[str, float] | None:
        """Least, mean and most experts of a token in a layer."""
        present = np.flatnonzero(self._used)
        if not present.size:
            return None
        mean = float(np.arange(len(self._used)) @ self._used / self._used.sum())
        return {"min": int(present[0]), "mean": mean, "max": int(present[-1])}

    def warnings(self) -> list[str]:
        source, found = self._source, []
        if self._used[0]:
            found.append(f"{self._used[0]} token-layers use no expert at all")
        if self.tokens >= _FEW_TOKENS:
            if self._largest < source.num_experts // 2:
                found.append(
                    f"no expert above {self._largest} is ever used: "
                    f"is num_experts {source.num_experts} right?"
                )
            constant = source.layer_ids[self._constant].tolist()
            if constant and source.top_k < source.num_experts:
                found.append(f"all tokens use the same experts in layers {constant}")
        repeating = self.requests.repeating()
        if repeating.size:
            found.append(
                f"{counted(repeating.size, 'request has', 'requests have')} several tokens at one "
                f"position, e.g. {repeating[0]} (recomputed after preemption, or one id for "
                "several requests?)"
            )
        return found


class _Requests:
    """Tokens and range of positions of every request seen."""

    def __init__(self) -> None:
        self.ids = np.empty(0, np.int64)
        self._tokens = np.empty(0, np.int64)
        self._lowest = np.empty(0, np.int64)
        self._highest = np.empty(0, np.int64)

    def add(self, chunk: Trace) -> None:
        ids = np.concatenate([self.ids, chunk.request])
        tokens = np.concatenate([self._tokens, np.ones(chunk.num_tokens, np.int64)])
        lowest = np.concatenate([self._lowest, chunk.position])
        highest = np.concatenate([self._highest, chunk.position])
        order = np.argsort(ids, kind="stable")
        self.ids, start = np.unique(ids[order], return_index=True)
        self._tokens = np.add.reduceat(tokens[order], start)
        self._lowest = np.minimum.reduceat(lowest[order], start)
        self._highest = np.maximum.reduceat(highest[order], start)

    def repeating(self) -> NDArray[np.int64]:
        """Requests with more tokens than there are positions between their lowest and highest."""
        return self.ids[self._tokens > self._highest - self._lowest + 1]

    def by_label(self, labels: dict[int, str]) -> dict[str, dict[str, int]]:
        """Label -> number of requests and tokens."""
        found: dict[str, dict[str, int]] = {}
        for request, tokens in zip(self.ids.tolist(), self._tokens.tolist(), strict=True):
            if request in labels:
                entry = found.setdefault(labels[request], {"requests": 0, "tokens": 0})
                entry["requests"] += 1
                entry["tokens"] += tokens
        return dict(sorted(found.items()))


def _files(path: Path) -> Iterator[Path]:
    yield from layout.own_files(path) if path.is_dir() else [path]
