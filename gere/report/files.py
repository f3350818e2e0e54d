"""What is read from a run folder, checked by its shape: nothing that is damaged is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gere.errors import RunFolderError

FORMAT = 1


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        RunFolderError: If it cannot be read or holds something else.
    """
    content = _parse(path, path, _text(path))
    require(isinstance(content, dict), path, "a JSON object", type(content).__name__)
    return content


def read_format(path: Path) -> dict[str, Any]:
    """Read a JSON object that names its format.

    Raises:
        RunFolderError: If it cannot be read or has another format.
    """
    content = read_object(path)
    require(content.get("format") == FORMAT, f"{path}, format", FORMAT, repr(content.get("format")))
    return content


def read_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Objects of a `.jsonl` file, each with its place; a last line without its end is still being written.

    Raises:
        RunFolderError: If a line cannot be read or holds something else.
    """
    for number, line in enumerate(_text(path).split("\n")[:-1], 1):
        place = f"{path}, line {number}"
        content = _parse(path, place, line)
        require(isinstance(content, dict), place, "a JSON object", type(content).__name__)
        yield place, content


def number(value: object) -> float | None:
    """A number of JSON as float; `None` for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def step_of(log: object, place: str) -> float:
    """The step of an entry of a log.

    Raises:
        RunFolderError: If it has none.
    """
    step = number(log.get("step")) if isinstance(log, dict) else None
    sound = step is not None and 0 <= step < math.inf
    require(sound, place, "an object with a step", log)
    return step if step is not None else math.nan


def shares(values: object, size: int, place: str) -> list[float]:
    """A list of `size` shares between 0 and 1, NaN for `null`.

    Raises:
        RunFolderError: If it is something else.
    """
    require(isinstance(values, list), place, f"a list of {size}", type(values).__name__)
    assert isinstance(values, list)  # noqa: S101
    require(len(values) == size, place, f"a list of {size}", f"a list of {len(values)}")
    found = [math.nan if value is None else number(value) for value in values]
    sound = all(value is not None and not (value < 0 or value > 1) for value in found)
    require(sound, place, "numbers from 0 to 1, or null where nothing was evaluated", values)
    return [value for value in found if value is not None]


def require(ok: bool, where: object, expected: object, found: object) -> None:
    """Raise a `RunFolderError` about a file unless `ok`."""
    if not ok:
        raise RunFolderError(
            "A file of a run folder is damaged, or is not of this version.",
            where=where,
            expected=expected,
            found=found,
            fix="Leave this run out, or take it from a backup; a run that is resumed writes its files anew.",
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(
            "A file of a run folder cannot be read.",
            where=path,
            expected="a text file in UTF-8",
            found=f"{type(error).__name__}: {error}",
            fix="Leave this run out, or make the file readable.",
        ) from error


def _parse(path: Path, place: object, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        require(False, place, "JSON" if path.suffix == ".json" else "JSON on each line", f"{error}")
