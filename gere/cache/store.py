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

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from gere._files import canonical_json, file_sha256, folder_errors, sha256
from gere._records import parse_record, read_raw
from gere.cache.fingerprint import FORMAT_VERSION, key_of
from gere.errors import CacheCorruptError, CacheMismatchError, brief

MANIFEST, ROWS, HELDOUT, SAMPLE = "manifest.json", "rows.safetensors", "heldout.safetensors", "sample.safetensors"
# Anchors of states and of logits from before version 0.2 have the second file, which nothing reads any more.
CONSTANTS = ("bands.safetensors", "noise.safetensors")
FILE_NAME = re.compile(r"[a-z]+(-\d{5,})?\.safetensors")
TENSORS = {"regions": {"codes"}, "states": {"state"}, "logits": {"ids", "log_probs", "rest"}}
LOSSES = {"tokens": torch.int32, "base_ce": torch.float32}
PLACES = {"shard": torch.int32, "start": torch.int64}
PARTIAL, RETIRED = ".partial", ".retired"  # after the name of an anchor: a build, and what a new build replaced


def anchor_folder(root: Path, key: str) -> Path:
    """Return the folder of the anchor with this key."""
    return root / f"anchor-{key}"


def shard_name(kind: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{kind}-{number:05d}.safetensors"


class Shape(NamedTuple):
    """What an anchor holds.

    Attributes:
        rows: Number of replay rows.
        tokens: Tokens of all of them.
        dim: Last dimension of what is kept of a token, 0 for nothing.
        heldout: Number of held-out rows.
    """

    rows: int
    tokens: int
    dim: int
    heldout: int = 0


class Manifest(NamedTuple):
    """Content of `manifest.json`.

    Attributes:
        format_version: `FORMAT_VERSION` of the gere that wrote it.
        key: Key that follows from the fields.
        fields: What the anchor depends on.
        files: SHA-256 of every other file, by name.
        shape: What the anchor holds.
        sha256: Seal of all this.
    """

    format_version: int
    key: str
    fields: dict[str, str]
    files: dict[str, str]
    shape: Shape
    sha256: str


def manifest_bytes(fields: Mapping[str, str], files: Mapping[str, str], shape: Mapping[str, int]) -> bytes:
    """Return the content of a manifest, where `files` has the SHA-256 of every file, and `shape` fits `Shape`."""
    content = {
        "format_version": FORMAT_VERSION,
        "key": key_of(fields),
        "fields": dict(fields),
        "files": dict(files),
        "shape": dict(shape),
    }
    return canonical_json({**content, "sha256": sha256(canonical_json(content))})


def has_manifest(folder: Path) -> bool:
    """Return whether a folder has a manifest; one that cannot be read is a `CacheFolderError`."""
    with folder_errors(folder):
        return (folder / MANIFEST).exists()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of an anchor, without its other files; errors as in `Anchor`."""
    path = folder / MANIFEST
    raw = read_raw(path, _corrupt)
    # Before all else, since another format may have other fields, and be sealed in another way.
    content = parse_record(raw, path, dict[str, Any], _corrupt)
    version = content.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        mismatch = CacheMismatchError(
            "The anchor has another format.",
            where=path,
            expected=f"format_version {FORMAT_VERSION}",
            found=brief(version),
            fix="Use the version of gere that wrote it, or another gere_hidden_state_saving_dir.",
        )
        mismatch.fields = ("format_version",)
        raise mismatch
    manifest = parse_record(raw, path, Manifest, _corrupt)
    content.pop("sha256")
    # Names before bytes: a manifest must lead to no file outside its folder, and to no device.
    for name in manifest.files:
        if not FILE_NAME.fullmatch(name):
            raise _corrupt(f"{path}, files", "names of files as gere writes them", brief(name))
    shards = {name for name in manifest.files if name not in (ROWS, HELDOUT, SAMPLE, *CONSTANTS)}
    counts = manifest.shape
    whole = ROWS in manifest.files and (HELDOUT in manifest.files) == (counts.heldout > 0)
    if min(counts) < 0 or not whole or bool(shards) != (counts.dim > 0):
        raise _corrupt(f"{path}, files", f"the files of {counts}", brief(sorted(manifest.files)))
    try:
        # As it was written, not as it is read: an older version left out what has a default now.
        digest = sha256(canonical_json(content))
        sealed = canonical_json({**content, "sha256": digest})
    except ValueError as error:  # half a surrogate pair, which JSON can hold and UTF-8 cannot
        raise _corrupt(path, "a text in UTF-8", f"{type(error).__name__}: {error}") from error
    # Compare the bytes, since damaged white space would read as the same content.
    if raw != sealed:
        raise _corrupt(path, f"SHA-256 {manifest.sha256}", digest)
    if manifest.key != key_of(manifest.fields):
        raise _corrupt(f"{path}, key", f"{key_of(manifest.fields)}, which follows from its fields", manifest.key)
    return manifest


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
        self.key = manifest.key
        self.fields = manifest.fields
        self.rows = manifest.shape.rows
        self.dim = manifest.shape.dim
        verify_files(self.folder, manifest.files)
        paths = [self.folder / name for name in sorted(manifest.files)]
        self._constants = [path for path in paths if path.name in CONSTANTS]
        self._shards = [path for path in paths if path.name not in (ROWS, HELDOUT, SAMPLE, *CONSTANTS)]
        self._heldout = manifest.shape.heldout

    def __repr__(self) -> str:
        return f"Anchor({str(self.folder)!r})"

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """Tensors that hold for all tokens, such as the bands of the regions; empty for a strategy without any."""
        return _tensors(self._constants[0]) if self._constants else {}

    @cached_property
    def base_ce(self) -> Tensor:
        """Cross-entropy of the base model on each row, float32 [rows]."""
        return self._index["base_ce"]

    @cached_property
    def heldout_ce(self) -> Tensor:
        """Cross-entropy of the base model on each held-out row, float32 [h]; empty if nothing is measured."""
        if not self._heldout:
            return torch.zeros(0)
        return _vectors(self.folder / HELDOUT, LOSSES, self._heldout)["base_ce"]

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
        path = self._shards[self._places["shard"][row]]
        with _reading(path), safe_open(path, framework="pt") as shard:
            return {name: shard.get_slice(name)[start:stop].clone() for name in shard.keys()}  # noqa: SIM118

    @cached_property
    def _index(self) -> dict[str, Tensor]:
        path = self.folder / ROWS
        index = _vectors(path, {**LOSSES, **PLACES} if self.dim else LOSSES, self.rows)
        _require_places(self._shards, index, path)
        return index

    @cached_property
    def _places(self) -> dict[str, list[int]]:
        """Tokens, shard and first token in it of each row."""
        # As plain numbers, since each training step reads them one by one.
        return {name: values.tolist() for name, values in self._index.items() if name != "base_ce"}


def weights_sample(folder: Path) -> list[float]:
    """Return the weights that an anchor keeps of its base model; empty for an anchor without any."""
    if not (folder / SAMPLE).is_file():
        return []
    verify_files(folder, {SAMPLE: read_manifest(folder).files.get(SAMPLE, "")})
    found: list[float] = _vectors(folder / SAMPLE, {"weights": torch.float32})["weights"].tolist()
    return found


def verify_files(folder: Path, files: Mapping[str, str]) -> None:
    """Compare every file of an anchor with its hash, and raise a `CacheCorruptError` for the first that differs."""
    # hashlib releases the lock of the interpreter, so threads hash several files at a time.
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda name: _hash_or_reason(folder / name), files))
    for (name, expected), actual in zip(files.items(), found, strict=True):
        if actual != expected:
            raise _corrupt(folder / name, f"SHA-256 {expected}", actual)


def _hash_or_reason(path: Path) -> str:
    try:
        if path.resolve().parent != path.parent.resolve():
            return "a link out of the folder"
        return file_sha256(path)
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror}"
    except (ValueError, RuntimeError) as error:  # no regular file; links that lead in a circle
        return str(error)


def _vectors(path: Path, kinds: Mapping[str, torch.dtype], length: int | None = None) -> dict[str, Tensor]:
    """Read the tensors of a file, which must be these, each of one dimension with so many elements."""
    found = _tensors(path)
    for name, kind in kinds.items():
        value = found.get(name)
        sound = value is not None and value.dtype == kind and value.ndim == 1
        if value is None or not sound or length not in (None, len(value)):
            shown = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
            raise _corrupt(f"{path}, {name}", f"{kind} [{'any' if length is None else length}]", shown)
    return {name: found[name] for name in kinds}


def _require_places(shards: Sequence[Path], index: Mapping[str, Tensor], path: Path) -> None:
    """Refuse an index that leads to tokens that no shard has."""
    tokens = index["tokens"].long()
    sound = bool((tokens > 0).all())
    if shards:
        lengths = torch.tensor([_tokens_in(shard) for shard in shards])
        number, start = index["shard"].long(), index["start"]
        known = (number >= 0) & (number < len(shards)) & (start >= 0)
        room = lengths[number.clamp(0, len(shards) - 1)] - tokens
        sound = sound and bool((known & (start <= room)).all())
    if not sound:
        raise _corrupt(path, "rows that lie in the shards", "others")


def _tokens_in(shard: Path) -> int:
    """Return the number of tokens of a shard, which must have the tensors of its kind."""
    with _reading(shard), safe_open(shard, framework="pt") as content:
        shapes = {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    kind = shard.name.rpartition("-")[0]
    lengths = {shape[0] if shape else -1 for shape in shapes.values()}
    if {*shapes} != TENSORS.get(kind, {*shapes}) or len(lengths) != 1:
        raise _corrupt(shard, f"the tensors of {kind}, of equally many tokens", brief(shapes))
    return int(lengths.pop())


def _tensors(path: Path) -> dict[str, Tensor]:
    with _reading(path):
        return load_file(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file of whatever goes wrong while it is read: it may be gone, or another one than was verified."""
    try:
        yield
    except Exception as error:  # safetensors raises many kinds
        raise _corrupt(path, "tensors as gere writes them", f"{type(error).__name__}: {error}") from error


def _corrupt(where: object, expected: str, found: str) -> CacheCorruptError:
    return CacheCorruptError(
        "The bytes of the anchor are not those that were written.",
        where=where,
        expected=expected,
        found=found,
        fix="Restore the folder from a copy, or delete it and start again from the base model.",
    )
