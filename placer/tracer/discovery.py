"""From what was seen in a first forward pass to the `Layout` that is traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn

from placer.errors import PlacerError, UsageError
from placer.tracer.dims import expert_dims
from placer.tracer.layers import Group, choose_group, group_sites, kind_of
from placer.tracer.readers import Extract, ReadAgain, Routing
from placer.tracer.sites import Layout, Site
from placer.tracer.structure import ancestors_of, find_stacks
from placer.tracer.watching import Seen, Watch

Experts: TypeAlias = Mapping[str, Extract] | Sequence[str | nn.Module]


class Discovery:
    """Finds the sites of a model during one forward pass.

    Args:
        model: the model, or any torch module.
        routers: see `choose_group`.
        experts: modules whose output holds expert ids, or path -> function that gets them; None
            to find them.
        num_experts: E, needed with `experts`.

    Attributes:
        watch: the hooks; put on by `attach`.
        is_encoder: whether the experts of an encoder beside a decoder are traced.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        routers: str | None = None,
        experts: Experts | None = None,
        num_experts: int | None = None,
    ) -> None:
        self.watch = Watch(model)
        self._model = model
        self._routers = routers
        self._explicit = None if experts is None else _named(model, experts)
        self._stacks = [] if experts is not None else find_stacks(model)
        if experts is not None and num_experts is None:
            raise UsageError("experts= needs num_experts=, the number of experts of a layer")
        self._num_experts = num_experts or 0
        self._left_out: list[Group] = []
        if experts is None and not self._stacks:
            raise _nothing_found(model)
        self.is_encoder = False
        config = getattr(model, "config", None)
        self._has_encoder = bool(getattr(config, "is_encoder_decoder", False))
        if self._has_encoder and self._stacks:
            chosen, self._left_out = choose_group([s.name for s in self._stacks], routers)
            self._stacks = [stack for stack in self._stacks if stack.name in chosen.names]
            self.is_encoder = chosen.in_encoder

    @property
    def names(self) -> list[str]:
        """Paths of the modules that may turn out to be sites."""
        return [stack.name for stack in self._stacks] or list(self._explicit or ())

    def entrances(self, names: Sequence[str] | None = None) -> list[str]:
        """Paths of modules around the sites through which a forward pass may come in.

        The encoder and the decoder of one model see different tokens: there, it is the module
        around the list of layers; else any module from that one outwards.
        """
        if self._explicit is not None:
            return [""]
        found: dict[str, None] = {}
        for group in group_sites(self.names if names is None else names):
            around = ancestors_of(group.prefix)
            found.update(dict.fromkeys(around[:1] if self._has_encoder else around))
        return list(found)

    def attach(self) -> None:
        if self._explicit is not None:
            self.watch.explicit(self._explicit, self._num_experts)
        else:
            self.watch.stacks(self._stacks)

    def finish(self) -> tuple[Layout, list[Routing]]:
        """The layout, and the routing of the pass that was watched, layer by layer."""
        best = self._best_of_each_block()
        if not best:
            raise _nothing_found(self._model, was_called=bool(self.watch.called))
        notes: list[str] = []
        if self._explicit is not None:
            group = _explicit_group(self._explicit)
            if len(best) < len(group.names):
                missing = next(name for name in group.names if name not in best)
                raise PlacerError(f"{missing}, named in experts=, was not called")
        else:
            group, others = choose_group(list(best), self._routers)
            others += self._left_out
            notes += [f"left out: {other} (routers= can choose them)" for other in others]
        chosen = [best[name] for name in group.names]
        self._check(chosen, group)
        sites, routing = [], []
        for seen in chosen:
            ids, weights = seen.calls[0]
            is_changed = not torch.equal(ids, seen.ids[0])
            site = seen.site
            drop_zero = seen.block in self.watch.skipping
            sites.append(
                Site(site.name, site.module, site.reader, site.after, is_changed, drop_zero)
            )
            routing.append((seen.ids[0] if is_changed else ids, weights))
        if any(isinstance(site.reader, ReadAgain) for site in sites):
            notes.append(
                "a fused kernel hides the ids: each router is run once more on the same input"
            )
        num_experts = chosen[0].num_experts
        layout = Layout(
            sites=tuple(sites),
            layer_ids=group.layer_ids,
            num_experts=num_experts,
            top_k=min(num_experts, max(ids.shape[-1] for ids, _ in routing)),
            has_weights=all(weights is not None for _, weights in routing),
            dims=expert_dims(self._model, [s for s in self._stacks if s.block == chosen[0].block]),
            notes=tuple(notes),
        )
        return layout, routing

    def _best_of_each_block(self) -> dict[str, Seen]:
        """Path -> what was seen there, for the best place of each block."""
        best: dict[str, Seen] = {}
        for seen in self.watch.seen.values():
            rank = (seen.site.after, seen.site.reader.rank)
            other = best.get(seen.block)
            if other is None or rank < (other.site.after, other.site.reader.rank):
                best[seen.block] = seen
        return {seen.site.name: seen for seen in best.values()}

    def _check(self, chosen: Sequence[Seen], group: Group) -> None:
        for seen in chosen:
            if len(seen.calls) != 1:
                raise PlacerError(
                    f"{seen.site.name} was called {len(seen.calls)} times in one forward pass, "
                    "expected once: which call is of which layer cannot be told",
                    "choose other modules with routers= or experts=",
                )
        counts = sorted({seen.num_experts for seen in chosen})
        if len(counts) > 1:
            raise PlacerError(
                f"the layers {group} have {counts} experts, expected one number",
                "choose layers of one kind with routers=",
            )
        for seen in chosen:
            if getattr(seen.site.module, "_is_expert_parallel", False):
                raise UsageError(
                    f"{seen.site.name} holds only this process's share of the experts",
                    "trace the model in one process, without expert parallelism",
                )
        read = {seen.block for seen in self.watch.seen.values()}
        unread = {s.block for s in self._stacks if s.block in self.watch.called} - read
        kinds = {kind_of(seen.block) for seen in chosen}
        lost = sorted(block for block in unread if kind_of(block) in kinds)
        guessed = [s.block for s in chosen if isinstance(s.site.reader, ReadAgain)]
        if len(guessed) < len(chosen):  # a fused kernel would hide all layers alike
            lost += guessed
        if lost:
            raise PlacerError(
                f"{lost[0]} routes tokens in a way that could not be seen, unlike the other "
                "layers beside it",
                "name the modules that return expert ids with experts=",
            )


