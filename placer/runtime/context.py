"""Who a rank is and where the others are, from a launcher's arguments or torchrun's environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from placer.errors import UsageError

DEFAULT_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class RankContext:
    """One rank of an expert-parallel group.

    Attributes:
        rank: its number, 0 to num_ranks - 1.
        num_ranks: G.
        ranks_per_node: ranks of one node; node of rank g is g // ranks_per_node.
        local_rank: its number among the ranks of its host, which picks its GPU.
        address, port: where rank 0 (or the launcher) keeps the store that ranks meet at.
        serves_store: whether this rank opens the store; else somebody else does.
        local_size: ranks of its host.
        timeout_s: how long it waits for another rank before it gives up.
        attempt: counts how often a launcher has started this group anew.
    """

    rank: int
    num_ranks: int
    ranks_per_node: int
    local_rank: int
    address: str
    port: int
    serves_store: bool
    local_size: int = 1
    timeout_s: float = DEFAULT_TIMEOUT_S
    attempt: int = 0

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node

    @property
    def ranks_of_host(self) -> range:
        """The ranks of the same host."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher such as torchrun started this process as one rank of several."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def context_from_environment(
    ranks_per_node: int | None = None,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    environment: Mapping[str, str] = os.environ,
) -> RankContext:
    """The context that torchrun's variables describe.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be set; LOCAL_RANK and LOCAL_WORLD_SIZE may
    be. Under torchrun its agent has a store at that address already; else rank 0 opens one.

    Args:
        ranks_per_node: of the plan; by default LOCAL_WORLD_SIZE.
        timeout_s: see `RankContext`.
        environment: the variables.

    Raises:
        UsageError: a variable is missing or not a number.
    """
    rank, num_ranks = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if not 0 <= rank < num_ranks:
        raise UsageError(f"RANK is {rank}, expected 0..{num_ranks - 1} by WORLD_SIZE")
    local_size = _number(environment, "LOCAL_WORLD_SIZE", num_ranks)
    if "MASTER_ADDR" not in environment:
        raise UsageError("MASTER_ADDR is not set", "start ranks with torchrun, or set it")
    return RankContext(
        rank=rank,
        num_ranks=num_ranks,
        ranks_per_node=local_size if ranks_per_node is None else ranks_per_node,
        local_rank=_number(environment, "LOCAL_RANK", rank % local_size),
        local_size=local_size,
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        serves_store=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout_s=timeout_s,
        attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None:
        if default is not None:
            return default
        raise UsageError(f"{name} is not set", "start ranks with torchrun, or set it")
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r}, expected a number") from None
