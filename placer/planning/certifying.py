"""How far from the optimum a placement can be at most, on the tokens that it is judged on here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from placer.errors import UsageError
from placer.plan import Plan
from placer.planning.parts import judging_part
from placer.planning.posing import build_problem
from placer.planning.settings import Progress, Settings
from placer.planning.stopwatch import Stopwatch
from placer.trace.source import TraceSource
from placer.wording import among

if TYPE_CHECKING:
    from solvers import Budget, Problem, Result
    from solvers.bounds.bound import Bound

DEFAULT_EFFORT, TRAFFIC_EFFORT, COMPARISON_EFFORT = 3.0, 8.0, 16.0
"""Nominal seconds per proof where no time was given: the same bytes on every machine."""
PROOF_SHARE = 0.2
"""Of a time limit, that is kept for the proof."""
OBJECTIVE_FIGURES = {"affinity": "cross_rank_fraction", "coactivation": "coactivation_cut"}
"""Figures that are all of an objective."""

FORMAT = "placer.certificate"
SCHEMA_VERSION = 1


def bounds_of_result(
    problem: Problem, result: Result, settings: Settings, budget: Budget, progress: Progress
) -> list[Bound]:
    """Bounds on the figures of a result: all of them where time was given for it.

    Without, only on what is to be minimised, with an effort, and within the time limit if there is
    one. What stops `budget`, the search's, stops the proofs.
    """
    from solvers.bounds.certifying import certify

    own = figure_of_objective(problem)
    if settings.certify_s is not None:
        progress("proving bounds")
        return certify(problem, result.placement, budget.other(settings.certify_s))
    if own is None or result.status == "optimal" or budget.interrupted:
        return []
    progress("proving bounds")
    effort = DEFAULT_EFFORT if own in OBJECTIVE_FIGURES.values() else TRAFFIC_EFFORT
    left = None
    if budget.seconds is not None:  # what compiling took was no time of the search's
        left = max(budget.remaining(), PROOF_SHARE * budget.seconds)
    return certify(problem, result.placement, budget.other(left, effort), [own])


def bounds_of_results(problem: Problem, results: Sequence[Result]) -> list[Bound | None]:
    """Bounds on the messages of several results, each among plans that are as balanced.

    With redundant slots among all plans.

    None where the solvers' own bound is all there is: other objectives, nodes.
    """
    from solvers import Budget
    from solvers.bounds.span import bounds_as_balanced

    figure, found = figure_of_objective(problem), []
    if problem.objective == "traffic" and figure not in (None, "objective"):
        assert figure is not None
        parts = [result.parts for result in results]
        found = bounds_as_balanced(problem, figure, parts, Budget(effort=COMPARISON_EFFORT))
    return list(found) or [None] * len(results)


def figure_of_objective(problem: Problem) -> str | None:
    """The figure to bound where nobody asked for more; None: the solver's own bound is enough.

    Traffic is messages, and between several nodes "objective" itself.
    """
    if problem.objective != "traffic" or problem.dispatch == "allgather":
        return OBJECTIVE_FIGURES.get(problem.objective)
    if problem.tokens is None or problem.link_cost is not None or problem.num_workloads > 1:
        return None
    between_nodes = problem.num_nodes > 1 and problem.node_weight > 0
    return "objective" if between_nodes else f"messages_{problem.dispatch}"


def with_bounds(
    certificate: Mapping[str, Any], bounds: Sequence[Bound], problem: Problem
) -> dict[str, Any]:
    """A plan's certificate with proven bounds; one on the objective itself takes the first place.

    Args:
        certificate: from the solver.
        bounds: from `bounds_of_result`.
        problem: what was solved.
    """
    found = dict(certificate)
    if not bounds:
        return found
    found["bounds"] = [bound.to_document() for bound in bounds]
    own = "imbalance" if problem.objective == "balance" else figure_of_objective(problem)
    for bound in bounds:
        known = found["lower_bound"]
        if bound.figure != own or abs(bound.value - found["value"]) > 1e-9:
            continue
        same = found["bound_of"] in (bound.figure, "objective")
        if known is None or bound.lower_bound > known or not same:
            found |= {
                "bound_of": bound.figure,
                "lower_bound": bound.lower_bound,
                "gap": bound.gap,
            }
            if bound.max_imbalance is not None:
                found["max_imbalance"] = bound.max_imbalance
            if bound.gap <= 1e-9 and found["status"] == "feasible":
                found["status"] = "optimal"
    return found


@dataclass(frozen=True)
class Certificate:
    """What is proven about a plan on a trace.

    Attributes:
        scope: "in-sample" where the plan was fitted to some of the tokens, else "unseen".
        tokens, requests: of the trace that were counted.
        sampled_tokens: of them, that the figures from single tokens (span, messages) are of.
        bounds: on the plan's figures.
        timings: wall-clock seconds, see `Stopwatch`.
    """

    scope: str
    tokens: int
    requests: int
    sampled_tokens: int
    bounds: tuple[Bound, ...]
    timings: dict[str, float]

    def to_document(self) -> dict[str, Any]:
        """The JSON document of `placer certify`."""
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "scope": self.scope,
            "tokens": self.tokens,
            "requests": self.requests,
            "sampled_tokens": self.sampled_tokens,
            "bounds": [
                bound.to_document() | {"seconds": round(bound.seconds, 3)} for bound in self.bounds
            ],
            "seconds": self.timings["total_s"],
            **{key: value for key, value in self.timings.items() if key == "compile_s"},
        }


def certify_plan(
    plan: Plan,
    source: TraceSource,
    *,
    seconds: float,
    figures: Sequence[str] | None = None,
    phase: str | None = None,
    as_balanced: bool = True,
    progress: Progress = lambda _: None,
) -> Certificate:
    """Bound a plan's figures on all tokens of a trace, whoever made the plan.

    Args:
        plan: of the trace's model.
        source: the trace.
        seconds: for the proofs, all together.
        figures: which; None = all that anything can be proven about.
        phase: only its tokens.
        as_balanced: bound span and messages of plans that are no less balanced than this one.
        progress: told what is being done.

    Raises:
        UsageError: another model's trace, or a figure that nothing is known about.
    """
    from solvers import Budget
    from solvers.bounds.certifying import certify, known_figures

    unknown = sorted(set(figures or ()) - set(known_figures()))
    if unknown:
        raise UsageError(
            f"no bound is known for {unknown[0]!r}", among(unknown[0], known_figures())
        )
    _, scope = judging_part(source, plan, phase=phase, all_requests=True)
    placement = plan.placement
    watch = Stopwatch()
    part = source.filtered(phase=phase)
    settings = Settings(
        num_ranks=placement.num_ranks,
        num_nodes=placement.num_ranks // placement.ranks_per_node,
        slots_per_rank=placement.slots_per_rank,
        dispatch=plan.dispatch,
        balance_over="trace",
    )
    problem = build_problem(part, settings, progress)
    progress(f"proving bounds for about {seconds:g} s; Ctrl-C keeps what is proven")
    slots = placement.physical_to_logical
    bounds = certify(problem, slots, Budget(seconds), figures, as_balanced=as_balanced)
    return Certificate(
        scope=scope,
        tokens=part.num_tokens,
        requests=len(part.request_ids()),
        sampled_tokens=0 if problem.tokens is None else len(problem.tokens),
        bounds=tuple(bounds),
        timings=watch.timings(),
    )
