"""The README's Python runs as it stands."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT, load_tiny
from transformers import DataCollatorForSeq2Seq

from gere import GeReConfig

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)


def no_network(*arguments):
    raise AssertionError("the hub was asked again")


def test_usage_with_the_default_replay_set(monkeypatch, tmp_path, arguments, task, general, tokenizer):
    """The hub is replaced by a function; what it gave is kept, so that the second start does not ask it."""
    usage = next(block for block in BLOCKS if "trainer.train()" in block)
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


def test_settings_of_the_readme_are_the_defaults():
    block = next(block for block in BLOCKS if "replay_dataset=" in block)
    config = eval(block.split("import GeReConfig")[1].strip(), {"GeReConfig": GeReConfig})
    assert config == GeReConfig(replay_dataset="general.jsonl")


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
def test_links_lead_somewhere(link):
    assert link.startswith("https://arxiv.org/") or (ROOT / link).exists()
