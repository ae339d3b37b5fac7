"""Watching one first forward pass for the calls that hold expert ids.

The hooks here look at much; they are removed after that pass. Where ids are looked for, best
first: arguments of a stack of experts, a look-up in a table of experts, what a router returns. A
fused kernel may call neither; then the router is run once more on what the block was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from placer.errors import PlacerError
from placer.tracer import readers
from placer.tracer.readers import Extract, Reader, Routing
from placer.tracer.sites import Site
from placer.tracer.structure import Stack, neighbours


@dataclass
class Seen:
    """What one module's calls held during the pass.

    Attributes:
        site: the module and how to read it.
        block: path of the block that it belongs to.
        num_experts: E of that block.
        calls: the routing of each call.
        ids: copies of the ids of each call, as they were at that moment.
    """

    site: Site
    block: str
    num_experts: int
    calls: list[Routing] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)


class Watch:
    """Hooks on everything around the experts of a model.

    Attributes:
        seen: path -> what was seen there.
        called: paths of blocks and neighbours that were called.
        skipping: blocks whose router has classes that are no experts.
        num_tokens: N of the pass, where it is known beforehand.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, Seen] = {}
        self.called: set[str] = set()
        self.skipping: set[str] = set()
        self.num_tokens: int | None = None
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._is_muted = False

    def stacks(self, stacks: list[Stack]) -> None:
        """Watch stacks of experts, and the blocks and neighbours around them."""
        blocks: dict[str, int] = {}
        for stack in stacks:
            blocks.setdefault(stack.block, stack.num_experts)
            if stack.is_table:
                self._table(stack)
            elif stack.is_callable:
                self._stack(stack)
        for block, num_experts in blocks.items():
            around = list(neighbours(self._model, block, stacks))
            for name, module in around:
                self._neighbour(name, module, block, num_experts)
            if block:
                self._block(block, num_experts, around)

    def explicit(self, experts: Mapping[str, Extract | None], num_experts: int) -> None:
        """Watch modules that the user named."""
        for name, extract in experts.items():
            self._explicit(name, extract, num_experts)

    def detach(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self, num_tokens: int | None) -> None:
        """A pass of N tokens begins; forget one that was cut off."""
        self.num_tokens = num_tokens
        self.seen.clear()
        self.called.clear()

    def _note(self, site: Site, block: str, num_experts: int, routing: Routing) -> None:
        seen = self.seen.setdefault(site.name, Seen(site, block, num_experts))
        seen.calls.append(routing)
        seen.ids.append(routing[0].detach().clone())

    def _known(self, name: str) -> Reader | None:
        return self.seen[name].site.reader if name in self.seen else None

    def _stack(self, stack: Stack) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.called.add(stack.block)
            reader = self._known(stack.name)
            reader = reader or readers.classify_call(stack.num_experts, args, kwargs)
            if reader is not None:
                site = Site(stack.name, stack.module, reader, after=False)
                self._note(site, stack.block, stack.num_experts, reader(args, kwargs, None))

        self._handles.append(stack.module.register_forward_pre_hook(hook, with_kwargs=True))

    def _table(self, stack: Stack) -> None:
        children = stack.module.named_children()
        name, table = next((n, m) for n, m in children if isinstance(m, nn.Embedding))

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.called.add(stack.block)
            reader = readers.classify_lookup(args)
            if reader is not None:
                site = Site(f"{stack.name}.{name}", table, reader, after=False)
                self._note(site, stack.block, stack.num_experts, reader(args, {}, None))

        self._handles.append(table.register_forward_pre_hook(hook))

    def _neighbour(self, name: str, module: nn.Module, block: str, num_experts: int) -> None:
        top_k = getattr(module, "top_k", None) or getattr(module, "num_experts_per_tok", None)
        expected = top_k if isinstance(top_k, int) else 0

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._is_muted:
                return
            self.called.add(name)
            reader = self._known(name)
            reader = reader or readers.classify_output(
                num_experts, self.num_tokens, output, expected
            )
            if reader is not None:
                if readers.num_classes(output) > num_experts:
                    self.skipping.add(block)
                site = Site(name, module, reader, after=True)
                self._note(site, block, num_experts, reader(args, {}, output))

        self._handles.append(module.register_forward_hook(hook))

    def _block(self, block: str, num_experts: int, around: list[tuple[str, nn.Module]]) -> None:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            self.called.add(block)
            if all(seen.block != block or seen.site.name == block for seen in self.seen.values()):
                self._read_again(module, block, num_experts, around, args, kwargs)

        module = self._model.get_submodule(block)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _read_again(
        self,
        module: nn.Module,
        block: str,
        num_experts: int,
        around: list[tuple[str, nn.Module]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Run a router that was not called on the block's input; keep it if it returns ids."""
        hidden = readers.find_hidden(args, kwargs)
        routers = [
            router
            for name, router in around
            if name not in self.called and _is_router_shaped(router, num_experts)
        ]
        if hidden is None or not routers:
            return
        place, values = hidden
        rows = values.reshape(-1, values.shape[-1])
        self._is_muted = True
        try:
            with torch.no_grad():
                output = routers[0](rows)
        except (TypeError, RuntimeError, ValueError):
            return  # not a router that takes hidden states alone
        finally:
            self._is_muted = False
        reader = readers.classify_output(num_experts, len(rows), output)
        if reader is not None:
            again = readers.ReadAgain(routers[0], place, reader)
            self._note(
                Site(block, module, again, after=False),
                block,
                num_experts,
                reader((), {}, output),
            )

    def _explicit(self, name: str, extract: Extract | None, num_experts: int) -> None:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            self.called.add(name)
            reader = self._known(name)
            if reader is None and extract is not None:
                reader = readers.ReadWith(extract)
            reader = reader or readers.classify_output(num_experts, None, output)
            if reader is None:
                raise PlacerError(
                    f"the output of {name} holds no expert ids: no integer tensor [..., k] with "
                    f"different numbers below {num_experts} in each row",
                    "give a function instead: experts={path: function of (args, kwargs, output)}",
                )
            routing = reader(args, kwargs, output)
            self._note(Site(name, module, reader, after=True), name, num_experts, routing)

        module = self._model.get_submodule(name)
        handle = module.register_forward_hook(hook, with_kwargs=True, prepend=not name)
        self._handles.append(handle)


def _is_router_shaped(module: nn.Module, num_experts: int) -> bool:
    parameters = [p for p in module._parameters.values() if p is not None]
    return any(p.dim() == 2 and p.shape[0] == num_experts for p in parameters)
