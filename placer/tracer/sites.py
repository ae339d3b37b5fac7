"""`Site` and `Layout`: the modules whose calls are read in every forward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from placer.trace.model import ModelDims
from placer.tracer.readers import Reader


@dataclass(frozen=True)
class Site:
    """A module whose calls hold the routing of one layer.

    Attributes:
        name, module: the module and its path.
        reader: how to read a call.
        after: whether the reader needs the output.
        copy: whether the ids are changed later in the pass, so that they must be copied at once.
        drop_zero: whether the router has classes that are no experts, so that a weight of exactly
            zero means that the token skips the layer.
    """

    name: str
    module: nn.Module
    reader: Reader
    after: bool
    copy: bool = False
    drop_zero: bool = False


@dataclass(frozen=True)
class Layout:
    """What is traced of a model.

    Attributes:
        sites: [L], by increasing layer number.
        layer_ids: [L] real layer numbers.
        num_experts: E.
        top_k: K.
        has_weights: whether every layer's gate weights can be seen.
        dims: dimensions of the model.
        notes: what a user should know of the choice, one sentence each.
    """

    sites: tuple[Site, ...]
    layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    has_weights: bool
    dims: ModelDims
    notes: tuple[str, ...]
