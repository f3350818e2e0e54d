"""Files: written whole or not at all, hashed, never pickled; one way to open a text, JSON lines and settings."""

from __future__ import annotations

import codecs
import errno
import hashlib
import io
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, TextIO

from gere.errors import CacheFolderError

MOST_SETTINGS = 2**24  # bytes of a file of settings
MOST_VALUES = 100_000  # values that a file of settings may stand for
MARK = "\ufeff"  # before a text that a Windows editor wrote


def canonical_json(content: Any) -> bytes:
    """Return the one way to write `content`: sorted keys, a final newline; NaN is a `ValueError`."""
    # Keys and seals of anchors are hashes of these bytes: any change here gives every anchor another key.
    return (json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256(content: bytes) -> str:
    """Return the hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; a device, a pipe or a folder is a `ValueError`."""
    # Without waiting: a pipe that nobody writes to would never open.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is no regular file")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, most: int) -> bytes:
    """Read a regular file of at most so many bytes; another one is a `ValueError`."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise ValueError(f"it has {size:,} bytes, more than {most:,}")
        return stream.read()


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a regular file; another one is a `ValueError`."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file as `write_whole` does; errors as `folder_errors`."""
    with folder_errors(path.parent):
        write_whole(path, content)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a start after a kill, sees all of it or nothing."""
    # In the same folder, since a rename is atomic within one file system only. The name is unique, since several
    # processes may write the same file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            # Without this, a loss of power after the rename can leave the final name on an empty file.
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a loss of power, where the system can."""
    # Windows cannot open a folder.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_folder(folder: Path) -> None:
    """Create a folder with its parents; one that is a file or cannot be created is a `CacheFolderError`."""
    with folder_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise CacheFolderError(
                "The folder to write to is a file.",
                where=folder,
                expected="a folder, or a path where one can be made",
                found="a file",
                fix="Give another path; that of the anchors is gere_hidden_state_saving_dir.",
            )
        folder.mkdir(parents=True, exist_ok=True)


def require_space(folder: Path, needed: int) -> None:
    """Raise a `CacheFolderError` if fewer than `needed` bytes are free on the disk of `folder`."""
    with folder_errors(folder):
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
    # A file system without locks is a NotImplementedError of filelock.
    except (OSError, NotImplementedError) as error:
        what, expected = "The folder cannot be written.", "a folder that this process may write to"
        # A quota fails like a full disk, and needs the same fix.
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            what, expected = "The disk of the folder is full.", "free space"
        raise CacheFolderError(
            what,
            where=folder,
            expected=expected,
            found=f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}",
            fix="Free some space, or give another folder; that of the anchors is gere_hidden_state_saving_dir.",
        ) from error


def open_text(path: Path, newline: str = "\n") -> TextIO:
    """Open a file as text, packed (.gz, .bz2, .xz, .zst) or not: UTF-8, or UTF-16 where its mark says so.

    The mark is no part of the text. Half a surrogate pair is let through.
    """
    from fsspec.implementations.local import LocalFileSystem

    raw = LocalFileSystem().open(str(path), "rb", compression="infer")
    marked = raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    raw.seek(0)
    encoding = "utf-16" if marked else "utf-8-sig"
    return io.TextIOWrapper(raw, encoding=encoding, errors="surrogatepass", newline=newline)


def read_lines(path: Path) -> Iterator[Any]:
    """Yield the JSON values of a `.jsonl` file; errors as in `numbered_lines`."""
    for _, value in numbered_lines(path):
        yield value


def numbered_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the JSON values of a `.jsonl` file with their line numbers, from 1; empty lines are skipped.

    A line that is not JSON is a `ValueError` with its number; an `OSError` is left as it is.
    """
    # Only "\n" ends a line: U+2028 and its like are part of a text.
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            # Files that were put together have a mark in their middle.
            content = line.lstrip(MARK)
            if not content.strip():
                continue
            try:
                yield number, json.loads(content)
            # Brackets that are nested too deep raise a RecursionError.
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of the file: {error}") from error


def read_settings(path: Path) -> Any:
    """Return the content of a YAML or JSON file; one that is neither is a `ValueError`."""
    text = read_regular(path, MOST_SETTINGS).decode("utf-8-sig")
    try:
        return json.loads(text) if path.suffix == ".json" else read_yaml(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_yaml(text: str) -> Any:
    """Return the value that YAML stands for; a text that is none, or stands for too much, is a `ValueError`."""
    import yaml

    try:
        value = yaml.safe_load(text)
        # Aliases repeat what they stand for: nine lines can mean a billion values, once anything walks over them.
        count = _values_in(value, {})
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if count > MOST_VALUES:
        raise ValueError(f"its aliases stand for {count:.3g} values, more than {MOST_VALUES:,}")
    return value


def _values_in(value: Any, known: dict[int, int]) -> int:
    """Count the values in a value, those that aliases repeat each time; one that holds itself is a RecursionError."""
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) not in known:
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_values_in(item, known) for item in inner)
    return known[id(value)]


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name the values of nested sections with dots, such as `settings.seed`."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
