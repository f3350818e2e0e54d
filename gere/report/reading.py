"""From folders on a command line to runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gere.errors import ConfigError, RunFolderError
from gere.report.run import Run
from gere.report.sequence import ABOUT, read_sequence
from gere.report.training import STATE, find_state, read_training


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders.

    Args:
        folders: Folders of `gere sequence`, or output folders of a `Trainer`.

    Raises:
        ConfigError: If a folder is named twice.
        RunFolderError: If a folder is no run, or a file of it is damaged.
    """
    twice = [str(path) for path, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise ConfigError(
            "A run is named twice.",
            where="RUN",
            expected="each folder once: an interval takes the runs of a name for independent",
            found=", ".join(twice),
            fix="Name it once.",
        )
    return [_read(folder) for folder in folders]


def labels_of(runs: Sequence[Run]) -> list[str]:
    """A label of each run that no other has: its name, with its seed or its folder where that is needed."""
    names = Counter(run.name for run in runs)
    labels = [run.name if names[run.name] == 1 or run.seed is None else f"{run.name}, seed {run.seed}" for run in runs]
    again = Counter(labels)
    return [label if again[label] == 1 else f"{label} ({run.folder})" for label, run in zip(labels, runs, strict=True)]


def _read(folder: Path) -> Run:
    if (folder / ABOUT).is_file():
        return read_sequence(folder)
    state = find_state(folder)
    if state is None:
        raise RunFolderError(
            "The folder holds no run.",
            where=folder,
            expected=f"{ABOUT} of gere sequence, or {STATE} of a Trainer, there or in a checkpoint-N",
            found="a folder without them" if folder.is_dir() else "no folder",
            fix="Name the output folder of a run; a Trainer writes its state with a checkpoint and by save_state().",
        )
    return read_training(folder, state)
