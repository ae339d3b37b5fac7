"""Small traces to test with, and what it means that two traces say the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from placer.trace import ModelDims, Trace, make_trace

REPOSITORY = Path(__file__).parents[2]
REAL_TRACE = REPOSITORY.parent / "shared" / "traces" / "gpt_oss_20b_decode.npz"

unhurried = settings(deadline=None, max_examples=25)  # files take as long as they take

ARRAYS = ("experts", "layer_ids", "request", "position", "phase", "step", "weights", "home")


def random_trace(
    seed: int = 0,
    *,
    tokens: int = 50,
    layers: int = 3,
    num_experts: int = 8,
    top_k: int = 2,
    requests: int = 5,
    variable: bool = False,
    weights: bool = False,
    step: bool = False,
    home: bool = False,
    labels: bool = False,
    model: ModelDims | None = None,
) -> Trace:
    """A random sound trace; `variable` leaves some experts of some tokens out."""
    rng = np.random.default_rng(seed)
    keys = rng.random((tokens, layers, num_experts))
    experts = np.argsort(keys, axis=2)[:, :, :top_k]
    if variable:
        experts = np.where(rng.random(experts.shape) < 0.3, -1, experts)
    ids = np.sort(rng.choice(10 * requests, requests, replace=False))
    request = rng.choice(ids, tokens)
    names = rng.choice(["code", "maths", "Prosa ü", ""], requests).tolist()
    present = set(request.tolist())
    return make_trace(
        experts=experts,
        num_experts=num_experts,
        layer_ids=np.cumsum(rng.integers(1, 3, layers)),
        request=request,
        phase=rng.integers(0, 2, tokens),
        step=np.sort(rng.integers(0, 9, tokens)) if step else None,
        weights=rng.standard_normal(experts.shape) if weights else None,
        home=rng.integers(0, 4, tokens) if home else None,
        labels={i: n for i, n in zip(ids.tolist(), names, strict=True) if i in present}
        if labels
        else None,
        model=model,
    )


@st.composite
def traces(draw: st.DrawFn, **fixed: Any) -> Trace:
    """Sound traces of every kind."""
    num_experts = draw(st.integers(1, 12))
    choices: dict[str, Any] = {
        "tokens": draw(st.integers(1, 60)),
        "layers": draw(st.integers(1, 4)),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, num_experts)),
        "requests": draw(st.integers(1, 6)),
        **{name: draw(st.booleans()) for name in ("variable", "weights", "step", "home", "labels")},
        "model": draw(
            st.sampled_from(
                [
                    ModelDims(),
                    ModelDims("m/x", 2880, 10_000_000_000, 4.5e7),
                    ModelDims(hidden_size=7),
                ]
            )
        ),
        **fixed,
    }
    return random_trace(draw(st.integers(0, 2**32)), **choices)


def assert_same(found: Trace, expected: Trace) -> None:
    """Every array alike in values, shape and type, and everything else equal."""
    for name in ARRAYS:
        one, other = getattr(found, name), getattr(expected, name)
        if other is None:
            assert one is None, name
            continue
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other, err_msg=name)
    assert found.num_experts == expected.num_experts
    assert found.labels == expected.labels
    assert found.model == expected.model


def python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A Python process of its own that can import placer and these cases."""
    path = os.pathsep.join(
        [str(REPOSITORY), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )
