"""What a cache folder holds, by names, sizes and manifests; nothing is hashed and no model runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gere.cache.resolve import anchor_folder
from gere.cache.store import MANIFEST, read_manifest
from gere.errors import CacheError, CacheMissingError

PARTIAL, RETIRED, LOCK = ".partial", ".retired", ".lock"


class Survey(NamedTuple):
    """Paths in a cache folder.

    Attributes:
        folder: The cache folder, or the folder of one anchor.
        anchors: Folders of anchors; one may be damaged.
        unfinished: Folders of builds that were begun and not ended.
        replay_files: Kept texts.
        leftovers: What a kill left: replaced anchors, temporary files.
    """

    folder: Path
    anchors: list[Path]
    unfinished: list[Path]
    replay_files: list[Path]
    leftovers: list[Path]


def survey(folder: Path) -> Survey:
    """Look through a cache folder, or the folder of one anchor.

    Raises:
        CacheMissingError: If there is no such folder, or it is none of these.
    """
    if not folder.is_dir():
        raise _no_cache(folder, "a file" if folder.exists() else "no such folder")
    if (folder / MANIFEST).exists():
        return Survey(folder, [folder.resolve()], [], [], [])
    named = [path for path in sorted(folder.glob("anchor-*")) if path.is_dir()]
    held = Survey(
        folder,
        anchors=[path for path in named if not path.suffix],
        unfinished=[path for path in named if path.suffix == PARTIAL],
        replay_files=sorted(folder.glob("replay-*.jsonl")),
        leftovers=[path for path in named if path.suffix == RETIRED] + sorted(_temporary(folder)),
    )
    if not any(held[1:]) and not (folder / LOCK).exists():
        raise _no_cache(folder, "a folder without any")
    return held


def pick(held: Survey, key: str) -> Path:
    """The anchor with this key.

    Raises:
        CacheMissingError: If there is none.
    """
    for path in held.anchors:
        if path.name == anchor_folder(path.parent, key_in(key)).name:
            return path
    raise CacheMissingError(
        "There is no anchor with this key.",
        where=held.folder,
        expected=", ".join(key_in(path.name) for path in held.anchors) or "a key (this folder holds no anchor)",
        found=key,
        fix="Use a key that `gere cache info` shows.",
    )


def key_in(name: str) -> str:
    """Key in the name of an anchor's folder, of its unfinished or its replaced build."""
    return name.removeprefix("anchor-").removesuffix(PARTIAL).removesuffix(RETIRED)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in and below a folder; what links lead to is not counted."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())


def describe(held: Survey) -> dict[str, Any]:
    """What a cache folder holds, ready for JSON."""
    return {
        "folder": str(held.folder),
        "anchors": [describe_anchor(path) for path in held.anchors],
        "unfinished": [_describe_unfinished(path) for path in held.unfinished],
        "replay_files": [{"name": path.name, "bytes": size_of(path)} for path in held.replay_files],
        "leftovers": [{"name": str(path.relative_to(held.folder)), "bytes": size_of(path)} for path in held.leftovers],
    }


def describe_anchor(folder: Path) -> dict[str, Any]:
    """What the manifest of an anchor says, and bytes on disk by kind; `error` in place of it if it cannot be read."""
    kinds: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        kind = re.sub(r"-\d+$", "", path.stem)
        kinds[kind] = kinds.get(kind, 0) + size_of(path)
    known = {"key": key_in(folder.name), "folder": str(folder), "bytes": {**kinds, "total": sum(kinds.values())}}
    try:
        manifest = read_manifest(folder)
    except CacheError as error:
        return {**known, "error": str(error)}
    return {**known, "key": manifest["key"], "fields": manifest["fields"], **manifest["shape"]}


def _describe_unfinished(folder: Path) -> dict[str, Any]:
    parts = sorted(folder.glob("part-*.safetensors"))
    return {
        "key": key_in(folder.name),
        "parts": len(parts),
        "rows": sum(map(_rows_in, parts)),
        "all_evaluated": (folder / MANIFEST).exists(),
        "bytes": size_of(folder),
    }


def _rows_in(part: Path) -> int:
    """Rows of a part by its header; 0 if that cannot be read, which the next build will name."""
    try:
        with part.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return int(header["row"]["shape"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, MemoryError):
        return 0


def _temporary(folder: Path) -> Iterator[Path]:
    """Files that are there for a moment only, unless a kill came."""
    for pattern in (".*.tmp", ".rank-*"):
        yield from folder.glob(pattern)
    for path in folder.glob("anchor-*/.*.tmp"):
        if not path.parent.suffix:  # others go with their folder
            yield path


def _no_cache(folder: Path, found: str) -> CacheMissingError:
    return CacheMissingError(
        "This is no folder of anchors.",
        where=folder,
        expected="a folder that holds anchor-KEY/, or such a folder itself",
        found=found,
        fix="Give the gere_hidden_state_saving_dir of a training, or build an anchor with `gere cache build`.",
    )
