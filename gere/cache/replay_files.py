"""Texts that the base model itself gave, kept beside the anchors: found by what they depend on, or by themselves.

| file | content |
|---|---|
| `replay-KEY.jsonl` | a record a line: `text`, and `source`, which is `self` |
| `replay-KEY.json` | what the texts depend on, what was dropped, digests of the texts and of their file |
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gere.cache.files import make_folder, seal_of, sealed_json, sha256, write_atomic
from gere.cache.fingerprint import key_of, text_digest
from gere.errors import CacheCorruptError, CacheMismatchError

REPLAY_FORMAT = 1
KEY_DIGITS = 16


class KeptTexts(NamedTuple):
    """Texts from disk.

    Attributes:
        texts: The texts.
        fields: What they depend on.
        path: Their manifest.
    """

    texts: list[str]
    fields: dict[str, str]
    path: Path


def replay_key(fields: Mapping[str, str]) -> str:
    """Key of the texts that depend on these fields."""
    return key_of(fields)[:KEY_DIGITS]


def text_lines(texts: Sequence[str], sources: Sequence[str]) -> bytes:
    """Texts as a .jsonl file, each with its source."""
    records = [{"text": text, "source": source} for text, source in zip(texts, sources, strict=True)]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    return "".join(lines).encode("utf-8", "surrogatepass")


def keep_texts(root: Path, fields: Mapping[str, str], texts: Sequence[str], counts: Mapping[str, int]) -> Path:
    """Write texts and their manifest.

    Args:
        root: Cache folder.
        fields: What the texts depend on.
        texts: The texts.
        counts: What was drawn and dropped.

    Returns:
        The file of the texts.

    Raises:
        CacheFolderError: If the folder cannot be written.
    """
    make_folder(root)
    lines = text_lines(texts, ["self"] * len(texts))
    content = {
        "format_version": REPLAY_FORMAT,
        "key": replay_key(fields),
        "fields": dict(fields),
        "counts": dict(counts),
        "texts": text_digest(texts),
        "file": sha256(lines),
    }
    manifest = _manifest(root, replay_key(fields))
    write_atomic(manifest.with_suffix(".jsonl"), lines)  # without a manifest it counts for nothing
    write_atomic(manifest, sealed_json(content))
    return manifest.with_suffix(".jsonl")


def open_texts(root: Path, fields: Mapping[str, str]) -> KeptTexts | None:
    """Open the texts that depend on these fields; `None` if they were not made yet.

    Raises:
        CacheCorruptError: If a byte of them differs from what was written.
        CacheMismatchError: If they were written in another format.
    """
    path = _manifest(root, replay_key(fields))
    return _open(path, _read(path)) if path.is_file() else None


def find_texts(root: Path, digest: str) -> KeptTexts | None:
    """Open the texts that have this `text_digest`; `None` if they are not in the cache folder.

    Raises:
        CacheCorruptError: If a byte of them differs from what was written.
        CacheMismatchError: If a manifest was written in another format.
    """
    for path in manifests_in(root):
        content = _read(path)
        if content["texts"] == digest:
            return _open(path, content)
    return None


def manifests_in(root: Path) -> list[Path]:
    """Manifests of all texts in a cache folder that a model gave."""
    return sorted(root.glob(f"replay-{'?' * KEY_DIGITS}.json"))


def _manifest(root: Path, key: str) -> Path:
    return root / f"replay-{key}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        digest, version = content.pop("sha256"), content["format_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(path, "a readable manifest", f"{type(error).__name__}: {error}") from error
    if version != REPLAY_FORMAT:
        raise CacheMismatchError(
            "The replay texts of the model have another format.",
            where=path,
            expected=f"format_version {REPLAY_FORMAT}",
            found=repr(version),
            fix="Use the version of gere that wrote them, or another gere_hidden_state_saving_dir.",
        )
    found = seal_of(raw, content)
    if found is not None:
        raise _corrupt(path, f"SHA-256 {digest}", found)
    if path != _manifest(path.parent, content["key"]) or content["key"] != replay_key(content["fields"]):
        raise _corrupt(path, f"the name of the key {replay_key(content['fields'])}", path.name)
    return content


def _open(path: Path, content: Mapping[str, Any]) -> KeptTexts:
    lines = path.with_suffix(".jsonl")
    try:
        raw = lines.read_bytes()
    except OSError as error:
        raise _corrupt(lines, "the texts that the manifest beside it names", f"{type(error).__name__}") from error
    if sha256(raw) != content["file"]:
        raise _corrupt(lines, f"SHA-256 {content['file']}", sha256(raw))
    text = raw.decode("utf-8", "surrogatepass")
    return KeptTexts([json.loads(line)["text"] for line in text.split("\n") if line], dict(content["fields"]), path)


def _corrupt(where: Path, expected: str, found: str) -> CacheCorruptError:
    return CacheCorruptError(
        "The bytes of the model's replay texts are not those that were written.",
        where=where,
        expected=expected,
        found=found,
        fix="Restore both files replay-KEY.json and replay-KEY.jsonl from a copy; or delete both, and start again "
        "from the base model, which writes the texts anew.",
    )
