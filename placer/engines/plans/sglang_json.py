"""SGLang's `--init-expert-location FILE.json`.

Checked against SGLang 0.5.23, `sglang/srt/eplb/expert_location.py`:
`compute_initial_expert_location_metadata` hands every key of the file to
`ExpertLocationMetadata.init_by_mapping`, which knows `physical_to_logical_map` and no other. It is
indexed by hidden layer, dense ones included, and each logical expert must appear in every row; -1
would count as the last expert. The number of slots must be the number of experts plus
`--ep-num-redundant-experts`, and divisible by `--ep-size`.
"""

from __future__ import annotations

import json
from pathlib import Path

from placer.engines.plans.hidden_layers import hidden_layer_table, plan_of_hidden_layers
from placer.engines.plans.tables import integer_table, short
from placer.engines.registry import ExportOptions, ImportedPlan, PlanFormat, PlanHints
from placer.errors import BadFileError
from placer.files import atomic_path, load_json
from placer.plan import Plan

KEY = "physical_to_logical_map"


def recognises(path: Path) -> bool:
    """Whether a path looks like one."""
    return path.suffix == ".json"


def read(path: Path, hints: PlanHints) -> ImportedPlan:
    """A plan of the file's table."""
    document = load_json(path, "SGLang expert location")
    if not isinstance(document, dict) or KEY not in document:
        raise BadFileError(
            f"{path} has no {KEY} (found {short(document)})", "is it SGLang's expert location?"
        )
    table = integer_table(document[KEY], f"{KEY} of {path}")
    return plan_of_hidden_layers(table, hints, path, "sglang")


def write(plan: Plan, path: Path, options: ExportOptions) -> list[str]:
    """The plan as SGLang loads it."""
    table, notes = hidden_layer_table(plan, "SGLang", options)
    rows = ",\n".join(json.dumps(row) for row in table.tolist())
    with atomic_path(path, force=options.force) as temporary:
        temporary.write_text(f'{{"{KEY}": [\n{rows}\n]}}\n', encoding="utf-8")
    return [*notes, serving_options(plan, table.shape[1])]


def serving_options(plan: Plan, num_slots: int) -> str:
    """The options that the server needs with it."""
    placement = plan.placement
    return (
        f"serve with --ep-size {placement.num_ranks} "
        f"--ep-num-redundant-experts {num_slots - placement.num_experts}"
    )


FORMAT = PlanFormat("SGLang expert location, JSON", ".json", recognises, read, write)
