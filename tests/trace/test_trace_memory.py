"""A trace that is longer than memory streams: what is held does not grow with its length."""

import pytest
from trace_cases import python

_WRITE_AND_READ = """
import resource, sys
from pathlib import Path
import numpy as np
from placer.trace import TraceWriter, open_trace

path, tokens, layers, top_k, part_tokens = Path(sys.argv[1]), *map(int, sys.argv[2:])
num_experts, batch = 256, 4096
rng = np.random.default_rng(0)
start = rng.integers(0, num_experts, (batch, layers, 1))
experts = ((start + np.arange(top_k) * 13) % num_experts).astype(np.int16)
with TraceWriter(
    path, num_experts=num_experts, layer_ids=range(layers), top_k=top_k, part_tokens=part_tokens
) as writer:
    for first in range(0, tokens, batch):
        position = np.arange(first, first + batch)
        writer.append(
            experts=experts,
            request=position // 1000,
            position=position % 1000,
            phase=np.ones(batch, int),
            step=position // batch,
        )
source = open_trace(path)
assert sum(chunk.num_tokens for chunk in source.chunks(part_tokens)) == tokens
source.fingerprint()
try:  # the peak of this program alone: ru_maxrss also counts what forked it
    status = Path("/proc/self/status").read_text()
    peak_kib = int(status.split("VmHWM:")[1].split()[0])
except (OSError, IndexError):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_kib = peak // 1024 if sys.platform == "darwin" else peak
print(peak_kib)
"""


def peak_mib(*arguments: object) -> float:
    """Peak resident memory of a process that writes a trace and reads it in chunks."""
    process = python(_WRITE_AND_READ, *arguments)
    output, _ = process.communicate()
    assert process.returncode == 0
    return int(output) / 1024


def test_memory_does_not_grow_with_the_length(tmp_path_factory: pytest.TempPathFactory) -> None:
    """8 and 64 parts of 8192 tokens: 8 and 64 MiB of ids."""
    folder = tmp_path_factory.mktemp("memory")
    short = peak_mib(folder / "short", 8 * 8192, 8, 8, 8192)
    long = peak_mib(folder / "long", 64 * 8192, 8, 8, 8192)
    assert long < short + 24


@pytest.mark.slow
def test_a_million_tokens_of_58_layers_take_less_than_2_gib(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """928 MiB of ids."""
    assert peak_mib(tmp_path_factory.mktemp("memory") / "t", 2**20, 58, 8, 65536) < 2048
