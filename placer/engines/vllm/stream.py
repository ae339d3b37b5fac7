"""A native trace that a thread of its own writes, so that serving does not wait for the disk."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from placer.errors import PlacerError

if TYPE_CHECKING:
    from placer.trace.store import TraceWriter

_log = logging.getLogger("placer.vllm")
_QUEUED_STEPS = 256
_BUSY_FLUSH_S = 60.0
_IDLE_FLUSH_S = 2.0


class TraceStream:
    """Takes the tokens of steps and writes them in order.

    When the disk is slower than the model, whole steps are left out and counted; when it fails,
    the trace ends there, unfinished. Neither stops the model.

    Tokens in memory are written once a minute while steps come in, and two seconds after the
    last step: vLLM kills its workers when the server is stopped, unless it is told to wait.
    """

    def __init__(
        self,
        writer: TraceWriter,
        *,
        busy_flush_s: float = _BUSY_FLUSH_S,
        idle_flush_s: float = _IDLE_FLUSH_S,
    ) -> None:
        self.dropped_steps = 0
        self.failed = False
        self._writer = writer
        self._busy_flush_s = busy_flush_s
        self._idle_flush_s = idle_flush_s
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_QUEUED_STEPS)
        self._thread = threading.Thread(target=self._write, name="placer-trace", daemon=True)
        self._thread.start()

    def put(self, tokens: dict[str, Any]) -> None:
        """Hand over the columns of a step (as `TraceWriter.append` takes them)."""
        if self.failed:
            return
        try:
            self._queue.put_nowait(tokens)
        except queue.Full:
            self.dropped_steps += 1

    def close(self) -> None:
        """Write all that was handed over, and mark the trace as whole unless it failed."""
        self._queue.put(None)
        self._thread.join()

    def _write(self) -> None:
        flushed = time.monotonic()
        while True:
            try:
                tokens = self._queue.get(timeout=self._idle_flush_s)
            except queue.Empty:
                tokens = {}
            if tokens is None:
                break
            if self.failed:
                continue
            try:
                if tokens:
                    self._writer.append(**tokens)
                if not tokens or time.monotonic() - flushed > self._busy_flush_s:
                    self._writer.flush()
                    flushed = time.monotonic()
            except PlacerError as error:
                self._fail(error)
        if not self.failed:
            try:
                self._writer.close()
            except PlacerError as error:
                self._fail(error)

    def _fail(self, error: PlacerError) -> None:
        self.failed = True
        _log.error("placer: tracing ends here, serving goes on: %s", error)
