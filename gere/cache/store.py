"""An anchor on disk: opened, verified, read row by row. It never runs a model.

An anchor is a folder of these files; `manifest.json` is written last and names every other file with its hash.

| file | content |
|---|---|
| `rows.safetensors` | `tokens` int32 [n], `base_ce` float32 [n]; with shards `shard` int32 [n], `start` int64 [n] |
| `heldout.safetensors` | of the held-out rows, if there are any: `tokens` int32 [h], `base_ce` float32 [h] |
| `sample.safetensors` | `weights` float32 [k], some of the base model's weights |
| `bands.safetensors` | for regions: `lower`, `upper`, `tolerance`, float32 [d], of several layers [l, d] |
| `regions-NNNNN.safetensors` | `codes` uint8 [tokens of the shard, ceil(d / 4)], of several layers [.., l, ..] |
| `states-NNNNN.safetensors` | `state` bfloat16 [tokens of the shard, d] |
| `logits-NNNNN.safetensors` | `ids` int32 and `log_probs` float32 [tokens of the shard, k], `rest` float32 [tokens] |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from gere._files import canonical_json, file_sha256, sha256
from gere.cache.fingerprint import FORMAT_VERSION, key_of
from gere.errors import CacheCorruptError, CacheMismatchError

MANIFEST, ROWS, HELDOUT, SAMPLE = "manifest.json", "rows.safetensors", "heldout.safetensors", "sample.safetensors"
# Anchors of states and of logits from before version 0.2 have the second file, which nothing reads any more.
CONSTANTS = ("bands.safetensors", "noise.safetensors")
PARTIAL, RETIRED = ".partial", ".retired"  # after the name of an anchor: a build, and what a new build replaced


def anchor_folder(root: Path, key: str) -> Path:
    """Return the folder of the anchor with this key."""
    return root / f"anchor-{key}"


def shard_name(kind: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{kind}-{number:05d}.safetensors"


def manifest_bytes(fields: Mapping[str, str], files: Mapping[str, str], shape: Mapping[str, int]) -> bytes:
    """Return the content of a manifest, where `files` has the SHA-256 of every file by name.

    `shape` has `rows`, `heldout`, `tokens` and `dim`, the last dimension of what is kept of a token, 0 for nothing.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "key": key_of(fields),
        "fields": dict(fields),
        "files": dict(files),
        "shape": dict(shape),
    }
    return _sealed(content, sha256(canonical_json(content)))


