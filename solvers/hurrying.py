"""How `local_search` spends a time limit that is too short for its ladder of prices.

Problem: placements with replicas whose mean imbalance over layers keeps a cap, from few proposals.
One long anneal of a layer at the right price of imbalance is worth more than several short ones at
a ladder of prices of which one is right; but the right price is not known, and depends on how long
anneals are.

Method: the price is learnt from layer to layer. Layers are annealed batch by batch, each at the
price at which the batches before say that the cap is just kept: the logarithm of what imbalance
exceeds 1 by falls about linearly with that of the price, and a line is fitted to the batches, later
ones counting more. This is done twice: shortly, which tells the price and how long proposals take,
and with most of the time that is left. Warm anneals, at a higher price while the cap is broken and
a lower one when not, then give the final choice something to choose from.

Complexity: the time that there is. No guarantee. Source: placer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from solvers.pacing import paced
from solvers.parallel import available_cores
from solvers.selection import Caps

if TYPE_CHECKING:
    from solvers.local_search import Search

SHORT = 0.5  # of the usual proposals: with fewer, time is short
# Every layer is annealed twice: for about one of FIRST_PART parts of the time, and for a share of
# what is left then, or with MOST times the usual proposals.
FIRST_PART, SHARE, MOST = 6, 0.87, 2
WARM_PART = 10  # times fewer proposals in a warm anneal
ABOVE, BELOW = 4.0, 0.5  # times the price, of warm anneals while the cap is broken and when not
SPEEDUP = 1.35  # of proposals in long anneals, which are colder
EASING = -0.25  # power of how many times longer anneals are with which the right price falls
LENDERS = ("eplb_global",)  # whose plan keeps the cap where nothing else does
PATIENCE = 4  # rounds of them without improvement
BATCHES, TRUST = 12, 3  # and how many of them the price of the first time counts for
UNDER = 0.95  # share of the excess that is allowed, to aim at
FIRST_PRICE = 3.0  # of imbalance, in messages per token and layer
LEAST_PRICE, MOST_SHARE = 0.05, 0.6  # the most is a share of the traffic of where it starts
# Of the line: its usual slope, what that counts for, its limits; what a batch counts for beside the
# next; how far beyond the prices that were tried it is trusted (logarithm).
SLOPE, SLOPE_WEIGHT, SLOPES, FADING, REACH = 0.4, 1.0, (0.2, 1.5), 0.8, 0.7


def hurries(search: Search, caps: Caps) -> bool:
    """Whether time is short, layers have replicas, and one price is to learn: of the imbalance.

    Without replicas anneals are short of time seldom, and the ladder does as well.
    """
    from solvers.local_search import AROUND as AROUND_PRICE
    from solvers.local_search import LADDER, LADDER_SHARE, ROUNDS

    problem, layers = search.problem, search.layers
    alone = problem.num_workloads == 1 and problem.max_moves is None and problem.slot_budget is None
    if search.budget.seconds is None or caps.imbalance is None:
        return False
    if not (alone and layers.replicates):
        return False
    later = ROUNDS * len(AROUND_PRICE)
    anneals, candidates = len(LADDER) / LADDER_SHARE + later, len(LADDER) + later
    patient = paced(layers, search.seed, search.budget, anneals, candidates)
    return patient.proposals < SHORT * layers.usual_proposals


def hurry(search: Search, caps: Caps) -> None:
    """Fill the search's pools until its time is over."""
    from solvers.local_search import IMPROVEMENT, worth_of

    budget, layers = search.budget, search.layers
    assert caps.imbalance is not None
    search.open(LENDERS)
    proposals = paced(layers, search.seed, budget, FIRST_PART, 1 + FIRST_PART).proposals
    start = budget.elapsed()
    price = anneal_once(search, caps, FIRST_PRICE, 0.0, proposals)
    passes = SPEEDUP * SHARE * budget.remaining() / max(budget.elapsed() - start, 1e-9)
    longer = max(1.0, min(passes, MOST * layers.usual_proposals / proposals))
    proposals, price = int(longer * proposals), price * longer**EASING
    price = anneal_once(search, caps, price, TRUST, proposals)
    best, idle = np.inf, 0
    while idle < PATIENCE and not budget.expired():
        over = search.imbalance(caps) > caps.imbalance
        around = max(price * (ABOVE if over else BELOW), caps.floor)
        search.extend([layers.uniform_prices(around)], 1 + proposals // WARM_PART, warm=True)
        worth = worth_of(search, caps)
        idle = 0 if worth < best - IMPROVEMENT * abs(worth) else idle + 1
        best = min(best, worth)


def anneal_once(search: Search, caps: Caps, price: float, trust: float, proposals: int) -> float:
    """Anneal every layer, at the latest within a share of the time; the price to go on with.

    Args:
        price: of the first layers.
        trust: how many batches it counts for.
        proposals: for each layer; fewer for later ones where that would take too long.
    """
    assert caps.imbalance is not None
    budget, num_layers = search.budget, search.problem.num_layers
    size = max(available_cores(), -(-num_layers // BATCHES))
    # an order in which each batch has layers from everywhere (golden ratio)
    order = np.argsort(np.arange(num_layers) * 0.6180339887 % 1).tolist()
    dearest = MOST_SHARE * float(np.mean([pool[0].traffic[0] for pool in search.pools]))
    end = budget.elapsed() + SHARE * budget.remaining()
    guess, tried, excess = np.log(price), [], []
    for first in range(0, num_layers, size):
        batch = order[first : first + size]
        tried.append(max(price, caps.floor))
        start = budget.elapsed()
        search.extend([search.layers.uniform_prices(tried[-1])], proposals, some=batch)
        if budget.expired():
            break
        now, left = budget.elapsed(), (num_layers - first) / size - 1
        late = (now - start) * left / max(end - now, 1e-9)
        proposals = max(1, int(proposals / max(1.0, late)))
        found = [search.pools[layer][-1].imbalance[0] for layer in batch]
        excess.append(float(np.mean(found)) - 1)
        learnt = np.log(next_price(tried, excess, UNDER * (caps.imbalance - 1)))
        blend = (trust * guess + len(tried) * learnt) / (trust + len(tried))
        price = min(float(np.exp(blend)), dearest)
    return price


def next_price(tried: Sequence[float], excess: Sequence[float], wanted: float) -> float:
    """The price at which imbalance would exceed 1 by what is wanted, see the module.

    Args:
        tried: [n] prices of batches, in order; n >= 1.
        excess: [n] mean imbalance of each batch, less 1.
        wanted: likewise; 0 or less is never reached.
    """
    x = np.log(tried)
    y = np.log(np.maximum(excess, 1e-4))
    weight = FADING ** np.arange(x.size)[::-1]
    weight /= weight.sum()
    mean_x, mean_y = weight @ x, weight @ y
    with_usual = SLOPE_WEIGHT * SLOPE - weight @ ((x - mean_x) * (y - mean_y))
    slope = with_usual / (SLOPE_WEIGHT + weight @ (x - mean_x) ** 2)
    target = mean_x + (mean_y - np.log(max(wanted, 1e-4))) / np.clip(slope, *SLOPES)
    within = np.clip(target, x.min() - REACH, x.max() + REACH)
    return max(LEAST_PRICE, float(np.exp(within)))
