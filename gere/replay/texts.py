"""Read general texts from wherever they are: files, a folder, the hub, a `datasets.Dataset` or a list."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from gere._files import canonical_json, make_folder, read_lines, sha256, write_atomic
from gere.cache.fingerprint import text_digest
from gere.config import SELF, GeReConfig
from gere.errors import CacheCorruptError, ReplayDownloadError, ReplaySetError
from gere.replay.forms import FORMS, OPTIONS, Row, read_row
from gere.replay.records import FORMATS, Record, kind_of, read_records, take

HUB_DATASET, HUB_SIZE = "DKYoon/SlimPajama-6B", 1000
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_SECONDS = 10.0
CHAT_FIELDS = ("messages", *OPTIONS, "prompt", "completion")
FILES = "a file (.jsonl, .json, .csv, .parquet, .txt), a folder, a datasets.Dataset or a list of strings"
BY_HAND = "gere replay --source A=500 --source B=500 --out FILE.jsonl"


class Source(NamedTuple):
    """Where texts come from.

    Attributes:
        value: What the user set.
        where: Name of the setting.
        size: Take the first so many texts; `None` for all, or for `HUB_SIZE` of a hub data set.
        split: Split of a hub data set.
        column: Column or JSON key that holds the text.
        subset: Configuration of a hub data set.
        settings: What the names of these settings begin with, such as `"--"`; empty where the user has none.
        writes: Whether the base model may write the texts.
    """

    value: Any
    where: str
    size: int | None = None
    split: str = "train"
    column: str = "text"
    subset: str | None = None
    settings: str = ""
    writes: bool = False

    @property
    def others(self) -> str:
        """Tell the user what else can be given."""
        own = '"self" (the base model writes the texts), ' if self.writes else ""
        return f"Give {own}{FILES}."

    def set(self, name: str, what: str) -> str:
        """Tell the user to set one of these settings; empty if there are none."""
        return f" {what}: {self.settings}{name}." if self.settings else ""


def load_texts(
    config: GeReConfig, cache_folder: Path, own_texts: Sequence[str] | None = None, tokenizer: Any = None
) -> list[str]:
    """Read the texts of the replay set, those among them that are held out.

    Args:
        config: Source and size.
        cache_folder: Folder that keeps texts from the hub.
        own_texts: Texts of the base model, for the source `"self"`.
        tokenizer: Its chat template shows chats. Without one, the parts of a chat are joined.

    Raises:
        ReplaySetError: If the set is missing, empty or too short, or a row has an unknown form.
        ReplayDownloadError: If it is on the hub and cannot be fetched.
    """
    return [row.render(tokenizer) for row in read_rows(replay_source(config, own_texts), cache_folder)]


def replay_source(config: GeReConfig, own_texts: Sequence[str] | None = None) -> Source:
    """Return where the replay set comes from; arguments and errors as in `load_texts`."""
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
        # As records, since a list of texts may be one of paths.
        value = [{"text": text} for text in own_texts]
        config = dataclasses.replace(config, replay_column="text")
    return config_source(config, value, "replay_dataset", config.replay_size)._replace(writes=True)


def config_source(config: GeReConfig, value: Any, name: str, size: int | None) -> Source:
    """Return the source that a setting of a config names."""
    return Source(
        value,
        f"gere_config.{name}",
        size,
        config.replay_split,
        config.replay_column,
        config.replay_subset,
        "gere_config.replay_",
    )


def read_rows(source: Source, cache_folder: Path | None = None) -> list[Row]:
    """Read the rows of a source, and no more of it than is asked for.

    Args:
        source: Where they are.
        cache_folder: Folder that keeps texts from the hub; `None` keeps none.

    Raises:
        ReplaySetError: If the set is missing, empty or too short, or a row has an unknown form.
        ReplayDownloadError: If it is on the hub and cannot be fetched.
    """
    return _rows(source, _records(source, cache_folder))


def _rows(source: Source, records: Iterable[Record]) -> list[Row]:
    forms = [source.column, *(" and ".join(names) for names in FORMS)]
    rows = take(
        records,
        partial(read_row, column=source.column),
        size=source.size,
        error=ReplaySetError,
        expected=f"a text, or a record with {', or '.join(forms)}."
        + source.set("column", "The name of another field"),
    )
    least = source.size or 1
    if len(rows) < least:
        raise ReplaySetError(
            f"The set of texts is {'shorter than asked' if rows else 'empty'}.",
            where=source.where,
            expected=f"{least} texts, or more",
            found=f"{len(rows)} texts",
            fix="Give more texts." + source.set("size", "Or ask for fewer"),
        )
    return rows


def _records(source: Source, cache_folder: Path | None) -> Iterator[Record]:
    value = source.value
    if isinstance(value, str | Path):
        yield from _named(source, cache_folder)
    # A DatasetDict has both attributes, too, but they are about its splits.
    elif hasattr(value, "column_names") and hasattr(value, "__len__") and not isinstance(value, dict):
        yield from _numbered(value, "the datasets.Dataset", "row")
    elif isinstance(value, Sequence):
        if value and all(map(_names_source, value)):
            yield from _by_turns([_named(source._replace(value=item), cache_folder) for item in value])
            return
        for place, item in enumerate(value):
            if _is_path(item):
                raise _mixed(source, place, item)
        yield from _numbered(value, source.where, "item")
    else:
        raise ReplaySetError(
            "Texts cannot be read from this.",
            where=source.where,
            expected="a path, a hub name, a datasets.Dataset (one split, not streamed) or a list of texts or paths",
            found=type(value).__name__,
            fix=f"Of a DatasetDict, pass one split, such as dataset['train']. {source.others}",
        )


def _numbered(values: Iterable[Any], holder: str, kind: str) -> Iterator[Record]:
    for place, value in enumerate(values):
        yield Record(holder, f"{kind} {place}", value)


def _by_turns(several: Sequence[Iterator[Record]]) -> Iterator[Record]:
    """Yield a record of each source in turn, so that the first N records are of all sources alike."""
    for records in zip_longest(*several):
        yield from filter(None, records)


def _names_source(item: Any) -> bool:
    """Return whether an item of a list may be the name of a source rather than a text."""
    if isinstance(item, str) and len(item.splitlines()) == 1:
        on_hub = "/" in item and HUB_NAME.fullmatch(item) is not None
        return on_hub or kind_of(Path(item)) in FORMATS or _stands(item, Path.exists)
    return isinstance(item, Path)


def _is_path(item: Any) -> bool:
    """Return whether an item of a list is surely the path of a file, though others are texts."""
    if isinstance(item, str) and len(item.splitlines()) == 1:
        return _stands(item, Path.is_file) or (len(item.split()) == 1 and kind_of(Path(item)) in FORMATS)
    return isinstance(item, Path)


def _stands(item: str, there: Callable[[Path], bool]) -> bool:
    try:
        return there(Path(item).expanduser())
    except (OSError, ValueError, RuntimeError):  # a text that is too long for a path, or begins with ~
        return False


def _mixed(source: Source, place: int, item: Any) -> ReplaySetError:
    return ReplaySetError(
        "A list has both texts and paths.",
        where=f"{source.where}, item {place}",
        expected="texts alone, or paths alone",
        found=f"the path {str(item)!r}",
        fix=f"Give a list of paths; or write one file by `{BY_HAND}`.",
    )


def _named(source: Source, cache_folder: Path | None) -> Iterator[Record]:
    """Read a file, files by a pattern, a folder or a hub data set."""
    name = str(source.value)
    path = Path(name).expanduser()
    known = kind_of(path) in FORMATS
    if path.is_dir():
        yield from _folder(source, path)
    elif path.is_file() or (known and not glob.has_magic(name)):
        # A missing file of a known kind is a wrong path. It must not be looked up on the hub.
        yield from read_records(path, ReplaySetError, source.where)
    elif glob.has_magic(name):
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (`Path.glob` takes no absolute pattern)
        if not found:
            raise _missing(source, "No file fits the pattern.")
        yield from _by_turns([_named(source._replace(value=Path(one)), cache_folder) for one in found])
    elif name == SELF:
        raise _missing(source, "The base model writes texts for replay_dataset alone, and not in a list.")
    elif HUB_NAME.fullmatch(name):
        yield from _hub(source, cache_folder)
    else:
        raise _missing(source, "There is no such file or folder.")


def _missing(source: Source, what: str) -> ReplaySetError:
    return ReplaySetError(
        what,
        where=source.where,
        expected="a file, a folder, a pattern such as texts/*.jsonl, or the name of a data set on the hub",
        found=repr(str(source.value)),
        fix=f"Correct the path. Several sources are a list of paths, or one file written by `{BY_HAND}`.",
    )


def _hub(source: Source, cache_folder: Path | None) -> Iterator[Record]:
    """Read a data set of the hub, or what was kept of it."""
    name, size = str(source.value), source.size or HUB_SIZE
    identity = {"name": name, "split": source.split, "column": source.column, "size": size}
    if source.subset is not None:
        identity["subset"] = source.subset
    kept = (cache_folder or Path()) / f"replay-{sha256(canonical_json(identity))[:16]}.jsonl"
    if cache_folder is None or not kept.is_file():
        _require_reachable(source)
        # Read before they are kept: a set that is too short would stop every later start.
        rows: Sequence[Row | None] = _rows(source._replace(size=size), _loaded(source, name))
        if cache_folder is not None:
            write_kept(kept, [row.record for row in rows if row], identity)
    else:
        fix = "Restore the file; or delete it, and the texts are fetched from the hub again."
        records = enumerate(read_kept(kept, size, fix), start=1)
        rows = [read_row(Record(str(kept), f"line {number}", record), "text") for number, record in records]
    yield from _numbered(rows, name, "row")


def _folder(source: Source, path: Path) -> Iterator[Record]:
    """Read a folder that `save_to_disk` wrote, or one in the format of the hub."""
    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        yield from _loaded(source, str(path))
        return
    from datasets import load_from_disk

    try:
        loaded = load_from_disk(str(path))
        if isinstance(loaded, dict):
            loaded = loaded[source.split]
    except Exception as error:  # of the library, and of Arrow
        raise _unloaded(source, error) from error
    yield from _numbered(loaded, str(path), "row")


def _loaded(source: Source, name: str) -> Iterator[Record]:
    """Yield the rows of a hub data set, or of a folder in its format."""
    from datasets import load_dataset

    further = {} if source.subset is None else {"name": source.subset}
    try:
        # Streamed, since the default set has 6 billion tokens and a run needs a thousand texts.
        yield from _numbered(load_dataset(name, split=source.split, streaming=True, **further), name, "row")
    except Exception as error:  # the hub's libraries raise many kinds, some of them bare
        raise _unloaded(source, error) from error


def _require_reachable(source: Source) -> None:
    """Ask the hub for the data set once: `load_dataset` tries again for half a minute where there is no network."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(str(source.value), timeout=HUB_SECONDS)
    except Exception as error:  # of the hub's library, and of whichever library it uses for HTTP
        raise _unloaded(source, error) from error


