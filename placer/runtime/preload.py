"""What the fork server loads once for all ranks that it starts."""

import importlib

for _name in (
    "torch.distributed",
    "transformers.models.mixtral.modeling_mixtral",  # what all models' files import takes longest
    "placer.cost.serving_kernels",
    "placer.runtime.rank",
):
    importlib.import_module(_name)
