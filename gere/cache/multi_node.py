"""An anchor that several processes build together: which disk is whose, and files for the disks that lack them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from gere._files import file_sha256, folder_errors, write_atomic
from gere.ranks import Ranks


def leads_disk(folder: Path, ranks: Ranks) -> bool:
    """Whether this is the first of the processes that see the same files in `folder`.

    Shared disks and disks of each machine look alike by their paths, so every process leaves a file and looks whose
    files it sees.

    Args:
        folder: A folder that exists everywhere.
        ranks: All processes; each must call this.

    Raises:
        CacheFolderError: If the folder cannot be written.
    """
    if ranks.count == 1:
        return True
    own = folder / f".rank-{uuid.uuid4().hex}"

    def leave() -> None:
        with folder_errors(folder):
            own.touch()

    ranks.together(leave)
    names = ranks.gather(own.name)
    seen = [rank for rank, name in enumerate(names) if (folder / name).exists()]
    ranks.gather(None)  # nobody takes his file away before all have looked
    ranks.together(lambda: own.unlink(missing_ok=True))
    return min(seen) == ranks.index


def deal(present: Sequence[Sequence[bool]]) -> tuple[list[int], list[bool]]:
    """Which rank has each part: one that has it on its disk already, else the parts are dealt round.

    Args:
        present: By rank, whether each part is on its disk.

    Returns:
        A rank for each part, and whether it is on a disk already.
    """
    owners, stored, dealt = [], [], 0
    for number, flags in enumerate(zip(*present, strict=True)):
        holders = [rank for rank, there in enumerate(flags) if there]
        owners.append(holders[number % len(holders)] if holders else dealt % len(present))
        stored.append(bool(holders))
        dealt += not holders
    return owners, stored


def spread_files(folder: Path, files: Mapping[str, tuple[str, int]], ranks: Ranks, *, leads: bool) -> None:
    """Write files to the disks that lack them.

    Args:
        folder: Their folder, which exists everywhere.
        files: SHA-256 of each file by name, and a rank whose disk has it.
        ranks: All processes; each must call this.
        leads: Whether this process writes for its disk.

    Raises:
        CacheFolderError: If a disk is full.
        RankFailedError: If another process failed.
    """
    wanted = ranks.ask(
        lambda: {name for name, (digest, _) in files.items() if leads and not _has(folder / name, digest)}
    )
    lacking = wanted[ranks.index]
    for name in sorted(set().union(*wanted)):
        owner = files[name][1]

        def read(path: Path = folder / name, mine: bool = owner == ranks.index) -> bytes | None:
            return path.read_bytes() if mine else None

        content = ranks.ask(read)[owner]

        def write(path: Path = folder / name, content: bytes | None = content) -> None:
            if path.name in lacking and content is not None:
                write_atomic(path, content)

        ranks.together(write)


def _has(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest
