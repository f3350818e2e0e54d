"""TRL's `SFTTrainer` with replay: its dataset forms, losses and metrics, which count task rows alone."""

from __future__ import annotations

import inspect
import json
import math
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from conftest import DATA, ROOT, TINY, read_jsonl
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from watching import Watch

from gere import GeReConfig, GeReMixin, gere_trainer

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

STEPS, BATCH, ACCUMULATION, REPLAY = 20, 4, 2, 3
KEYS = {"gere/ce", "gere/tm", "gere/weight", "gere/violations", "gere/forgetting", "gere/task_loss"}
METRICS = ("entropy", "mean_token_accuracy", "num_tokens")


class HalfLoss(trl.SFTTrainer):
    """A user's own class, whose loss knows task rows alone."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert "labels" in inputs and not any(name.startswith("gere") for name in inputs)
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (found[0] / 2, found[1]) if return_outputs else found / 2


class Fed(trl.SFTTrainer):
    """The plain trainer on batches that were recorded."""

    batches: list[Any]

    def get_train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)


@dataclass
class Kind:
    """A way of training: settings, the user's class, and whether the dataset is a stream."""

    settings: dict[str, Any] = field(default_factory=dict)
    base: type = trl.SFTTrainer
    lora: bool = False
    stream: bool = False


KINDS = {
    "full": Kind(),
    "lora": Kind(lora=True),
    "wrapped": Kind({"packing": True, "packing_strategy": "wrapped", "max_length": 96}),
    "bfd": Kind({"packing": True, "packing_strategy": "bfd", "max_length": 96}),
    "padding_free": Kind({"padding_free": True, "max_length": None}),
    "stream": Kind(stream=True),
    "own_loss": Kind(base=HalfLoss),
}
if "loss_type" in inspect.signature(trl.SFTConfig).parameters:
    KINDS["dft"] = Kind({"loss_type": "dft"})


def records(first: int, last: int) -> Dataset:
    rows = read_jsonl(DATA / "task.jsonl", last)[first:]
    return Dataset.from_list(
        [{"prompt": row["instruction"] + row["input"], "completion": " " + row["output"]} for row in rows]
    )


def make(cls, root, kind: Kind, out: str, *, model=None, strategy="tm", **changes):
    """Make a trainer; `cls` may be one with replay or without. All share the base model and the anchor in `root`."""
    replay = {}
    if issubclass(cls, GeReMixin):
        texts = [row["text"] for row in read_jsonl(DATA / "general.jsonl", 24)]
        replay = {
            "gere_hidden_state_saving_dir": root / "gere_saving",
            "num_interpolate_per_batch": REPLAY,
            "w_strategy": "dy",
            "gere_config": GeReConfig(replay_dataset=texts, max_length=48, replay_strategy=strategy),
        }
    settings = {
        "output_dir": str(root / out),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **kind.settings,
        **changes,
    }
    # TRL's stream of 14 steps ends within the run, but after the checkpoint: `Trainer` resumes no later epoch of one.
    train = records(0, 112 if kind.stream else 48)
    torch.manual_seed(0)  # the adapter's first weights: TRL 0.24 makes them without a seed
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return cls(
        model=model or AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32),
        args=trl.SFTConfig(**settings),
        train_dataset=train.to_iterable_dataset() if kind.stream else train,
        eval_dataset=records(48, 55),
        processing_class=AutoTokenizer.from_pretrained(TINY),
        peft_config=lora if kind.lora else None,
        **replay,
    )


def train_logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def record(trainer) -> list[list[Any]]:
    """Keep the batches that the parent trains on, by optimizer step; one without rows is there for replay alone."""
    steps, collect = [], trainer.get_batch_samples

    def watch(*args, **kwargs):
        samples, items = collect(*args, **kwargs)
        if samples:
            steps.append([sample for sample in samples if sample["input_ids"].numel()])
        return samples, items

    trainer.get_batch_samples = watch
    return steps


