"""From names in a checkpoint to parameters of the model, for whole tensors and single experts.

Checkpoints keep experts one by one (`experts.3.gate_proj.weight`), fused (`gate_up_proj` [E, ...])
or under older names; transformers knows, for each kind of model, which tensors make which parameter
(its conversion mapping). Here that knowledge is used for one expert at a time.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from placer.errors import BadFileError
from placer.runtime.checkpoint import Checkpoint


@dataclass
class _Sources:
    """The tensors that make one parameter.

    Attributes:
        names: pattern of the converter (or "" for a mere renaming) -> names in the checkpoint, in
            the natural order of their numbers.
        converter: transformers' converter; None for a renaming.
    """

    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    converter: Any = None


class Mapping:
    """Which tensors of a checkpoint make which parameter of a model.

    Args:
        checkpoint: the checkpoint.
        model: the model; on the meta device will do.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            dot_natural_key,
            rename_source_key,
        )

        self.checkpoint = checkpoint
        transforms = get_model_conversion_mapping(model)
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        meta = model.state_dict()
        self._sources: dict[str, _Sources] = defaultdict(_Sources)
        for name in sorted(checkpoint.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(
                name, renamings, converters, model.base_model_prefix, meta
            )
            sources = self._sources[target]
            sources.names[pattern or ""].append(name)
            if pattern is not None:
                sources.converter = by_pattern[pattern]

    def has(self, parameter: str) -> bool:
        """Whether the checkpoint has what makes a parameter."""
        return parameter in self._sources

    def read_into(self, parameter: str, held: Tensor) -> None:
        """Fill a contiguous tensor with a whole parameter."""
        sources = self._of(parameter)
        if sources.converter is not None:
            parts = {p: [self.checkpoint.read(n) for n in ns] for p, ns in sources.names.items()}
            found = _converted(sources.converter, parameter, parts)
            self._check(found.shape, parameter, held.shape)
            held.copy_(found)
            return
        name = sources.names[""][0]
        self._check(self.checkpoint.shape(name), parameter, held.shape)
        self.checkpoint.read_into(name, held)

    def read_expert(
        self, parameter: str, expert: int, num_experts: int, shape: tuple[int, ...]
    ) -> Tensor:
        """One expert's share [1, ...] of a parameter [E, ...]; only its bytes are read."""
        sources = self._of(parameter)
        parts = {
            pattern: [self._share(names, expert, num_experts, parameter)]
            for pattern, names in sources.names.items()
        }
        if sources.converter is None:
            found = parts[""][0]
        else:
            found = _converted(sources.converter, parameter, parts)
        self._check(found.shape, parameter, (1, *shape))
        return found

    def _share(self, names: list[str], expert: int, num_experts: int, parameter: str) -> Tensor:
        if len(names) == num_experts:
            return self.checkpoint.read(names[expert])
        if len(names) == 1 and self.checkpoint.shape(names[0])[0] == num_experts:
            return self.checkpoint.read(names[0], slice(expert, expert + 1))
        raise BadFileError(
            f"{self.checkpoint.folder}: {parameter} is made of {len(names)} tensors "
            f"({names[0]}, ...), expected one for each of {num_experts} experts"
        )

    def _of(self, parameter: str) -> _Sources:
        if parameter not in self._sources:
            raise BadFileError(
                f"{self.checkpoint.folder} lacks {parameter}",
                "is the checkpoint complete, and of the kind that its config.json says?",
            )
        return self._sources[parameter]

    def _check(self, found: Sequence[int], parameter: str, expected: Sequence[int]) -> None:
        if tuple(found) != tuple(expected):
            raise BadFileError(
                f"{self.checkpoint.folder}: {parameter} has shape {tuple(found)}, "
                f"expected {tuple(expected)} by config.json"
            )


def _converted(converter: Any, parameter: str, parts: dict[str, list[Tensor]]) -> Tensor:
    """What transformers' converter makes of the tensors, in memory of its own."""
    fresh = copy.deepcopy(converter)
    for pattern, tensors in parts.items():
        for tensor in tensors:
            fresh.add_tensor(parameter, parameter, pattern, lambda tensor=tensor: tensor)
    with torch.no_grad():
        made = fresh.convert(parameter)
    found = made[parameter] if parameter in made else _only(made.values())
    whole: Tensor = found[0] if isinstance(found, list) else found
    return whole


def _only(values: Iterable[Any]) -> Any:
    found = list(values)
    assert len(found) == 1, "a converter of several parameters into several"
    return found[0]
