"""Plans applied to real models across processes: loading, dispatch, generation, launching.

All modules here but this one need torch; see docs/runtime.md.
"""

import importlib.util

from placer.errors import MissingExtraError

_NEEDED = ("torch", "transformers", "safetensors")


def check_installed() -> None:
    """Raise MissingExtraError when a package that the runtime needs is not installed."""
    for package in _NEEDED:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "trace")
