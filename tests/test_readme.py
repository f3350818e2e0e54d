"""The README's Python runs as it stands."""

from __future__ import annotations

import json
import re
import sys

import pytest
from conftest import DATA, ROOT, load_tiny, read_jsonl
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer

from gere import GeReConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def no_network(*arguments):
    raise AssertionError("the hub was asked again")


def test_usage_with_the_default_replay_set(monkeypatch, tmp_path, arguments, task, general, tokenizer):
    """The hub is replaced by a function; what it gave is kept, so that the second start does not ask it."""
    usage = next(block for block in BLOCKS if "eval_dataset=dev" in block)
    asked = []

    def stream(name, config, size):
        asked.append((name, config.replay_split, config.replay_column, size))
        return [f"{general[row % len(general)]} This is text {row}." for row in range(size)]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gere.replay._stream", stream)
    for _ in range(2):
        names = {"model": load_tiny(), "args": arguments(eval_strategy="steps", eval_steps=2), "train": task}
        names |= {"dev": task[:4], "collator": DataCollatorForSeq2Seq(tokenizer), "tokenizer": tokenizer}
        exec(usage, names)
        logs = names["trainer"].state.log_history
        assert logs[0]["gere/tm"] == 0.0 and any("eval_loss" in log for log in logs)
        monkeypatch.setattr("gere.replay._stream", no_network)
    assert asked == [("DKYoon/SlimPajama-6B", "train", "text", 1000)]
    assert len(list((tmp_path / "gere_saving").glob("anchor-*"))) == 1


class MyTrainer(Trainer):
    """Stands for the reader's own class."""


def run_block(mark, monkeypatch, tmp_path, **names):
    block = next(block for block in BLOCKS if mark in block)
    monkeypatch.chdir(tmp_path)
    exec(block, names)
    logs = names["trainer"].state.log_history
    assert logs[0]["gere/tm"] == 0.0 and len(logs) > 2
    return names["trainer"]


@pytest.fixture
def texts(monkeypatch, general):
    monkeypatch.setattr("gere.replay._stream", lambda name, config, size: [f"{general[0]} {n}" for n in range(size)])


def test_recipe_of_a_trainer_of_ones_own(monkeypatch, tmp_path, arguments, task, tokenizer, texts):
    names = {"MyTrainer": MyTrainer, "model": load_tiny(), "args": arguments(), "train": task, "tokenizer": tokenizer}
    trainer = run_block(
        "gere_trainer(MyTrainer)", monkeypatch, tmp_path, collator=DataCollatorForSeq2Seq(tokenizer), **names
    )
    assert type(trainer).__name__ == "GeReMyTrainer"


def test_recipe_of_hf_argument_parser(monkeypatch, tmp_path, task, tokenizer, general):
    (tmp_path / "general.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in general))
    command = (
        "train.py --output_dir out --max_steps 3 --logging_steps 1 --use_cpu True --report_to none --save_strategy no"
    )
    replay = "--gere_num_interpolate_per_batch 4 --gere_w_strategy dy --gere_replay_dataset general.jsonl"
    monkeypatch.setattr(sys, "argv", f"{command} {replay}".split())
    names = {"model": load_tiny(), "train": task, "tokenizer": tokenizer}
    run_block("HfArgumentParser", monkeypatch, tmp_path, collator=DataCollatorForSeq2Seq(tokenizer), **names)


def test_recipe_of_trl(monkeypatch, tmp_path, texts):
    pytest.importorskip("trl")
    import trl

    def config(**settings):
        small = {
            "max_steps": 3,
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "save_strategy": "no",
        }
        return original(**settings, **small)

    original = trl.SFTConfig
    monkeypatch.setattr(trl, "SFTConfig", config)
    dataset = Dataset.from_list([{"text": row["text"]} for row in read_jsonl(DATA / "heldout.jsonl", 40)])
    run_block("SFTTrainer", monkeypatch, tmp_path, model=load_tiny(), dataset=dataset)


@pytest.mark.parametrize("name", ["llamafactory", "axolotl"])
def test_sections_are_those_that_the_documents_tests_run(name):
    sections = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), flags=re.S)
    assert sections[0] in re.findall(r"```yaml\n(.*?)```", README, flags=re.S)


def test_settings_of_the_readme_are_the_defaults():
    block = next(block for block in BLOCKS if "replay_dataset=" in block)
    config = eval(block.split("import GeReConfig")[1].strip(), {"GeReConfig": GeReConfig})
    assert config == GeReConfig(replay_dataset="general.jsonl")


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert link.startswith("https://arxiv.org/") or (ROOT / link).exists()
