"""Plans fitted to some requests, judged side by side on others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from placer.evaluation import homes_fit
from placer.placement import Placement
from placer.planning import Settings, build_problem, placement_of, run_solver
from placer.trace.source import TraceSource
from placer.trace.split import split_requests

if TYPE_CHECKING:
    from solvers import Problem, Result

Progress = Callable[[str], None]

BALANCE_FIGURES = ("imbalance", "imbalance_batches_p95")


@dataclass(frozen=True, eq=False)
class Halves:
    """A trace in two: requests to fit plans to, and requests that judge them."""

    fit: TraceSource
    judge: TraceSource

    def part(self, *, phase: str | None = None, requests: Any = None) -> Halves | None:
        """The same two sides of a part of the trace; None where a side would have no tokens."""
        sides = []
        for side in (self.fit, self.judge):
            present = side.requests(phase=phase)
            kept = present if requests is None else np.intersect1d(present, requests)
            if kept.size == 0:
                return None
            sides.append(side.filtered(phase=phase, requests=kept))
        return Halves(*sides)

    def fewest_requests(self) -> int:
        """Requests of the smaller side."""
        return min(int(side.request_ids().size) for side in (self.fit, self.judge))


@dataclass(frozen=True, eq=False)
class Fitted:
    """A placement and the solver's word on it."""

    placement: Placement
    problem: Problem
    result: Result


def halve(source: TraceSource, settings: Settings) -> Halves:
    """Split by request, as `placer solve` does with the same seed and share."""
    split = split_requests(
        source.request_ids(),
        seed=settings.seed,
        holdout=settings.holdout,
        labels=source.request_labels(),
    )
    return Halves(source.filtered(requests=split.fit), source.filtered(requests=split.held_out))


def fit(source: TraceSource, settings: Settings, earlier: Fitted | None = None) -> Fitted:
    """A plan of these tokens.

    Args:
        source: tokens to fit to.
        settings: of the plan.
        earlier: a plan with the same solver and seed, to be taken where its problem was the same.

    Raises:
        KeyboardInterrupt: Ctrl-C; a search that was cut short says nothing about the tokens.
    """
    problem = build_problem(source, settings, lambda _: None)
    if earlier is not None and _same(problem, earlier.problem):
        return earlier
    result = run_solver(problem, settings)
    if result.termination == "interrupted":
        raise KeyboardInterrupt
    return Fitted(placement_of(problem, result), problem, result)


def _same(problem: Problem, other: Problem) -> bool:
    """Whether two problems agree in every field."""
    for field in fields(problem):
        ours, theirs = getattr(problem, field.name), getattr(other, field.name)
        if isinstance(ours, np.ndarray) or isinstance(theirs, np.ndarray):
            if type(ours) is not type(theirs) or not np.array_equal(ours, theirs):
                return False
        elif ours != theirs:
            return False
    return True


def headline(settings: Settings) -> str:
    """The figure that a plan is chosen for."""
    if settings.dispatch == "allgather" or settings.objective == "balance":
        return "imbalance"
    return f"messages_{settings.dispatch}"


def figure_names(settings: Settings) -> tuple[str, ...]:
    """The headline, then balance."""
    return tuple(dict.fromkeys((headline(settings), *BALANCE_FIGURES)))


class Judge:
    """Replays some tokens under placements, once each, and compares them on the same resamples."""

    def __init__(self, source: TraceSource, settings: Settings) -> None:
        self._source = source
        self._settings = settings
        self._ignore_home = not homes_fit(source, settings.num_ranks)
        self._replays: dict[str, Any] = {}
        self.num_requests = int(source.request_ids().size)
        self.num_tokens = source.num_tokens

    def add(self, name: str, placement: Placement) -> None:
        from placer.cost import replay

        self._replays[name] = replay(
            self._source.chunks(),
            placement.for_rounds(self._source.layer_ids),
            dispatch=self._settings.dispatch,
            replica_policy=self._settings.replica_policy,
            mixed_batches=False,
            ignore_home=self._ignore_home,
        )

    def figures(self, name: str) -> dict[str, Any]:
        """Figure -> {value, low, high} of one placement."""
        from placer.cost import measure

        found = measure(self._replays[name], seed=self._settings.seed).to_dict()
        return {
            figure: {key: found[figure][key] for key in ("value", "low", "high")}
            for figure in figure_names(self._settings)
        }

    def change(self, name: str, baseline: str) -> dict[str, Any]:
        """Figure -> {change, change_low, change_high} of one placement from another."""
        from placer.cost import compare

        found = compare(self._replays[name], self._replays[baseline], seed=self._settings.seed)
        return {
            figure: {key: found[figure][key] for key in ("change", "change_low", "change_high")}
            for figure in figure_names(self._settings)
        }


def judged(source: TraceSource, placements: Mapping[str, Placement], settings: Settings) -> Judge:
    """A judge that has replayed all of `placements`."""
    judge = Judge(source, settings)
    for name, placement in placements.items():
        judge.add(name, placement)
    return judge


def balance_settings(settings: Settings) -> Settings:
    """The same ranks and slots, for objective balance."""
    return replace(settings, objective="balance", max_imbalance=None)
