"""Parts of an anchor that is being built: files that a killed build leaves and the next one goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from gere._files import sha256, write_atomic
from gere.errors import CacheCorruptError


def store_part(path: Path, tensors: dict[str, Tensor], tag: str) -> None:
    """Write a part.

    Args:
        path: Its file.
        tensors: Its content.
        tag: What it was made from, without spaces.

    Raises:
        CacheFolderError: If the file cannot be written.
    """
    write_atomic(path, save(tensors, {"part": f"{tag} {_part_digest(tag, tensors)}"}))


def load_part(path: Path, tag: str) -> dict[str, Tensor] | None:
    """Read a part that an earlier build left.

    Args:
        path: Its file.
        tag: What it must have been made from.

    Returns:
        Its tensors, or `None` if there is none with this tag.

    Raises:
        CacheCorruptError: If its bytes differ from what was written.
    """
    try:
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        rows, digest = header["__metadata__"]["part"].split()
        tensors = load(raw)
        if digest != _part_digest(rows, tensors):
            raise ValueError(f"its SHA-256 is not {digest}")
        return tensors if rows == tag else None
    except FileNotFoundError:
        return None
    except Exception as error:  # safetensors, JSON and struct raise many kinds
        raise _damaged(path, error) from error


def read_part(path: Path, tag: str) -> dict[str, Tensor]:
    """Read a part that must be there; errors as in `load_part`."""
    stored = load_part(path, tag)
    if stored is None:
        raise FileNotFoundError(path)
    return stored


def _damaged(path: Path, error: Exception) -> CacheCorruptError:
    return CacheCorruptError(
        "A part of an unfinished anchor cannot be read.",
        where=path,
        expected="a part as it was written",
        found=f"{type(error).__name__}: {error}",
        fix="Delete this file; only its rows are then evaluated again.",
    )


def _part_digest(tag: str, tensors: Mapping[str, Tensor]) -> str:
    parts = [tensors[name].contiguous().flatten().view(torch.uint8).numpy().data for name in sorted(tensors)]
    return sha256(tag.encode() + b"".join(hashlib.sha256(part).digest() for part in parts))
