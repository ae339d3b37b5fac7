"""Nothing here may reach a model hub; without the `trace` extra, only prompts are tested."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

has_extra = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
collect_ignore = (
    []
    if has_extra
    else [
        "test_capture.py",
        "test_cuda.py",
        "test_families.py",
        "test_many_families.py",
        "test_plain_modules.py",
        "test_run.py",
    ]
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, above all beside other work."""
    if not has_extra:
        yield
        return
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
