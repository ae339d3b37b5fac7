"""The frontier between messages and imbalance, every point judged on held-out tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from placer.errors import InfeasibleError, UsageError
from placer.evaluation import evaluate
from placer.plan import Plan
from placer.planning.making import figures_of_interest, placement_of, plan_of_result
from placer.planning.parts import split_sources
from placer.planning.posing import build_problem
from placer.planning.settings import Progress, Settings
from placer.planning.stopwatch import Stopwatch
from placer.trace.source import TraceSource

FORMAT = "placer.frontier"
SCHEMA_VERSION = 1
PEERS = ("contiguous", "eplb")


@dataclass(frozen=True, eq=False)
class Point:
    """A plan on the frontier.

    Attributes:
        plan: with its held-out figures.
        fitted: traffic and imbalance on the tokens that it was fitted to.
        is_knee: whether giving up more balance saves little from here on.
    """

    plan: Plan
    fitted: dict[str, float]
    is_knee: bool


@dataclass(frozen=True, eq=False)
class Frontier:
    """Plans from the most balanced to the one with least messages.

    Attributes:
        points: at least one.
        peers: held-out figures of load-only placements, for comparison; EPLB's only where it knows
            what is asked of where experts sit.
        figures: names of the figures that matter.
        scope: what the figures are of.
    """

    points: tuple[Point, ...]
    peers: dict[str, dict[str, Any]]
    figures: tuple[str, ...]
    scope: str

    @property
    def knee(self) -> Point:
        return next(point for point in self.points if point.is_knee)

    def to_document(self) -> dict[str, Any]:
        """As JSON; the plans themselves lie in files of their own."""
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "scope": self.scope,
            "modelled": True,
            "figures": list(self.figures),
            "points": [
                {
                    "plan": plan_name(number),
                    "knee": point.is_knee,
                    "fitted": point.fitted,
                    "metrics": {k: point.plan.prediction["metrics"][k] for k in self.figures},
                }
                for number, point in enumerate(self.points)
            ],
            "peers": {
                name: {figure: metrics[figure] for figure in self.figures}
                for name, metrics in self.peers.items()
            },
        }


def plan_name(number: int) -> str:
    """File name of a point's plan."""
    return f"plan-{number:02d}.json"


def make_frontier(
    sources: Sequence[TraceSource], settings: Settings, progress: Progress = lambda _: None
) -> Frontier:
    """Fit the frontier to one part of the requests and judge every point on the other.

    Which points stay and which one is the knee is decided on the tokens that the plans were fitted
    to; the held-out figures choose nothing. Once the search has begun, the first Ctrl-C ends it;
    what was found is judged and returned.

    Raises:
        UsageError: the dispatch's traffic does not depend on the placement.
        InfeasibleError: no placement keeps the pins, slots and moves that were asked for.
    """
    import solvers

    watch = Stopwatch()
    if settings.dispatch == "allgather":
        raise UsageError("under allgather every plan sends the same messages", "solve for balance")
    settings = replace(settings, solver="local_search", objective="traffic", max_imbalance=None)
    parts = split_sources(sources, settings)
    problem = build_problem(parts.fit, settings, progress)
    progress("searching the frontier")
    budget = solvers.Budget(settings.time_limit_s)
    with solvers.ctrl_c_stops(budget):
        try:
            results = solvers.frontier(problem, seed=settings.seed, budget=budget)
        except solvers.InfeasibleProblem as error:
            raise InfeasibleError(str(error)) from error
        best = solvers.knee(results)
        points = []
        for number, result in enumerate(results):
            progress(f"replaying the {parts.scope} tokens: plan {number + 1} of {len(results)}")
            plan = plan_of_result(result, problem, parts, settings, watch)
            fitted = {
                "traffic": result.objective,
                "imbalance": solvers.capped_imbalance(result.parts),
            }
            points.append(Point(plan, fitted, number == best))
        figures = figures_of_interest(settings)
        peers = {}
        for name in PEERS[:1] if problem.restrictions else PEERS:
            progress(f"replaying {name}")
            if name == "contiguous":
                metrics = points[0].plan.prediction["baselines"]["contiguous"]
            else:
                result = solvers.solve(problem, name, seed=settings.seed)
                metrics = evaluate(
                    placement_of(problem, result),
                    {},
                    parts.judge,
                    scope=parts.scope,
                    dispatch=settings.dispatch,
                    replica_policy=settings.replica_policy,
                    seed=settings.seed,
                ).metrics
            peers[name] = {figure: metrics[figure] for figure in figures}
        return Frontier(tuple(points), peers, figures, parts.scope)
