"""`RecurrentKIFTrainer`: rounds and consolidation in real trainings, next to the plain trainer."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, load_tiny
from processes import run
from safetensors.torch import load_file
from test_lora import with_lora
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Trainer, TrainerCallback

from gere import GeReTrainer, KIFConfig, RecurrentKIFTrainer, TaskMemory, recurrent_kif_trainer
from gere.errors import CacheCorruptError, ConfigError, TaskMemoryError, UnsupportedModelError
from gere.kif import read_history


@pytest.fixture(scope="session")
def memory(task) -> TaskMemory:
    return TaskMemory().add("earlier", task[:24], [row["labels"][-2] for row in task[:24]], share=0.5)


def adapter(scale=0.02):
    """A LoRA model whose adapter has learned something."""
    model = with_lora(lora_dropout=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    return model


def trained(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def equal(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


class Watch(TrainerCallback):
    """What every step shows: generators, learning rate, step counter."""

    def __init__(self) -> None:
        self.seen = []

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        generators = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
        self.seen.append((state.global_step, lr_scheduler.get_last_lr(), hash(str(generators))))


class Stop(TrainerCallback):
    """Ends a training as a kill does: after a step, or in the midst of a fusion."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_torn_checkpoint_is_passed_over(make_trainer, arguments, memory, tmp_path):
    def trainer():
        args = arguments(max_steps=4, save_strategy="steps", save_steps=1)
        config = KIFConfig(inner_steps=2, outer_steps=1)
        return make_trainer(RecurrentKIFTrainer, model=adapter(), args=args, kif_memory=memory, kif_config=config)

    whole = trainer()
    whole.train()
    for step in (3, 4):
        (tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert equal(trained(whole.model), trained(resumed.model))


def test_the_first_task_is_plain_training(make_trainer):
    models = with_lora(lora_dropout=0.1), with_lora(lora_dropout=0.1)
    make_trainer(Trainer, model=models[0]).train()
    make_trainer(RecurrentKIFTrainer, model=models[1]).train()
    assert equal(trained(models[0]), trained(models[1]))


def test_ones_without_outer_steps_are_plain_training(make_trainer, arguments, memory):
    models, watches = (adapter(), adapter()), (Watch(), Watch())
    make_trainer(Trainer, model=models[0], args=arguments(max_steps=7), callbacks=[watches[0]]).train()
    config = KIFConfig(inner_steps=2, outer_steps=0, fusion_weights=(1, 1, 1))
    make_trainer(
        RecurrentKIFTrainer, model=models[1], args=arguments(max_steps=7), kif_memory=memory, kif_config=config,
        callbacks=[watches[1]],
    ).train()  # fmt: skip
    assert equal(trained(models[0]), trained(models[1]))
    assert watches[0].seen == watches[1].seen


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_the_outer_loop_leaves_no_trace(make_trainer, arguments, memory, preset):
    """Generators, schedule, step counter and rows are those of the plain trainer; the weights are not."""
    models, watches = (adapter(), adapter()), (Watch(), Watch())
    args = {"max_steps": 6, "warmup_steps": 2}
    plain = make_trainer(Trainer, model=models[0], args=arguments(**args), callbacks=[watches[0]])
    plain.train()
    ours = make_trainer(
        RecurrentKIFTrainer, model=models[1], args=arguments(**args), kif_memory=memory,
        kif_config=KIFConfig.preset(preset, inner_steps=2, outer_steps=2), callbacks=[watches[1]],
    )  # fmt: skip
    ours.train()
    assert watches[0].seen == watches[1].seen and not equal(trained(models[0]), trained(models[1]))
    logs = [log for log in ours.state.log_history if "kif/neither" in log]
    assert [log["step"] for log in logs] == [2, 4, 6] and all(0.6 < log["kif/neither"] < 1 for log in logs)
    assert all(log["kif/outer_loss"] > 0 for log in logs)
    rates = [[log["learning_rate"] for log in made.state.log_history if "loss" in log] for made in (plain, ours)]
    assert rates[0] == rates[1]


def test_a_fusion_of_the_paper_by_hand(make_trainer, arguments, memory):
    """One round: entries of no mask stay, those of the inner mask alone are where plain training takes them."""
    models = adapter(), adapter()
    start = trained(models[0])
    args = {"max_steps": 3, "gradient_accumulation_steps": 1}
    make_trainer(Trainer, model=models[0], args=arguments(**args)).train()
    config = KIFConfig(inner_steps=3, outer_steps=2)
    trainer = make_trainer(RecurrentKIFTrainer, model=models[1], args=arguments(**args), kif_config=config, kif_memory=memory)  # fmt: skip # noqa: E501
    trainer.train()
    middle, fused = trained(models[0]), trained(models[1])
    stayed = sum((fused[name] == start[name]).sum() for name in start)
    inner = sum(((fused[name] == middle[name]) & (fused[name] != start[name])).sum() for name in start)
    every = sum(weight.numel() for weight in start.values())
    (log,) = [log for log in trainer.state.log_history if "kif/neither" in log]
    assert stayed / every == pytest.approx(log["kif/neither"], abs=0.01)
    assert 0 < inner <= 0.2 * every
    # The outer steps of a new Adam at 1e-3 move an entry by 2e-3 at most, up to weight decay.
    outer = [
        (fused[name] - middle[name])[(fused[name] != start[name]) & (fused[name] != middle[name])] for name in start
    ]
    assert torch.cat(outer).abs().max() < 0.02


def test_nan_gradients_do_not_reach_the_masks(make_trainer, arguments, memory):
    """A step whose gradients are NaN is left out of the importance."""

    class Broken(RecurrentKIFTrainer):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == 1:
                weight = next(weight for weight in model.parameters() if weight.grad is not None)
                weight.grad[0, 0] = float("nan")
            return loss

    class Spare(TrainerCallback):
        """Leaves the weights alone in that step, as the scaler of float16 does."""

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 1:
                for group in optimizer.param_groups:
                    for weight in group["params"]:
                        weight.grad = None

    trainer = make_trainer(
        Broken, model=adapter(), args=arguments(max_steps=4), kif_config=KIFConfig(inner_steps=4), kif_memory=memory
    )
    trainer.add_callback(Spare())
    trainer.train()
    assert all(weight.isfinite().all() for weight in trained(trainer.model).values())
    (log,) = [log for log in trainer.state.log_history if "kif/neither" in log]
    assert 0.6 < log["kif/neither"] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "cls"),
    [
        ("paper", RecurrentKIFTrainer),
        pytest.param("code", RecurrentKIFTrainer, marks=pytest.mark.slow),
        pytest.param("paper", recurrent_kif_trainer(GeReTrainer), marks=pytest.mark.slow),
    ],
    ids=["paper", "code", "with replay"],
)
def test_killed_before_inside_and_after_a_fusion(make_trainer, arguments, memory, tmp_path, preset, cls, monkeypatch):
    """Q is 3: checkpoints of step 2 (in the midst of a round) and of step 4 (after a fusion)."""

    def trainer(out, kept=memory, **changes):
        args = arguments(output_dir=str(tmp_path / out), max_steps=7, save_strategy="steps", save_steps=2)
        return make_trainer(
            cls, model=adapter(), args=args, kif_memory=kept,
            kif_config=KIFConfig.preset(preset, inner_steps=3, outer_steps=2, **changes),
        )  # fmt: skip

    whole = trainer("whole")
    whole.train()
    losses = [(log["loss"], log.get("kif/outer_loss")) for log in whole.state.log_history if "loss" in log]
    for stop in (2, 4):  # before, and after the first fusion
        killed = trainer(f"killed-{stop}")
        killed.add_callback(Stop(stop + 1 if stop == 4 else 3))
        if stop == 2:  # inside of it: the second outer step fails
            outer, calls = cls._kif_outer_step, []

            def fail(self, *given, outer=outer, calls=calls):
                calls.append(1)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return outer(self, *given)

            monkeypatch.setattr(cls, "_kif_outer_step", fail)
        with pytest.raises(KeyboardInterrupt):
            killed.train()
        monkeypatch.undo()
        resumed = trainer(f"killed-{stop}")
        resumed.train(resume_from_checkpoint=True)
        assert equal(trained(whole.model), trained(resumed.model)), stop
        again = [(log["loss"], log.get("kif/outer_loss")) for log in resumed.state.log_history if "loss" in log]
        assert again == losses
    other = trainer("whole", score="sensitivity" if preset == "code" else "sensitivity x uncertainty")
    with pytest.raises(CacheCorruptError, match="kif_config"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    another = trainer("whole", TaskMemory(memory.tasks, memory.rows[1:]))
    with pytest.raises(CacheCorruptError, match="kif_memory"):
        another.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    (tmp_path / "whole" / "checkpoint-2" / "gere_kif.safetensors").unlink()
    with pytest.raises(CacheCorruptError, match="gere_kif"):
        trainer("whole").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize("preset", ["tasl", pytest.param("taslora", marks=pytest.mark.slow)])
def test_tasl_consolidates_after_a_task(make_trainer, arguments, tmp_path, preset):
    def trainer(model, **changes):
        args = arguments(output_dir=str(tmp_path / "out"), max_steps=5, save_strategy="steps", save_steps=2)
        return make_trainer(
            RecurrentKIFTrainer, model=model, args=args, kif_config=KIFConfig.preset(preset), **changes
        )

    models = [adapter() for _ in range(3)]
    start = trained(models[0])
    first = trainer(models[0])
    first.train()
    make_trainer(Trainer, model=models[1], args=arguments(max_steps=5)).train()
    present = trained(models[1])
    assert equal(trained(models[0]), present), "the first task is plain training"
    units = 1 if preset == "tasl" else 4
    assert {len(unit) for unit in first.kif_history.values()} == {units}
    first.save_model(str(tmp_path / "model"))
    assert read_history(tmp_path / "model") == first.kif_history

    history = read_history(tmp_path / "model")
    second = trainer(models[2], kif_history=history, kif_earlier=["one"])
    second.train()
    shares = []
    for name, weight in trained(models[2]).items():
        moved = present[name] != start[name]
        share = ((weight - start[name]) / (present[name] - start[name]))[moved].median().item()
        shares.append(round(share, 3))
        if preset == "tasl":
            mixed = start[name] + share * (present[name] - start[name])
            torch.testing.assert_close(weight, mixed, rtol=1e-4, atol=1e-6)
    if preset == "tasl":
        assert {*shares} <= {0.0, 0.3, 0.5, 1.0} and 0.5 in shares
    assert second.kif_history.keys() == history.keys() and second.kif_history != history
    resumed = trainer(adapter(), kif_history=history)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert equal(trained(resumed.model), trained(models[2])) and resumed.kif_history == second.kif_history
    with pytest.raises(ConfigError, match="kif_history"):
        trainer(adapter(), kif_earlier=["one"])
    other = trainer(with_lora(target_modules=["q_proj"]), kif_history=history)
    with pytest.raises(ConfigError, match="another adapter"):
        other.train()


def test_together_with_replay(make_trainer, arguments, memory):
    """The outer steps train on the memory alone, and the replay rows of each inner step are taken up."""
    cls = recurrent_kif_trainer(GeReTrainer)
    trainer = make_trainer(
        cls, model=adapter(), args=arguments(max_steps=4), kif_memory=memory, kif_config=KIFConfig(inner_steps=2)
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all("gere/ce" in log for log in logs) and "kif/neither" in logs[1] and "kif/neither" not in logs[0]
    alone = make_trainer(GeReTrainer, model=adapter(), args=arguments(max_steps=4))
    alone.train()
    before = [log for log in alone.state.log_history if "loss" in log]
    assert before[0]["gere/ce"] == logs[0]["gere/ce"] and before[1]["loss"] == logs[1]["loss"]
    assert recurrent_kif_trainer(cls) is cls
    assert issubclass(recurrent_kif_trainer(Seq2SeqTrainer), Seq2SeqTrainer)


def test_bfloat16_autocast(make_trainer, arguments, memory):
    args = arguments(max_steps=4, bf16=True)
    trainer = make_trainer(
        RecurrentKIFTrainer, model=adapter(), args=args, kif_memory=memory, kif_config=KIFConfig(inner_steps=2)
    )
    trainer.train()
    assert all(weight.isfinite().all() for weight in trained(trainer.model).values())


def scaled(scale):
    """A trainer class with the scaler of float16, which accelerate makes on a GPU alone."""

    class Scaled(RecurrentKIFTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()

            # As accelerate does it, which looks for a GPU first.
            def unscale(accelerator, optimizer=None):
                for own in accelerator._optimizers:
                    accelerator.scaler.unscale_(own.optimizer)

            kind = type(self.accelerator)
            self.accelerator.__class__ = type("Scaled", (kind,), {"unscale_gradients": unscale})
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)

    return Scaled


@pytest.mark.slow
@pytest.mark.parametrize("norm", [1.0, 0.0])
@pytest.mark.parametrize("preset", ["paper", "code"])
def test_importance_is_that_of_unscaled_gradients(make_trainer, arguments, memory, tmp_path, preset, norm):
    """A power of two scales every gradient without rounding: the state of the round is the same, bit for bit."""
    states = []
    for name, cls in (("plain", RecurrentKIFTrainer), ("scaled", scaled(2.0**10))):
        args = arguments(
            output_dir=str(tmp_path / name), max_steps=5, max_grad_norm=norm, save_strategy="steps", save_steps=5
        )
        config = KIFConfig.preset(preset, inner_steps=3, outer_steps=2)
        make_trainer(cls, model=adapter(), args=args, kif_memory=memory, kif_config=config).train()
        states.append(load_file(tmp_path / name / "checkpoint-5" / "gere_kif.safetensors"))
    assert any(value.any() for name, value in states[0].items() if name.startswith("outer.E"))
    assert equal(*states)


def test_a_step_that_overflows_is_left_out(make_trainer, arguments, memory):
    """The scaler leaves the weights alone and halves its scale, in an outer step, too."""
    trainer = make_trainer(
        scaled(2.0**127), model=adapter(), args=arguments(max_steps=1), kif_memory=memory,
        kif_config=KIFConfig(inner_steps=1, outer_steps=1),
    )  # fmt: skip
    before = trained(trainer.model)
    trainer.train()
    assert equal(before, trained(trainer.model))
    assert trainer.accelerator.scaler.get_scale() == 2.0**125
    assert [log["kif/neither"] for log in trainer.state.log_history if "kif/neither" in log] == [1.0]


def test_the_optimizer_state_is_kept_or_reset(make_trainer, arguments, memory):
    for policy, steps in (("keep", 4.0), ("reset", 2.0)):
        config = KIFConfig(inner_steps=2, outer_steps=3, optimizer_state=policy)
        args = arguments(max_steps=4, save_strategy="steps", save_steps=1)
        trainer = make_trainer(RecurrentKIFTrainer, model=adapter(), args=args, kif_memory=memory, kif_config=config)

        class Count(TrainerCallback):
            def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
                self.steps = max(entry["step"].item() for entry in optimizer.optimizer.state.values())

        count = Count()
        trainer.add_callback(count)
        trainer.train()
        assert count.steps == steps


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kif_earlier": ["one"]}, TaskMemoryError, "no memory"),
        ({"kif_earlier": ["two", "one"], "memory": ("one", "two")}, TaskMemoryError, "two, one"),
        ({"kif_earlier": [], "memory": ("one",)}, TaskMemoryError, "first one"),
        ({"kif_config": {"inner_steps": 8}, "memory": ("one",)}, ConfigError, r"inner_steps[\s\S]*3 steps"),
        ({"plain": True}, UnsupportedModelError, "no adapter"),
        ({"kif_config": "paper"}, ConfigError, "KIFConfig"),
        ({"kif_memory": "memory.jsonl"}, ConfigError, "TaskMemory"),
        ({"kif_memmory": None}, TypeError, "kif_memmory"),
    ],
)
def test_bad_input_is_refused_by_name(make_trainer, task, changes, error, message):
    changes = dict(changes)
    names = changes.pop("memory", ())
    model = load_tiny() if changes.pop("plain", False) else adapter()
    made = TaskMemory()
    for name in names:
        made = made.add(name, task[:10], ["x"] * 10)
    if names:
        changes["kif_memory"] = made
    if isinstance(changes.get("kif_config"), dict):
        changes["kif_config"] = KIFConfig(**changes["kif_config"])
    with pytest.raises(error, match=message):
        make_trainer(RecurrentKIFTrainer, model=model, **changes).train()


