"""The same settings by Python, by command line and by config file."""

from __future__ import annotations

import dataclasses
import inspect
import runpy
import subprocess
import sys
from typing import Literal, get_args, get_type_hints

import numpy as np
import pytest
from conftest import ROOT
from transformers import HfArgumentParser, Trainer, TrainingArguments

from gere import GeReArguments, GeReConfig, GeReMixin
from gere.config import STRATEGIES, kwargs_of_section, parse_replay_per_batch, refuse_unknown_arguments
from gere.errors import ConfigError
from gere.losses.strategy import Strategy, make_strategy

FIELDS = {field.name: field for field in dataclasses.fields(GeReArguments)}
# The four arguments of `GeReTrainer` beside `gere_config`, and their names in `GeReArguments`.
TRAINER_FIELDS = {
    "gere_hidden_state_saving_dir": "gere_hidden_state_saving_dir",
    "reuse_gere_hidden_state": "gere_reuse_hidden_state",
    "num_interpolate_per_batch": "gere_num_interpolate_per_batch",
    "w_strategy": "gere_w_strategy",
}
REGENERATE = "docs/settings.md is not what gere/config.py says; write it again: python docs/make_settings.py"
CHANGED = {
    "gere_hidden_state_saving_dir": "elsewhere",
    "gere_reuse_hidden_state": False,
    "gere_num_interpolate_per_batch": 4,
    "gere_w_strategy": "dy",
    "gere_replay_dataset": "general.jsonl",
    "gere_replay_size": 20,
    "gere_add_bos": True,
    "gere_normalization": "elements",
    "gere_band_width": 1.5,
}


@pytest.fixture
def parser():
    return HfArgumentParser((TrainingArguments, GeReArguments))


def test_same_fields_and_defaults_as_the_trainer_and_its_config():
    config = {f"gere_{field.name}": field.default for field in dataclasses.fields(GeReConfig)}
    of_trainer = inspect.signature(GeReMixin.__init__).parameters
    four = {field: of_trainer[name].default for name, field in TRAINER_FIELDS.items()}
    assert {name: field.default for name, field in FIELDS.items()} == four | config
    own = {name for name, what in of_trainer.items() if what.kind is what.KEYWORD_ONLY}
    assert own == {*TRAINER_FIELDS, "gere_config"}


def test_same_types_as_the_config():
    ours = get_type_hints(GeReArguments)
    theirs = {f"gere_{name}": hint for name, hint in get_type_hints(GeReConfig).items()}
    as_text = {
        "gere_replay_dataset": str | None,
        "gere_heldout_dataset": str | None,
        "gere_layers": str,
        "gere_base_decay": str,
        "gere_replay_strategy": Literal["tm", "ce", "kl", "l1", "l2", "none"],
    }
    assert {name: ours[name] for name in theirs} == theirs | as_text


def test_every_strategy_of_the_table_can_be_chosen_and_made():
    *names, off = get_args(get_type_hints(GeReArguments)["gere_replay_strategy"])
    assert names == [*STRATEGIES] and off == "none"
    for name in names:
        settings = dataclasses.asdict(GeReConfig(replay_strategy=name, normalization="elements"))
        assert isinstance(make_strategy(name, settings, depth=2, live=False, half=False), Strategy)


def test_every_setting_is_explained_in_the_docstring_and_in_the_docs():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == runpy.run_path(str(ROOT / "docs" / "make_settings.py"))["settings_page"](), REGENERATE
    for name in TRAINER_FIELDS:
        assert f"| `{name}` | " in page
    for field in dataclasses.fields(GeReConfig):
        assert f"\n    {field.name}: {field.metadata['help']}" in GeReConfig.__doc__
        assert f"| `{field.name}` | " in page


def test_every_field_has_a_help_and_the_help_is_shown(parser, capsys):
    assert all(field.metadata["help"].endswith(".") for field in FIELDS.values())
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args_into_dataclasses(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"--{name} " in shown for name in FIELDS)


def test_from_a_command_line_and_from_a_dict(parser, tmp_path):
    line = [part for name, value in CHANGED.items() for part in (f"--{name}", str(value))]
    _, by_line = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *line])
    _, by_dict = parser.parse_dict({"output_dir": str(tmp_path), **CHANGED})
    kwargs = by_line.trainer_kwargs()
    assert kwargs.pop("num_interpolate_per_batch") == "4", "a text, since it may be a share or a word"
    assert by_dict == GeReArguments(**CHANGED)
    config = GeReConfig(
        replay_dataset="general.jsonl", replay_size=20, add_bos=True, normalization="elements", band_width=1.5
    )
    four = {"gere_hidden_state_saving_dir": "elsewhere", "reuse_gere_hidden_state": False}
    assert kwargs == {**four, "w_strategy": "dy", "gere_config": config}
    assert by_dict.trainer_kwargs() == {**kwargs, "num_interpolate_per_batch": 4}


