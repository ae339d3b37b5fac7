"""SGLang's `--init-expert-location FILE.pt`: the same table as in JSON, saved by torch.

Checked against SGLang 0.5.23, `compute_initial_expert_location_metadata`, which loads it with
`weights_only=True`. See `sglang_json` for what the table must be.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from placer.engines.plans.hidden_layers import hidden_layer_table, plan_of_hidden_layers
from placer.engines.plans.sglang_json import KEY, serving_options
from placer.engines.plans.tables import integer_table
from placer.engines.readers.common import load_torch
from placer.engines.registry import ExportOptions, ImportedPlan, PlanFormat, PlanHints
from placer.errors import BadFileError, MissingExtraError, PlacerError
from placer.files import atomic_path
from placer.plan import Plan


def recognises(path: Path) -> bool:
    """Whether a path is a .pt file with the one key that such a plan has."""
    if path.suffix != ".pt" or not path.is_file():
        return False
    try:
        found = load_torch(path)
    except PlacerError:
        return False
    return isinstance(found, dict) and KEY in found and "logical_count" not in found


def read(path: Path, hints: PlanHints) -> ImportedPlan:
    """A plan of the file's table."""
    found = load_torch(path)
    if not isinstance(found, dict) or not hasattr(found.get(KEY), "numpy"):
        raise BadFileError(f"{path} has no tensor {KEY}", "is it SGLang's expert location?")
    table = integer_table(found[KEY].numpy(), f"{KEY} of {path}")
    return plan_of_hidden_layers(table, hints, path, "sglang")


def write(plan: Plan, path: Path, options: ExportOptions) -> list[str]:
    """The plan as SGLang loads it."""
    try:
        import torch
    except ImportError:
        raise MissingExtraError("torch", "trace") from None
    table, notes = hidden_layer_table(plan, "SGLang", options)
    buffer = BytesIO()  # a file's name would become part of its bytes
    torch.save({KEY: torch.from_numpy(table)}, buffer)
    with atomic_path(path, force=options.force) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return [*notes, serving_options(plan, table.shape[1])]


FORMAT = PlanFormat("SGLang expert location, .pt", ".pt", recognises, read, write)
