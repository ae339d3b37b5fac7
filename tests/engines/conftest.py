"""What a test imported of an engine is gone after it: the next one may need other stand-ins."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def nothing_stays_imported() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("sglang", "vllm_ascend", "einops"):
            del sys.modules[name]
