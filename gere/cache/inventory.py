"""List what a cache folder holds, by names, sizes and manifests; nothing is hashed and no model runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gere._files import folder_errors, open_regular
from gere.cache.store import PARTIAL, RETIRED, anchor_folder, has_manifest, read_manifest
from gere.errors import CacheError, CacheMissingError


class Survey(NamedTuple):
    """Paths in a cache folder, or in the folder of one anchor."""

    folder: Path
    anchors: list[Path]  # some may be damaged
    unfinished: list[Path]
    replay_files: list[Path]
    leftovers: list[Path]  # of kills: replaced anchors, temporary files


def survey(folder: Path) -> Survey:
    """Look through a cache folder, or the folder of one anchor; any other is a `CacheMissingError`."""
    with folder_errors(folder):
        if not folder.is_dir():
            raise _no_cache(folder, "a file" if folder.exists() else "no such folder")
        if has_manifest(folder):
            return Survey(folder, [folder.resolve()], [], [], [])
        named = [path for path in sorted(folder.glob("anchor-*")) if path.is_dir()]
        held = Survey(
            folder,
            anchors=[path for path in named if not path.suffix],
            unfinished=[path for path in named if path.suffix == PARTIAL],
            replay_files=[path for path in sorted(folder.glob("replay-*.jsonl")) if path.is_file()],
            leftovers=[path for path in named if path.suffix == RETIRED] + sorted(_temporary(folder)),
        )
        # The first start leaves the lock. A folder without it never held an anchor: its path may be mistyped.
        if not any(held[1:]) and not (folder / ".lock").exists():
            raise _no_cache(folder, "a folder without any")
    return held


def pick(held: Survey, key: str) -> Path:
    """Return the folder of the anchor with this key, or raise a `CacheMissingError`."""
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
    """Return the key in the name of an anchor's folder, of its unfinished or its replaced build."""
    return name.removeprefix("anchor-").removesuffix(PARTIAL).removesuffix(RETIRED)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in and below a folder, not counting what links lead to."""
    files = [path]
    if path.is_dir() and not path.is_symlink():
        files = [*path.rglob("*")]
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())


def describe(held: Survey) -> dict[str, Any]:
    """Return what a cache folder holds, ready for JSON."""
    return {
        "folder": str(held.folder),
        "anchors": [describe_anchor(path) for path in held.anchors],
        "unfinished": [_describe_unfinished(path) for path in held.unfinished],
        "replay_files": [{"name": path.name, "bytes": size_of(path)} for path in held.replay_files],
        "leftovers": [{"name": str(path.relative_to(held.folder)), "bytes": size_of(path)} for path in held.leftovers],
    }


def describe_anchor(folder: Path) -> dict[str, Any]:
    """Return the content of an anchor's manifest, or `error` if it cannot be read, and bytes on disk by kind."""
    kinds: dict[str, int] = {}
    with folder_errors(folder):
        for path in sorted(folder.iterdir()):
            kind = re.sub(r"-\d+$", "", path.stem)
            kinds[kind] = kinds.get(kind, 0) + size_of(path)
    known = {"key": key_in(folder.name), "folder": str(folder), "bytes": {**kinds, "total": sum(kinds.values())}}
    try:
        manifest = read_manifest(folder)
    except CacheError as error:
        return {**known, "error": str(error)}
    return {**known, "key": manifest.key, "fields": manifest.fields, **manifest.shape._asdict()}


def _describe_unfinished(folder: Path) -> dict[str, Any]:
    parts = sorted(folder.glob("part-*.safetensors"))
    return {
        "key": key_in(folder.name),
        "parts": len(parts),
        "rows": sum(map(_rows_in, parts)),
        "all_evaluated": has_manifest(folder),
        "bytes": size_of(folder),
    }


def _rows_in(part: Path) -> int:
    """Return the rows of a part by its header; 0 if that cannot be read, which the next build will name."""
    try:
        with open_regular(part) as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return int(header["row"]["shape"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, MemoryError, RecursionError):
        return 0


def _temporary(folder: Path) -> Iterator[Path]:
    """Yield files that exist for a moment only, unless a kill came."""
    for pattern in (".*.tmp", ".rank-*"):
        yield from folder.glob(pattern)
    for path in folder.glob("anchor-*/.*.tmp"):
        # Those of unfinished and replaced builds go with their folder.
        if not path.parent.suffix:
            yield path


def _no_cache(folder: Path, found: str) -> CacheMissingError:
    return CacheMissingError(
        "This is not a folder of anchors.",
        where=folder,
        expected="a folder that holds anchor-KEY/, or such a folder itself",
        found=found,
        fix="Give the gere_hidden_state_saving_dir of a training, or build an anchor with `gere cache build`.",
    )
