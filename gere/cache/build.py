"""Build an anchor: run the base model once over the replay set, in parts that survive a kill.

Each part holds the states and losses of some rows and is written as soon as it is done. When all parts are there, the
bands follow from the merged moments, the states are encoded and dropped, and the folder gets its final name.

Every process must call each function here that takes `ranks`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gere._files import folder_errors, make_folder, remove, sha256, sync_folder
from gere.cache.distil import Part, distil_parts, measure_noise, token_size
from gere.cache.encode import encode
from gere.cache.multi_node import spread_files
from gere.cache.plan import BuildPlan, Distil, parts_of
from gere.cache.store import MANIFEST, PARTIAL, RETIRED, has_manifest, read_manifest, verify_files
from gere.errors import CacheCorruptError, CacheError
from gere.ranks import ALONE, Ranks


def build_anchor(
    folder: Path, plan: BuildPlan, distil: Distil, *, ranks: Ranks = ALONE, leads: bool = True, progress: bool = True
) -> None:
    """Build an anchor at `folder`, and reuse the parts that an earlier, killed build left.

    Several processes take a share each. The bytes do not depend on their number. Where they do not share a disk, every
    disk gets the whole anchor.

    Args:
        folder: Folder of the finished anchor; replaced if it exists.
        plan: What to build.
        distil: Runs the base model on rows of token ids, padded on the right.
        ranks: All processes; each must call this.
        leads: Whether this process writes for its disk.
        progress: Show a progress bar over the tokens.

    Raises:
        CacheFolderError: If the folder cannot be written or the disk is full.
        CacheCorruptError: If a part of an earlier build is damaged.
        NonFiniteStateError: If the model gives NaN or infinite values.
        RankFailedError: If another process failed.
    """
    partial = partial_folder(folder)
    ranks.together(lambda: make_folder(partial))
    complete = ranks.ask(lambda: _is_complete(partial))
    if not any(complete):
        width, noise = 0, None
        if plan.strategy.wants_parts:
            width = token_size(partial, plan, distil, ranks)
        if plan.strategy.constants_file:
            noise = measure_noise(partial, plan, distil, ranks)
        parts = [Part(partial, number, batches, plan) for number, batches in enumerate(parts_of(plan, width))]
        measured = plan.of_heldout()
        heldout = [Part(partial, number, batches, measured) for number, batches in enumerate(parts_of(measured, 0))]
        distil_parts([*parts, *heldout], plan, distil, ranks, progress=progress)
        encode(partial, plan, parts, heldout, noise, ranks, leads=leads)
    # A disk that lacks what another one has complete gets a copy of that, by `spread_anchor`.
    done = leads and (complete[ranks.index] or not any(complete))
    ranks.only(done, lambda: _publish(partial, folder))


def is_everywhere(folder: Path, ranks: Ranks) -> bool:
    """Return whether every process sees the same finished anchor at `folder`."""
    manifests = set(ranks.ask(lambda: _checked_manifest(folder)))
    return len(manifests) == 1 and None not in manifests


def spread_anchor(folder: Path, ranks: Ranks, *, leads: bool) -> None:
    """Copy the anchor at `folder`, if any disk has it, to disks that lack it or hold another build of it.

    The caller keeps other runs out.

    Raises:
        CacheCorruptError: If an anchor that was found is damaged.
    """
    manifests = ranks.ask(lambda: _checked_manifest(folder))
    if len(set(manifests)) == 1:
        return
    owner, manifest = next((rank, found) for rank, found in enumerate(manifests) if found is not None)
    own = manifests[ranks.index]
    # A damaged anchor must not be copied, and not be replaced in silence.
    ranks.only(own is not None, lambda: verify_files(folder, read_manifest(folder).files))
    lacks = leads and own != manifest
    partial = partial_folder(folder)
    ranks.only(lacks, lambda: make_folder(partial))
    files: dict[str, str] = json.loads(manifest)["files"]  # of another disk, checked there
    digests = {**files, MANIFEST: sha256(manifest)}
    source = folder if ranks.index == owner else partial
    spread_files(source, {name: (digest, owner) for name, digest in digests.items()}, ranks, leads=lacks)
    ranks.only(lacks, lambda: _publish(partial, folder))


def finish_build(folder: Path) -> None:
    """Give an anchor its name if a kill came between its last byte and that."""
    partial = partial_folder(folder)
    if not folder.exists() and _is_complete(partial):
        _publish(partial, folder)


def partial_folder(folder: Path) -> Path:
    """Return the folder in which the anchor at `folder` is built."""
    return folder.with_name(folder.name + PARTIAL)


def _is_complete(partial: Path) -> bool:
    """Return whether a build was killed between its manifest and its final name."""
    if not has_manifest(partial):
        return False
    try:
        files = read_manifest(partial).files
    except CacheError as error:
        raise CacheCorruptError(
            "The manifest of an unfinished anchor cannot be used.",
            where=partial / MANIFEST,
            expected="a manifest as this version writes it",
            found=str(error).splitlines()[0],
            fix="Delete this .partial folder; the anchor is then built again from the base model.",
        ) from error
    # A damaged file is no error here: it is made again from its part.
    try:
        verify_files(partial, files)
    except CacheCorruptError:
        return False
    return True


def _publish(partial: Path, folder: Path) -> None:
    """Drop the parts, and give the folder its name."""
    names = {MANIFEST, *read_manifest(partial).files}
    with folder_errors(folder.parent):
        for path in partial.iterdir():
            if path.name not in names:
                remove(path)
        # A folder cannot be renamed over one that is not empty. A kill between the two renames leaves a complete
        # .partial folder and no anchor; the next start gives it its name.
        retired = folder.with_name(folder.name + RETIRED)
        shutil.rmtree(retired, ignore_errors=True)
        if folder.exists():
            folder.rename(retired)
        partial.rename(folder)
        # Before the old anchor goes: a loss of power must not leave neither of them.
        sync_folder(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _checked_manifest(folder: Path) -> bytes | None:
    """Return the bytes of the manifest of a finished anchor; `None` if there is none."""
    if not has_manifest(folder):
        return None
    read_manifest(folder)
    with folder_errors(folder):
        return (folder / MANIFEST).read_bytes()
