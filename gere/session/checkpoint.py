"""What a checkpoint or a saved model says of replay: the key of its anchor, and the state of the weight."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from torch import nn

from gere._files import canonical_json, folder_errors, write_atomic
from gere._records import Fail, read_record
from gere.cache.fingerprint import weights_digest
from gere.config import AUTO, GeReConfig
from gere.errors import CacheCorruptError, CacheFolderError, CacheMissingError, ConfigError, brief
from gere.model.adapters import base_module
from gere.ranks import ALONE, Ranks

ANCHOR_FILE, WEIGHT_FILE, BASE_FILE = "gere_anchor.json", "gere_weight.json", "gere_base.json"
LIVE = "live"
STATE_FILE = "trainer_state.json"
REMEMBERED = "_gere_base"  # attribute of a model in memory
T = TypeVar("T")
KEY = re.compile("[0-9a-f]{32}")


class AnchorName(NamedTuple):
    """Content of `gere_anchor.json`: the key of an anchor, and the base decay of the training."""

    anchor: str
    format_version: Literal[1] = 1
    base_decay: float = 0.0


class BaseName(NamedTuple):
    """Content of `gere_base.json`: the digest of base weights."""

    weights: str
    format_version: Literal[1] = 1


class RunState(NamedTuple):
    """What is read of `trainer_state.json`, which `Trainer` writes last into a checkpoint."""

    global_step: int
    max_steps: int
    log_history: list[dict[str, Any]] | None = None


def read_state(folder: Path, fail: Fail) -> RunState:
    """Read the state of a training in its output folder or in a checkpoint, or raise what `fail` makes."""
    return read_record(folder / STATE_FILE, RunState, fail, most=2**30, others=True)


def write_key(folder: Path, key: str, base_decay: float = 0.0) -> None:
    """Write the key of the anchor beside a saved model, and the base decay of its training.

    Raises:
        CacheFolderError: If the folder cannot be written.
    """
    content = {"format_version": 1, "anchor": key}
    if base_decay:
        content["base_decay"] = base_decay
    _write(folder / ANCHOR_FILE, content)


def read_decay(checkpoint: Path) -> float:
    """Base decay of the training that a checkpoint belongs to.

    Raises:
        CacheCorruptError: If the file cannot be used.
    """
    fix = "Restore the file, or set gere_config.base_decay to a number."
    content = _read(checkpoint, ANCHOR_FILE, AnchorName, fix)
    decay = content.base_decay if content is not None else 0.0
    if not 0 <= decay < math.inf:
        raise damaged(f"{checkpoint}/{ANCHOR_FILE}", "'base_decay': a finite number >= 0", brief(decay), fix=fix)
    return decay


def write_weight(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of the weight into a checkpoint; nothing if it has none.

    Raises:
        CacheFolderError: If the folder cannot be written.
    """
    if state:
        _write(folder / WEIGHT_FILE, {"format_version": 1, **state})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with folder_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)  # with sharded checkpoints the trainer has not made it yet
    write_atomic(path, canonical_json(content))


def write_base(folder: Path, model: nn.Module) -> None:
    """Write the digest of the base weights beside a model that was trained without replay, if base decay knows it.

    Raises:
        CacheFolderError: If the folder cannot be written.
    """
    known: Remembered | None = getattr(base_module(model), REMEMBERED, None)
    if known is not None:
        _write(folder / BASE_FILE, {"format_version": 1, "weights": known.weights})


def base_digest(model: nn.Module, ranks: Ranks) -> str:
    """Digest of the base weights of a model that is trained without replay: those that it had first."""
    known: Remembered | None = getattr(base_module(model), REMEMBERED, None)
    if known is not None:
        return known.weights
    digest = weights_digest(model, ranks)
    remember(model, "", digest)
    return digest


def base_of_checkpoint(checkpoint: Path, ranks: Ranks) -> str:
    """Digest of the base weights of a training without replay that is resumed, from any process that has it.

    Raises:
        CacheMissingError: If its checkpoint does not name it.
        CacheCorruptError: If the file cannot be used.
    """
    fix = "Restore the file, or start from the base model."
    for found in ranks.ask(lambda: _read(checkpoint, BASE_FILE, BaseName, fix)):
        if found is not None:
            return found.weights
    raise CacheMissingError(
        "Training with base_decay resumes, and nothing says what its base is.",
        where=checkpoint,
        expected=f"{BASE_FILE}, which a training with base_decay writes into every checkpoint",
        found="no such file",
        fix=fix,
    )


def read_key(folder: Path | None) -> str | None:
    """Key in the anchor file of a checkpoint or model folder; `None` if there is no such file.

    Raises:
        CacheCorruptError: If the file cannot be used.
    """
    fix = "Restore the file, or set gere_config.anchor to the key of the anchor."
    content = _read(folder, ANCHOR_FILE, AnchorName, fix)
    if content is None:
        return None
    # The key becomes the name of a folder: nothing else may pass.
    if not KEY.fullmatch(content.anchor):
        found = f"'anchor': {brief(content.anchor)}"
        raise damaged(f"{folder}/{ANCHOR_FILE}", "a key of 32 hexadecimal digits", found, fix=fix)
    return content.anchor


def read_weight(folder: Path | None) -> dict[str, Any]:
    """State of the weight in a checkpoint; empty if there is none.

    Raises:
        CacheCorruptError: If the file cannot be used.
    """
    fix = "Restore the file; or delete it, and the weight calibrates again on the next replay rows."
    return _read(folder, WEIGHT_FILE, dict[str, Any], fix) or {}


