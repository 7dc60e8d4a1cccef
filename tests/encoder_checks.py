"""Helpers of the tests of encoders."""

import json
from pathlib import Path
from typing import Any

import torch

from mmbeam.models.encoders import describe, load
from mmbeam.models.encoders.base import Encoder


def load_encoder(directory: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
    """Describe and load the encoder in `directory`."""
    return load(describe(directory), device, dtype)


def edit_json(directory: Path, name: str, part: str | None = None, **changes: Any) -> None:
    """Change entries of a JSON file, or of the object `part` in it; None removes an entry."""
    content = json.loads((directory / name).read_text())
    entries = content if part is None else content[part]
    entries.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del entries[key]
    (directory / name).write_text(json.dumps(content))
