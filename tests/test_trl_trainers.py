"""TRL's other trainers with replay: they see their own rows alone, and report what they report without replay."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import TINY, load_tiny
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from watching import Watch, train_logs

from gere import GeReConfig, gere_trainer
from gere.errors import UnsupportedSettingError

trl = pytest.importorskip("trl", minversion="1.16")
CPO, GKD, ORPO, ONLINE_DPO = (
    pytest.importorskip(f"trl.experimental.{name}") for name in ("cpo", "gkd", "orpo", "online_dpo")
)

BATCH, ACCUMULATION, REPLAY = 4, 2, 5
ROWS = range(24)
MESSAGES = [[{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}] for i in ROWS]
PAIRS = {
    "prompt": ["a b c"] * len(ROWS),
    "chosen": [f" yes {i}" for i in ROWS],
    "rejected": [f" no {i % 3}" for i in ROWS],
}
LABELS = {"prompt": ["a b c"] * len(ROWS), "completion": [f" yes {i}" for i in ROWS], "label": [True, False] * 12}
PROMPTS = {"prompt": [f"question {i}" for i in ROWS]}


def lengths_of(completions, **kwargs):
    return [float(len(str(completion))) for completion in completions]


def teacher():
    torch.manual_seed(5)
    model = load_tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


# For each: the class, its arguments class, further settings, its rows, and what else it takes.
KINDS: dict[str, tuple[type, type, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "SFT": (trl.SFTTrainer, trl.SFTConfig, {}, {"messages": MESSAGES}, {}),
    "DPO": (trl.DPOTrainer, trl.DPOConfig, {}, PAIRS, {}),
    "KTO": (trl.KTOTrainer, trl.KTOConfig, {}, LABELS, {}),
    "ORPO": (ORPO.ORPOTrainer, ORPO.ORPOConfig, {"max_length": 48}, PAIRS, {}),
    "CPO": (CPO.CPOTrainer, CPO.CPOConfig, {"max_length": 48}, PAIRS, {}),
    "GKD, lmbda 0": (
        GKD.GKDTrainer,
        GKD.GKDConfig,
        {"lmbda": 0.0},
        {"messages": MESSAGES},
        {"teacher_model": teacher},
    ),
    "GKD, lmbda 0.5": (
        GKD.GKDTrainer,
        GKD.GKDConfig,
        {"lmbda": 0.5},
        {"messages": MESSAGES},
        {"teacher_model": teacher},
    ),
    "GKD, lmbda 1": (
        GKD.GKDTrainer,
        GKD.GKDConfig,
        {"lmbda": 1.0},
        {"messages": MESSAGES},
        {"teacher_model": teacher},
    ),
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, {"num_generations": 2}, PROMPTS, {"reward_funcs": lengths_of}),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, {"num_generations": 2}, PROMPTS, {"reward_funcs": lengths_of}),
    "Distillation": (trl.DistillationTrainer, trl.DistillationConfig, {}, PROMPTS, {"teacher_model": teacher}),
}
LENGTHS = {GKD.GKDConfig: {"max_length": 48, "max_new_tokens": 5}}
LENGTHS |= {kind: {"max_completion_length": 5} for kind in (trl.GRPOConfig, trl.RLOOConfig, trl.DistillationConfig)}
ADD_BY_THEMSELVES = ("GRPO", "RLOO", "Distillation")


def make(root, name: str, cls: type | None = None, /, *, mode: str = "auto", texts=None, **changes):
    """Make a trainer of a kind; with `texts`, one with replay."""
    base, arguments, own, rows, more = KINDS[name]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    settings = {
        "output_dir": str(root / "out"), "per_device_train_batch_size": BATCH, "max_steps": 2, "learning_rate": 1e-3,
        "gradient_accumulation_steps": ACCUMULATION, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False, **own,
        **LENGTHS.get(arguments, {}), **changes,
    }  # fmt: skip
    replay = {}
    cls = cls or base
    if texts is not None:
        cls = gere_trainer(cls)
        replay = {
            "gere_hidden_state_saving_dir": root / "saving", "num_interpolate_per_batch": REPLAY, "w_strategy": "dy",
            "gere_config": GeReConfig(replay_dataset=texts, max_length=40, replay_mode=mode),
        }  # fmt: skip
    given = {key: value() if value is teacher else value for key, value in more.items()}
    torch.manual_seed(0)
    random.seed(0)
    return cls(
        model=load_tiny(), args=arguments(**settings), train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer, **given, **replay,
    )  # fmt: skip


def trained(trainer) -> dict[str, float]:
    """Train with the same draws in every run, and give the first log."""
    torch.manual_seed(1)
    random.seed(1)
    trainer.train()
    return train_logs(trainer)[0]


def metrics_of(log: dict[str, float]) -> dict[str, float]:
    """What the parent reports of its rows."""
    of_the_whole = ("gere/", "loss", "grad_norm", "learning_rate", "epoch", "num_input_tokens_seen")
    return {key: value for key, value in log.items() if not key.startswith(of_the_whole) and "time" not in key}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_added_rows_leave_the_step_of_the_parent_as_it_is(tmp_path, general, name):
    """Exactly k rows in each step, no margin in the first, and loss and metrics of the plain trainer in it."""
    ours = make(tmp_path, name, mode="auto" if name in ADD_BY_THEMSELVES else "add", texts=general)
    watch = Watch(ours, general, 40)
    first = trained(ours)
    theirs = trained(make(tmp_path, name))
    assert [len(watch.replay(step)) for step in range(2)] == [REPLAY] * 2
    assert first["gere/tm"] == 0.0 < train_logs(ours)[1]["gere/tm"]
    assert first["gere/task_loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-5)
    assert metrics_of(first) == pytest.approx(metrics_of(theirs), rel=1e-5, abs=1e-6)
    assert len(metrics_of(theirs)) > 1 or name.startswith("GKD")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ADD_BY_THEMSELVES])
def test_rows_are_replaced_and_the_parent_sees_the_others(tmp_path, general, name):
    """The plain trainer gets the batches that are left: its first step is the same, but for the replay rows."""
    ours = make(tmp_path, name, texts=general)
    watch, steps, collect = Watch(ours, general, 40), [], ours.get_batch_samples

    def note(*args, **kwargs):
        samples, items = collect(*args, **kwargs)
        steps.append([dict(sample) for sample in samples if len(sample) > 3 or sample["input_ids"].numel()])
        return samples, items

    ours.get_batch_samples = note
    first = trained(ours)
    assert [len(watch.replay(step)) for step in range(2)] == [REPLAY] * 2
    assert first["gere/tm"] == 0.0 < train_logs(ours)[1]["gere/tm"]
    assert len(steps[0]) == 1, "the other micro-step has replay rows alone"

    class Fed(KINDS[name][0]):
        def get_train_dataloader(self):
            return DataLoader(steps[0], batch_size=None)

    theirs = trained(make(tmp_path, name, Fed, max_steps=1, gradient_accumulation_steps=1))
    assert first["gere/task_loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-5)
    assert metrics_of(first) == pytest.approx(metrics_of(theirs), rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_a_loader_of_ones_own(tmp_path, general, name):
    class OwnLoader(KINDS[name][0]):
        def get_train_dataloader(self):
            per_step = ACCUMULATION if name == "GRPO" else 1
            rows = self.train_dataset if name == "DPO" else [row for row in self.train_dataset for _ in range(2)]
            batches = DataLoader(rows, batch_size=BATCH * per_step, collate_fn=self.data_collator)
            return batches if name == "DPO" else [batch for batch in batches for _ in range(per_step)]

    ours = make(tmp_path, name, OwnLoader, texts=general)
    watch = Watch(ours, general, 40)
    first, theirs = trained(ours), trained(make(tmp_path, name, OwnLoader))
    assert [len(watch.replay(step)) for step in range(2)] == [REPLAY] * 2 and first["gere/tm"] == 0.0
    assert metrics_of(first) == pytest.approx(metrics_of(theirs), rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_a_trainer_that_never_asks_for_its_loss_is_refused_by_name(tmp_path, general, monkeypatch):
    """OnlineDPO computes its loss inside its training step, where replay cannot join it."""
    own = {"max_length": 48, "max_new_tokens": 5}
    kind = (
        ONLINE_DPO.OnlineDPOTrainer,
        ONLINE_DPO.OnlineDPOConfig,
        own,
        PROMPTS,
        {"reward_funcs": lengths_of, "ref_model": load_tiny()},
    )
    monkeypatch.setitem(KINDS, "OnlineDPO", kind)
    assert trained(make(tmp_path, "OnlineDPO"))["loss"] > 0
    ours = make(tmp_path, "OnlineDPO", mode="add", texts=general)
    with pytest.raises(UnsupportedSettingError, match=r"GeReOnlineDPOTrainer\.training_step[\s\S]*found: +0 calls"):
        ours.train()
