"""Released engines, module by module, without what their packages import besides.

`make test-engines` puts the packages of `packages.txt` into `.venv-engines/packages`, without
dependencies. A module of theirs is run as it was released; only the package's own `__init__` is not
run, and modules that it imports but that are not there or need a GPU get stand-ins, which each test
names.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PACKAGES = Path(__file__).resolve().parents[2] / ".venv-engines" / "packages"


def released(
    monkeypatch: pytest.MonkeyPatch, module: str, stand_ins: Mapping[str, Mapping[str, Any]]
) -> ModuleType:
    """A module of a released package.

    Args:
        monkeypatch: takes back the stand-ins; `conftest.py` removes what was imported.
        module: its full name.
        stand_ins: module name -> its attributes, for imports that are not there.
    """
    if not PACKAGES.is_dir():
        pytest.skip("the engines' packages are not there: make test-engines")
    top = module.partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == top]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_BarePackage(top), *sys.meta_path])
    monkeypatch.setattr(sys, "path", [*sys.path, str(PACKAGES)])
    for name, attributes in stand_ins.items():
        _stand_in(monkeypatch, name, attributes)
    found = importlib.import_module(module)
    assert Path(str(found.__file__)).is_relative_to(PACKAGES)
    return found


def _stand_in(monkeypatch: pytest.MonkeyPatch, name: str, attributes: Mapping[str, Any]) -> None:
    parent, _, _ = name.rpartition(".")
    if parent and parent not in sys.modules and not (PACKAGES / parent.replace(".", "/")).is_dir():
        _stand_in(monkeypatch, parent, {"__path__": []})
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


class _BarePackage:
    """Finds one package by its folder, so that its `__init__` does not run."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(PACKAGES / name)]
        return spec
