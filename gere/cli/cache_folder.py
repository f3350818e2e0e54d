"""`gere cache info`, `verify` and `gc`: show what a cache folder holds, check it, and clean it up.

Each function is one command: it writes its report and returns the exit status.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gere.cache.gc import collect
from gere.cache.inventory import describe, pick, size_of, survey
from gere.cache.resolve import open_whole
from gere.errors import CacheError
from gere.session.checkpoint import keys_in_runs

NO_RUNS = "Finished anchors stay, since no runs are given: --runs OUT removes those that no run under OUT names."


def info(folder: Path, *, as_json: bool) -> int:
    """Show what a cache folder, or the folder of one anchor, holds; status 1 if a manifest cannot be read."""
    held = describe(survey(folder))
    text = "\n".join(_lines(held))
    if as_json:
        text = json.dumps(held, indent=1, ensure_ascii=False)
    sys.stdout.write(text + "\n")
    return int(any("error" in anchor for anchor in held["anchors"]))


def verify(folder: Path, key: str | None) -> int:
    """Hash every file of every anchor, or of the one with this key; status 1 if an anchor is damaged."""
    held = survey(folder)
    paths = held.anchors
    if key is not None:
        paths = [pick(held, key)]
    damaged = 0
    for path in paths:
        # Written one by one: anchors are large, and hashing them takes its time.
        try:
            open_whole(path)
        except CacheError as error:
            damaged += 1
            sys.stdout.write(f"DAMAGED  {path.name}\n{_indented(str(error))}\n")
        else:
            sys.stdout.write(f"OK       {path.name}  {_megabytes(size_of(path))}\n")
    if not held.anchors:
        sys.stdout.write("no finished anchor\n")
    return int(damaged > 0)


def clean_up(folder: Path, runs: Sequence[Path] | None, keep: Sequence[str], *, delete: bool) -> int:
    """List what no run needs, and remove it if asked to. Without `runs` every finished anchor stays."""
    named: dict[str, list[Path]] = {}

    def find() -> Collection[str]:
        named.update(keys_in_runs(runs or ()))
        return named

    rubbish = collect(folder, None if runs is None else find, keep, delete=delete)
    note = NO_RUNS if runs is None else f"Runs name {len(named)} anchors."
    lines = [f"{_megabytes(item.size):>12}  {item.path.relative_to(folder)}  ({item.why})" for item in rubbish]
    if rubbish:
        done = "Removed:" if delete else "To remove them, give --yes:"
        lines.append(f"{done} {len(rubbish)} of them, {_megabytes(sum(item.size for item in rubbish))}.")
    else:
        lines.append("Nothing to remove.")
    sys.stdout.write("\n".join([*lines, note]) + "\n")
    return 0


def anchor_lines(anchor: Mapping[str, Any]) -> Iterator[str]:
    """Describe an anchor from `describe_anchor` to a person, one fact a line."""
    if "error" in anchor:
        yield _indented(anchor["error"])
    else:
        held_out = f", {anchor['heldout']} held out" if anchor.get("heldout") else ""
        yield f"  {anchor['rows']:,} rows{held_out}, {anchor['tokens']:,} tokens, dim {anchor['dim']:,}"
        for name, value in anchor["fields"].items():
            # Twelve digits of a SHA-256 are enough to compare by eye.
            yield f"  {name:<14}" + re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", value)
    sizes = dict(anchor["bytes"])
    total = _megabytes(sizes.pop("total"))
    yield f"  {'on disk':<14}{total}: " + ", ".join(f"{kind} {_megabytes(size)}" for kind, size in sizes.items())


def _lines(held: Mapping[str, Any]) -> Iterator[str]:
    for anchor in held["anchors"]:
        yield f"anchor {anchor['key']}"
        yield from anchor_lines(anchor)
    for build in held["unfinished"]:
        far = f"{build['rows']:,} rows in {build['parts']} parts"
        if build["all_evaluated"]:
            far = "all evaluated"
        yield f"unfinished {build['key']}: {far}, {_megabytes(build['bytes'])}"
    for item in held["replay_files"]:
        yield f"kept texts {item['name']}, {_megabytes(item['bytes'])}"
    for item in held["leftovers"]:
        yield f"leftover {item['name']}, {_megabytes(item['bytes'])}"
    if not any(held[kind] for kind in ("anchors", "unfinished", "replay_files", "leftovers")):
        yield "empty"


def _megabytes(size: int) -> str:
    if size < 1e5:
        return f"{size / 1e3:,.1f} kB"
    return f"{size / 1e6:,.1f} MB"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
