"""Small models, tokenizers and trainers that every test can use; nothing here reaches a network."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from gere import GeReConfig, GeReTrainer

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "base_llms" / "llama-tiny-random"
DATA = ROOT / "examples" / "data"

torch.set_num_threads(1)
# The same examples in every run; `HYPOTHESIS_PROFILE=random` searches for new ones. No deadline: machines are busy.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("random", derandomize=False, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def read_jsonl(path: Path, limit: int) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(limit), lines, strict=False)]


def load_tiny() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


def encode(tokenizer, row: dict) -> dict:
    prompt = tokenizer(row["instruction"] + row["input"])["input_ids"]
    answer = tokenizer(" " + row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer}


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """`TrainingArguments(bf16=True)` of transformers 4 leaves its precision in the environment of later tests."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def model():
    return load_tiny()


@pytest.fixture(scope="session")
def general() -> list[str]:
    return [row["text"] for row in read_jsonl(DATA / "general.jsonl", 24)]


@pytest.fixture(scope="session")
def task(tokenizer) -> list[dict]:
    return [encode(tokenizer, row) for row in read_jsonl(DATA / "task.jsonl", 48)]


@pytest.fixture
def arguments(tmp_path):
    def make(**changes) -> TrainingArguments:
        settings = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        return TrainingArguments(**{**settings, **changes})

    return make


@pytest.fixture
def make_trainer(tmp_path, tokenizer, general, task, arguments):
    """Make a `GeReTrainer` (or another class) on the tiny model; everything can be replaced.

    All texts are replayed, and base decay is off; `measuring_trainer` holds two of them out.
    """

    def make(cls=GeReTrainer, *, model=None, args=None, config=None, replay=4, w="dy", **changes):
        settings = {
            "model": load_tiny() if model is None else model,
            "args": args or arguments(),
            "train_dataset": task,
            "data_collator": DataCollatorForSeq2Seq(tokenizer),
            "processing_class": tokenizer,
        }
        if issubclass(cls, GeReTrainer):
            config = {
                "replay_dataset": general,
                "replay_heldout": 0,
                "base_decay": 0,
                "max_length": 48,
                **(config or {}),
            }
            settings |= {
                "gere_hidden_state_saving_dir": tmp_path / "gere_saving",
                "num_interpolate_per_batch": replay,
                "w_strategy": w,
                "gere_config": GeReConfig(**config),
            }
        return cls(**{**settings, **changes})

    return make


@pytest.fixture
def measuring_trainer(make_trainer):
    """Make a trainer as `make_trainer` does, with as many held-out texts as by default."""
    return lambda *args, config=None, **changes: make_trainer(
        *args, config={"replay_heldout": GeReConfig.replay_heldout, **(config or {})}, **changes
    )