@pytest.mark.parametrize(
    "setting",
    [
        {"share": 0}, {"share": 1.0}, {"share": True}, {"memory_share": 1}, {"inner_steps": 0}, {"outer_steps": -1},
        {"inner_smoothing": 1.0}, {"outer_smoothing": float("nan")}, {"score": "E"}, {"rule": "third"},
        {"observe": "now"}, {"fusion_weights": (1, 1)}, {"outer_learning_rate": 0}, {"outer_batch": 1.5},
        {"optimizer_state": None}, {"consolidate": "all"}, {"temperature": 0},
    ],
)  # fmt: skip
def test_settings_are_checked(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        KIFConfig(**setting)
    with pytest.raises(ConfigError, match="Did you mean paper"):
        KIFConfig.preset("papre")


def test_the_code_of_the_page(tokenizer, arguments, task, tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "kif.md").read_text(), flags=re.S | re.M)
    labels = [row["labels"][-2] for row in task[:24]]
    names = {
        "tasks": [("one", task[:24], labels), ("two", task[24:], labels)],
        "model": adapter(),
        "args": arguments(max_steps=8, gradient_accumulation_steps=1, per_device_train_batch_size=2),
        "collator": DataCollatorForSeq2Seq(tokenizer),
        "path": tmp_path / "memory.jsonl",
    }
    exec(code, names)
    assert "kif/neither" in names["trainer"].state.log_history[7]
    assert TaskMemory.read(tmp_path / "memory.jsonl").tasks == ("one", "two")


