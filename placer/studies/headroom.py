"""What a placement can bring at most, and what the solver reaches of it."""

from __future__ import annotations

from typing import Any

from placer.placement import contiguous_like
from placer.planning import Settings
from placer.studies.fitting import Fitted, Halves, balance_settings, figure_names, fit, judged


def headroom(halves: Halves, fitted: Fitted, settings: Settings) -> dict[str, Any]:
    """Gain over contiguous placement: by the proven bound, reached in-sample, and held out.

    Args:
        halves: what `fitted` was fitted to, and what judges it.
        fitted: a plan for the settings.
        settings: as it was fitted.

    Returns:
        `figure`: what the bound is of (the objective, or one of its parts); `contiguous`,
        `reached` and `bound`, in-sample, with `gain_reached` and `gain_at_most` (None where
        nothing is proven); `held_out`: figures of the plan and of contiguous placement and their
        change, with intervals; and `balance`: the same in-sample figures of imbalance when nothing
        but balance is asked for.
    """
    contiguous = contiguous_like(fitted.placement)
    judge = judged(halves.judge, {"plan": fitted.placement, "contiguous": contiguous}, settings)
    document: dict[str, Any] = {
        **_in_sample(fitted),
        "status": fitted.result.status,
        "held_out": {
            "requests": judge.num_requests,
            "tokens": judge.num_tokens,
            "figures": list(figure_names(settings)),
            "plan": judge.figures("plan"),
            "contiguous": judge.figures("contiguous"),
            "change": judge.change("plan", "contiguous"),
        },
    }
    document["balance"] = _in_sample(fit(halves.fit, balance_settings(settings)))
    return document


def _in_sample(fitted: Fitted) -> dict[str, Any]:
    """The certificate's figure of the plan, of its bound and of contiguous placement."""
    from solvers import check

    problem, result = fitted.problem, fitted.result
    table = contiguous_like(fitted.placement).physical_to_logical
    parts = check.check(problem, table)
    figure = result.bound_of or "objective"
    if figure == "objective":
        before, after = check.objective(problem, parts), result.objective
    else:
        before, after = parts[figure], result.parts[figure]
    bound = result.lower_bound
    return {
        "figure": problem.objective if figure == "objective" else figure,
        "contiguous": before,
        "reached": after,
        "bound": bound,
        "gain_reached": 1 - after / before if before else None,
        "gain_at_most": 1 - bound / before if before and bound is not None else None,
    }
