"""Files: written whole or not at all, hashed, never pickled; one reader for JSON lines and one for settings."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gere.errors import CacheFolderError


def canonical_json(content: Any) -> bytes:
    """The one way in which `content` is written: sorted keys, no NaN, a final newline."""
    return (json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, header and payload."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sealed_json(content: Mapping[str, Any]) -> bytes:
    """Content as `canonical_json`, with its own SHA-256 in it as `sha256`."""
    return canonical_json({**content, "sha256": sha256(canonical_json(content))})


def seal_of(raw: bytes, content: Mapping[str, Any]) -> str | None:
    """SHA-256 of content that was read from `raw` without its `sha256`; `None` if it is sealed by that very digest."""
    found = sha256(canonical_json(content))
    return None if raw == canonical_json({**content, "sha256": found}) else found


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a start after a kill, sees all of it or nothing.

    Args:
        path: Where the file shall be.
        content: Its bytes.

    Raises:
        CacheFolderError: If the folder cannot be written or its disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with folder_errors(path.parent):
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a loss of power, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a cache folder, with its parents.

    Raises:
        CacheFolderError: If it is a file or cannot be created.
    """
    if folder.exists() and not folder.is_dir():
        raise CacheFolderError(
            "The cache folder is a file.",
            where=folder,
            expected="a folder, or a path where one can be made",
            found="a file",
            fix="Set gere_hidden_state_saving_dir to another path.",
        )
    with folder_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def require_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        CacheFolderError: If fewer than `needed` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CacheFolderError(
            "The disk of the cache folder is too full.",
            where=folder,
            expected=f"{needed / 1e6:,.1f} MB free (most of it only while the anchor is built)",
            found=f"{free / 1e6:,.1f} MB",
            fix="Free some space, set gere_hidden_state_saving_dir to another disk, or use fewer or shorter texts.",
        )


@contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Turn the system's errors about a folder into a `CacheFolderError`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise CacheFolderError(
            "The disk of the cache folder is full." if full else "The cache folder cannot be written.",
            where=folder,
            expected="free space" if full else "a folder that this process may write to",
            found=f"{type(error).__name__}: {error.strerror or error}",
            fix="Free some space, or set another folder: gere_hidden_state_saving_dir, for a saved model output_dir.",
        ) from error


def read_lines(path: Path) -> Iterator[Any]:
    """JSON values of a `.jsonl` file; arguments and errors as in `numbered_lines`."""
    return (value for _, value in numbered_lines(path))


def numbered_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """JSON values of a `.jsonl` file with their line numbers, from 1; empty lines are skipped.

    Args:
        path: The file, in UTF-8 with or without a byte order mark.

    Raises:
        OSError: If it cannot be read.
        ValueError: If a line is not JSON, with its number.
    """
    # Only "\n" ends a line: U+2028 and its like are part of a text. `utf-8-sig` skips the mark of Windows editors.
    with path.open(encoding="utf-8-sig", errors="surrogatepass", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of the file: {error}") from error


def read_settings(path: Path) -> Any:
    """Content of a YAML file, or of a JSON file.

    Args:
        path: The file, in UTF-8 with or without a byte order mark.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is neither YAML nor JSON.
    """
    import yaml

    text = path.read_text(encoding="utf-8-sig")
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
