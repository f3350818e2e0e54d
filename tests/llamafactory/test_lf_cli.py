"""`gere-llamafactory train`: config files, and several processes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("llamafactory.cli")

from lf_helpers import KEYS, LORA, ROOT, STEPS, settings, start, train_logs

from gere.errors import ConfigError
from gere.integrations import llamafactory
from gere.integrations.llamafactory import main, run
from gere.integrations.llamafactory_config import read_config

YAML = "stage: sft\nlearning_rate: 1.0e-4\ngere:\n  w_strategy: dy\n  std_floor: 1e-3\n"
OVERRIDES = ["learning_rate=2e-4", "max_steps=7", "gere.w_strategy=50", "gere.replay_size=8", "report_to=[none]"]


@pytest.mark.parametrize("name", ["run.yaml", "run.yml"])
def test_config_is_read_as_llamafactory_reads_it(tmp_path, monkeypatch, name):
    from llamafactory.hparams import read_args

    (tmp_path / name).write_text(YAML)
    monkeypatch.setattr(sys, "argv", ["launcher", str(tmp_path / name), *OVERRIDES])
    ours = read_config(tmp_path / name, OVERRIDES)
    assert ours == read_args()
    assert ours["gere"] == {"w_strategy": 50, "std_floor": 1e-3, "replay_size": 8} and ours["max_steps"] == 7


def test_json_gives_the_same(tmp_path):
    (tmp_path / "run.yaml").write_text(YAML)
    config = read_config(tmp_path / "run.yaml")
    (tmp_path / "run.json").write_text(json.dumps(config))
    assert read_config(tmp_path / "run.json", OVERRIDES) == read_config(tmp_path / "run.yaml", OVERRIDES)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("run.yaml", None, "no file"),
        ("run.toml", "a = 1", "another kind of file"),
        ("run.yaml", "- a\n- b", "a list"),
        ("run.yaml", "a: [1, 2", "expected"),
        ("run.json", "{", "Expecting"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, name, text, found):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=found):
        read_config(tmp_path / name)


def test_a_refused_config_is_a_message_and_no_traceback(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(YAML.replace("w_strategy", "w_stratgy"))
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(tmp_path / "run.yaml")])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "'w_stratgy'" in message and "Did you mean w_strategy?" in message
    assert "run.yaml, section gere" in message


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "gere-llamafactory train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environ", "devices", "starts"),
    [
        ({}, 0, False),
        ({}, 1, False),
        ({}, 2, True),
        ({"USE_KT": "1"}, 2, False),
        ({"FORCE_TORCHRUN": "1"}, 0, True),
        ({"FORCE_TORCHRUN": "true", "LOCAL_RANK": "0"}, 2, False),
    ],
)
def test_processes_start_where_llamafactory_starts_them(tmp_path, monkeypatch, environ, devices, starts):
    calls = []
    (tmp_path / "run.yaml").write_text(YAML)
    for name in ("FORCE_TORCHRUN", "LOCAL_RANK", "USE_KT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("llamafactory.extras.misc.get_device_count", lambda: devices)
    monkeypatch.setattr("os.execve", lambda program, command, environ: calls.append(command))
    monkeypatch.setattr(llamafactory, "run", lambda config: calls.append("run"))
    main(["train", str(tmp_path / "run.yaml"), "max_steps=3"])
    assert (calls[0] != "run") == starts
    if starts:
        own = ["-m", "gere.integrations.llamafactory", "train", str(tmp_path / "run.yaml"), "max_steps=3"]
        assert calls[0][1:3] == ["-m", "torch.distributed.run"] and calls[0][-5:] == own
        assert f"--nproc_per_node={max(1, devices)}" in calls[0]


# Whole micro-steps of replay rows under LLaMA-Factory's own checkpointing, then a mixed one on each of the two ranks.
@pytest.mark.parametrize(
    ("replay", "changes"), [(4, {}), (3, {**LORA, "use_reentrant_gc": False})], ids=["full", "lora, mixed"]
)
def test_two_processes_follow_the_curve_of_one(tmp_path, replay, changes):
    # Of the rows that are left with held-out texts, one has an element at the very edge of its region, which rounding
    # moves in or out. Its whole weight then shows in the gradient.
    gere = {"num_interpolate_per_batch": replay, "normalization": "elements", "replay_heldout": 0}
    one, two = tmp_path / "one", tmp_path / "two"
    run(settings(one, gere=gere, **changes))
    config = settings(two, gere=gere, per_device_train_batch_size=2, **changes)
    (two / "run of two.yaml").write_text(json.dumps(config))
    command = ["-m", "gere.integrations.llamafactory", "train", "run of two.yaml", "logging_steps=1"]
    start(command, two, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    ours, theirs = train_logs(two / "out"), train_logs(one / "out")
    assert len(ours) == len(theirs) == STEPS and all(set(log) >= KEYS for log in ours)
    assert ours[0]["gere/tm"] == 0.0
    for key in ("loss", "grad_norm", *sorted(KEYS)):
        curves = [[log[key] for log in logs] for logs in (ours, theirs)]
        assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-5), key


def test_command_of_the_package_is_this_one():
    scripts = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    target = re.search(r"^gere-llamafactory = \"(.*)\"$", scripts, flags=re.M).group(1)
    assert target == f"{main.__module__}:{main.__name__}"
    assert Path(llamafactory.__file__).name == "llamafactory.py"
