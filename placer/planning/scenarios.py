"""Scenarios that a plan's balance is asked of: folds of the requests, batches, workloads.

The busiest rank of a layer is a maximum, and a plan that is fitted to one sample makes that
sample's maximum small: on other requests it is larger. The mean over the requests without each of a
few folds is close to what held-out requests show (docs/adr/0016), and over batches or workloads it
is what each of them suffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placer.cost.order import concatenate
from placer.errors import UsageError
from placer.planning.settings import Settings
from placer.trace.concat import ConcatenatedSource
from placer.trace.model import Trace
from placer.trace.source import TraceSource
from placer.trace.split import scramble

LEAST_REQUESTS = 8  # of a fold; with fewer, the maximum is noise
BATCH_TOKENS = 256
LEAST_BATCHES, MOST_BATCHES = 3, 48
UNLABELLED = "(no label)"


@dataclass(frozen=True, eq=False)
class Scenarios:
    """Load by scenario.

    Attributes:
        load: [C, L, E] token-expert pairs.
        folds: they are folds of each workload's requests.
        requests: [R] request ids, increasing, and
        of_request: [R] the scenario of each; None when `sample` says it.
        workload: [C] workload of each scenario; None = all to one.
        names: of the workloads.
        sample: the tokens that the problem is posed on, and
        of_sample: [T] the scenario of each; None = a sample of all tokens.
    """

    load: NDArray[np.float64]
    folds: bool = False
    requests: NDArray[np.int64] | None = None
    of_request: NDArray[np.int64] | None = None
    workload: NDArray[np.int64] | None = None
    names: tuple[str, ...] = ()
    sample: Trace | None = None
    of_sample: NDArray[np.int64] | None = None

    def of(self, request: NDArray[np.int64]) -> NDArray[np.int64]:
        """[T] scenario of tokens by their request."""
        assert self.requests is not None
        assert self.of_request is not None
        return self.of_request[np.searchsorted(self.requests, request)]


def workloads_of(source: TraceSource) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names of the workloads, and [R] the workload of each of the source's requests.

    Several traces are a workload each; within one trace the labels of its requests are.
    """
    requests = source.request_ids()
    if isinstance(source, ConcatenatedSource):
        names = source.part_names()
        return names, source.part_of(requests)
    labels = source.request_labels()
    of_request = [labels.get(request, UNLABELLED) for request in requests.tolist()]
    distinct = sorted(set(of_request))
    index = {name: number for number, name in enumerate(distinct)}
    return tuple(distinct), np.array([index[name] for name in of_request], np.int64)


def request_scenarios(source: TraceSource, settings: Settings) -> Scenarios | None:
    """Folds of the requests, by workload where `robust` is asked for; or the workloads.

    None where there are too few requests for more than one scenario.

    Raises:
        UsageError: workloads are asked for and there is one only.
    """
    from solvers.problem import NUM_FOLDS, NUM_PARTS

    requests = source.request_ids()
    names: tuple[str, ...] = ()
    workload = np.zeros(requests.size, np.int64)
    if settings.robust is not None or settings.averaged_over == "workloads":
        names, workload = workloads_of(source)
        if len(names) < 2:
            raise UsageError(
                f"{source.name} has one workload only ({names[0]})",
                "give several traces, or one whose requests have labels (docs/traces.md)",
            )
    folds, fold = 1, np.zeros(requests.size, np.int64)
    if settings.averaged_over == "requests":
        fewest = int(np.bincount(workload).min())
        folds = max(1, min(NUM_FOLDS, fewest // LEAST_REQUESTS))
        parts = NUM_PARTS if folds == NUM_FOLDS else folds  # of which folds are made
        for number in range(int(workload.max()) + 1):  # equal shares of every workload
            own = np.nonzero(workload == number)[0]
            order = own[np.argsort(scramble(requests[own], settings.seed))]
            fold[order] = np.arange(own.size) % parts
    key = workload * NUM_PARTS + fold
    distinct, scenario = np.unique(key, return_inverse=True)
    if distinct.size == 1:
        return None
    of_scenario = distinct // NUM_PARTS if settings.robust is not None else None
    load = _loads(source, requests, scenario, distinct.size)
    return Scenarios(load, folds > 1, requests, scenario, of_scenario, names)


def _loads(
    source: TraceSource, requests: NDArray[np.int64], scenario: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """[C, L, E] pairs of each scenario, over all tokens."""
    from placer.planning.kernels import count_pairs

    load = np.zeros((count, source.num_layers, source.num_experts), np.int64)
    for chunk in source.chunks(with_weights=False):
        count_pairs(chunk.experts, scenario[np.searchsorted(requests, chunk.request)], load)
    return load.astype(np.float64)


def batch_scenarios(source: TraceSource, settings: Settings) -> Scenarios | None:
    """Some of the source's batches, a scenario each; the problem is posed on their tokens.

    A batch is a recorded forward pass, or BATCH_TOKENS consecutive tokens where none are recorded.
    As many as `profile_tokens` allows, at most MOST_BATCHES, drawn without a pattern. None where
    there is one only.
    """
    from placer.planning.kernels import count_pairs

    number = batch_numbers(source)
    distinct, of_token, size = np.unique(number, return_inverse=True, return_counts=True)
    whole = np.nonzero(2 * size >= np.median(size))[0]  # not the last, cut short
    most = int(settings.profile_tokens // max(1.0, float(np.mean(size[whole]))))
    most = min(MOST_BATCHES, max(most, LEAST_BATCHES), whole.size)
    if most < 2:
        return None
    drawn = whole[np.argsort(scramble(distinct[whole], settings.seed))[:most]]
    scenario_of_batch = np.full(distinct.size, -1)
    scenario_of_batch[np.sort(drawn)] = np.arange(most)
    of_sample = scenario_of_batch[of_token]
    kept: list[Trace] = []
    seen = 0
    for chunk in source.chunks():
        chosen = of_sample[seen : seen + chunk.num_tokens] >= 0
        seen += chunk.num_tokens
        if chosen.any():
            kept.append(chunk.select(chosen))
    sample = concatenate(kept)
    of_sample = of_sample[of_sample >= 0]
    order: NDArray[Any] = np.argsort(of_sample, kind="stable")
    sample, of_sample = sample.select(order), of_sample[order]
    load = np.zeros((most, source.num_layers, source.num_experts), np.int64)
    count_pairs(sample.experts, of_sample, load)
    return Scenarios(load.astype(np.float64), sample=sample, of_sample=of_sample)


def batch_numbers(source: TraceSource) -> NDArray[np.int64]:
    """[T] forward pass of each token, or the run of BATCH_TOKENS that it lies in."""
    if source.has_step:
        return np.concatenate([part["step"] for part in source.token_columns(["step"])])
    return np.arange(source.num_tokens) // BATCH_TOKENS
