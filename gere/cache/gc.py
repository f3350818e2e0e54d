"""Collect the garbage of a cache folder: anchors that no run names, what kills left, and spare texts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gere._files import folder_errors, read_lines, remove
from gere.cache.fingerprint import text_digest
from gere.cache.heldout import held_out
from gere.cache.inventory import Survey, key_in, pick, size_of, survey
from gere.cache.resolve import acquired, folder_lock
from gere.cache.store import RETIRED, anchor_folder, has_manifest, read_manifest
from gere.errors import CacheError, CacheFolderError, CacheMissingError

STALE_SECONDS = 3600


class Rubbish(NamedTuple):
    """A file or folder that can go, the reason for a person, and its bytes."""

    path: Path
    why: str
    size: int


def collect(
    root: Path, named: Callable[[], Collection[str]] | None, keep: Collection[str] = (), *, delete: bool
) -> list[Rubbish]:
    """Return what can go from a cache folder, and remove it if asked to.

    Anchors whose keys are in `keep`, or are found by `named` while no other run may begin, stay; with `named=None`
    every finished anchor stays. A key of `keep` that is not there is a `CacheMissingError`, a folder in which another
    run builds is a `CacheFolderError`.
    """
    # Before the lock, which would be a file in a folder of something else.
    _require_root(root)
    # Even a look needs the lock: what another run is building would be taken for what a kill left.
    lock = folder_lock(root)
    if not acquired(lock, root):
        raise CacheFolderError(
            "Another run builds an anchor in this folder.",
            where=root,
            expected="a folder in which nothing is being built",
            found=f"a lock on {lock.lock_file}",
            fix="Try again when the other run has begun to train.",
        )
    try:
        # Only now: a run that built while this one waited has named its anchor before it let go of the lock.
        rubbish = list(_find(survey(root), None if named is None else named(), keep))
        for item in rubbish if delete else ():
            with folder_errors(root):
                _remove(item.path)
    finally:
        lock.release()
    return rubbish


def _find(held: Survey, named: Collection[str] | None, keep: Collection[str]) -> Iterator[Rubbish]:
    wanted = {*(named or ()), *_known(held, keep)}
    builds = [*held.anchors, *held.unfinished]
    staying = [path for path in builds if _stays(path, wanted, everything=named is None)]
    for path in builds:
        if path not in staying:
            why = "unfinished or damaged build" if _is_unusable(path) else "no run names it"
            yield Rubbish(path, why, size_of(path))
    for path in held.leftovers:
        # A kill between the two renames of a rebuild leaves the old anchor as the only finished one.
        only_copy = path.suffix == RETIRED and key_in(path.name) in wanted and not _finished(path)
        if not (_is_young(path) or only_copy):
            yield Rubbish(path, "left by a run that was killed", size_of(path))
    made_from = [_made_from(path) for path in staying]
    # While one manifest does not tell its texts, any file may be the one that its anchor was made from.
    if None in made_from:
        return
    for path in held.replay_files:
        if not (_is_young(path) or _may_have_made(path, [anchor for anchor in made_from if anchor])):
            yield Rubbish(path, "no anchor that stays was made from these texts", size_of(path))


def _is_young(path: Path) -> bool:
    """Return whether a run that starts just now may have written a file: its texts, before it holds the lock."""
    return path.is_file() and time.time() - path.stat().st_mtime < STALE_SECONDS


def _stays(path: Path, wanted: Collection[str], *, everything: bool) -> bool:
    """Return whether an anchor, or a build without a finished anchor beside it, stays."""
    if key_in(path.name) in wanted:
        return not path.suffix or not _finished(path)
    return everything and not _is_unusable(path)


def _is_unusable(path: Path) -> bool:
    """Return whether no start can open this; a build that lacks only its name is an anchor to the next start."""
    return not has_manifest(path) or (bool(path.suffix) and _finished(path))


def _finished(path: Path) -> bool:
    """Return whether the finished anchor of this key is there."""
    return has_manifest(anchor_folder(path.parent, key_in(path.name)))


def _known(held: Survey, keep: Collection[str]) -> set[str]:
    """Return the keys to keep, after looking for each: one that is written wrong would let its anchor go."""
    keys = {key_in(key) for key in keep}
    for key in keys - {key_in(path.name) for path in held.unfinished}:
        pick(held, key)
    return keys


class _MadeFrom(NamedTuple):
    """Digest of the texts that an anchor replays, and the number of those that were held out beside them."""

    digest: str
    heldout: int


def _made_from(folder: Path) -> _MadeFrom | None:
    """Return what an anchor was made from; `None` if its manifest does not tell."""
    try:
        fields = read_manifest(folder).fields
        return _MadeFrom(fields["texts"], int(fields.get("heldout", "0").split()[0]))
    except (CacheError, KeyError, ValueError, IndexError):
        return None


def _may_have_made(replay_file: Path, anchors: Iterable[_MadeFrom]) -> bool:
    """Return whether one of the anchors was made from kept texts, or whether they cannot be read."""
    try:
        texts = [str(record["text"]) for record in read_lines(replay_file)]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    for anchor in anchors:
        # What was held out comes from the same file, or from another one.
        for count in {0, anchor.heldout}:
            measured = {*held_out(texts, count)}
            if text_digest(text for place, text in enumerate(texts) if place not in measured) == anchor.digest:
                return True
    return False


def _remove(path: Path) -> None:
    # An anchor loses its name first, so that a kill leaves no half of it under that.
    if path.is_dir() and not path.is_symlink() and not path.suffix:
        retired = path.with_name(path.name + RETIRED)
        shutil.rmtree(retired, ignore_errors=True)
        path = path.rename(retired)
    remove(path)


def _require_root(root: Path) -> None:
    if has_manifest(root):
        raise CacheMissingError(
            "This is the folder of one anchor.",
            where=root,
            expected="the folder that holds it",
            found=root.name,
            fix=f"Give {root.resolve().parent}.",
        )
    survey(root)
