"""Where the experts of a model are, told by the shape of its parameters, not by class names.

A *stack* is a module that holds E like experts: as parameters with a leading axis of E, as a list
or dictionary of E like modules, or as tables whose rows are experts. The module around a stack is
its *block*; a block's other modules (its router among them) are its *neighbours*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

_COUNT_NAMES = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
    "n_experts",
)


@dataclass(frozen=True)
class Stack:
    """A module that holds E like experts.

    Attributes:
        name: its path in the model.
        module: the module.
        num_experts: E.
        is_table: whether an expert is a row of two or more embedding tables (then `module` is
            the module around the tables, and the block too).
    """

    name: str
    module: nn.Module
    num_experts: int
    is_table: bool = False

    @property
    def block(self) -> str:
        """Path of the module around the stack."""
        return self.name if self.is_table else parent_of(self.name)

    @property
    def is_callable(self) -> bool:
        """Whether the module has a forward of its own (a bare ModuleList has none)."""
        return not self.is_table and type(self.module) not in (nn.ModuleList, nn.ModuleDict)


def find_stacks(model: nn.Module) -> list[Stack]:
    """All stacks of `model`, in the order of its modules; none is inside another."""
    found: list[Stack] = []
    counted = ""  # the last stack that was told by its counter; its own modules are parts of it
    for name, module in model.named_modules():
        if _is_builtin(module) or not name or (counted and name.startswith(f"{counted}.")):
            continue
        tables = _num_table_experts(module)
        if tables and _has_number(name):
            found.append(Stack(name, module, tables, is_table=True))
        elif num_experts := _num_stacked(module) or _num_listed(module):
            found.append(Stack(name, module, num_experts))
        elif num_experts := _num_counted(module):
            found.append(Stack(name, module, num_experts))
            counted = name
    names = {stack.name for stack in found}
    # a list of decoder layers is a list of like modules too, but it holds stacks inside
    outer = {ancestor for name in names for ancestor in ancestors_of(name)} & names
    return [stack for stack in found if stack.name not in outer]


def neighbours(
    model: nn.Module, block: str, stacks: Sequence[Stack]
) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside `block`, with their paths, that are in no stack and no inner block."""
    around = f"{block}." if block else ""
    apart = {stack.name for stack in stacks if not stack.is_table}
    apart |= {stack.block for stack in stacks if stack.block.startswith(around)} - {block}
    for name, module in model.get_submodule(block).named_modules(prefix=block):
        is_inside = name in apart or any(outer in apart for outer in ancestors_of(name))
        is_table = isinstance(module, nn.Embedding)
        if name != block and not is_inside and not is_table:
            yield name, module


def parent_of(name: str) -> str:
    return name.rpartition(".")[0]


def ancestors_of(name: str) -> list[str]:
    """Paths of the modules around `name`, innermost first, the model itself ("") last."""
    found = []
    while name:
        name = parent_of(name)
        found.append(name)
    return found


def _num_stacked(module: nn.Module) -> int:
    """E when the module's own parameters are three-dimensional with a leading axis of E.

    Where some stacks are longer (experts that compute nothing have no last projection), E is the
    shortest.
    """
    counts = [p.shape[0] for p in module._parameters.values() if p is not None and p.dim() >= 3]
    return min(counts) if counts and min(counts) >= 2 else 0


def _num_listed(module: nn.Module) -> int:
    """E when the module is a list or dictionary of E modules of like type and shapes."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return 0
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    shapes = [[tuple(p.shape) for p in child.parameters()] for child in children]
    is_like = all(type(child) is type(children[0]) for child in children[1:])
    is_stack = len(children) >= 2 and is_like and all(s == shapes[0] for s in shapes)
    return len(children) if is_stack else 0


def _num_counted(module: nn.Module) -> int:
    """E when the module says so and its parameters, or its children's, are E flattened matrices.

    Experts that a quantiser packed keep only their biases as parameters: two with E rows.
    """
    for name in _COUNT_NAMES:
        count = getattr(module, name, None)
        if not isinstance(count, int) or isinstance(count, bool) or count < 2:
            continue
        own = [p for p in module._parameters.values() if p is not None and p.dim() == 2]
        nested = [
            p
            for child in module.children()
            if not _is_builtin(child)
            for p in child._parameters.values()
            if p is not None and p.dim() == 2
        ]
        flattened = [p for p in own + nested if p.shape[0] % count == 0 and p.shape[0] > count]
        packed = [p for p in own if p.shape[0] == count]
        if len(flattened) >= 2 or len(packed) >= 2:
            return count
    return 0


def _num_table_experts(module: nn.Module) -> int:
    tables = [child for child in module.children() if isinstance(child, nn.Embedding)]
    shapes = {(table.num_embeddings, table.embedding_dim) for table in tables}
    return tables[0].num_embeddings if len(tables) >= 2 and len(shapes) == 1 else 0


def _is_builtin(module: nn.Module) -> bool:
    """A plain torch layer, such as a convolution, whose weight is three-dimensional too."""
    containers = (nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, containers)


def _has_number(name: str) -> bool:
    return any(segment.isdigit() for segment in name.split("."))
