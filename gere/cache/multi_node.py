"""An anchor that several processes build together: which disk is whose, and files for the disks that lack them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from gere._files import file_sha256, folder_errors, write_atomic
from gere.ranks import Ranks


def leads_disk(folder: Path, ranks: Ranks) -> bool:
    """Return whether this is the first of the processes that see the same files in a folder."""
    if ranks.count == 1:
        return True
    # Shared disks and disks of each machine look alike by their paths, so every process leaves a file and looks whose
    # files it sees.
    own = folder / f".rank-{uuid.uuid4().hex}"

    def leave() -> None:
        with folder_errors(folder):
            own.touch()

    ranks.together(leave)
    names = ranks.gather(own.name)
    first = min(rank for rank, name in enumerate(names) if (folder / name).exists())
    ranks.gather(None)  # no process may delete its file before all have looked

    def clear() -> None:
        with folder_errors(folder):
            own.unlink(missing_ok=True)

    ranks.together(clear)
    return first == ranks.index


def deal(present: Sequence[Sequence[bool]]) -> tuple[list[int], list[bool]]:
    """Return a rank for each part, and whether it is on a disk already; `present` says so by rank and part."""
    owners, stored, dealt = [], [], 0
    for number, flags in enumerate(zip(*present, strict=True)):
        holders = [rank for rank, there in enumerate(flags) if there]
        if holders:
            # On a shared disk all ranks hold it, and they share the work of encoding it, too.
            owners.append(holders[number % len(holders)])
        else:
            owners.append(dealt % len(present))
            dealt += 1
        stored.append(bool(holders))
    return owners, stored


def spread_files(folder: Path, files: Mapping[str, tuple[str, int]], ranks: Ranks, *, leads: bool) -> None:
    """Write files to the disks that lack them; `files` has the SHA-256 of each, and a rank whose disk has it."""

    def find_lacking() -> set[str]:
        if not leads:
            return set()
        return {name for name, (digest, _) in files.items() if not _has(folder / name, digest)}

    wanted = ranks.ask(find_lacking)
    # One file at a time, since every process holds the bytes of those that are exchanged.
    for name in sorted(set().union(*wanted)):
        _spread(folder / name, files[name][1], ranks, lacks=name in wanted[ranks.index])


def _spread(path: Path, owner: int, ranks: Ranks, *, lacks: bool) -> None:
    def read() -> bytes:
        return path.read_bytes() if ranks.index == owner else b""

    content = ranks.ask(read)[owner]
    ranks.only(lacks, lambda: write_atomic(path, content))


def _has(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest
