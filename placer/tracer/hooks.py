"""The hooks that stay on while a model is traced: as little work as can be, once for each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from placer.errors import PlacerError
from placer.tracer.readers import ReadIds
from placer.tracer.sites import Layout, Site


class SiteHooks:
    """Reads the calls of all sites of a layout; nothing is changed and nothing waits."""

    def __init__(self, layout: Layout) -> None:
        self._sites = layout.sites
        self._order = tuple(range(len(layout.sites)))
        self._has_other_order = False
        self._calls: list[tuple[int, Any, Any]] = []
        self._handles = [_attach(site, i, self._calls) for i, site in enumerate(layout.sites)]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

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


def _number(call: tuple[int, Any, Any]) -> int:
    return call[0]


def _attach(site: Site, i: int, calls: list[tuple[int, Any, Any]]) -> RemovableHandle:
    reader = site.reader
    is_plain = isinstance(reader, ReadIds) and reader.ids.source == "args" and not site.copy
    if is_plain and isinstance(reader, ReadIds) and len(reader.ids.keys) == 1:
        ids_at = reader.ids.keys[0]
        weights_at = _argument(reader)
        if weights_at is None or weights_at >= 0:
            hook = _plain_hook(i, int(ids_at), weights_at, calls)
            return site.module.register_forward_pre_hook(hook)
    copy = site.copy

    def note(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids, weights = reader(args, kwargs, output)
        calls.append((i, ids.clone() if copy else ids, weights))

    if site.after:

        def after(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            note(args, kwargs, output)

        # the whole model as a site: read it before its pass is taken to have ended
        is_model = not site.name
        return site.module.register_forward_hook(after, with_kwargs=True, prepend=is_model)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(args, kwargs, None)

    return site.module.register_forward_pre_hook(before, with_kwargs=True)


def _argument(reader: ReadIds) -> int | None:
    """Number of the positional argument that holds the weights; None without, -1 elsewhere."""
    if reader.weights is None:
        return None
    key = reader.weights.keys[0]
    is_argument = reader.weights.source == "args" and len(reader.weights.keys) == 1
    return key if is_argument and isinstance(key, int) else -1


def _plain_hook(
    i: int, ids_at: int, weights_at: int | None, calls: list[tuple[int, Any, Any]]
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """The hook for the common case, expert ids as a positional argument of the experts."""
    append = calls.append
    if weights_at is None:

        def ids_only(module: nn.Module, args: tuple[Any, ...]) -> None:
            append((i, args[ids_at], None))

        return ids_only

    def ids_and_weights(module: nn.Module, args: tuple[Any, ...]) -> None:
        append((i, args[ids_at], args[weights_at]))

    return ids_and_weights