def _read(folder: Path | None, name: str, form: type[T], fix: str) -> T | None:
    """Read a file of a checkpoint; `None` if it is not there."""
    if folder is None:
        return None
    with folder_errors(folder):
        there = (folder / name).is_file()
    return read_record(folder / name, form, partial(damaged, fix=fix)) if there else None


def damaged(where: str, expected: str, found: str, *, fix: str) -> CacheCorruptError:
    """Make the error about a file beside a saved model."""
    return CacheCorruptError(
        "A file that gere writes beside a saved model cannot be used.",
        where=where,
        expected=expected,
        found=found,
        fix=fix,
    )


def loaded_key(model: Any) -> str | None:
    """Key in the folder that a model was loaded from."""
    loaded_from = getattr(getattr(model, "config", None), "_name_or_path", "")
    return read_key(Path(loaded_from)) if loaded_from else None


class Remembered(NamedTuple):
    """What a model in memory knows of the base that it was tuned from: the key of its anchor, and its weights."""

    key: str
    weights: str


def remember(model: nn.Module, key: str, weights: str) -> None:
    """Tell a model the key of its anchor and the digest of its base weights, for the next trainer that gets it."""
    # In the model itself, since it may be trained again without being saved.
    setattr(base_module(model), REMEMBERED, Remembered(key, weights))


def remembered_key(model: nn.Module, ranks: Ranks) -> str | None:
    """Key of the anchor that a model was trained with before; `None` if its base weights have not moved since."""
    known: Remembered | None = getattr(base_module(model), REMEMBERED, None)
    if known is None or known.weights == weights_digest(model, ranks):
        return None
    return known.key


def named_key(
    config: GeReConfig, reuse: bool, model: nn.Module, checkpoint: Path | None, ranks: Ranks = ALONE
) -> str | None:
    """Key that the user, the checkpoint or the model itself names; `None` for a model that is its own base.

    Args:
        config: The setting `anchor`.
        reuse: Reuse an anchor that is there.
        model: The model without its distributed wrapper.
        checkpoint: The checkpoint that training resumes from.
        ranks: All processes; each must call this.

    Raises:
        ConfigError: If a fine-tuned model would become a base.
        CacheMissingError: If the checkpoint names no anchor.
        CacheCorruptError: If a file that names an anchor is damaged.
    """
    if config.anchor not in (AUTO, LIVE):
        return config.anchor.removeprefix("anchor-")
    if checkpoint is not None:
        return ranks.ask(lambda: _key_of_checkpoint(checkpoint))[0]
    key = remembered_key(model, ranks) or ranks.ask(lambda: loaded_key(model))[0]
    if key is not None and not reuse:
        raise ConfigError(
            "This model was fine-tuned from a base model whose anchor is known. "
            "reuse_gere_hidden_state=False would anchor the fine-tuned model instead of its base.",
            where="reuse_gere_hidden_state",
            expected=f"True, to use the anchor {key}",
            found="False",
            fix=f"Leave it out; or, to make this model a base itself, load it from a folder without {ANCHOR_FILE}.",
        )
    return key


def _key_of_checkpoint(checkpoint: Path) -> str:
    key = read_key(checkpoint)
    if key is None:
        raise CacheMissingError(
            "Training resumes from a checkpoint that names no anchor, and its model cannot be anchored any more.",
            where=checkpoint,
            expected=f"{ANCHOR_FILE}, which GeReTrainer writes into every checkpoint",
            found="a checkpoint of another trainer, or of GeReTrainer without replay",
            fix="Start from the base model, or set gere_config.anchor to the key of its anchor.",
        )
    return key


def keys_in_runs(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Keys that output folders name, in themselves, in their checkpoints and in all folders below.

    Args:
        folders: Output folders of runs.

    Returns:
        By key, the folders that name it.

    Raises:
        CacheMissingError: If one of the folders is not there.
        CacheFolderError: If a folder cannot be read.
        CacheCorruptError: If a file that names an anchor is damaged.
    """
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for holder in _holders(folder):
            found.setdefault(_sure_key(holder), []).append(holder)
    return found


def _holders(folder: Path) -> Iterator[Path]:
    """Folders in and below `folder`, links followed, that hold a file that names an anchor."""
    if not folder.is_dir():
        raise CacheMissingError(
            "An output folder is not there.",
            where=folder,
            expected="a folder of runs, whose anchors stay",
            found="a file" if folder.exists() else "no such folder",
            fix="Correct the path, or leave it out.",
        )
    seen: set[Path] = set()
    for name, below, files in os.walk(folder, onerror=_refuse, followlinks=True):
        path = Path(name)
        if path.resolve() in seen:  # a link can lead back to a folder above it
            below.clear()
            continue
        seen.add(path.resolve())
        if ANCHOR_FILE in files:
            yield path


def _refuse(error: OSError) -> None:
    raise CacheFolderError(
        "An output folder cannot be read, so that the anchors that it names are not known.",
        where=error.filename,
        expected="a folder that this process may read",
        found=f"{type(error).__name__}: {error.strerror}",
        fix="Run this as a user who may read it.",
    ) from error


def _sure_key(folder: Path) -> str:
    """Key that a folder names. Anything that only looks like one would let an anchor go that a run needs."""
    key = read_key(folder)
    if key is None:
        raise CacheCorruptError(
            "The file that names the anchor of a run names none.",
            where=folder / ANCHOR_FILE,
            expected="a key of 32 hexadecimal digits",
            found="a link that leads nowhere",
            fix="Restore the file, or delete it if the run is not needed any more.",
        )
    return key
