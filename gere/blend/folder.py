"""A blended model on disk: the files of the tuned model, its weights moved along the line; all of it or nothing."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gere._files import canonical_json, sync_folder
from gere.blend.files import ADAPTER_CONFIG, CONFIG
from gere.blend.pairs import Line
from gere.errors import BlendError

BLEND_FILE = "gere_blend.json"
# Of a training, not of a model; and weights in other files, which have not moved.
LEFT_OUT = ("trainer_state.json", "gere_weight.json", "latest", "zero_to_fp32.py", BLEND_FILE)
LEFT_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")
LEFT_INDEXES = (".bin.index.json",)
LEFT_FOLDERS = ("checkpoint-", "global_step", "runs", "anchor-", ".")


def require_new(out: Path, inputs: list[str], *, force: bool) -> None:
    """Refuse a folder that must not be overwritten.

    Args:
        out: The folder to write.
        inputs: Folders that are read.
        force: Whether a blend that is there may go.

    Raises:
        BlendError: If it exists and `force` is not set, or it holds anything but a blend.
    """
    place = out.resolve()
    read = [Path(name).resolve() for name in inputs]
    if any(place == path or place in path.parents for path in read):
        raise _exists(
            out, "a folder beside TUNED and the base", "one of them, or a folder around them", "another --out"
        )
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise _exists(out, "a new folder", "one that exists", "another --out, or add --force to replace a blend")
    # `--force` must never remove anything that this command did not write.
    blend = out.is_dir() and not out.is_symlink() and ((out / BLEND_FILE).is_file() or not any(out.iterdir()))
    if not blend:
        raise _exists(out, f"a folder with {BLEND_FILE}, which --force may replace", "something else", "another --out")


def write_blend(line: Line, share: float, out: Path, about: Mapping[str, Any], *, force: bool = False) -> None:
    """Write the model at a share of the line.

    The weights are in the same files as the tuned ones. Everything else of the tuned folder is copied, but for
    checkpoints, states of the training, and weights in other formats. A run that is killed leaves no `out`, or the one
    that was there.

    Args:
        line: The line.
        share: From 0 to 1.
        out: The folder to write.
        about: Content of `gere_blend.json` beside format and share.
        force: Whether a blend that is there may go.

    Raises:
        BlendError: If the folder exists, cannot be written, or its disk is too full; or as `Line.at`.
    """
    inputs = [line.tuned.name, *([line.base.name] if line.base else [])]
    require_new(out, inputs, force=force)
    tuned = Path(line.tuned.name)
    others = list(_others(tuned))
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _require_space(out.parent, sum(path.stat().st_size for path in [*line.tuned.files, *others]))
        temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
        try:
            for path in others:
                _copy(path, temporary / path.relative_to(tuned))
            for path in line.tuned.files:
                _write_weights(line, share, path, temporary / path.name)
            content = canonical_json({"format_version": 1, "share": share, **about})
            (temporary / BLEND_FILE).write_bytes(content)
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _sync(Path(folder) / name)
                sync_folder(Path(folder))
            _move(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _others(folder: Path) -> Iterator[Path]:
    """Yield the files of a tuned folder that are copied as they are."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            # A folder with a model of its own holds weights that do not move along; one with anchors is a cache.
            own = any((path / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)) or any(path.glob("anchor-*"))
            if not path.name.startswith(LEFT_FOLDERS) and not own:
                yield from _others(path)
        elif path.name not in LEFT_OUT and path.suffix not in LEFT_SUFFIXES and not path.name.endswith(LEFT_INDEXES):
            yield path


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_weights(line: Line, share: float, source: Path, target: Path) -> None:
    """Write one file of weights, which is all that main memory holds."""
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    pairs = [pair for pair in line.pairs if line.tuned.places[pair.name] == source]
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({pair.name: line.at(pair, share) for pair in pairs}, target, metadata=metadata)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(temporary: Path, out: Path) -> None:
    """Give a whole folder its name. What was there goes after it has another name."""
    old = out.with_name(f".{out.name}.{uuid.uuid4().hex}.old")
    if out.exists():
        out.replace(old)
    temporary.replace(out)
    sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BlendError(
            "The disk is too full for the blend.",
            where=folder,
            expected=f"{needed / 1e6:,.1f} MB free",
            found=f"{free / 1e6:,.1f} MB",
            fix="Free some space, or give --out on another disk.",
        )


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BlendError(
            "The blend cannot be written.",
            where=out,
            expected="a path that this process may write to, on a disk with room",
            found=f"{type(error).__name__}: {error}",
            fix="Give another --out, or free some space.",
        ) from error


def _exists(out: Path, expected: str, found: str, fix: str) -> BlendError:
    return BlendError(
        "The folder of the blend is in use.", where=f"--out {out}", expected=expected, found=found, fix=f"Give {fix}."
    )
