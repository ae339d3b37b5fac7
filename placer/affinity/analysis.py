"""One pass over a trace for everything that `placer analyze` shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.affinity.counts import Progress, count_by
from placer.affinity.drift import Drift, load_drift
from placer.affinity.groups import FOLD_NAMES, both_of, fold_of, phase_of
from placer.affinity.information import held_out_information
from placer.affinity.loads import LabelLoads, PartLoad, RequestLoads, total
from placer.affinity.model import Affinity
from placer.affinity.skew import load_skew
from placer.affinity.statistics import figures, per_layer, summary
from placer.trace.model import Trace
from placer.trace.source import TraceSource


@dataclass(frozen=True, eq=False)
class Analysis:
    """Counts and loads of a trace and of its parts.

    Attributes:
        overall: counts of all tokens.
        phases: phase -> counts of its tokens; only phases that occur.
        held_out_bits: [L-1] what the affinity of one half of the requests says about the other
            half, mean of both directions (`held_out_information`); nan for a single request.
        labels: workload label -> load of its requests; "" for requests without one; empty when
            no request has a label.
        request_halves: load of the requests with lower and with higher ids; None when there
            is only one request.
    """

    overall: Affinity
    phases: dict[str, Affinity]
    held_out_bits: NDArray[np.float64]
    labels: dict[str, PartLoad]
    request_halves: tuple[PartLoad, PartLoad] | None

    def summary(self, num_ranks: Sequence[int] | None = None) -> dict[str, Any]:
        """The figures as a JSON document; see `placer.affinity.statistics.summary`."""
        overall = summary(self.overall, num_ranks)
        overall["affinity"]["all_pairs"]["held_out_bits"] = per_layer(self.held_out_bits)
        phases = {
            name: overall if counts is self.overall else summary(counts, num_ranks)
            for name, counts in self.phases.items()
        }
        return {
            "overall": overall,
            "phases": phases,
            "labels": {name: self._label(name) for name in self.labels},
            "drift": {
                "phases": self._phase_drift(),
                "request_halves": self._halves_drift(),
            },
        }

    def label_drift(self, label: str) -> Drift | None:
        """Load of a label against the rest of the trace; None when there is no rest."""
        own = self.labels[label]
        everything = total(self.labels.values())
        assert everything is not None
        rest = everything - own
        return _drift(own, rest) if rest.num_tokens else None

    def _label(self, name: str) -> dict[str, Any]:
        part, drift = self.labels[name], self.label_drift(name)
        return {
            "num_tokens": part.num_tokens,
            "load": figures(load_skew(part.load)),
            "drift_from_rest": None if drift is None else figures(drift),
        }

    def _phase_drift(self) -> dict[str, Any] | None:
        if len(self.phases) < 2:
            return None
        first, second = self.phases.values()
        return figures(load_drift(first.load, second.load, first.tokens, second.tokens))

    def _halves_drift(self) -> dict[str, Any] | None:
        return None if self.request_halves is None else figures(_drift(*self.request_halves))


def analyse(
    source: TraceSource | Trace | Iterable[Trace],
    *,
    progress: Progress | None = None,
    threads: int | None = None,
) -> Analysis:
    """Count a trace, its phases and two halves of its requests, and the load of its labels.

    Memory: the tables of a count (5 of E x E per layer) per phase and half, whatever the tokens.

    Args:
        source: an open trace, a trace in memory, or its chunks.
        progress: told of the tokens counted.
        threads: how many; by default as many as there are cores.

    Raises:
        ValueError: there are no tokens, or the chunks are not of one model.
    """
    chunks: Iterable[Trace]
    if isinstance(source, Trace):
        chunks = [source]
    elif isinstance(source, TraceSource):
        chunks = source.chunks()
    else:
        chunks = source
    labels, requests = LabelLoads(), RequestLoads()

    def looked_at() -> Iterable[Trace]:
        for chunk in chunks:
            labels.add(chunk)
            requests.add(chunk)
            yield chunk

    groups = count_by(looked_at(), both_of(phase_of, fold_of), progress=progress, threads=threads)
    if not groups:
        raise ValueError("there is nothing to analyse: no tokens")
    phases = _sums({key: key.split("/")[0] for key in groups}, groups)
    folds = _sums({key: key.split("/")[1] for key in groups}, groups)
    overall = reduce(add, phases.values())
    return Analysis(
        overall=overall,
        phases=phases,
        held_out_bits=_held_out(folds, overall),
        labels={} if set(labels.loads) == {""} else dict(sorted(labels.loads.items())),
        request_halves=requests.halves(),
    )


def _sums(names: dict[str, str], groups: dict[str, Affinity]) -> dict[str, Affinity]:
    """Groups of the same name together."""
    found: dict[str, Affinity] = {}
    for key, name in names.items():
        found[name] = found[name] + groups[key] if name in found else groups[key]
    return found


def _held_out(folds: dict[str, Affinity], overall: Affinity) -> NDArray[np.float64]:
    if len(folds) < 2:
        return np.full(len(overall.affinity), np.nan)
    first, second = (folds[name] for name in FOLD_NAMES)
    return (held_out_information(first, second) + held_out_information(second, first)) / 2


def _drift(first: PartLoad, second: PartLoad) -> Drift:
    return load_drift(first.load, second.load, first.tokens, second.tokens)
