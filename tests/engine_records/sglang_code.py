"""SGLang's own recorder, from its released package, without the server around it.

The modules that it is imported from (the server's settings, the forward batch) are given as plain
objects; classes that it uses are cut out of the released files.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import enum
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def definitions(file: Path, *names: str, **given: Any) -> dict[str, Any]:
    """Run some top-level definitions of a file on their own."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if getattr(node, "name", None) in names]
    assert {node.name for node in wanted} == set(names), f"{file} has not all of {names}"
    future = ast.parse("from __future__ import annotations").body
    scope: dict[str, Any] = dict(given)
    exec(compile(ast.Module([*future, *wanted], []), str(file), "exec"), scope)
    return {name: scope[name] for name in names}


def encode_routed_experts(packages: Path, tensors: list[Any]) -> list[str]:
    """What SGLang's detokenizer makes of the routing of requests."""
    file = packages / "sglang/srt/managers/detokenizer_manager.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (function,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "_b64_encode_per_request"
    ]
    function.decorator_list = []
    future = ast.parse("from __future__ import annotations").body
    scope: dict[str, Any] = {"pybase64": base64}
    exec(compile(ast.Module([*future, function], []), str(file), "exec"), scope)
    encoded: list[str] = scope["_b64_encode_per_request"](tensors)
    return encoded


@contextlib.contextmanager
def recorder_module(packages: Path, **settings: Any) -> Iterator[Any]:
    """`sglang.srt.eplb.expert_distribution` of the package under `packages`.

    Args:
        packages: folder that holds `sglang`.
        settings: of the server's `moe` options.
    """
    srt = packages / "sglang" / "srt"
    defaults = {
        "expert_balancedness_report_mode": None,
        "expert_distribution_recorder_buffer_size": 4,
        "moe_a2a_backend": "none",
        "deepep_mode": "auto",
        "elastic_ep_backend": None,
        "eplb_min_rebalancing_utilization_threshold": 1.0,
    }
    moe = SimpleNamespace(**defaults | settings)
    execution = SimpleNamespace(moe=moe, overlap=SimpleNamespace(enable_two_batch_overlap=False))
    mode = definitions(
        srt / "model_executor/forward_batch_info.py",
        "ForwardMode",
        IntEnum=enum.IntEnum,
        auto=enum.auto,
    )["ForwardMode"]
    withable = definitions(srt / "utils/common.py", "Withable", **_typing())["Withable"]
    given: dict[str, dict[str, Any]] = {
        "sglang.srt.model_executor.forward_batch_info": {
            "ForwardBatch": object,
            "ForwardMode": mode,
        },
        "sglang.srt.layers.moe": {"get_moe_a2a_backend": lambda: None},
        "sglang.srt.observability.metrics_collector": {
            "STAT_LOGGER_ROLE_EXPERT_DISPATCH": "",
            "ExpertDispatchCollector": object,
            "resolve_collector_class": lambda *_: object,
        },
        "sglang.srt.runtime_context": {
            "get_device": lambda: SimpleNamespace(device="cpu"),
            "get_exec": lambda: execution,
            "get_platform": lambda: SimpleNamespace(is_hip=False),
            "get_schedule": lambda: SimpleNamespace(chunked_prefill_size=4),
            "logs_expert_balancedness_to_server_log": lambda: False,
            "reports_expert_balancedness": lambda: False,
        },
        "sglang.srt.utils": {
            "Withable": withable,
            "get_device": lambda: "cpu",
            "get_int_env_var": lambda _, default=0: default,
        },
    }
    before = {name: module for name, module in sys.modules.items() if name.startswith("sglang")}
    sys.path.insert(0, str(packages))
    try:
        for name in ("sglang", "sglang.srt", "sglang.srt.eplb"):
            package = types.ModuleType(name)
            package.__path__ = [str(packages.joinpath(*name.split(".")))]
            sys.modules[name] = package
        for name, attributes in given.items():
            module = types.ModuleType(name)
            vars(module).update(attributes)
            sys.modules[name] = module
        yield importlib.import_module("sglang.srt.eplb.expert_distribution")
    finally:
        sys.path.remove(str(packages))
        for name in [name for name in sys.modules if name.startswith("sglang")]:
            del sys.modules[name]
        sys.modules.update(before)


def _typing() -> dict[str, Any]:
    import typing

    return {name: getattr(typing, name) for name in typing.__all__} | {
        "contextmanager": contextlib.contextmanager,
        "T": typing.TypeVar("T"),
    }
