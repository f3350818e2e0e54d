"""The same settings by Python, by command line and by config file."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from typing import get_type_hints

import pytest
from transformers import HfArgumentParser, TrainingArguments

from gere import GeReArguments, GeReConfig, GeReMixin
from gere.arguments import TRAINER_FIELDS, kwargs_of_section
from gere.errors import ConfigError

FIELDS = {field.name: field for field in dataclasses.fields(GeReArguments)}
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
    assert {name: ours[name] for name in theirs} == theirs | {"gere_replay_dataset": str | None, "gere_layers": str}


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
    assert by_line == by_dict == GeReArguments(**CHANGED)
    kwargs = by_line.trainer_kwargs()
    config = GeReConfig(
        replay_dataset="general.jsonl", replay_size=20, add_bos=True, normalization="elements", band_width=1.5
    )
    four = {"gere_hidden_state_saving_dir": "elsewhere", "reuse_gere_hidden_state": False}
    assert kwargs == {**four, "num_interpolate_per_batch": 4, "w_strategy": "dy", "gere_config": config}


def test_trainer_takes_them(make_trainer, general):
    arguments = GeReArguments(gere_num_interpolate_per_batch=2, gere_max_length=48, gere_w_strategy="dy")
    kwargs = arguments.trainer_kwargs()
    kwargs["gere_config"] = dataclasses.replace(kwargs["gere_config"], replay_dataset=general)
    trainer = make_trainer(**kwargs)
    assert trainer._gere.replay_per_batch == 2 and trainer._gere.config.max_length == 48


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
    script = "import sys, gere.arguments; print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
