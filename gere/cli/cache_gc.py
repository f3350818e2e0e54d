"""`gere cache gc`: list or remove what no run needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gere.cache.gc import collect
from gere.cli.cache_show import megabytes
from gere.session.checkpoint import keys_in_runs

NO_RUNS = "Finished anchors stay, since no runs are given: --runs OUT removes those that no run under OUT names.\n"


def clean_up(folder: Path, runs: Sequence[Path] | None, keep: Sequence[str], *, delete: bool) -> int:
    """Write what no run needs, and remove it if asked to.

    Args:
        folder: Cache folder.
        runs: Output folders of runs; `None` lets every finished anchor stay.
        keep: Keys of further anchors that stay.
        delete: Remove what is found.

    Returns:
        The exit status, 0.
    """
    named = None if runs is None else keys_in_runs(runs)
    rubbish = collect(folder, named, keep, delete=delete)
    for item in rubbish:
        sys.stdout.write(f"{megabytes(item.size):>12}  {item.path.relative_to(folder)}  ({item.why})\n")
    size = megabytes(sum(item.size for item in rubbish))
    done = "Removed:" if delete else "To remove them, give --yes:"
    sys.stdout.write(f"{done} {len(rubbish)} of them, {size}.\n" if rubbish else "Nothing to remove.\n")
    sys.stdout.write(NO_RUNS if named is None else f"Runs name {len(named)} anchors.\n")
    return 0
