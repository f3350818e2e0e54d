"""Read general texts from wherever they are: a file, a folder, the hub, a `datasets.Dataset` or a list."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gere._files import canonical_json, make_folder, read_lines, sha256, write_atomic
from gere.cache.fingerprint import text_digest
from gere.config import GeReConfig
from gere.errors import CacheCorruptError, ReplayDownloadError, ReplaySetError

HUB_DATASET, HUB_SIZE = "DKYoon/SlimPajama-6B", 1000
SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
OTHER_SOURCES = (
    'Set gere_config.replay_dataset to "self" (the base model writes the texts), a file (.jsonl, .json, .parquet, '
    ".txt), a datasets.Dataset or a list of strings; or connect to the network once, after which the texts are kept "
    "beside the cache."
)
HUB_SECONDS = 10.0


class Source(NamedTuple):
    """Where texts come from.

    Attributes:
        value: What the user set.
        where: Name of the setting.
        size: Take the first so many texts; `None` for all, or for `HUB_SIZE` of a hub data set.
        split: Split of a hub data set.
        column: Column or JSON key that holds the text.
    """

    value: Any
    where: str
    size: int | None
    split: str
    column: str


def load_texts(config: GeReConfig, cache_folder: Path, own_texts: Sequence[str] | None = None) -> list[str]:
    """Read the texts of the replay set, those among them that are held out.

    Args:
        config: Source and size.
        cache_folder: Folder that keeps texts from the hub.
        own_texts: Texts of the base model, for the source `"self"`.

    Raises:
        ReplaySetError: If the set is missing, empty or too short, or a row has no text.
        ReplayDownloadError: If it is on the hub and cannot be fetched.
    """
    value = config.replay_dataset
    if value is None:
        value = HUB_DATASET
    if config.samples_itself:
        if own_texts is None:
            raise ReplaySetError(
                "The base model writes the replay texts, and there is no model here.",
                where="gere_config.replay_dataset",
                expected="texts; only a trainer has a model to sample them from",
                found="'self'",
                fix="Write a file by `gere replay --source self --model MODEL --out replay.jsonl`, and set it here.",
            )
        value = list(own_texts)
    source = Source(value, "gere_config.replay_dataset", config.replay_size, config.replay_split, config.replay_column)
    return read_texts(source, cache_folder)


def read_texts(source: Source, cache_folder: Path) -> list[str]:
    """Read the texts of a source; arguments and errors as in `load_texts`."""
    value, column = source.value, source.column
    if isinstance(value, str | Path):
        return _checked(_read_named(source, cache_folder), source)
    # A DatasetDict has both attributes, too, but they are about its splits.
    if hasattr(value, "column_names") and hasattr(value, "__len__") and not isinstance(value, dict):
        return _checked(list(_in_column(value, value.column_names, column, "the datasets.Dataset")), source)
    if isinstance(value, Sequence):
        texts = [_text_of(item, column, f"item {row} of the list") for row, item in enumerate(value)]
        return _checked(texts, source)
    raise ReplaySetError(
        "Texts cannot be read from this.",
        where=source.where,
        expected="a path, a hub name, a datasets.Dataset (one split, not streamed) or a list of strings",
        found=type(value).__name__,
        fix=f"Of a DatasetDict, pass one split, such as dataset['train']. {OTHER_SOURCES}",
    )


def read_file(path: Path, column: str) -> list[Any]:
    """Read one column of a file, or its texts if the file has no columns.

    Args:
        path: A .jsonl, .json, .parquet or .txt file.
        column: Column or JSON key.

    Raises:
        ReplaySetError: If the file cannot be read, or has no such column.
    """
    try:
        content = _content(path)
    except (OSError, ValueError) as error:
        raise ReplaySetError(
            "A file of texts cannot be read.",
            where=path,
            expected="UTF-8 text: .jsonl or .json with texts or records, .parquet, or .txt with one text a line",
            found=f"{type(error).__name__}: {error}",
            fix="Correct the path or the file; one JSON record on each line belongs into a .jsonl file.",
        ) from error
    # Outside of `try`: a ReplaySetError is a ValueError, too.
    if path.suffix == ".parquet":
        return list(_in_column(content, content.column_names, column, str(path)))
    return [_text_of(record, column, f"{path}, record {index}") for index, record in enumerate(content)]


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, whole or not at all, and make the folder."""
    make_folder(path.parent)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    # A text may hold half of a surrogate pair, which strict UTF-8 refuses.
    write_atomic(path, "".join(lines).encode("utf-8", "surrogatepass"))


def write_kept(path: Path, texts: Sequence[str], about: Mapping[str, Any]) -> None:
    """Keep texts in a cache folder: JSON lines of `text` and `about`, the first of them with a digest of all texts."""
    records = [{"text": text, **about} for text in texts]
    records[0]["sha256"] = text_digest(texts)
    write_records(path, records)


def read_kept(path: Path, size: int, fix: str) -> list[str]:
    """Read the texts that `write_kept` wrote.

    Args:
        path: The file.
        size: Number of texts that it must have.
        fix: What to do about a damaged file.

    Raises:
        CacheCorruptError: If they are not those that were written.
    """
    try:
        # Of use again: a start that has read them may be on its way to an anchor that is made from them.
        with contextlib.suppress(OSError):
            path.touch()
        records = list(read_lines(path))
        texts = [record["text"] for record in records]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text that is no string")
        if len(texts) != size:
            raise ValueError(f"{len(texts)} texts")
        digest = text_digest(texts)
        # Files from before version 0.2 have no digest.
        if records[0].get("sha256", digest) != digest:
            raise ValueError(f"texts with SHA-256 {digest}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheCorruptError(
            "The kept replay texts are damaged.",
            where=path,
            expected=f"{size} lines as they were written, each a JSON object with the key 'text'",
            found=f"{type(error).__name__}: {error}",
            fix=fix,
        ) from error
    return texts