def test_trainer_takes_them(make_trainer, general):
    arguments = GeReArguments(gere_num_interpolate_per_batch=2, gere_max_length=48, gere_w_strategy="dy")
    kwargs = arguments.trainer_kwargs()
    kwargs["gere_config"] = dataclasses.replace(kwargs["gere_config"], replay_dataset=general)
    trainer = make_trainer(**kwargs)
    assert trainer.replay.rows_per_step == 2
    trainer.get_train_dataloader()
    assert trainer.replay.texts + trainer.replay.heldout == len(general)


@pytest.mark.parametrize("name", ["gere_max_length", "gere_num_interpolate_per_batch", "gere_w_strategy"])
def test_a_value_that_cannot_be_used_stops_at_the_command_line(parser, tmp_path, name):
    with pytest.raises(ConfigError, match=name.removeprefix("gere_")):
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), f"--{name}=-1"])


def test_section_of_a_config_file():
    assert kwargs_of_section({}, "here") == {"gere_config": GeReConfig()}
    kwargs = kwargs_of_section({"w_strategy": 10, "replay_dataset": ["a text", "one more"]}, "here")
    assert kwargs == {"w_strategy": 10, "gere_config": GeReConfig(replay_dataset=["a text", "one more"])}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("num_interpolate_per_bach", "num_interpolate_per_batch"), ("replay_data", "replay_dataset"), (7, "")],
)
def test_an_unknown_key_is_named_with_the_nearest(key, nearest):
    with pytest.raises(ConfigError) as failed:
        kwargs_of_section({key: 1}, "run.yaml, section gere")
    message = str(failed.value)
    assert f"found:    {key!r}" in message and f"Did you mean {nearest}" in message and "run.yaml" in message


@pytest.mark.parametrize("section", [None, "text", ["a"], 3])
def test_a_section_that_is_no_mapping(section):
    with pytest.raises(ConfigError, match="no mapping"):
        kwargs_of_section(section, "run.yaml")


def test_reading_arguments_imports_nothing_heavy():
    script = "import sys, gere.config; print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""


def test_integers_of_numpy_are_integers():
    config = GeReConfig(max_length=np.int64(48), replay_size=np.int32(5), self_seed=np.uint8(3))
    assert config == GeReConfig(max_length=48, replay_size=5, self_seed=3)
    assert type(config.max_length) is type(config.replay_size) is type(parse_replay_per_batch(np.int64(4))) is int
    for value in (np.float64(4), np.bool_(True), np.int64(-1)):
        with pytest.raises(ConfigError, match="num_interpolate_per_batch"):
            parse_replay_per_batch(value)


TRAINER = [*inspect.signature(Trainer.__init__).parameters]


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("num_interpolate_per_bach", "Did you mean num_interpolate_per_batch?"),
        ("reuse_hidden_state", "Did you mean reuse_gere_hidden_state?"),
        ("gere_w_strategy", "Did you mean w_strategy?"),
        ("gere_confg", "Did you mean gere_config?"),
        ("replay_dataset", "replay_dataset belongs in GeReConfig: gere_config=GeReConfig(replay_dataset=...)."),
        ("gere_replay_dataset", "replay_dataset belongs in GeReConfig: gere_config=GeReConfig(replay_dataset=...)."),
        ("band_widht", "Did you mean band_width? It belongs in GeReConfig: gere_config=GeReConfig(band_width=...)."),
    ],
)
def test_an_argument_of_the_trainer_that_is_misspelled_or_misplaced(key, fix):
    with pytest.raises(ConfigError) as failed:
        refuse_unknown_arguments({"model": None, key: 4}, TRAINER)
    assert str(failed.value).endswith(f"next:     {fix}") and f"found:    {key!r}" in str(failed.value)


def test_arguments_that_are_none_of_ours_are_left_to_the_parent():
    """Those of the parent, misspellings of them, and what other trainers had in other versions."""
    others = ["train_datset", "train_datasets", "tokeniser", "max_seq_length", "dataset_text_field", "packing", "beta"]
    refuse_unknown_arguments(dict.fromkeys([*TRAINER, *TRAINER_FIELDS, "gere_config", *others]), TRAINER)
    refuse_unknown_arguments({"max_length": 512, "replay_datsets": []}, [*TRAINER, "max_length", "replay_datasets"])


def test_no_argument_of_a_trainer_of_trl_is_taken_for_ours():
    trl = pytest.importorskip("trl")
    for cls in (trl.SFTTrainer, trl.DPOTrainer, trl.GRPOTrainer):
        refuse_unknown_arguments(inspect.signature(cls.__init__).parameters, TRAINER)