@dataclass
class Done:
    """A trained trainer, its evaluation of the untouched model, and its batches."""

    trainer: Any
    before: dict[str, float]
    steps: list[list[Any]]
    watch: Watch | None = None


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder with a base model that knows something: at random weights, accuracy and entropy would tell nothing."""
    root = tmp_path_factory.mktemp("trl")
    tiny = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    trainer = make(trl.SFTTrainer, root, Kind(), "warm", model=tiny, learning_rate=3e-3)
    trainer.train()
    trainer.save_model(str(root / "base"))
    return root


@pytest.fixture(scope="module")
def done(root):
    @cache
    def run(name: str) -> Done:
        kind = KINDS[name]
        each = {"save_strategy": "steps", "save_steps": 10, "eval_strategy": "steps", "eval_steps": 10}
        trainer = make(gere_trainer(kind.base), root, kind, name, **each)
        before, steps = trainer.evaluate(), record(trainer)
        watch = Watch(trainer, [row["text"] for row in read_jsonl(DATA / "general.jsonl", 24)])
        trainer.train()
        return Done(trainer, before, steps, watch)

    return run


@pytest.fixture(scope="module")
def plain(done, root):
    """The plain trainer: its evaluation of the untouched model, and its first step on the task rows of `done`."""

    @cache
    def run(name: str) -> Done:
        kind = KINDS[name]
        batches = done(name).steps[0]
        fed = type("Fed", (Fed, kind.base), {"batches": batches})
        trainer = make(fed, root, kind, f"{name}-plain", max_steps=1, gradient_accumulation_steps=len(batches))
        before = trainer.evaluate()
        trainer.train()
        return Done(trainer, before, [])

    return run


every_kind = pytest.mark.parametrize("name", KINDS)
some_kinds = pytest.mark.parametrize("name", ["full", "lora", "bfd", "stream"])


@every_kind
def test_log_and_margin(done, name):
    history = done(name).trainer.state.log_history
    logs = train_logs(done(name).trainer)
    assert len(logs) == STEPS and all(set(log) >= KEYS | set(METRICS) for log in logs)
    assert logs[0]["gere/tm"] == logs[0]["gere/violations"] == 0.0
    assert logs[0]["gere/forgetting"] == pytest.approx(0, abs=1e-5)
    assert logs[-1]["gere/tm"] > 0 and all(math.isfinite(log["loss"]) for log in logs)
    evaluated = [log for log in history if "eval_loss" in log]
    assert len(evaluated) == 2 and not any(key.startswith("gere/") for log in evaluated for key in log)


@every_kind
def test_exactly_k_replay_rows_in_every_step(done, name):
    run = done(name)
    assert [len(run.watch.replay(step)) for step in range(STEPS)] == [REPLAY] * STEPS
    if name in ("full", "lora", "stream"):
        task = BATCH * ACCUMULATION - (0 if KINDS[name].stream else REPLAY)
        assert [len(run.watch.task(step)) for step in range(STEPS)] == [task] * STEPS


@every_kind
def test_loss_and_metrics_count_task_rows_alone(done, plain, name):
    """The plain trainer gets the task rows of the first step, in the same micro-batches."""
    ours, theirs = (train_logs(run(name).trainer)[0] for run in (done, plain))
    assert {key: ours[key] for key in METRICS} == pytest.approx({key: theirs[key] for key in METRICS}, rel=1e-6)
    assert ours["mean_token_accuracy"] > 0
    assert ours["gere/task_loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    task = BATCH * ACCUMULATION - (0 if KINDS[name].stream else REPLAY)
    whole = (task * ours["gere/task_loss"] + REPLAY * ours["gere/ce"]) / (task + REPLAY)  # the margin is 0
    assert ours["loss"] == pytest.approx(whole, rel=1e-4)


@every_kind
def test_tokens_of_all_steps_are_those_of_task_rows(done, name):
    tasks = [task for step in done(name).steps for task in step]
    tokens = sum(int(task.get("attention_mask", torch.ones_like(task["input_ids"])).sum()) for task in tasks)
    assert train_logs(done(name).trainer)[-1]["num_tokens"] == tokens


@every_kind
def test_evaluation_is_that_of_the_plain_trainer(done, plain, name):
    keys = {"eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"}
    ours, theirs = ({key: run(name).before.get(key) for key in keys} for run in (done, plain))
    assert ours == theirs and ours["eval_loss"] > 0


def test_one_anchor_for_all_kinds(done):
    assert len({done(name).trainer.replay.anchor.key for name in KINDS}) == 1


@some_kinds
def test_resume(done, root, name):
    whole = done(name).trainer
    resumed = make(gere_trainer(trl.SFTTrainer), root, KINDS[name], f"{name}-resumed")
    resumed.train(resume_from_checkpoint=str(root / name / "checkpoint-10"))
    keys = [*sorted(KEYS), "loss", "grad_norm", "entropy"]
    ours, theirs = ([[log[key] for key in keys] for log in train_logs(trainer)] for trainer in (resumed, whole))
    assert len(ours) == STEPS and ours == theirs
    assert same_weights(resumed, whole)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_next_task_from_a_checkpoint(done, root, name):
    first, checkpoint = done(name).trainer, root / name / "checkpoint-20"
    base = root / "base" if name == "lora" else checkpoint
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if name == "lora":
        model = peft.PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    later = make(gere_trainer(trl.SFTTrainer), root, Kind(), f"{name}-later", model=model, max_steps=1)
    assert same_weights(later, first)
    later.train()
    assert later.replay.anchor.key == first.replay.anchor.key and train_logs(later)[0]["gere/tm"] > 0


@some_kinds
def test_strategy_none_is_the_plain_trainer_bit_for_bit(root, name):
    base = trl.SFTTrainer
    ours = make(gere_trainer(base), root, KINDS[name], f"{name}-none", strategy="none", max_steps=4)
    theirs = make(base, root, KINDS[name], f"{name}-without", max_steps=4)
    for trainer in (ours, theirs):
        trainer.train()
    assert train_logs(ours) == train_logs(theirs) and len(train_logs(ours)) == 4
    assert same_weights(ours, theirs)


def same_weights(first, second) -> bool:
    ours, theirs = (trainer.model.state_dict() for trainer in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_recipe(monkeypatch, tmp_path):
    """The code of the document as it stands, but for the model, the device and the number of steps."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trl.md").read_text(encoding="utf-8"), flags=re.S)
    (model,) = re.findall(r'model="([^"]+)"', code)
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps(row) + "\n" for row in records(0, 48))
    (tmp_path / "reviews.jsonl").write_text(rows, encoding="utf-8")
    general = [json.dumps(row) + "\n" for row in read_jsonl(DATA / "general.jsonl", 12)]
    (tmp_path / "general.jsonl").write_text("".join(general), encoding="utf-8")
    code = code.replace(model, str(TINY)).replace('SFTConfig("out", ', 'SFTConfig("out", use_cpu=True, max_steps=2, ')
    names: dict[str, Any] = {}
    exec(code, names)
    logs = train_logs(names["trainer"])
    assert len(logs) == 2 and logs[0]["gere/tm"] == 0.0 and set(logs[1]) >= KEYS | set(METRICS)
    assert (tmp_path / "out" / "adapter_config.json").is_file() and (tmp_path / "out" / "gere_anchor.json").is_file()