def _unloaded(source: Source, error: Exception) -> ReplaySetError:
    """Say that a hub data set or a folder cannot be loaded."""
    name = str(source.value)
    parts = source.set("split", "Its split") + source.set("subset", "One of its configurations")
    where = f"{source.where}, {name}, split {source.split!r}"
    if Path(name).expanduser().is_dir():
        return ReplaySetError(
            "The folder cannot be read.",
            where=where,
            expected="what datasets.load_dataset reads, or a folder of Dataset.save_to_disk",
            found=f"{type(error).__name__}: {error}",
            fix=f"Correct the folder, or name one of its files.{parts}",
        )
    near = [*([SELF] if source.writes else []), *sorted(map(str, Path().glob("*")))]
    meant = difflib.get_close_matches(name, near, n=1)
    guess = f'Did you mean "{meant[0]}"? ' if meant else ""
    return ReplayDownloadError(
        "The texts could not be fetched from the hub.",
        where=where,
        expected="a data set on the hub; there is no file or folder of this name",
        found=f"{type(error).__name__}: {error}",
        fix=f"{guess}{source.others} Or connect to the network once, after which the texts are kept beside the cache. "
        f"If there is a network, check the name.{parts}",
    )


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, whole or not at all, and make the folder."""
    make_folder(path.parent)
    write_atomic(path, json_lines(records))


def json_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return records as JSON lines."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    # A text may hold half of a surrogate pair, which strict UTF-8 refuses.
    return "".join(lines).encode("utf-8", "surrogatepass")


def write_kept(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Keep rows in a cache folder: JSON lines, each with `about`, the first of them with a digest of all rows."""
    records = [{**row, **about} for row in rows]
    records[0]["sha256"] = text_digest(map(_content, rows))
    write_records(path, records)


