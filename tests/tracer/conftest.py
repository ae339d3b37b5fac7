"""Nothing here may reach a model hub; without the `trace` extra these tests are skipped."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Models this small are slower on several threads, above all beside other work."""
    torch.set_num_threads(1)
