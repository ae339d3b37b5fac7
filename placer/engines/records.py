"""What serving engines record, by the name of the format: `placer import --from NAME`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from placer.trace.load import LoadRecord
    from placer.trace.model import Trace


@dataclass(frozen=True)
class Hints:
    """What the user says of the model where a file does not; None = not said.

    Attributes:
        num_experts: E.
        top_k: experts per token (K).
        layer_ids: real numbers of the MoE layers.
    """

    num_experts: int | None = None
    top_k: int | None = None
    layer_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Recorded:
    """What a file held: tokens, or only load.

    Attributes:
        content: a trace, or a load record where nobody recorded which token used which expert.
        warnings: what a user should know, a sentence each.
    """

    content: Trace | LoadRecord
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RecordFormat:
    """A format that placer reads.

    Attributes:
        name: as on the command line.
        reads: what a user gives, in a few words.
        module: of `placer.engines.readers`, which holds `read(path, hints)`.
    """

    name: str
    reads: str
    module: str

    def read(self, path: Path, hints: Hints) -> Recorded:
        """Read what lies at `path`.

        Raises:
            BadFileError: missing, damaged, or not of this format.
            UsageError: a hint is missing or does not fit.
        """
        module = importlib.import_module(f"placer.engines.readers.{self.module}")
        recorded: Recorded = module.read(path, hints)
        return recorded


RECORD_FORMATS = {
    entry.name: entry
    for entry in (
        RecordFormat("npz", "the interchange trace (docs/traces.md)", "npz"),
        RecordFormat(
            "sglang",
            "a .pt of the expert distribution recorder, or the folder with those of all ranks",
            "sglang",
        ),
        RecordFormat(
            "routed-experts",
            "responses of vLLM or SGLang that carry routed_experts: JSON, or JSON lines",
            "routed_experts",
        ),
        RecordFormat(
            "vllm-load", "the .jsonl of vLLM's expert-load statistics, or their folder", "vllm_load"
        ),
        RecordFormat(
            "tensorrt-llm", "the folder of expert statistics (meta_info.json)", "tensorrt_llm"
        ),
        RecordFormat("vllm-ascend", "a .pt tensor of load, [layers, experts]", "matrix"),
        RecordFormat(
            "omni-infer", "the folder of activation_counts_recordstep_*.txt", "omni_infer"
        ),
        RecordFormat("matrix", "load as .npy, .npz, .pt, .safetensors or .csv numbers", "matrix"),
        RecordFormat(
            "table",
            "a row per token, layer and expert, or per count: .csv, .tsv, .parquet",
            "table",
        ),
    )
}
