"""The state of the replay weight in a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gere.cache.files import canonical_json, folder_errors, write_atomic
from gere.errors import CacheCorruptError

WEIGHT_FILE = "gere_weight.json"
NUMBERS = ("unrelated", "number", "rows")


def write_weight(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of the weight into a checkpoint.

    Raises:
        CacheFolderError: If the folder cannot be written.
    """
    with folder_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)  # with sharded checkpoints the trainer has not made it yet
    write_atomic(folder / WEIGHT_FILE, canonical_json({"format_version": 1, **state}))


def read_weight(folder: Path | None) -> dict[str, Any]:
    """State of the weight in a checkpoint; empty if it names none.

    Raises:
        CacheCorruptError: If the file cannot be used.
    """
    path = folder / WEIGHT_FILE if folder is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        numbers = {name: float(content[name]) for name in NUMBERS}
        if not all(math.isfinite(value) and value > 0 for value in numbers.values()):
            raise ValueError(f"values that are no positive numbers: {numbers}")
        return {"distance": str(content["distance"]), **numbers}
    except (ValueError, KeyError, TypeError) as error:
        raise CacheCorruptError(
            "The state of the replay weight in the checkpoint cannot be used.",
            where=path,
            expected=f"a JSON object with a distance, and positive numbers for {', '.join(NUMBERS)}",
            found=f"{type(error).__name__}: {error}",
            fix="Restore the file; or delete it, and the weight is found again from the next replay rows.",
        ) from error