def few(indices: Sequence[int]) -> str:
    """List the first ten row numbers, for a message."""
    shown = ", ".join(map(str, indices[:10]))
    if len(indices) > 10:
        return f"{shown} and {len(indices) - 10} more"
    return shown


def _read_named(source: Source, cache_folder: Path) -> list[Any]:
    """Read a folder, a file or a hub data set."""
    name = str(source.value)
    path = Path(name)
    if path.is_dir():
        return _stream(source, source.size)
    # A missing file with a known suffix is a wrong path. It must not be looked up on the hub.
    if path.suffix in SUFFIXES or path.is_file():
        return read_file(path, source.column)
    size = source.size or HUB_SIZE
    identity = {"name": name, "split": source.split, "column": source.column, "size": size}
    kept = cache_folder / f"replay-{sha256(canonical_json(identity))[:16]}.jsonl"
    if kept.is_file():
        return read_kept(kept, size, "Restore the file; or delete it, and the texts are fetched from the hub again.")
    _require_reachable(source)
    # Checked before they are kept: a set that is too short would stop every later start.
    texts = _checked(_stream(source, size), source._replace(size=size))
    write_kept(kept, texts, identity)
    return texts


def _require_reachable(source: Source) -> None:
    """Ask the hub for the data set once: `load_dataset` tries again for half a minute where there is no network."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(str(source.value), timeout=HUB_SECONDS)
    except Exception as error:  # of the hub's library, and of whichever library it uses for HTTP
        raise _unreachable(source, error) from error


def _unreachable(source: Source, error: Exception) -> ReplayDownloadError:
    return ReplayDownloadError(
        "The texts could not be fetched from the hub.",
        where=f"{source.where}, {source.value}, split {source.split!r}",
        expected="a data set on the hub, or a folder that datasets.load_dataset reads",
        found=f"{type(error).__name__}: {error}",
        fix=f"{OTHER_SOURCES} If there is a network, check the name and gere_config.replay_split.",
    )


def _content(path: Path) -> Any:
    """Read the records or texts of a file, or the `datasets.Dataset` of a .parquet file."""
    if path.suffix == ".jsonl":
        return list(read_lines(path))
    if path.suffix == ".parquet":
        from datasets import Dataset

        return Dataset.from_parquet(str(path))
    if path.suffix == ".txt":
        # `splitlines` would also split at characters inside of a text, such as U+2028.
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if path.suffix != ".json":
        raise ValueError(f"a file of kind {path.suffix or path.name!r}")
    records = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(records, list):
        raise ValueError(f"a JSON {type(records).__name__} where a list of texts or records is expected")
    return records


def _text_of(record: Any, column: str, where: str) -> Any:
    if not isinstance(record, dict):
        return record
    return _in_column(record, record, column, where)


def _in_column(holder: Any, names: Iterable[str], column: str, where: str) -> Any:
    """Return what a record or a data set has in a column."""
    if column not in names:
        raise ReplaySetError(
            "The texts have no such column.",
            where=where,
            expected=f"column {column!r}",
            found=", ".join(map(repr, names)) or "no columns",
            fix="Set gere_config.replay_column to the column that holds the text.",
        )
    return holder[column]


def _stream(source: Source, size: int | None) -> list[Any]:
    """Read the first `size` texts of a hub data set or of a folder in its format; `None` reads all."""
    from datasets import load_dataset

    texts: list[Any] = []
    name = str(source.value)
    try:
        # Streamed, since the default set has 6 billion tokens and a run needs a thousand texts.
        for row, record in enumerate(load_dataset(name, split=source.split, streaming=True)):
            text = _text_of(record, source.column, f"{name}, record {row}")
            # Users can drop the empty rows of their own file, but not those of a hub set.
            if isinstance(text, str) and len(text.split()) > 1:
                texts.append(text)
            if len(texts) == size:
                break
    except ReplaySetError:
        raise
    except Exception as error:  # the hub's libraries raise many kinds, some of them bare
        raise _unreachable(source, error) from error
    return texts


def _checked(texts: list[Any], source: Source) -> list[str]:
    """Return the first `source.size` texts, or all; refuse too few, and rows without text."""
    wanted = source.size
    if len(texts) < (wanted or 1):
        fault = "shorter than asked" if texts else "empty"
        raise ReplaySetError(
            f"The set of texts is {fault}.",
            where=source.where,
            expected=f"{wanted or 1} texts (gere_config.replay_size), or more",
            found=f"{len(texts)} texts",
            fix="Give more texts, or set gere_config.replay_size lower.",
        )
    chosen = texts[:wanted]
    bad = [index for index, text in enumerate(chosen) if not isinstance(text, str) or not text.strip()]
    if bad:
        raise ReplaySetError(
            "Rows of a set of texts have no text.",
            where=f"{source.where}, rows {few(bad)}",
            expected="a string with something in it",
            found=f"{len(bad)} such rows of {len(chosen)}, the first {chosen[bad[0]]!r}",
            fix="Drop these rows.",
        )
    return chosen