def _nothing_found(model: nn.Module, *, was_called: bool = False) -> PlacerError:
    what = type(model).__name__
    by_hand = "the modules that return expert ids: capture(model, experts=[...], num_experts=...)"
    if was_called:
        return PlacerError(
            f"{what} has layers that may be experts, but ids of chosen experts pass through none "
            "of the modules that could be watched",
            "load it without fused kernels (use_kernels=False; for MXFP4 weights, "
            f"Mxfp4Config(dequantize=True)) and without torch.compile, or name {by_hand}",
        )
    return PlacerError(
        f"{what} has no mixture-of-experts layers that could be found", f"if it has, name {by_hand}"
    )


def _named(model: nn.Module, experts: Experts) -> dict[str, Extract | None]:
    """Path -> function or None, of what the user passed as `experts`."""
    paths = {module: name for name, module in model.named_modules()}
    named: dict[str, Extract | None] = {}
    if isinstance(experts, Mapping):
        named.update(experts)
    else:
        for item in experts:
            if isinstance(item, nn.Module) and item not in paths:
                raise UsageError(f"a {type(item).__name__} in experts= is not part of the model")
            named[paths[item] if isinstance(item, nn.Module) else item] = None
    unknown = sorted(set(named) - set(paths.values()))
    if unknown:
        raise UsageError(
            f"experts= names {unknown[0]!r}, which the model does not have",
            "paths are those of model.named_modules()",
        )
    if not named:
        raise UsageError("experts= is empty", "name at least one module")
    return named


def _explicit_group(names: Mapping[str, Extract | None]) -> Group:
    groups = group_sites(list(names))
    if len(groups) == 1:
        return groups[0]
    return Group("", tuple(names), tuple(range(len(names))))
