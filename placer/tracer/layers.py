"""Which of the places where routing was seen are the layers of one model, and their numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from placer.errors import UsageError

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Group:
    """Sites that are alike but for the number of their layer.

    Attributes:
        prefix: path up to the layer number, e.g. "model.layers".
        names: paths of the sites, by increasing layer number.
        layer_ids: [L] their layer numbers.
    """

    prefix: str
    names: tuple[str, ...]
    layer_ids: tuple[int, ...]

    @property
    def in_attention(self) -> bool:
        """Whether these experts are part of an attention (mixture-of-attention heads)."""
        return bool(_ATTENTION.search(self.names[0][len(self.prefix) :]))

    @property
    def in_encoder(self) -> bool:
        return "encoder" in self.prefix.split(".")

    def __str__(self) -> str:
        first, last = self.names[0], self.names[-1]
        return first if len(self.names) == 1 else f"{first} ... {last} ({len(self.names)} layers)"


def group_sites(names: Sequence[str]) -> list[Group]:
    """Sort sites into groups; the layers of one list of layers that differ in kind are joined.

    The layer number is the first number in the path.
    """
    kinds: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), {})[_split(name)[1]] = name
    joined: dict[str, list[dict[int, str]]] = {}
    for (prefix, _), layers in kinds.items():
        groups = joined.setdefault(prefix, [])
        for other in groups:
            if not other.keys() & layers.keys():
                other.update(layers)
                break
        else:
            groups.append(dict(layers))
    return [
        Group(prefix, tuple(layers[i] for i in sorted(layers)), tuple(sorted(layers)))
        for prefix, groups in joined.items()
        for layers in groups
    ]


def kind_of(name: str) -> tuple[str, str]:
    """Path before the layer number, and after it; the same for modules that are alike."""
    prefix, _, suffix = _split(name)
    return prefix, re.sub(r"\d+", "#", suffix)


def choose_group(names: Sequence[str], routers: str | None) -> tuple[Group, list[Group]]:
    """The group to trace, and those that are left out.

    Args:
        names: paths of all sites.
        routers: a regular expression that the wanted paths contain, or None to choose: experts
            of attentions are left out, and a decoder is preferred to an encoder.
    """
    wanted = group_sites([n for n in names if routers is None or re.search(routers, n)])
    if not wanted:
        raise UsageError(
            f"no experts that were called are at a path with {routers!r} in it",
            "there are: " + "; ".join(map(str, group_sites(names))),
        )
    wanted = _rather([group for group in wanted if not group.in_attention], wanted)
    wanted = _rather([group for group in wanted if not group.in_encoder], wanted)
    if len(wanted) > 1:
        raise UsageError(
            f"the model has {len(wanted)} sets of experts: " + "; ".join(map(str, wanted)),
            "choose one with routers=, a regular expression that its path contains",
        )
    chosen = wanted[0]
    return chosen, group_sites([name for name in names if name not in set(chosen.names)])


def _rather(some: list[Group], all_of_them: list[Group]) -> list[Group]:
    return some or all_of_them


def _split(name: str) -> tuple[str, int, str]:
    segments = name.split(".")
    for i, segment in enumerate(segments):
        if segment.isdigit():
            return ".".join(segments[:i]), int(segment), ".".join(segments[i + 1 :])
    return name, 0, ""
