"""How long anneals may be so that a search ends within its time.

Without a limit anneals are as long as pays. Where the time will not do for that, shorter anneals of
all layers at all prices beat long ones of some: the schedule stays, and its anneals shrink. An
anneal of coupled layers, which would otherwise be cut short while hot, is given a share of what
time is left and spreads it over its parts.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from solvers.budget import Budget
from solvers.layers import Layers, anneal
from solvers.parallel import available_cores

SHARE = 0.75  # of the remaining time that anneals are planned to take
PILOT = 8192  # proposals
PILOT_PRICE = 2.0  # of imbalance
LEAST = 4  # proposals per expert
FIRST_PART = 8  # times fewer proposals in the part that tells how long parts take


def paced(layers: Layers, seed: int, budget: Budget, anneals: float, candidates: int) -> Layers:
    """The layers with as many proposals per long anneal as the budget has time for.

    A short anneal on every core tells how fast they are.

    Args:
        layers: of the problem.
        seed: of the pilot.
        budget: of the search.
        anneals: long anneals of each layer that the search will do; shorter ones count in part.
        candidates: placements of each layer that it will judge.
    """
    if budget.seconds is None:
        return layers
    width = layers.problem.slots_per_rank
    prices = layers.uniform_prices(PILOT_PRICE)
    num_layers, cores = layers.problem.num_layers, available_cores()

    def made(proposals: int) -> None:
        """A candidate by an anneal of so many proposals."""
        slots = anneal(
            layers, 0, layers.start(0, width), width, prices, proposals=proposals, seed=(seed,)
        )
        layers.candidate(0, slots, width)

    def seconds(proposals: int) -> float:
        """That it takes, on all cores at once."""
        start = budget.elapsed()
        list(executor.map(made, [proposals] * cores))
        return (budget.elapsed() - start) / cores

    with ThreadPoolExecutor(cores) as executor:
        seconds(1)  # first calls are slow
        candidate = seconds(1)
        proposal = max(1e-9, (seconds(PILOT) - candidate) / PILOT)
    spare = SHARE * budget.remaining() - candidates * num_layers * candidate
    affordable = spare / (anneals * num_layers * proposal)
    least = LEAST * layers.problem.num_experts
    return replace(layers, most_proposals=max(least, int(affordable)))


@dataclass
class Pace:
    """Proposals for each part of one anneal, so that it cools within a share of the time.

    Attributes:
        budget: of the search; without a limit all parts have the usual number.
        parts: still to come.
        usual: proposals of a part where there is time.
        share: of the remaining time that the anneal may take.
    """

    budget: Budget
    parts: int
    usual: int
    share: float = 0.5
    _end: float = field(init=False)
    _asked: float = field(init=False, default=0.0)
    _given: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._end = self.budget.elapsed() + self.share * self.budget.remaining()

    def steps(self) -> int:
        """Proposals of the next part, by how long the last one took; few of the first."""
        if self.budget.seconds is None:
            return self.usual
        now = self.budget.elapsed()
        steps = max(1, self.usual // FIRST_PART)
        if self._given:
            step = max((now - self._asked) / self._given, 1e-9)
            affordable = (self._end - now) / max(1, self.parts) / step
            steps = int(min(self.usual, max(1.0, affordable)))
        self.parts -= 1
        self._asked, self._given = now, steps
        return steps
