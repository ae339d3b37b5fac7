"""What stays on a model while it is traced: as little work as can be, once for each layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

from torch import Tensor, nn

from placer.errors import PlacerError
from placer.tracer.readers import Place, ReadIds
from placer.tracer.sites import Layout, Site

Call: TypeAlias = tuple[int, Any, Any]  # number of the layer, ids, weights


class SiteHooks:
    """Reads the calls of all sites of a layout; nothing is changed and nothing waits."""

    def __init__(self, layout: Layout) -> None:
        self._sites = layout.sites
        self._order = tuple(range(len(layout.sites)))
        self._has_other_order = False
        self._calls: list[Call] = []
        self._undo = [_attach(site, i, self._calls) for i, site in enumerate(layout.sites)]

    def detach(self) -> None:
        for undo in self._undo:
            undo()

    def clear(self) -> None:
        """Forget the calls so far."""
        self._calls.clear()

    def take(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """Ids and weights of the L layers in the pass that has ended."""
        calls = sorted(self._calls, key=_number) if self._has_other_order else self._calls
        order, ids, weights = zip(*calls, strict=True) if calls else ((), (), ())
        if order != self._order:
            if not self._has_other_order and len(order) == len(self._order):
                self._has_other_order = True  # layers may run in another order than their numbers
                return self.take()
            self._refuse(order)
        self._calls.clear()
        return ids, weights

    def _refuse(self, order: tuple[int, ...]) -> NoReturn:
        counts = [order.count(i) for i in self._order]
        i = next(i for i, count in enumerate(counts) if count != 1)
        raise PlacerError(
            f"{self._sites[i].name} was called {counts[i]} times in a forward pass, once in the "
            "first one",
            "trace without torch.compile and CUDA graphs, whose code goes round hooks",
        )


def _number(call: Call) -> int:
    return call[0]


def _attach(site: Site, i: int, calls: list[Call]) -> Callable[[], None]:
    """Start to note the calls of a site; returns what ends that."""
    reader = site.reader
    if isinstance(reader, ReadIds) and not site.copy:
        ids_at, weights_at = _argument(reader.ids), _argument(reader.weights)
        if ids_at is not None and (weights_at is not None or reader.weights is None):
            return _wrap_forward(site.module, i, ids_at, weights_at, calls)

    def note(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids, weights = reader(args, kwargs, output)
        calls.append((i, ids.clone() if site.copy else ids, weights))

    if site.after:

        def after(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            note(args, kwargs, output)

        # the whole model as a site: read it before its pass is taken to have ended
        is_model = not site.name
        return site.module.register_forward_hook(after, with_kwargs=True, prepend=is_model).remove

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(args, kwargs, None)

    return site.module.register_forward_pre_hook(before, with_kwargs=True).remove


def _argument(place: Place | None) -> int | None:
    """Number of the positional argument at `place`, or None if it is none."""
    if place is None or place.source != "args" or len(place.keys) != 1:
        return None
    return int(place.keys[0])


def _wrap_forward(
    module: nn.Module, i: int, ids_at: int, weights_at: int | None, calls: list[Call]
) -> Callable[[], None]:
    """The common case, ids as an argument of the experts, at a fraction of the cost of a hook.

    The wrapper sees the arguments after all hooks of others, as the experts do.
    """
    original, had_own = module.forward, module.__dict__.get("forward")
    record: list[Callable[[Call], None]] = [calls.append]

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        weights = None if weights_at is None else args[weights_at]
        record[0]((i, args[ids_at], weights))
        return original(*args, **kwargs)

    module.__dict__["forward"] = forward

    def undo() -> None:
        record[0] = _ignore
        if module.__dict__.get("forward") is not forward:
            return  # wrapped once more by someone else, who holds on to this one
        if had_own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = had_own

    return undo


def _ignore(call: Call) -> None:
    """Takes the place of the list of calls after the end."""
