"""Run `placer bench` in the laboratory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def bench_in_netlab(arguments, mbit):
    """The bench's document on 2 nodes x 2 ranks, and what was printed beside it."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.netlab", "--mbit", str(mbit), "--time-limit", "240",
         "--", sys.executable, "-m", "placer", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr
