"""Build an anchor: run the base model once over the replay set, in parts that survive a kill.

Each part holds the states and losses of some rows and is written as soon as it is done. When all parts are there, the
bands follow from the merged moments, the states are encoded and dropped, and the folder gets its final name.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from gere._files import make_folder, sha256, sync_folder
from gere.cache.distil import Part, distil_parts, measure_noise, token_size
from gere.cache.encode import encode
from gere.cache.multi_node import spread_files
from gere.cache.plan import BuildPlan, Distil, parts_of
from gere.cache.store import MANIFEST, read_manifest, verify_files
from gere.errors import CacheCorruptError, CacheError
from gere.ranks import ALONE, Ranks


def build_anchor(
    folder: Path, plan: BuildPlan, distil: Distil, *, ranks: Ranks = ALONE, leads: bool = True, progress: bool = True
) -> None:
    """Build an anchor at `folder`, going on from the parts that an earlier, killed build left.

    Several processes take a share each. The bytes do not depend on their number, and where they do not share a disk,
    every disk gets the whole anchor.

    Args:
        folder: Folder of the finished anchor; replaced if it exists.
        plan: What to build.
        distil: Runs the base model on rows of token ids, padded on the right.
        ranks: All processes; each must call this.
        leads: Whether this process writes for its disk.
        progress: Show a progress bar over the tokens.

    Raises:
        CacheFolderError: If the folder cannot be written or the disk is full.
        NonFiniteStateError: If the model gives NaN or infinite values.
        RankFailedError: If another process failed.
    """
    partial = partial_folder(folder)
    ranks.together(lambda: make_folder(partial))
    complete = ranks.ask(lambda: _is_complete(partial))
    if not any(complete):
        noise = None
        width = 0
        if plan.strategy.wants_parts:
            width = token_size(partial, plan, distil, ranks)
        if plan.strategy.constants_file:
            noise = measure_noise(partial, plan, distil, ranks)
        groups = parts_of(plan, width)
        parts = [Part(partial, number, batches, plan) for number, batches in enumerate(groups)]
        owners = distil_parts(parts, plan, distil, ranks, progress=progress)
        encode(partial, plan, parts, owners, noise, ranks, leads=leads)
    done = leads and (complete[ranks.index] or not any(complete))
    ranks.together(lambda: _publish(partial, folder) if done else None)


def is_everywhere(folder: Path, ranks: Ranks) -> bool:
    """Whether every process sees the same finished anchor at `folder`.

    Raises:
        CacheCorruptError: If a manifest is damaged.
        RankFailedError: If another process failed.
    """
    manifests = set(ranks.ask(lambda: _checked_manifest(folder)))
    return len(manifests) == 1 and None not in manifests


def spread_anchor(folder: Path, ranks: Ranks, *, leads: bool) -> None:
    """Give the anchor at `folder`, if any disk has it, to those that lack it or that hold another build of it.

    Args:
        folder: Folder of the anchor; the caller keeps other runs out.
        ranks: All processes; each must call this.
        leads: Whether this process writes for its disk.

    Raises:
        CacheCorruptError: If an anchor that was found is damaged.
        RankFailedError: If another process failed.
    """
    manifests = ranks.ask(lambda: _checked_manifest(folder))
    if len(set(manifests)) == 1:
        return
    owner = next(rank for rank, manifest in enumerate(manifests) if manifest is not None)
    lacks = leads and manifests[ranks.index] != manifests[owner]
    partial = partial_folder(folder)
    ranks.together(lambda: make_folder(partial) if lacks else None)
    digests = ranks.ask(lambda: _verified_digests(folder))[owner] or {}
    digests[MANIFEST] = sha256(manifests[owner] or b"")
    source = folder if ranks.index == owner else partial
    spread_files(source, {name: (digest, owner) for name, digest in digests.items()}, ranks, leads=lacks)
    ranks.together(lambda: _publish(partial, folder) if lacks else None)


def finish_build(folder: Path) -> None:
    """Give an anchor its name if a kill came between its last byte and that."""
    partial = partial_folder(folder)
    if not folder.exists() and _is_complete(partial):
        _publish(partial, folder)


def partial_folder(folder: Path) -> Path:
    """Where the anchor at `folder` is built."""
    return folder.with_name(folder.name + ".partial")


def _is_complete(partial: Path) -> bool:
    """Whether a build was killed between its manifest and its final name."""
    if not (partial / MANIFEST).exists():
        return False
    try:
        files = read_manifest(partial)["files"]
    except CacheError as error:
        raise CacheCorruptError(
            "The manifest of an unfinished anchor cannot be used.",
            where=partial / MANIFEST,
            expected="a manifest as this version writes it",
            found=str(error).splitlines()[0],
            fix="Delete this .partial folder; the anchor is then built again from the base model.",
        ) from error
    try:
        verify_files(partial, files)
    except CacheCorruptError:
        return False
    return True


def _publish(partial: Path, folder: Path) -> None:
    """Drop what was needed for building alone, and give the folder its name."""
    names = {MANIFEST, *read_manifest(partial)["files"]}
    for path in partial.iterdir():
        if path.name not in names:
            path.unlink()
    retired = folder.with_name(folder.name + ".retired")
    shutil.rmtree(retired, ignore_errors=True)
    if folder.exists():
        folder.rename(retired)
    partial.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _verified_digests(folder: Path) -> dict[str, str] | None:
    """Hashes of the files of a finished anchor, compared with the files; a damaged one is not handed on."""
    if not (folder / MANIFEST).exists():
        return None
    files = read_manifest(folder)["files"]
    verify_files(folder, files)
    return dict(files)


def _checked_manifest(folder: Path) -> bytes | None:
    """Bytes of the manifest of a finished anchor; `None` if there is none."""
    if not (folder / MANIFEST).exists():
        return None
    read_manifest(folder)
    return (folder / MANIFEST).read_bytes()
