"""Small random models of the supported families, and what they compute unsharded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from placer.runtime.layout import ModelLayout, read_layout
from tests.tracer.families import Family

FAMILIES = ("Mixtral", "Qwen3Moe", "Olmoe", "DeepseekV3", "GptOss")
SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "model"
NEW_TOKENS = 3
# lengths differ; with homes below, one rank of 4 starts with no request
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 3, 4], [33], [44, 21, 5, 6, 17], [7, 7, 1]]
HOMES = [0, 1, 0, 3, 1]


@dataclass(frozen=True)
class Reference:
    """A checkpoint and what its model does unsharded.

    Attributes:
        folder: the checkpoint.
        layout: of the model.
        tokens: [B][NEW_TOKENS] greedy tokens.
        logits: [B, NEW_TOKENS, V].
    """

    folder: Path
    layout: ModelLayout
    tokens: list[list[int]]
    logits: torch.Tensor


class Models:
    """Builds each model once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[str, Reference] = {}

    def get(self, family: str, **overrides: Any) -> Reference:
        name = "-".join([family, *(f"{key}{value}" for key, value in overrides.items())])
        if name not in self._made:
            folder = SHIPPED
            if family != "shipped":
                folder = self._root / name
                # small weights: logits near 1, so that 1e-5 means something
                values = {"initializer_range": 0.1, "num_hidden_layers": 3, **overrides}
                if family == "GptOss":
                    values["sliding_window"] = 4  # shorter than some prompts
                model = Family(family, f"{family}ForCausalLM").build(**values)
                with torch.no_grad():
                    for parameter in model.parameters():  # GPT-OSS starts biases and sinks at 0
                        if not parameter.any():
                            parameter.normal_(std=0.1)
                model.save_pretrained(folder)
            self._made[name] = _reference(folder)
        return self._made[name]


def _reference(folder: Path) -> Reference:
    """Every request alone, without padding, by the stock model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, logits = [], []
    with torch.inference_mode():
        for prompt in PROMPTS:
            cache = transformers.DynamicCache(config=model.config)
            given, made, seen = torch.tensor([prompt]), [], []
            for _ in range(NEW_TOKENS):
                output = model(given, past_key_values=cache, use_cache=True)
                seen.append(output.logits[0, -1])
                made.append(int(seen[-1].argmax()))
                given = torch.tensor([[made[-1]]])
            tokens.append(made)
            logits.append(torch.stack(seen))
    return Reference(folder, read_layout(folder, "float32"), tokens, torch.stack(logits).clone())
