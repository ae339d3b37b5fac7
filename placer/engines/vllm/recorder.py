"""`Recorder`: what every step of a vLLM worker routed, as a native trace."""

from __future__ import annotations

import atexit
import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from placer.engines.vllm.batches import Batch, last_batch
from placer.engines.vllm.plugin import TraceSettings
from placer.engines.vllm.routing import MoeLayer, RoutingBuffers, moe_layers, watch_routers
from placer.engines.vllm.stream import TraceStream
from placer.errors import UsageError
from placer.trace.model import DECODE, PREFILL, ModelDims

_log = logging.getLogger("placer.vllm")
_MOST_PENDING = 8  # steps whose copies to the host may be under way


@dataclass(frozen=True, eq=False)
class _Pending:
    """A step whose copies to the host are under way."""

    columns: dict[str, NDArray[Any]]
    prompt_length: NDArray[np.int64]
    tensors: dict[str, torch.Tensor]
    event: Any  # torch.cuda.Event, or None on a CPU


def attach(worker: Any, config: Any, settings: TraceSettings) -> Recorder | None:
    """Start to record a worker whose model is loaded; None where another rank does it.

    Tensor-parallel ranks see the same tokens: the first of each group records.

    Raises:
        UsageError: the model or the way it is served cannot be traced.
    """
    from vllm.distributed.parallel_state import get_tp_group

    _refuse_unsupported(config.parallel_config)
    if get_tp_group().rank_in_group != 0:
        return None
    recorder = Recorder(worker.model_runner, config, settings)
    _wrap(worker.model_runner, "execute_model", recorder, recorder.after_step)
    _wrap(worker, "execute_dummy_batch", recorder, recorder.after_dummy_step)
    _wrap(worker, "compile_or_warm_up_model", recorder, recorder.after_warm_up)
    atexit.register(recorder.close)
    return recorder


class Recorder:
    """Reads the buffers after each step and hands the tokens to the trace."""

    def __init__(self, runner: Any, config: Any, settings: TraceSettings) -> None:
        from placer.trace.store import TraceWriter

        layers = moe_layers(runner.model)
        shapes = [layer.runner.moe_config for layer in layers]
        counts = {int(shape.num_logical_experts) for shape in shapes}
        if len(counts) > 1:
            raise UsageError(f"layers have {sorted(counts)} experts; a trace needs equal layers")
        top_k = max(int(layer.router.top_k) for layer in layers)
        parallel = config.parallel_config
        self._runner = runner
        self._num_experts = counts.pop()
        self._dp_rank = int(parallel.data_parallel_rank)
        self._dp_size = int(parallel.data_parallel_size)
        self._max_tokens = settings.max_tokens
        self._weights = settings.weights
        self._layer_ids = [layer.layer_id for layer in layers]
        self._serving = False  # the batches of vLLM's warm-up look like real ones
        self._step = 0
        self._numbers: dict[str, int] = {}
        self._next_request = self._dp_rank
        self._num_tokens = 0
        self._pending: deque[_Pending] = deque()
        self._buffers: RoutingBuffers | None = RoutingBuffers(
            layers,
            max_tokens=int(config.scheduler_config.max_num_batched_tokens),
            top_k=top_k,
            device=runner.device,
            local_rows=self._local_rows,
        )
        writer = TraceWriter(
            settings.folder,
            num_experts=self._num_experts,
            layer_ids=self._layer_ids,
            top_k=top_k,
            model=_dims(config, layers[0]),
            weights=settings.weights,
            step=True,
            rank=self._dp_rank,
            source=_source(config),
        )
        self._stream = TraceStream(writer)
        watch_routers(layers, self._buffers)
        _log.warning(
            "placer: tracing layers %s into %s%s",
            self._layer_ids,
            settings.folder,
            f", {settings.max_tokens} tokens" if settings.max_tokens else "",
        )

    def after_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called when the model runner has launched a step."""
        is_dummy = kwargs.get("dummy_run", args[2] if len(args) > 2 else False)
        if self._buffers is None or not self._serving or is_dummy:
            return
        scheduler_output = args[0] if args else kwargs["scheduler_output"]
        for name in scheduler_output.finished_req_ids:
            self._numbers.pop(name, None)
        if self._buffers.error is not None:
            raise self._buffers.error
        batch = last_batch(self._runner, scheduler_output)
        if batch is None:
            return
        if not all(self._buffers.seen):
            unseen = [i for i, s in zip(self._layer_ids, self._buffers.seen, strict=True) if not s]
            _log.error("placer: layers %s choose experts out of sight: no trace", unseen)
            self.close()
            return
        self._copy(batch, self._buffers)
        self._step += 1
        while self._pending and (
            len(self._pending) > _MOST_PENDING or _is_done(self._pending[0].event)
        ):
            self._take(self._pending.popleft())
        if self._max_tokens is not None and self._num_tokens >= self._max_tokens:
            self.close()

    def after_warm_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called when the worker is ready to serve."""
        self._serving = True

    def after_dummy_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called when this rank ran along without tokens; steps stay equal on all ranks."""
        self._step += 1

    def close(self) -> None:
        """Write what is in memory; the trace is whole then."""
        if self._buffers is None:
            return
        self._buffers.active = False
        self._buffers = None
        atexit.unregister(self.close)
        while self._pending:
            self._take(self._pending.popleft())
        self._stream.close()
        if self._stream.dropped_steps:
            _log.error(
                "placer: %d steps are missing from the trace, the disk was too slow",
                self._stream.dropped_steps,
            )
        if not self._stream.failed:
            _log.warning("placer: traced %d tokens", self._num_tokens)

    def abandon(self) -> None:
        """Stop at once; the trace stays unfinished."""
        if self._buffers is not None:
            self._buffers.active = False
        self._buffers = None
        self._pending.clear()
        self._stream.failed = True

    def _copy(self, batch: Batch, buffers: RoutingBuffers) -> None:
        """Start to copy a step to the host, behind the forward pass on the device."""
        request = np.repeat(
            [self._number(name) for name in batch.request_ids], batch.num_tokens
        ).astype(np.int64)
        experts, weights = buffers.snapshot(len(request), self._num_experts)
        tensors = {"experts": experts, "position": batch.position.clone()}
        if self._weights:
            tensors["weights"] = weights
        event = None
        if experts.device.type == "cuda":
            tensors = {
                name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()
            }
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        columns = {"request": request, "step": np.full(len(request), self._step)}
        length = np.repeat(batch.prompt_length, batch.num_tokens)
        self._pending.append(_Pending(columns, length, tensors, event))

    def _take(self, pending: _Pending) -> None:
        """Hand a step that has arrived on the host to the trace."""
        if pending.event is not None:
            pending.event.synchronize()
        columns = {name: tensor.numpy() for name, tensor in pending.tensors.items()}
        phase = np.where(columns["position"] < pending.prompt_length, PREFILL, DECODE)
        self._stream.put({**pending.columns, **columns, "phase": phase})
        self._num_tokens += len(phase)

    def _number(self, name: str) -> int:
        """The number of a request; ranks count in steps of their number, so that none meet."""
        if name not in self._numbers:
            self._numbers[name] = self._next_request
            self._next_request += self._dp_size
        return self._numbers[name]

    def _local_rows(self, num_rows: int) -> slice:
        """Which of the rows that a router saw are this data-parallel rank's."""
        from vllm.forward_context import get_forward_context

        across = get_forward_context().dp_metadata
        if across is None:
            return slice(0, num_rows)
        counts = across.num_tokens_across_dp_cpu
        own = int(counts[self._dp_rank])
        if num_rows == int(counts.sum()) and num_rows != own:  # gathered before the routing
            start = int(counts[: self._dp_rank].sum())
            return slice(start, start + own)
        return slice(0, num_rows)


