"""`Bound`: what is proven about one figure of a placement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """A proven bound beside the value of a placement, on the same data.

    Attributes:
        figure: a key of `solvers.check.check`'s figures, or "objective".
        value: of the placement, as the checker computes it.
        lower_bound: what no placement of the problem is below.
        method: how it was proven, in a few words.
        seconds: wall-clock time that the proof took.
        max_imbalance: the bound is on placements with at most this imbalance, as the cap counts it;
            None = on all.
    """

    figure: str
    value: float
    lower_bound: float
    method: str
    seconds: float
    max_imbalance: float | None = None

    @property
    def gap(self) -> float:
        """(value - lower_bound) / value: how far below the value the optimum can be at most."""
        if self.value <= 0:
            return 0.0
        return max(0.0, self.value - self.lower_bound) / self.value

    def to_document(self) -> dict[str, float | str]:
        """As it stands in a plan file."""
        found: dict[str, float | str] = {
            "figure": self.figure,
            "value": self.value,
            "lower_bound": self.lower_bound,
            "gap": self.gap,
            "method": self.method,
        }
        if self.max_imbalance is not None:
            found["max_imbalance"] = self.max_imbalance
        return found
