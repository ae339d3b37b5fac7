"""`capture`: trace the routing of a model while a user's own code runs it."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from placer.errors import PlacerError, UsageError
from placer.files import refuse_overwrite
from placer.trace import Trace
from placer.tracer.assembly import Assembly
from placer.tracer.bookkeeping import Bookkeeper
from placer.tracer.discovery import Discovery, Experts
from placer.tracer.generation import GenerateCall, wrap_generate
from placer.tracer.hooks import SiteHooks
from placer.tracer.inputs import InputReader, Inputs
from placer.tracer.passes import Pass
from placer.tracer.sinks import FolderSink, MemorySink, Sink
from placer.tracer.sites import Layout

log = logging.getLogger(__name__)

_captured: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def capture(
    model: nn.Module,
    path: str | Path | None = None,
    *,
    weights: bool = False,
    routers: str | None = None,
    experts: Experts | None = None,
    num_experts: int | None = None,
    force: bool = False,
    source: dict[str, Any] | None = None,
) -> Tracer:
    """Trace the routing of every forward pass of `model` inside a with block.

        with placer.capture(model) as tracer:
            model.generate(**inputs)
        trace = tracer.trace()

    The experts are found during the first pass, by the shape of the model's parameters and by
    where ids of experts are handed over (docs/tracing.md). What the model computes is not
    changed. Rows of a batch become requests, padding is left out, prefill and decode are told
    apart.

    Args:
        model: a Hugging Face model, or any torch module.
        path: folder of a native trace to stream to; None keeps the trace in memory.
        weights: keep gate weights.
        routers: a regular expression; only experts whose path contains it are traced. Needed
            where a model has several sets of experts.
        experts: for modules that are not found: the modules (or their paths) that return expert
            ids, or a dictionary from path to a function of (args, kwargs, output) that returns
            ids [..., K], or ids and gate weights.
        num_experts: E; needed with `experts`.
        force: replace a trace at `path`.
        source: where the trace comes from, for the manifest; any JSON document.

    Raises:
        UsageError: the model is compiled, or is captured already.
        PlacerError: no experts were found.
    """
    return Tracer(
        model,
        None if path is None else Path(path),
        weights=weights,
        routers=routers,
        experts=experts,
        num_experts=num_experts,
        force=force,
        source=source,
    )


class Tracer:
    """The traced side of a `capture` block; made by `capture`.

    Attributes:
        layout: what is traced; None until the first forward pass has ended.
        on_pass: called after each forward pass, where it is set.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Path | None,
        *,
        weights: bool,
        routers: str | None,
        experts: Experts | None,
        num_experts: int | None,
        force: bool,
        source: dict[str, Any] | None,
    ) -> None:
        _refuse_compiled(model)
        if path is not None and not (path.is_dir() and not any(path.iterdir())):
            refuse_overwrite(path, force)
        self.layout: Layout | None = None
        self.on_pass: Callable[[], None] | None = None
        self._model = model
        self._path = path
        self._weights = weights
        self._force = force
        self._source = source or {}
        discovery = Discovery(model, routers=routers, experts=experts, num_experts=num_experts)
        self._discovery: Discovery | None = discovery
        self._books = Bookkeeper(is_encoder=discovery.is_encoder)
        self._hooks: SiteHooks | None = None
        self._sink: Sink | None = None
        self._assembly: Assembly | None = None
        self._handles: dict[str, list[RemovableHandle]] = {}
        self._undo_generate: Callable[[], None] = lambda: None
        self._marked: list[nn.Module] = []
        self._running: tuple[str, Pass, Inputs] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that were traced so far; those of the last few passes may be missing."""
        return 0 if self._assembly is None else self._assembly.num_tokens

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the choice of experts, one sentence each."""
        return () if self.layout is None else self.layout.notes

    def requests(self, ids: ArrayLike, labels: Sequence[str | None] | None = None) -> None:
        """Name the rows of the next batch that starts on an empty cache.

        Args:
            ids: [B] request ids, 0 or more; or one for each prompt, where beams or several
                samples of a prompt follow each other.
            labels: [B] domain or workload of each request.
        """
        self._books.tell_requests(ids, labels)

    def batch(
        self,
        *,
        requests: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        valid: ArrayLike | None = None,
        phase: str | None = None,
    ) -> None:
        """Say what the tokens of the next forward pass are, where the arguments do not tell.

        Args:
            requests: [B] or [B, S] request ids.
            positions: [B] (for S = 1) or [B, S] positions in the requests.
            valid: [B] or [B, S], False for what is not to be counted: padding, rows that are over.
            phase: "prefill" or "decode".
        """
        self._books.tell_pass(requests, positions, valid, phase)

    def flush(self) -> None:
        """Bring all passes so far to the host and hand their tokens on."""
        if self._assembly is not None:
            self._assembly.flush()

    def trace(self) -> Trace:
        """What was traced so far, as a `Trace` in memory."""
        self.flush()
        if isinstance(self._sink, FolderSink):
            raise UsageError(
                f"the trace was streamed to {self._path}",
                "read it with placer.trace.open_trace after the block",
            )
        if self._sink is None:
            raise PlacerError("nothing was traced", "call the model inside the with block")
        return self._sink.trace()

    def __enter__(self) -> Tracer:
        discovery = self._discovery
        if discovery is None:
            raise UsageError("a tracer is used once", "call capture(...) again")
        names = discovery.names
        modules = [self._model, *(self._model.get_submodule(name) for name in names)]
        if any(module in _captured for module in modules):
            raise UsageError("the model is captured already", "leave the other capture block first")
        self._marked = modules
        _captured.update(modules)
        try:
            for name in discovery.entrances():
                self._watch_entrance(name)
            discovery.attach()
            self._undo_generate = wrap_generate(
                self._model, self._enter_generate, self._leave_generate
            )
        except BaseException:
            self._remove_all()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove_all()
        try:
            self.flush()
        except BaseException:
            if isinstance(self._sink, FolderSink):
                self._sink.close(*sys.exc_info())
            if error is None:
                raise
            log.warning("the last passes before the error could not be traced")
            return
        if isinstance(self._sink, FolderSink):
            self._sink.close(kind, error, traceback)
        if self.layout is None and error is None:
            log.warning("nothing was traced: no forward pass of the captured model was seen")

    def _remove_all(self) -> None:
        self._undo_generate()
        self._undo_generate = lambda: None
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()
        if self._discovery is not None:
            self._discovery.watch.detach()
        if self._hooks is not None:
            self._hooks.detach()
        _captured.difference_update(self._marked)
        self._marked = []
        self._running = None

    def _enter_generate(self, call: GenerateCall) -> None:
        self._books.generate = call

    def _leave_generate(self) -> None:
        self._books.generate = None

    def _watch_entrance(self, name: str) -> None:
        """Put hooks on a module through which a pass may come in; the outermost one counts."""
        module = self._model.get_submodule(name)
        read = InputReader(module)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._running is None or self._was_cut_off(name):
                self._start(name, read(args, kwargs))

        def after(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if self._running is not None and self._running[0] == name:
                self._end(output)

        self._handles[name] = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]

    def _was_cut_off(self, name: str) -> bool:
        """Whether the pass that seems to run was ended by an interrupt, which calls no hooks."""
        assert self._running is not None
        running = self._running[0]
        return running == name or not name or running.startswith(f"{name}.")

    def _start(self, name: str, inputs: Inputs) -> None:
        if torch.compiler.is_compiling():
            raise UsageError(
                "the model is being compiled, which goes round hooks",
                "trace it without torch.compile; for generate with a static cache, "
                "set disable_compile=True in its generation config",
            )
        if self._hooks is not None:
            self._hooks.clear()
        found = self._books.start(inputs)
        if self._discovery is not None:
            is_known = found.num_rows is not None and found.num_columns is not None
            num_tokens = (found.num_rows or 0) * (found.num_columns or 0)
            self._discovery.watch.start(num_tokens if is_known else None)
        self._running = (name, found, inputs)

    def _end(self, output: Any) -> None:
        assert self._running is not None
        _, found, inputs = self._running
        self._running = None
        if output is None and sys.exc_info()[0] is not None:
            return  # the pass raised an error
        if self._discovery is not None:
            layout, routing = self._discovery.finish()
            self._keep(layout)
            ids: Sequence[Tensor] = [one[0] for one in routing]
            weights: Sequence[Tensor | None] = [one[1] for one in routing]
        else:
            assert self._hooks is not None
            ids, weights = self._hooks.take()
        assert self.layout is not None
        assert self._assembly is not None
        with torch.no_grad():
            found.start_copy(self.layout, ids, weights)
        self._books.finish(found, inputs, output)
        self._assembly.add(found)
        if self.on_pass is not None:
            self.on_pass()

    def _keep(self, layout: Layout) -> None:
        """The first pass has shown what is traced: keep the few hooks that are needed."""
        if self._weights and not layout.has_weights:
            raise UsageError(
                f"the gate weights of {type(self._model).__name__} pass through no module that "
                "could be watched",
                "trace it without weights",
            )
        sink: Sink
        if self._path is None:
            sink = MemorySink(
                num_experts=layout.num_experts, layer_ids=layout.layer_ids, model=layout.dims
            )
        else:
            sink = FolderSink(
                self._path,
                num_experts=layout.num_experts,
                layer_ids=layout.layer_ids,
                top_k=layout.top_k,
                model=layout.dims,
                weights=self._weights,
                force=self._force,
                source={**self._source, "notes": list(layout.notes)},
            )
        assert self._discovery is not None
        self._discovery.watch.detach()
        entrances = self._discovery.entrances([site.name for site in layout.sites])
        for name in set(self._handles) - set(entrances):
            for handle in self._handles.pop(name):
                handle.remove()
        self._discovery = None
        self.layout = layout
        self._sink = sink
        self._hooks = SiteHooks(layout)
        self._assembly = Assembly(layout, sink, weights=self._weights, labels=self._books.labels)
        for note in layout.notes:
            log.info(note)


def _refuse_compiled(model: nn.Module) -> None:
    compiled = [
        module
        for module in model.modules()
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    ]
    if compiled:
        raise UsageError(
            f"{type(compiled[0]).__name__} is compiled, and compiled code goes round hooks",
            "trace the model before torch.compile, or the module that it wraps (._orig_mod)",
        )
