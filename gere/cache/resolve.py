"""Find the anchor of a run: open the one that fits, build it where there is none, refuse a model that was tuned.

Every process must call each function here that takes `ranks`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gere._files import folder_errors, make_folder
from gere._log import logger, say
from gere.cache.build import finish_build, is_everywhere, partial_folder, spread_anchor
from gere.cache.fingerprint import CONFIG, differences, key_of, same_but_for_rounding
from gere.cache.multi_node import leads_disk
from gere.cache.store import Anchor, anchor_folder, has_manifest, read_manifest, weights_sample
from gere.errors import CacheCorruptError, CacheMismatchError, CacheMissingError, GeReError
from gere.ranks import ALONE, Ranks

LOCK_SECONDS = 2.0


def folder_lock(root: Path) -> FileLock:
    """Return the lock that one run holds while it builds or removes anchors in a cache folder."""
    return FileLock(root / ".lock")


def acquired(lock: FileLock, root: Path) -> bool:
    """Try to take the lock for `LOCK_SECONDS`."""
    with folder_errors(root):
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            return False
    return True


def open_named(
    root: Path, key: str, fields: Mapping[str, str], ranks: Ranks = ALONE, claim: Callable[[str], None] | None = None
) -> Anchor:
    """Open the anchor that a checkpoint, a model or the user names. It is never built.

    Args:
        root: Cache folder.
        key: Key of the anchor.
        fields: What must agree; a fine-tuned model leaves out its weights, which have moved.
        ranks: All processes; each must call this.
        claim: As in `open_or_build`.

    Raises:
        CacheMissingError: If there is none with this key.
        CacheMismatchError: If a field disagrees.
        CacheCorruptError: If its bytes are damaged.
        RankFailedError: If another process failed.
    """
    folder = anchor_folder(root, key)
    there = any(ranks.ask(lambda: partial_folder(folder).exists() or folder.exists()))
    if there and claim is not None:
        ranks.together(lambda: claim(key))
    if there and not is_everywhere(folder, ranks):
        ranks.together(lambda: make_folder(root))
        with _locked(root, ranks) as leads:
            ranks.only(leads, lambda: finish_build(folder))
            spread_anchor(folder, ranks, leads=leads)
    return ranks.together(lambda: _open_same(root, folder, fields))


def open_or_build(
    root: Path,
    fields: Mapping[str, str],
    build: Callable[[Path, bool], None],
    *,
    reuse: bool,
    sample: Sequence[float] = (),
    ranks: Ranks = ALONE,
    claim: Callable[[str], None] | None = None,
) -> Anchor:
    """Open the anchor that belongs to `fields`, or build it beside those that are there.

    Args:
        root: Cache folder.
        fields: What the anchor depends on.
        build: Builds the anchor in the folder that it is given, and is told whether this process writes for its disk;
            called on every process.
        reuse: Open what is there, and refuse a model that was tuned. `False` rebuilds it.
        sample: Some of the model's weights, as in `BuildPlan`.
        ranks: All processes; each must call this.
        claim: Names the anchor where `gere cache gc` looks for what runs need; called before another run could take
            the anchor for one that no run needs.

    Raises:
        CacheMismatchError: If the model may be one that was tuned from a base whose anchor is there.
        CacheCorruptError: If the anchor is damaged.
        CacheFolderError: If the folder cannot be used.
        RankFailedError: If another process failed.
    """
    key = key_of(fields)
    folder = anchor_folder(root, key)

    def take() -> Anchor:
        if claim is not None:
            claim(key)
        return open_whole(folder)

    if reuse:
        try:
            if is_everywhere(folder, ranks):
                return ranks.together(take)
        except GeReError:
            # Another run may have removed or replaced it just now. What is damaged is so under the lock, too.
            if not all(ranks.ask(lambda: os.access(root, os.W_OK))):
                raise
    ranks.together(lambda: make_folder(root))
    with _locked(root, ranks) as leads:
        if not (reuse and any(ranks.ask(lambda: has_manifest(folder)))):
            ranks.only(reuse, lambda: _require_untuned(root, fields, sample))
            if ranks.index == 0:
                _say_why(root, fields)
            build(folder, leads)
        spread_anchor(folder, ranks, leads=leads)
        return ranks.together(take)


@contextmanager
def _locked(root: Path, ranks: Ranks) -> Iterator[bool]:
    """Keep other runs out, by one process for each disk; yields whether this process is the one."""
    lock = folder_lock(root)
    leads = leads_disk(root, ranks)
    try:
        # Wait in short turns, after which all processes meet: one long wait would run into the timeout of the others.
        for attempt in itertools.count():
            if all(ranks.ask(lambda: not leads or acquired(lock, root))):
                break
            # Two runs that hold a disk each would block each other forever, so a run that cannot have all of them
            # gives its own back for a moment of random length.
            lock.release()
            if attempt == 0 and ranks.index == 0:
                logger.warning("Another run builds an anchor in %s, or on another machine; waiting for it.", root)
            time.sleep(LOCK_SECONDS * os.urandom(1)[0] / 255)
        yield leads
    finally:
        lock.release()


def named_fields(root: Path, key: str, ranks: Ranks = ALONE) -> dict[str, str]:
    """Return the fields of the anchor that a checkpoint, a model or the user names, from any process that has it.

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

    def read() -> dict[str, str] | None:
        # A kill may have come before the last rename.
        for path in (folder, partial_folder(folder)):
            if has_manifest(path):
                return read_manifest(path).fields
        return None

    for fields in ranks.ask(read):
        if fields is not None:
            return fields
    raise _missing(root, folder)


