"""`gere replay`: makes a replay file from texts of several sources, or shows what is in one."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from gere.config import PROMPTS, SELF, GeReConfig, require
from gere.errors import ConfigError

HUB = "hub"
SOURCE_HELP = (
    "self (texts that --model samples), hub (DKYoon/SlimPajama-6B), a file, a folder or a hub name, and the number of "
    "its texts; can be repeated"
)
PROMPT_HELP = "what the model goes on from: its BOS token or its chat template; auto is chat where there is a template"
SAVING_HELP = "gere_hidden_state_saving_dir: find and keep texts of the model and of the hub there, as a training does"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Source(NamedTuple):
    """One source of texts.

    Attributes:
        name: `self`, `hub`, a file, a folder or the name of a data set.
        size: Number of texts; `None` for all of a file or folder.
    """

    name: str
    size: int | None


def add_parser(commands: Any) -> None:
    """Add the command `replay` to those of `gere`."""
    text = "Write a replay file from texts of a model, the hub or files, or show what is in them."
    parser = commands.add_parser("replay", help=text, description=text)
    add = parser.add_argument
    add("--source", action="append", required=True, metavar="SOURCE[=N]", help=SOURCE_HELP)
    add("--model", help="folder or hub name of the base model, for the source self")
    add("--tokenizer", help="folder or hub name of the tokenizer (default: that of --model); it counts the tokens")
    add("--size", type=int, help="texts of each source without a number (default: all of a file, else 1,000)")
    add("--max-length", type=int, default=GeReConfig.max_length, help="longest replay row in tokens")
    add("--column", default=GeReConfig.replay_column, help="column or JSON key that holds the text")
    add("--split", default=GeReConfig.replay_split, help="split of a hub data set")
    add("--prompt", choices=PROMPTS, default=GeReConfig.self_prompt, help=PROMPT_HELP)
    add("--temperature", type=float, default=GeReConfig.self_temperature, help="temperature of the sampling")
    add("--top-p", type=float, default=GeReConfig.self_top_p, help="share of the probability to draw tokens from")
    add("--batch-size", type=int, default=GeReConfig.self_batch_size, help="texts that are sampled at a time")
    add("--seed", type=int, default=GeReConfig.self_seed, help="seed of the sampling")
    add("--device", help="where the model runs (default: cuda if there is one, else cpu)")
    add("--dtype", choices=DTYPES, help="precision of the model (default: float32 on a CPU, else that of its files)")
    add("--saving-dir", type=Path, help=SAVING_HELP)
    add("--out", type=Path, metavar="FILE.jsonl", help="write the texts there; without it they are only shown")
    add("--force", action="store_true", help="overwrite the file of --out")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read or sample the texts, write them if asked to, and report what they are.

    Args:
        options: What `add_parser` defines.

    Raises:
        GeReError: If a source, a setting or the file cannot be used.
    """
    sources = [_source(word, options.size) for word in options.source]
    _require_usable(options, sources)
    from gere.cli.replay_stats import Record, describe, without_repeats

    name = options.tokenizer or options.model
    tokenizer = _tokenizer(name) if name else None
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as unkept:
        folder = options.saving_dir or Path(unkept)
        for source in sources:
            records += _records(source, options, tokenizer, folder)
    kept = without_repeats(records)
    if options.out is not None:
        _write(options.out, kept)
    sys.stdout.write(describe(records, tokenizer, _config(options, sources[0])))
    if options.out is not None:
        sys.stdout.write(f"wrote {len(kept)} texts to {options.out}\n")
    return 0


def _source(word: str, size: int | None) -> Source:
    name, sign, number = word.rpartition("=")
    if not sign:
        require(bool(word), "--source", "self, hub, a file, a folder or a hub name", word)
        return Source(word, size)
    sound = bool(name) and number.isascii() and number.isdecimal() and int(number) > 0
    require(sound, "--source", "SOURCE=N with a whole number N of at least 1", word)
    return Source(name, int(number))


def _config(options: argparse.Namespace, source: Source) -> GeReConfig:
    return GeReConfig(
        replay_dataset=None if source.name == HUB else source.name,
        replay_split=options.split,
        replay_column=options.column,
        replay_size=source.size,
        max_length=options.max_length,
        self_prompt=options.prompt,
        self_temperature=options.temperature,
        self_top_p=options.top_p,
        self_batch_size=options.batch_size,
        self_seed=options.seed,
    )


def _require_usable(options: argparse.Namespace, sources: list[Source]) -> None:
    """Refuse what cannot work before anything is loaded."""
    for source in sources:
        _config(options, source)
    if any(source.name == SELF for source in sources) and not options.model:
        raise ConfigError(
            "The source self needs a model to sample from.",
            where="--model",
            expected="folder or hub name of the base model",
            found="nothing",
            fix="Add --model MODEL, or take another --source.",
        )
    if options.out is not None:
        require(options.out.suffix == ".jsonl", "--out", "a file name that ends in .jsonl", str(options.out))
    if options.out is not None and options.out.exists() and not options.force:
        raise ConfigError(
            "The file that shall be written is there already.",
            where=options.out,
            expected="a new file",
            found=f"a file of {options.out.stat().st_size:,} bytes",
            fix="Give another --out, or add --force to overwrite it.",
        )


def _records(source: Source, options: argparse.Namespace, tokenizer: Any, folder: Path) -> list[Any]:
    from gere.cli.replay_stats import Record, sources_of
    from gere.replay.texts import load_texts

    config = _config(options, source)
    own = None
    if config.samples_itself:
        from gere.cli.models import sample

        own = sample(options.model, tokenizer, config, folder, device=options.device, dtype=options.dtype)
    texts = load_texts(config, folder, own)
    return [Record(*pair) for pair in zip(texts, sources_of(source.name, texts), strict=True)]


def _tokenizer(name: str) -> Any:
    from gere.cli.models import load_tokenizer

    return load_tokenizer(name)


def _write(path: Path, records: list[Any]) -> None:
    from gere._files import make_folder, write_atomic
    from gere.replay.written import text_lines

    make_folder(path.parent)
    write_atomic(path, text_lines([record.text for record in records], [record.source for record in records]))
