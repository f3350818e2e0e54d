"""A killed run goes on as if nothing had happened: same rows, same losses, same weights, same anchor."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer
from watching import Watch

from gere.errors import CacheMissingError

SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import conftest
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments
from gere import GeReConfig, GeReTrainer
from test_lora import with_lora

root, out, kind, kill, resume = Path({root!r}), sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "resume"
tokenizer = AutoTokenizer.from_pretrained(conftest.TINY)
rows = [conftest.encode(tokenizer, row) for row in conftest.read_jsonl(conftest.DATA / "task.jsonl", 40)]
texts = [row["text"] for row in conftest.read_jsonl(conftest.DATA / "general.jsonl", 11)]

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == kill:
            os.kill(os.getpid(), signal.SIGKILL)

args = TrainingArguments(
    str(root / out), max_steps=20, per_device_train_batch_size=2, gradient_accumulation_steps=4, learning_rate=1e-3,
    logging_steps=1, save_steps=7, report_to=[], use_cpu=True, disable_tqdm=True,
)
trainer = GeReTrainer(
    with_lora(lora_dropout=0.1) if kind == "lora" else conftest.load_tiny(), args, DataCollatorForSeq2Seq(tokenizer),
    rows, processing_class=tokenizer, callbacks=[Kill()], num_interpolate_per_batch=3, w_strategy="dy",
    gere_hidden_state_saving_dir=root / "gere_saving", gere_config=GeReConfig(replay_dataset=texts, max_length=40),
)
trainer.train(resume_from_checkpoint=resume)
trainer.save_model(str(root / out / "final"))
trainer.state.save_to_json(str(root / out / "final" / "state.json"))
"""


def run(root: Path, *arguments: str) -> int:
    script = SCRIPT.format(tests=str(Path(__file__).parent), root=str(root))
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=250)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def result(root: Path, name: str) -> tuple[list, dict]:
    final = root / name / "final"
    history = json.loads((final / "state.json").read_text())["log_history"]
    keys = ("step", "loss", "grad_norm", "gere/ce", "gere/tm", "gere/violations", "gere/forgetting", "gere/task_loss")
    logs = [tuple(log[key] for key in keys) for log in history if "loss" in log]
    return logs, load_file(next(final.glob("*model.safetensors")))


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_kill_and_resume_is_bit_for_bit(tmp_path, kind):
    assert run(tmp_path, "whole", kind, "0", "start") == 0
    assert run(tmp_path, "killed", kind, "10", "start") == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint-7" / "gere_anchor.json").is_file()
    assert run(tmp_path, "killed", kind, "0", "resume") == 0
    (logs, weights), (expected_logs, expected) = result(tmp_path, "killed"), result(tmp_path, "whole")
    assert len(logs) == 20 and logs == expected_logs
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("replay", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_resume_at_every_step_of_three_epochs(make_trainer, arguments, task, general, tmp_path, replay):
    def args():
        return arguments(max_steps=-1, num_train_epochs=3, save_strategy="steps", save_steps=1, save_only_model=False)

    def trainer():
        made = make_trainer(args=args(), replay=replay, train_dataset=task[:17])
        return made, Watch(made, general)

    first, whole = trainer()
    first.train()
    steps = first.state.global_step
    assert steps == first.state.max_steps == len(whole.steps)
    third = steps // 3
    epochs = [whole.steps[start : start + third] for start in (0, third, 2 * third)]
    assert epochs[0] != epochs[1] != epochs[2], "each epoch has an order of its own"
    for step in range(1, steps):
        resumed, seen = trainer()
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert seen.steps == whole.steps[step:], f"resumed at step {step}"
        assert resumed.state.global_step == steps


def saving(arguments):
    return arguments(save_strategy="steps", save_steps=2, max_steps=4)


def test_anchor_is_never_built_on_resume(make_trainer, arguments, tmp_path):
    make_trainer(args=saving(arguments)).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (tmp_path / "gere_saving").rename(tmp_path / "elsewhere")
    lost = make_trainer(args=saving(arguments))
    with pytest.raises(CacheMissingError, match=r"never|cannot be anchored again"):
        lost.train(resume_from_checkpoint=str(checkpoint))
    assert not list((tmp_path / "gere_saving").glob("anchor-*"))
    found = make_trainer(args=saving(arguments), gere_hidden_state_saving_dir=tmp_path / "elsewhere")
    found.train(resume_from_checkpoint=str(checkpoint))
    assert found.state.global_step == 4


def test_checkpoint_of_another_trainer_is_refused(make_trainer, arguments, tmp_path):
    make_trainer(Trainer, args=saving(arguments)).train()
    trainer = make_trainer(args=saving(arguments))
    with pytest.raises(CacheMissingError, match=r"names no anchor[\s\S]*gere_config.anchor"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_resume_true_takes_the_last_checkpoint(make_trainer, arguments):
    make_trainer(args=saving(arguments)).train()
    trainer = make_trainer(args=arguments(save_strategy="steps", save_steps=2, max_steps=6))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6 and [log["step"] for log in trainer.state.log_history][-2] == 6