def _wrap(owner: Any, name: str, recorder: Recorder, after: Any) -> None:
    """Call `after` with the arguments whenever a method of one object has returned.

    Whatever goes wrong there ends the trace, not the serving.
    """
    plain = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        try:
            after(args, kwargs)
        except Exception:
            _log.exception("placer: tracing ends here, serving goes on")
            recorder.abandon()
        return result

    setattr(owner, name, wrapped)


def _refuse_unsupported(parallel: Any) -> None:
    unsupported = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "dual-batch overlap": parallel.use_ubatching,
        "sequence-parallel experts": parallel.use_sequence_parallel_moe,
    }
    for name, used in unsupported.items():
        if used:
            raise UsageError(
                f"placer cannot trace vLLM with {name}",
                "unset PLACER_TRACE_DIR, or serve without it while you trace",
            )


def _dims(config: Any, layer: MoeLayer) -> ModelDims:
    """Dimensions of the model; an expert has three matrices where its activation is gated."""
    shape = layer.runner.moe_config
    parameters = int(shape.hidden_dim) * int(shape.intermediate_size)
    parameters *= 3 if shape.activation.is_gated else 2
    quantized = config.model_config.quantization is not None
    return ModelDims(
        name=str(config.model_config.model),
        hidden_size=int(config.model_config.get_hidden_size()),
        expert_bytes=None if quantized else parameters * shape.in_dtype.itemsize,
        expert_flops_per_token=2.0 * parameters,
    )


def _source(config: Any) -> dict[str, Any]:
    import vllm

    parallel = config.parallel_config
    return {
        "captured_by": "placer's vLLM plugin",
        "vllm": vllm.__version__,
        "tensor_parallel_size": int(parallel.tensor_parallel_size),
        "data_parallel_size": int(parallel.data_parallel_size),
        "enforce_eager": bool(config.model_config.enforce_eager),
    }


def _is_done(event: Any) -> bool:
    return event is None or bool(event.query())
