"""`gere replay`: write a file of replay texts from several sources, or show what is in one."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gere._files import write_whole
from gere.cli.settings import output_errors, read_kwargs
from gere.config import DTYPES, TRAINER_FIELDS, GeReConfig, require
from gere.errors import ConfigError

if TYPE_CHECKING:
    from gere.cli.replay_stats import Record

HUB = "hub"
# Options that are short for `--set NAME=VALUE`.
SHORT = {
    "--max-length": "max_length",
    "--column": "replay_column",
    "--split": "replay_split",
    "--subset": "replay_subset",
    "--prompt": "self_prompt",
    "--temperature": "self_temperature",
    "--top-p": "self_top_p",
    "--batch-size": "self_batch_size",
    "--seed": "self_seed",
}
SOURCE_HELP = (
    "self (texts that --model samples), hub (DKYoon/SlimPajama-6B), a file, a folder or a hub name, and the number of "
    "its texts; can be repeated"
)
SET_HELP = "a setting of GeReConfig, such as add_bos=true; can be repeated"
SAVING_HELP = "gere_hidden_state_saving_dir: find and keep texts of the model and of the hub there, as a training does"


def add_replay(commands: Any) -> None:
    """Add the command `replay` to those of `gere`."""
    text = "Write a replay file from texts of a model, the hub or files, or show what is in them."
    parser = commands.add_parser("replay", help=text, description=text)
    add = parser.add_argument
    add("--source", action="append", required=True, metavar="SOURCE[=N]", help=SOURCE_HELP)
    add("--model", help="folder or hub name of the base model, for the source self")
    add("--tokenizer", help="folder or hub name of the tokenizer (default: that of --model); it counts the tokens")
    add("--size", type=int, help="texts of each source without a number (default: all of a file, else 1,000)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help=SET_HELP)
    for option, name in SHORT.items():
        word = f"{name}={{}}".format
        add(option, dest="set", action="append", type=word, metavar="VALUE", help=f"short for --set {name}=VALUE")
    add("--device", help="where the model runs (default: cuda if there is one, else cpu)")
    add("--dtype", choices=DTYPES, help="precision of the model (default: float32 on a CPU, else that of its files)")
    add("--saving-dir", type=Path, help=SAVING_HELP)
    add("--out", type=Path, metavar="FILE.jsonl", help="write the texts there; without it they are only shown")
    add("--force", action="store_true", help="overwrite the file of --out")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    """Read or sample the texts, write them if asked to, and report on them."""
    config = _config(options.set)
    sources = [(word, _source(word, options.size, config)) for word in options.source]
    _require_usable(options, [source for _, source in sources])
    # Imports torch and transformers, which a wrong word should not wait for.
    from gere.cli.replay_stats import describe, without_repeats

    tokenizer = _tokenizer(options)
    records: list[Record] = []
    # Texts of the model and of the hub are always kept in some folder.
    with tempfile.TemporaryDirectory() as unkept:
        for word, source in sources:
            records += _records(word, source, options, tokenizer, options.saving_dir or Path(unkept))
    report = describe(records, tokenizer, config)
    if options.out is not None:
        kept = without_repeats(records)
        _write(options.out, kept)
        report += f"wrote {len(kept)} texts to {options.out}\n"
    sys.stdout.write(report)
    return 0


def _config(words: list[str]) -> GeReConfig:
    """Read the settings that all sources share."""
    others = {"replay_dataset", "replay_size", *TRAINER_FIELDS} & {word.partition("=")[0] for word in words}
    expected = "settings of the texts; --source SOURCE=N says where they come from and how many"
    require(not others, "--set", expected, ", ".join(sorted(others)))
    config: GeReConfig = read_kwargs(None, words)["gere_config"]
    return config


def _source(word: str, size: int | None, config: GeReConfig) -> GeReConfig:
    """Read SOURCE=N as the settings of a training that takes its texts there."""
    # The last equals sign, since a path may hold others.
    name, sign, number = word.rpartition("=")
    if not sign:
        require(bool(word), "--source", "self, hub, a file, a folder or a hub name", word)
        name = word
    else:
        # `isdecimal` alone is true of digits of other scripts, too.
        sound = bool(name) and number.isascii() and number.isdecimal() and int(number) > 0
        require(sound, "--source", "SOURCE=N with a whole number N of at least 1", word)
        size = int(number)
    require(size is None or size > 0, "--size", "a whole number of at least 1", size)
    dataset = None if name == HUB else name
    return dataclasses.replace(config, replay_dataset=dataset, replay_size=size)


def _require_usable(options: argparse.Namespace, sources: list[GeReConfig]) -> None:
    """Refuse what cannot work before anything is loaded."""
    if any(source.samples_itself for source in sources) and not options.model:
        raise ConfigError(
            "The source self needs a model to sample from.",
            where="--model",
            expected="folder or hub name of the base model",
            found="nothing",
            fix="Add --model MODEL, or take another --source.",
        )
    if options.out is None:
        return
    require(options.out.suffix == ".jsonl", "--out", "a file name that ends in .jsonl", str(options.out))
    if options.out.exists() and not options.force:
        raise ConfigError(
            "The file to write exists already.",
            where=options.out,
            expected="a new file",
            found=f"a file of {options.out.stat().st_size:,} bytes",
            fix="Give another --out, or add --force to overwrite it.",
        )


def _write(path: Path, records: Sequence[Record]) -> None:
    """Write rows as they were read, so that a training shows chats by the template of its own tokenizer."""
    from gere.replay.kept import json_lines

    with output_errors(path, "The replay file", "--out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json_lines({**record.row.record, "source": record.source} for record in records))


def _tokenizer(options: argparse.Namespace) -> Any:
    name, option = options.tokenizer, "--tokenizer"
    if name is None:
        name, option = options.model, "--model"
    if name is None:
        return None
    from gere.cli.loading import load_tokenizer

    tokenizer = load_tokenizer(name, option=option)
    if tokenizer.pad_token_id is None:
        # Padding is masked, so any token works.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return tokenizer


def _records(word: str, config: GeReConfig, options: argparse.Namespace, tokenizer: Any, folder: Path) -> list[Record]:
    from gere.cli.replay_stats import Record
    from gere.replay.texts import read_rows, replay_source

    own = _sample(config, options, tokenizer, folder) if config.samples_itself else None
    source = replay_source(config, own)._replace(where=f"--source {word}", settings="--")
    name = str(config.replay_dataset or HUB)
    return [Record(row.render(tokenizer), row.source or name, row) for row in read_rows(source, folder)]


def _sample(config: GeReConfig, options: argparse.Namespace, tokenizer: Any, folder: Path) -> list[str]:
    """Let the base model write texts, or read those that it wrote into `folder` before."""
    from gere.cli.loading import load_model, measuring_device
    from gere.replay.written import own_texts
    from gere.session.checkpoint import ANCHOR_FILE, loaded_key

    device, dtype = measuring_device(options.device, options.dtype)
    model = load_model(options.model, dtype, device)
    if loaded_key(model) is not None:
        raise ConfigError(
            "This model was fine-tuned from a base model, whose anchor its folder names.",
            where=f"--model {options.model}",
            expected="the base model",
            found=f"a folder with {ANCHOR_FILE}",
            fix=f"Give the base model; to make this model a base, delete {ANCHOR_FILE} from its folder.",
        )
    return own_texts(model, tokenizer, config, folder, progress=sys.stderr.isatty())
