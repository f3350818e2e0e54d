"""Which anchors the output folders of runs name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from gere.anchoring import ANCHOR_FILE, read_key
from gere.errors import CacheCorruptError, CacheFolderError, CacheMissingError


def keys_in_runs(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Keys that output folders name, in themselves, in their checkpoints and in all folders below.

    Args:
        folders: Output folders of runs.

    Returns:
        By key, the folders that name it.

    Raises:
        CacheMissingError: If one of the folders is not there.
        CacheFolderError: If a folder cannot be read.
        CacheCorruptError: If a file that names an anchor is damaged.
    """
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for holder in _holders(folder):
            found.setdefault(_sure_key(holder), []).append(holder)
    return found


def _holders(folder: Path) -> Iterator[Path]:
    """Folders in and below `folder`, links followed, that hold a file that names an anchor."""
    if not folder.is_dir():
        raise CacheMissingError(
            "An output folder is not there.",
            where=folder,
            expected="a folder of runs, whose anchors shall stay",
            found="a file" if folder.exists() else "no such folder",
            fix="Correct the path, or leave it out.",
        )
    seen: set[Path] = set()
    for name, below, files in os.walk(folder, onerror=_refuse, followlinks=True):
        path = Path(name)
        if path.resolve() in seen:  # links may lead round
            below.clear()
            continue
        seen.add(path.resolve())
        if ANCHOR_FILE in files:
            yield path


def _refuse(error: OSError) -> None:
    raise CacheFolderError(
        "An output folder cannot be read, so that nobody knows which anchors it names.",
        where=error.filename,
        expected="a folder that this process may read",
        found=f"{type(error).__name__}: {error.strerror}",
        fix="Run this as a user who may read it.",
    ) from error


def _sure_key(folder: Path) -> str:
    """Key that a folder names, and nothing that only looks like one."""
    key = None
    try:
        key = read_key(folder)
    except OSError as error:
        _refuse(error)
    if key is None or not re.fullmatch("[0-9a-f]{32}", key):
        raise CacheCorruptError(
            "The file that names the anchor of a run names none.",
            where=folder / ANCHOR_FILE,
            expected="a key of 32 hexadecimal digits",
            found="a link that leads nowhere" if key is None else repr(key),
            fix="Restore the file, or delete it if the run is not needed any more.",
        )
    return key
