"""A model's shape by name: a preset, or a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path

from placer.errors import UsageError
from placer.models.presets import PRESETS
from placer.models.shape import ModelShape
from placer.wording import among


def load_shape(name_or_folder: str | Path) -> ModelShape:
    """The shape of a preset, or of a checkpoint by its configuration.

    Raises:
        UsageError: neither a preset nor a folder.
        BadFileError: the folder's configuration cannot be read.
    """
    preset = PRESETS.get(str(name_or_folder).lower())
    if preset is not None:
        return preset
    folder = Path(name_or_folder)
    if not folder.is_dir():
        raise UsageError(
            f"{name_or_folder} is neither a model preset nor a folder",
            among(str(name_or_folder), PRESETS, "presets:"),
        )
    from placer.models.config import shape_of_folder

    return shape_of_folder(folder)