def _content(record: Mapping[str, Any]) -> str:
    """Return what the digest of kept rows is made from: the text of a row, or its other fields as JSON."""
    if "text" in record:
        return str(record["text"])
    return json.dumps({name: record[name] for name in CHAT_FIELDS if name in record}, sort_keys=True)


def _is_kept(record: Mapping[str, Any]) -> bool:
    if "text" in record:
        return isinstance(record["text"], str)
    return any(name in record for name in CHAT_FIELDS)


def read_kept(path: Path, size: int, fix: str) -> list[dict[str, Any]]:
    """Read the rows that `write_kept` wrote.

    Args:
        path: The file.
        size: Number of rows that it must have.
        fix: What to do about a damaged file.

    Raises:
        CacheCorruptError: If they are not those that were written.
    """
    try:
        # Of use again: a start that has read them may be on its way to an anchor that is made from them.
        with contextlib.suppress(OSError):
            path.touch()
        records = list(read_lines(path))
        if not all(isinstance(record, dict) and _is_kept(record) for record in records):
            raise TypeError("a row without a text")
        if len(records) != size:
            raise ValueError(f"{len(records)} texts")
        digest = text_digest(map(_content, records))
        # Files from before version 0.2 have no digest.
        if records[0].get("sha256", digest) != digest:
            raise ValueError(f"texts with SHA-256 {digest}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheCorruptError(
            "The kept replay texts are damaged.",
            where=path,
            expected=f"{size} lines as they were written, each a JSON object",
            found=f"{type(error).__name__}: {error}",
            fix=fix,
        ) from error
    return records
