"""Find the anchor of a run: open the one that fits, refuse the one that does not, build it once."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gere._files import folder_errors, make_folder
from gere.cache.build import finish_build, is_everywhere, partial_folder, spread_anchor
from gere.cache.fingerprint import differences, key_of
from gere.cache.multi_node import leads_disk
from gere.cache.store import MANIFEST, Anchor, read_manifest
from gere.errors import CacheCorruptError, CacheMismatchError, CacheMissingError
from gere.ranks import ALONE, Ranks

LOCK_SECONDS = 2.0
logger = logging.getLogger("gere")

NAMED_WAY_ON = (
    "Restore the setting; or, from the base model, build an anchor with the new settings (one step is enough) and set "
    "gere_config.anchor to its key."
)
WAYS_ON = {
    "weights": "Start from the base model that the anchor belongs to; if this model was fine-tuned from it, set "
    "gere_config.anchor to the anchor's key; for a new base model use another gere_hidden_state_saving_dir, or "
    "reuse_gere_hidden_state=False to build a second anchor in this one.",
    "": "Restore the setting, use another gere_hidden_state_saving_dir, or set reuse_gere_hidden_state=False to build "
    "a second anchor in this one.",
}


def anchor_folder(root: Path, key: str) -> Path:
    """Folder of the anchor with this key."""
    return root / f"anchor-{key}"


def folder_lock(root: Path) -> FileLock:
    """The lock that one run holds while it builds or removes anchors in a cache folder."""
    return FileLock(root / ".lock")


def open_named(root: Path, key: str, fields: Mapping[str, str], ranks: Ranks = ALONE) -> Anchor:
    """Open the anchor that a checkpoint, a model or the user names. It is never built.

    Args:
        root: Cache folder.
        key: Key of the anchor.
        fields: What must agree; a fine-tuned model leaves out its weights, which have moved.
        ranks: All processes; each must call this.

    Raises:
        CacheMissingError: If there is none with this key.
        CacheMismatchError: If a field disagrees.
        CacheCorruptError: If its bytes are damaged.
        RankFailedError: If another process failed.
    """
    folder = anchor_folder(root, key)
    there = any(ranks.ask(lambda: partial_folder(folder).exists() or folder.exists()))
    if there and not is_everywhere(folder, ranks):
        ranks.together(lambda: make_folder(root))
        with _locked(root, ranks) as leads:
            ranks.together(lambda: finish_build(folder) if leads else None)
            spread_anchor(folder, ranks, leads=leads)
    return ranks.together(lambda: _open_same(root, folder, fields))


def open_or_build(
    root: Path, fields: Mapping[str, str], build: Callable[[Path, bool], None], *, reuse: bool, ranks: Ranks = ALONE
) -> Anchor:
    """Open the anchor that belongs to `fields`, or build it if the cache folder holds none.

    Args:
        root: Cache folder.
        fields: What the anchor depends on.
        build: Builds the anchor in the folder that it is given, and is told whether this process writes for its disk;
            called on every process.
        reuse: Open what is there, and refuse a folder that holds only others. `False` builds anew.
        ranks: All processes; each must call this.

    Raises:
        CacheMismatchError: If the folder holds an anchor of other fields, naming them.
        CacheCorruptError: If the anchor is damaged.
        CacheFolderError: If the folder cannot be used.
        RankFailedError: If another process failed.
    """
    folder = anchor_folder(root, key_of(fields))
    if not (reuse and is_everywhere(folder, ranks)):
        ranks.together(lambda: make_folder(root))
        with _locked(root, ranks) as leads:
            if not (reuse and any(ranks.ask(lambda: (folder / MANIFEST).exists()))):
                ranks.together(lambda: _refuse_others(root, fields) if reuse else None)
                build(folder, leads)
            spread_anchor(folder, ranks, leads=leads)
    return ranks.together(lambda: open_whole(folder))


@contextmanager
def _locked(root: Path, ranks: Ranks) -> Iterator[bool]:
    """Keep other runs out, by one process for each disk; gives whether this one is it.

    The processes ask each other again and again, so that none times out. Who has its own disk and waits for another
    gives it back for a moment: two runs that hold a disk each would wait for ever.
    """
    lock = folder_lock(root)
    leads = leads_disk(root, ranks)

    def acquire() -> bool:
        with folder_errors(root):
            try:
                lock.acquire(timeout=LOCK_SECONDS)
            except Timeout:
                return False
        return True

    try:
        for attempt in itertools.count():
            if all(ranks.ask(lambda: not leads or acquire())):
                break
            lock.release()
            if attempt == 0 and ranks.index == 0:
                logger.warning("Another run builds an anchor in %s, or on another machine; waiting for it.", root)
            time.sleep(LOCK_SECONDS * os.urandom(1)[0] / 255)
        yield leads
    finally:
        lock.release()


def named_fields(root: Path, key: str, ranks: Ranks = ALONE) -> dict[str, str]:
    """What the anchor depends on that a checkpoint, a model or the user names, wherever a process has it.

    Args:
        root: Cache folder.
        key: Key of the anchor.
        ranks: All processes; each must call this.

    Raises:
        CacheMissingError: If no process has it.
        CacheCorruptError: If its manifest is damaged.
        RankFailedError: If another process failed.
    """
    folder = anchor_folder(root, key)
    places = (folder, partial_folder(folder))  # a kill may have come before the last rename
    there = ranks.ask(lambda: next((read_manifest(path) for path in places if (path / MANIFEST).exists()), None))
    found = next((manifest["fields"] for manifest in there if manifest is not None), None)
    if found is None:
        raise _missing(root, folder)
    return found


def _missing(root: Path, folder: Path) -> CacheMissingError:
    return CacheMissingError(
        "The anchor of this run is not in the cache folder, and a trained model cannot be anchored again.",
        where=root,
        expected=folder.name,
        found=", ".join(path.name for path in anchors_in(root)) or "no anchor",
        fix="Set gere_hidden_state_saving_dir to the folder of the first run, or copy that folder here; or make "
        "the anchor again by one step from the base model with the same settings, which gives the same key.",
    )


def _open_same(root: Path, folder: Path, fields: Mapping[str, str]) -> Anchor:
    if not (folder / MANIFEST).exists():
        raise _missing(root, folder)
    anchor = open_whole(folder)
    _require_same(fields, {name: anchor.fields.get(name, "") for name in fields}, folder, NAMED_WAY_ON)
    return anchor


def open_whole(folder: Path) -> Anchor:
    """Open an anchor that must be the one its folder is named after.

    Raises:
        CacheCorruptError: If a byte of it, or the name of its folder, is not what was written.
        CacheMismatchError: If it was written in another format.
    """
    anchor = Anchor(folder)
    if folder != anchor_folder(folder.parent, anchor.key):
        raise CacheCorruptError(
            "The folder of an anchor has the name of another.",
            where=folder,
            expected=anchor_folder(folder.parent, anchor.key).name,
            found=folder.name,
            fix="Give the folder its own name back.",
        )
    return anchor


def anchors_in(root: Path) -> list[Path]:
    """Folders of the finished anchors in a cache folder."""
    return sorted(path for path in root.glob("anchor-*") if path.suffix == "" and (path / MANIFEST).exists())


def _refuse_others(root: Path, fields: Mapping[str, str]) -> None:
    others = [(path, read_manifest(path)["fields"]) for path in anchors_in(root)]
    if others:
        nearest, found = min(others, key=lambda other: len(differences(fields, other[1])))
        names = differences(fields, found)
        _require_same(fields, found, nearest, WAYS_ON["weights" if "weights" in names else ""])


def _require_same(wanted: Mapping[str, str], found: Mapping[str, str], folder: Path, fix: str) -> None:
    names = differences(wanted, found)
    if names:
        causes = [name for name in names if name != "input_ids"] or ["input_ids"]  # the ids follow from the others
        error = CacheMismatchError(
            f"The anchor was made from other {', '.join(causes)}.",
            where=folder,
            expected="; ".join(f"{name} {_short(wanted.get(name))}" for name in causes) + " (this run)",
            found="; ".join(f"{name} {_short(found.get(name))}" for name in causes) + " (the anchor)",
            fix=fix,
        )
        error.fields = names
        raise error


def _short(value: str | None) -> str:
    """A field as a person reads it: the beginning of a digest, anything else whole."""
    text = "not there" if value is None else value
    return text[:12] if len(text) == 64 and " " not in text else text
