"""Without the `trace` extra nothing here can run; nothing may reach a model hub."""

from __future__ import annotations

import importlib.util
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

has_extra = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
collect_ignore_glob = [] if has_extra else ["test_*.py"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Family -> a small random model, saved as a checkpoint, and what it generates alone."""
    from .models import Models

    return Models(tmp_path_factory.mktemp("models"))