def _sealed(content: Mapping[str, Any], digest: str) -> bytes:
    return canonical_json({**content, "sha256": digest})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of an anchor, without its other files; errors as in `Anchor`."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        expected = content.pop("sha256")
        version = content["format_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(path, "a readable manifest", f"{type(error).__name__}: {error}") from error
    # Before the hash, since another format may be sealed in another way.
    if version != FORMAT_VERSION:
        mismatch = CacheMismatchError(
            "The anchor has another format.",
            where=path,
            expected=f"format_version {FORMAT_VERSION}",
            found=repr(version),
            fix="Use the version of gere that wrote it, or another gere_hidden_state_saving_dir.",
        )
        mismatch.fields = ("format_version",)
        raise mismatch
    try:
        digest = sha256(canonical_json(content))
        sealed = _sealed(content, digest)
    except (ValueError, TypeError, RecursionError) as error:  # what JSON reads but gere never writes, such as NaN
        raise _corrupt(path, "a readable manifest", f"{type(error).__name__}: {error}") from error
    # Compare the bytes, since damaged white space would read as the same content.
    if raw != sealed:
        raise _corrupt(path, f"SHA-256 {expected}", digest)
    if content["key"] != key_of(content["fields"]):
        raise _corrupt(path, f"key {key_of(content['fields'])} of its fields", content["key"])
    return content


class Anchor:
    """Targets and losses of the base model on the replay set, read from disk.

    Args:
        folder: Folder of the anchor. Opening compares the hash of every file in it with the manifest.

    Attributes:
        key: Key of the anchor.
        fields: What it depends on.
        rows: Number of replay rows.
        dim: Size d of the state, or k of the likeliest tokens; 0 if it holds no targets.

    Raises:
        CacheCorruptError: If a file is missing or its bytes differ from what was written.
        CacheMismatchError: If it was written in another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.key: str = manifest["key"]
        self.fields: dict[str, str] = manifest["fields"]
        self.rows: int = manifest["shape"]["rows"]
        self.dim: int = manifest["shape"]["dim"]
        verify_files(self.folder, manifest["files"])
        paths = [self.folder / name for name in sorted(manifest["files"])]
        self._constants = [path for path in paths if path.name in CONSTANTS]
        self._heldout = [path for path in paths if path.name == HELDOUT]
        self._shards = [path for path in paths if path.name not in (ROWS, HELDOUT, SAMPLE, *CONSTANTS)]

    def __repr__(self) -> str:
        return f"Anchor({str(self.folder)!r})"

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """Tensors that hold for all tokens, such as the bands of the regions; empty for a strategy without any."""
        return load_file(self._constants[0]) if self._constants else {}

    @cached_property
    def base_ce(self) -> Tensor:
        """Cross-entropy of the base model on each row, float32 [rows]."""
        return self._index["base_ce"]

    @cached_property
    def heldout_ce(self) -> Tensor:
        """Cross-entropy of the base model on each held-out row, float32 [h]; empty if nothing is measured."""
        return load_file(self._heldout[0])["base_ce"] if self._heldout else torch.zeros(0)

    def tokens(self, row: int) -> int:
        """Return the number of tokens of a row."""
        return self._places["tokens"][row]

    def targets(self, row: int) -> dict[str, Tensor]:
        """Read the targets of a row: tensors of shape [tokens, *] by name, empty if the anchor holds none."""
        if not self.dim:
            return {}
        start = self._places["start"][row]
        stop = start + self.tokens(row)
        # The shard is mapped for this row alone, and the clone lets go of the map. A map that stays counts every page
        # that was ever read as memory of the process, up to the whole anchor.
        with safe_open(self._shards[self._places["shard"][row]], framework="pt") as shard:
            return {name: shard.get_slice(name)[start:stop].clone() for name in shard.keys()}  # noqa: SIM118

    @cached_property
    def _index(self) -> dict[str, Tensor]:
        return load_file(self.folder / ROWS)

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        """Tokens, shard and first token in it of each row."""
        # As plain numbers, since each training step reads them one by one.
        return {name: values.tolist() for name, values in self._index.items() if name != "base_ce"}


def weights_sample(folder: Path) -> list[float]:
    """Return the weights that an anchor keeps of its base model; empty for an anchor without any."""
    if not (folder / SAMPLE).is_file():
        return []
    verify_files(folder, {SAMPLE: read_manifest(folder)["files"].get(SAMPLE, "")})
    found: list[float] = load_file(folder / SAMPLE)["weights"].tolist()
    return found


def verify_files(folder: Path, files: Mapping[str, str]) -> None:
    """Compare every file of an anchor with its hash, and raise a `CacheCorruptError` for the first that differs."""
    # hashlib releases the lock of the interpreter, so threads hash several files at a time.
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda name: _hash_or_reason(folder / name), files))
    for (name, expected), actual in zip(files.items(), found, strict=True):
        # A manifest must not name files outside its folder.
        if Path(name).name != name or actual != expected:
            raise _corrupt(folder / name, f"SHA-256 {expected}", actual)


def _hash_or_reason(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"


def _corrupt(where: Path, expected: str, found: str) -> CacheCorruptError:
    return CacheCorruptError(
        "The bytes of the anchor are not those that were written.",
        where=where,
        expected=expected,
        found=found,
        fix="Restore the folder from a copy, or delete it and start again from the base model.",
    )