def _missing(root: Path, folder: Path) -> CacheMissingError:
    return CacheMissingError(
        "The anchor of this run is not in the cache folder, and it cannot be built from a trained model.",
        where=root,
        expected=folder.name,
        found=", ".join(path.name for path in anchors_in(root)) or "no anchor",
        fix="Set gere_hidden_state_saving_dir to the folder of the first run, or copy that folder here; or make "
        "the anchor again by one step from the base model with the same settings, which gives the same key.",
    )


def _open_same(root: Path, folder: Path, fields: Mapping[str, str]) -> Anchor:
    if not has_manifest(folder):
        raise _missing(root, folder)
    anchor = open_whole(folder)
    # Compare `fields` alone: those of a fine-tuned model lack the weights, which the anchor has. An anchor from before
    # 0.2 does not say all settings of its model; a run that was begun with it goes on.
    fields = {name: value for name, value in fields.items() if name in anchor.fields or name != CONFIG}
    fix = (
        "Restore the setting; or build an anchor with the new settings from the base model (by `gere cache build`, or "
        "by one step of training), which is then found."
    )
    _require_same(fields, {name: anchor.fields.get(name, "") for name in fields}, folder, fix)
    return anchor


def open_whole(folder: Path) -> Anchor:
    """Open an anchor as `Anchor` does, and raise a `CacheCorruptError` if its folder has the name of another."""
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
    """Return the folders of the finished anchors in a cache folder."""
    return sorted(path for path in root.glob("anchor-*") if path.suffix == "" and has_manifest(path))


def _others(root: Path, fields: Mapping[str, str]) -> list[tuple[Path, dict[str, str]]]:
    """Return the other anchors of a folder with their fields, the nearest first."""
    others = [(path, read_manifest(path).fields) for path in anchors_in(root)]
    return sorted(others, key=lambda other: len(differences(fields, other[1])))


def _require_untuned(root: Path, fields: Mapping[str, str], sample: Sequence[float]) -> None:
    """Refuse a model that has the architecture of a base whose anchor is here, and weights that were trained."""
    kin = [other for other in _others(root, fields) if other[1].get("architecture") == fields.get("architecture")]
    if not kin or any(found.get("weights") == fields.get("weights") for _, found in kin):
        return
    # In another precision the weights of a base differ by rounding, in the same one they do not.
    same_precision = any(found.get("dtype") == fields.get("dtype") for _, found in kin)
    if not same_precision and any(same_but_for_rounding(sample, weights_sample(path)) for path, _ in kin):
        return
    nearest, found = kin[0]
    fix = (
        "Start from the base model that the anchor belongs to. If this model was fine-tuned from it, set "
        "gere_config.anchor to the anchor's key. If it is a base model of its own, use another "
        "gere_hidden_state_saving_dir, or reuse_gere_hidden_state=False to build a second anchor in this one."
    )
    _require_same(fields, found, nearest, fix)


def _say_why(root: Path, fields: Mapping[str, str]) -> None:
    """Say which settings make another anchor necessary, if there are others."""
    others = [other for other in _others(root, fields) if other[1] != fields]
    if others:
        names = ", ".join(_causes(differences(fields, others[0][1])))
        say(f"gere: builds another anchor in {root}, since {others[0][0].name} was made from other {names}.")


def _causes(names: Sequence[str]) -> list[str]:
    """Leave out the ids, which follow from other fields, unless nothing else differs."""
    return [name for name in names if name != "input_ids"] or ["input_ids"]


def _require_same(wanted: Mapping[str, str], found: Mapping[str, str], folder: Path, fix: str) -> None:
    names = differences(wanted, found)
    if not names:
        return
    causes = _causes(names)
    error = CacheMismatchError(
        f"The anchor was made from other {', '.join(causes)}.",
        where=folder,
        expected=_shown(wanted, causes) + " (this run)",
        found=_shown(found, causes) + " (the anchor)",
        fix=fix,
    )
    error.fields = names
    raise error


def _shown(fields: Mapping[str, str], names: Sequence[str]) -> str:
    """Show fields to a person: of a digest the beginning, anything else whole."""
    shown = []
    for name in names:
        value = fields.get(name, "not there")
        if len(value) == 64 and " " not in value:
            value = value[:12]
        shown.append(f"{name} {value}")
    return "; ".join(shown)