def test_a_new_adapter_in_a_later_task_is_noticed(make_trainer, memory, caplog):
    make_trainer(
        RecurrentKIFTrainer, model=with_lora(), kif_memory=memory, kif_config=KIFConfig(inner_steps=1)
    ).train()
    assert "The adapter is new" in caplog.text


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one(tmp_path):
    """After two fusions, with the rows of the memory split over both; their masks are the same."""
    one, two = (run(tmp_path / str(ranks), ranks, script="kif_job.py") for ranks in (1, 2))
    alone, *both = (
        load_file(tmp_path / f"{ranks}" / f"trained-{rank}.safetensors") for ranks, rank in ((1, 0), (2, 0), (2, 1))
    )
    assert equal(*both)
    for name, weight in alone.items():
        torch.testing.assert_close(both[0][name], weight, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(two.logs, one.logs, strict=True):
        keys = {"loss", "kif/outer_loss", "kif/neither"} & {*theirs}
        assert {key: ours[key] for key in keys} == pytest.approx({key: theirs[key] for key in keys}, rel=1e-5)
    assert len([log for log in two.logs if "kif/neither" in log]) == 2 and len(two.logs) == 20


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_spread_weights_are_refused(tmp_path, strategy):
    done = run(tmp_path, 2, script="kif_job.py", strategy=strategy, succeed=False)
    assert "UnsupportedSettingError" in done.output and "one process, or DDP" in done.output
