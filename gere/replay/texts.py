"""The replay set: general texts read from wherever they are, as rows of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gere._files import canonical_json, make_folder, sha256, write_atomic
from gere.config import GeReConfig
from gere.errors import ReplayDownloadError, ReplaySetError

HUB_DATASET, HUB_SIZE = "DKYoon/SlimPajama-6B", 1000
SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
WAYS_ON = (
    "Set gere_config.replay_dataset to a file (.jsonl, .json, .parquet, .txt), a datasets.Dataset or a list of "
    "strings; or connect to the network once, after which the texts are kept beside the cache."
)


def load_texts(config: GeReConfig, cache_folder: Path, own_texts: Sequence[str] | None = None) -> list[str]:
    """Read the texts of the replay set, whatever holds them.

    Args:
        config: Source and size.
        cache_folder: Where texts from the hub are kept.
        own_texts: What the base model itself gave, for the source `"self"`.

    Raises:
        ReplaySetError: If the set is missing, empty or too short, or a row has no text.
        ReplayDownloadError: If it is on the hub and cannot be fetched.
    """
    source = HUB_DATASET if config.replay_dataset is None else config.replay_dataset
    if config.samples_itself:
        texts: list[Any] = list(_require_own(own_texts))
    elif isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            texts = _stream(str(source), config, config.replay_size)
        elif path.suffix in SUFFIXES or path.is_file():
            texts = read_file(path, config.replay_column)
        else:
            texts = _read_hub(str(source), config, cache_folder)
    elif hasattr(source, "column_names") and hasattr(source, "__len__") and not isinstance(source, dict):
        texts = _column(source, config.replay_column, "the datasets.Dataset")
    elif isinstance(source, Sequence):
        texts = [_text_of(item, config.replay_column, f"item {row} of the list") for row, item in enumerate(source)]
    else:
        raise ReplaySetError(
            "The replay set cannot be read from this.",
            where="gere_config.replay_dataset",
            expected="a path, a hub name, a datasets.Dataset (one split, not streamed) or a list of strings",
            found=type(source).__name__,
            fix=f"Pass one split, such as dataset['train']. {WAYS_ON}" if isinstance(source, dict) else WAYS_ON,
        )
    return _checked(texts, config.replay_size)


def read_file(path: Path, column: str) -> list[Any]:
    """Read what a file holds in a column, or its texts if they stand alone.

    Args:
        path: A .jsonl, .json, .parquet or .txt file.
        column: Column or JSON key.

    Raises:
        ReplaySetError: If the file cannot be read, or has no such column.
    """
    try:
        if path.suffix not in SUFFIXES:
            raise ValueError(f"a file of kind {path.suffix or path.name!r}")
        if path.suffix == ".parquet":
            from datasets import Dataset

            return _column(Dataset.from_parquet(str(path)), column, str(path))
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            return [line.rstrip("\r") for line in content.split("\n") if line.strip()]
        records = json.loads(content) if path.suffix == ".json" else _json_lines(content)
        if not isinstance(records, list):
            raise ValueError(f"a JSON {type(records).__name__} where a list of texts or records is expected")
    except (OSError, ValueError) as error:
        raise ReplaySetError(
            "The file of the replay set cannot be read.",
            where=path,
            expected="UTF-8 text: .jsonl or .json with texts or records, .parquet, or .txt with one text a line",
            found=f"{type(error).__name__}: {error}",
            fix="Correct the path or the file; one JSON record on each line belongs into a .jsonl file.",
        ) from error
    return [_text_of(record, column, f"{path}, record {index}") for index, record in enumerate(records)]


def _require_own(own_texts: Sequence[str] | None) -> Sequence[str]:
    if own_texts is None:
        raise ReplaySetError(
            "The replay texts shall come from the base model itself, and there is no model here.",
            where="gere_config.replay_dataset",
            expected="texts; only a trainer has a model to sample them from",
            found="'self'",
            fix="Write a file by `gere replay --source self --model MODEL --out replay.jsonl`, and set it here.",
        )
    return own_texts


def _json_lines(content: str) -> list[Any]:
    records = []
    for number, line in enumerate(content.split("\n"), start=1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number} of the file: {error}") from error
    return records


def _text_of(record: Any, column: str, where: str) -> Any:
    if not isinstance(record, dict):
        return record
    if column not in record:
        raise _no_column(where, column, record)
    return record[column]


def _column(dataset: Any, column: str, where: str) -> list[Any]:
    if column not in dataset.column_names:
        raise _no_column(where, column, dataset.column_names)
    return list(dataset[column])


def _no_column(where: str, column: str, names: Iterable[str]) -> ReplaySetError:
    return ReplaySetError(
        "The replay set has no such column.",
        where=where,
        expected=f"column {column!r}",
        found=", ".join(map(repr, names)) or "no columns",
        fix="Set gere_config.replay_column to the column that holds the text.",
    )


def _read_hub(name: str, config: GeReConfig, cache_folder: Path) -> list[str]:
    """Stream the first texts of a hub data set once, and keep them beside the cache."""
    size = config.replay_size or HUB_SIZE
    identity = {"name": name, "split": config.replay_split, "column": config.replay_column, "size": size}
    kept = cache_folder / f"replay-{sha256(canonical_json(identity))[:16]}.jsonl"
    if kept.is_file():
        return read_file(kept, "text")
    texts = _checked(_stream(name, config, size), size)
    make_folder(cache_folder)
    lines = [json.dumps({"text": text, **identity}, ensure_ascii=False) for text in texts]
    write_atomic(kept, ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))
    return texts


def _stream(name: str, config: GeReConfig, size: int | None) -> list[str]:
    """First `size` texts of a hub data set or of a folder in its format, `None` for all."""
    from datasets import load_dataset

    texts: list[str] = []
    try:
        for row, record in enumerate(load_dataset(name, split=config.replay_split, streaming=True)):
            text = _text_of(record, config.replay_column, f"{name}, record {row}")
            if isinstance(text, str) and len(text.split()) > 1:  # nobody can drop the empty rows of a hub set
                texts.append(text)
            if len(texts) == size:
                break
    except ReplaySetError:
        raise
    except Exception as error:  # the hub's libraries raise many kinds, some of them bare
        raise ReplayDownloadError(
            "The replay set could not be fetched from the hub.",
            where=f"{name}, split {config.replay_split!r}",
            expected="a data set on the hub, or a folder that datasets.load_dataset reads",
            found=f"{type(error).__name__}: {error}",
            fix=f"Check gere_config.replay_split. {WAYS_ON}",
        ) from error
    return texts


def _checked(texts: list[Any], wanted: int | None) -> list[str]:
    if not texts or (wanted is not None and len(texts) < wanted):
        raise ReplaySetError(
            "The replay set is empty." if not texts else "The replay set is shorter than asked.",
            where="gere_config.replay_dataset",
            expected="at least 1 text" if wanted is None else f"{wanted} texts (gere_config.replay_size)",
            found=f"{len(texts)} texts",
            fix="Give more texts." if wanted is None else "Give more texts, or set gere_config.replay_size lower.",
        )
    chosen = texts[:wanted]
    bad = [index for index, text in enumerate(chosen) if not isinstance(text, str) or not text.strip()]
    if bad:
        raise ReplaySetError(
            "Rows of the replay set have no text.",
            where=f"gere_config.replay_dataset, rows {few(bad)}",
            expected="a string with something in it",
            found=f"{len(bad)} such rows of {len(chosen)}, the first {chosen[bad[0]]!r}",
            fix="Drop these rows.",
        )
    return chosen


def few(indices: Sequence[int]) -> str:
    """The first ten of some row numbers, for a message."""
    shown = ", ".join(map(str, indices[:10]))
    return shown if len(indices) <= 10 else f"{shown} and {len(indices) - 10} more"
