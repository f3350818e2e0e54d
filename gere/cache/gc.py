"""Garbage of a cache folder: anchors that no run names, what kills left, kept texts that no anchor was made from."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from gere._files import folder_errors, read_lines
from gere.cache.fingerprint import text_digest
from gere.cache.inventory import RETIRED, Survey, key_in, pick, size_of, survey
from gere.cache.resolve import LOCK_SECONDS, anchor_folder, folder_lock
from gere.cache.store import MANIFEST, read_manifest
from gere.errors import CacheError, CacheFolderError, CacheMissingError

STALE_SECONDS = 3600  # a temporary file of a run that starts just now is younger


class Rubbish(NamedTuple):
    """Something that can go.

    Attributes:
        path: File or folder.
        why: The reason, for a person.
        size: Bytes.
    """

    path: Path
    why: str
    size: int


def collect(root: Path, named: Collection[str] | None, keep: Collection[str] = (), *, delete: bool) -> list[Rubbish]:
    """Find what can go from a cache folder, and remove it if asked to, while no other run can build in it.

    Args:
        root: Cache folder.
        named: Keys that runs name; their anchors stay. `None` lets every finished anchor stay.
        keep: Further keys that stay.
        delete: Remove what is found.

    Returns:
        What can go, or has gone.

    Raises:
        CacheMissingError: If this is no cache folder, or holds nothing of a key of `keep`.
        CacheFolderError: If another run works in the folder, or it cannot be written.
    """
    _require_root(root)
    with _alone(root):
        rubbish = list(_find(survey(root), named, keep))
        for item in rubbish if delete else ():
            with folder_errors(root):
                _remove(item.path)
    return rubbish


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    file = folder_lock(root)
    with folder_errors(root):
        try:
            lock = file.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise CacheFolderError(
                "Another run builds an anchor in this folder.",
                where=root,
                expected="a folder in which nothing is being built",
                found=f"a lock on {file.lock_file}",
                fix="Try again when the other run has begun to train.",
            ) from error
    with lock:
        yield


def _find(held: Survey, named: Collection[str] | None, keep: Collection[str]) -> Iterator[Rubbish]:
    wanted = {*(named or ()), *_known(held, keep)}
    builds = [*held.anchors, *held.unfinished]
    staying = [path for path in builds if _stays(path, wanted, everything=named is None)]
    for path in builds:
        if path not in staying:
            yield _rubbish(path, "unfinished or damaged build" if _is_unusable(path) else "no run names it")
    for path in held.leftovers:
        replaced_by_nothing = path.suffix == RETIRED and key_in(path.name) in wanted and not _finished(path)
        young = path.is_file() and time.time() - path.stat().st_mtime < STALE_SECONDS
        if not (young or replaced_by_nothing):
            yield _rubbish(path, "left by a run that was killed")
    texts = {_texts_of(path) for path in staying}
    for path in held.replay_files:
        if None not in texts and _digest_of(path) not in {*texts, None}:
            yield _rubbish(path, "no anchor that stays was made from these texts")


def _stays(path: Path, wanted: Collection[str], *, everything: bool) -> bool:
    """Whether an anchor, or a build without a finished anchor beside it, stays."""
    if key_in(path.name) in wanted:
        return not path.suffix or not _finished(path)
    return everything and not _is_unusable(path)


def _is_unusable(path: Path) -> bool:
    """Whether no start can open this; a build that lacks only its name is an anchor to the next start."""
    return not (path / MANIFEST).exists() or (bool(path.suffix) and _finished(path))


def _finished(path: Path) -> bool:
    """Whether the finished anchor of this key is there."""
    return (anchor_folder(path.parent, key_in(path.name)) / MANIFEST).exists()


def _known(held: Survey, keep: Collection[str]) -> set[str]:
    """The keys to keep; one that is written wrong would let its anchor go."""
    keys = {key_in(key) for key in keep}
    for key in keys - {key_in(path.name) for path in held.unfinished}:
        pick(held, key)
    return keys


def _rubbish(path: Path, why: str) -> Rubbish:
    return Rubbish(path, why, size_of(path))


def _texts_of(folder: Path) -> str | None:
    """Digest of the texts of an anchor; `None` if its manifest does not tell."""
    try:
        return read_manifest(folder)["fields"].get("texts")
    except CacheError:
        return None


def _digest_of(replay_file: Path) -> str | None:
    """Digest of kept texts; `None` if they cannot be read, and then they stay."""
    try:
        return text_digest(record["text"] for record in read_lines(replay_file))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove(path: Path) -> None:
    """Remove a file or folder; an anchor loses its name first, so that a kill leaves no half of it under that."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    if not path.suffix:
        retired = path.with_name(path.name + RETIRED)
        shutil.rmtree(retired, ignore_errors=True)
        path = path.rename(retired)
    shutil.rmtree(path)


def _require_root(root: Path) -> None:
    if (root / MANIFEST).exists():
        raise CacheMissingError(
            "This is the folder of one anchor.",
            where=root,
            expected="the folder that holds it",
            found=root.name,
            fix=f"Give {root.resolve().parent}.",
        )
    survey(root)
