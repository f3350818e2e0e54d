"""What one optimizer step computes: the same gradient for every split of the same rows, nothing at step 0."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_tiny
from test_losses import oracle_ce, oracle_margin
from torch.utils.data import SequentialSampler
from transformers import DataCollatorForSeq2Seq, Trainer

from gere import GeReConfig, GeReMixin, GeReTrainer
from gere.cache import Bands, pack, regions
from gere.replay.batch import REPLAY, ROWS, TASK, MixedCollator, ReplayRow, TaskRow
from gere.losses.distances import make_distance
from gere.losses.objective import ReplayObjective
from gere.session.step import StepShare
from gere.model.forward import ReplayPass
from gere.replay.rows import ReplaySet
from gere.model.states import StateReader, depth_of
from gere.losses.weighting import FixedWeight

SPLITS = [(16, 1), (8, 2), (4, 4), (1, 16)]  # accumulation steps x rows of a micro-batch


def drifted(seed=1, size=0.02):
    """The tiny model moved away from the base, so that regions are violated."""
    model = load_tiny()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def anchored(make_trainer, **changes):
    """A trainer whose anchor is the untouched tiny model, and whose data loader is ready."""
    trainer = make_trainer(**changes)
    trainer.get_train_dataloader()
    trainer._gere_prepare(False)
    return trainer


def step_gradient(trainer, model, batches):
    """Gradient of one optimizer step, as `Trainer` accumulates it."""
    trainer.model = trainer.model_wrapped = model
    trainer._gere_prepare(False)
    model.zero_grad()
    samples, items = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(samples)
    loss = sum(trainer.training_step(model, sample, items) for sample in samples)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss, gradient


def with_longer_answers(task):
    """The same rows with different numbers of tokens to learn."""
    rows = []
    for number, row in enumerate(task):
        kept = row["labels"].count(-100) - 3 * (number % 5)
        rows.append({**row, "labels": [-100] * kept + row["input_ids"][kept:]})
    return rows


def rows_of_a_step(task, count_task=11, count_replay=5):
    return [TaskRow(row) for row in task[:count_task]] + [ReplayRow(index) for index in range(count_replay)]


@pytest.mark.parametrize("normalization", ["violations", "elements"])
@pytest.mark.parametrize("w", ["dy", 3.0])
@pytest.mark.parametrize("counted", [True, False])
def test_gradient_does_not_depend_on_the_split(make_trainer, task, tokenizer, w, normalization, counted):
    trainer = anchored(make_trainer, w=w, replay=5, config={"normalization": normalization})
    trainer.model_accepts_loss_kwargs = counted
    # A parent that does not count tokens averages over a micro-batch: its rows have answers of one length here.
    rows = rows_of_a_step(with_longer_answers(task) if counted else task)
    lengths = {sum(label != -100 for label in row.content["labels"]) for row in rows[:11]}
    assert len(lengths) == (5 if counted else 1)
    results = []
    for steps, micro in SPLITS:
        collate = trainer._gere._collator
        batches = [collate(rows[start : start + micro]) for start in range(0, steps * micro, micro)]
        results.append(step_gradient(trainer, drifted(), batches))
    for loss, gradient in results[1:]:
        assert loss.item() == pytest.approx(results[0][0].item(), rel=1e-5)
        error = (gradient - results[0][1]).norm() / results[0][1].norm()
        assert error < 1e-5, error


def test_loss_of_a_step_equals_the_definition(make_trainer, task, tokenizer):
    """L = T/B L_task + 1/B sum (CE_i + w D_i), each part computed by other means."""
    trainer = anchored(make_trainer, w=3.0, replay=5)
    task = with_longer_answers(task)
    rows = rows_of_a_step(task)
    model = drifted()
    loss, _ = step_gradient(trainer, model, [trainer._gere._collator(rows[i : i + 4]) for i in range(0, 16, 4)])
    with torch.no_grad():
        batch = DataCollatorForSeq2Seq(tokenizer)(task[:11])
        l_task = model(**batch).loss.item()
        replay = trainer._gere._collator.replay_batch(range(5))
        outputs = model(replay["input_ids"], replay["attention_mask"], output_hidden_states=True)
        base = load_tiny()(replay["input_ids"], replay["attention_mask"], output_hidden_states=True)
    mask = replay["attention_mask"].bool().numpy()
    ce = oracle_ce(outputs.logits.double().numpy(), replay["input_ids"].numpy(), mask)
    lower, upper = (trainer._gere.anchor.constants[name].double().numpy() for name in ("lower", "upper"))
    states = [result.hidden_states[-1].double().numpy() for result in (base, outputs)]
    margin = oracle_margin(*states, lower, upper, mask, "violations")
    expected = (11 * l_task + np.sum(ce + 3.0 * margin)) / 16
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_margin_is_exactly_zero_on_the_untouched_model(make_trainer):
    trainer = make_trainer(w="dy")
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["gere/tm"] == 0.0 and first["gere/violations"] == 0.0 and first["gere/weight"] == 0.0
    assert abs(first["gere/forgetting"]) < 1e-5
    later = trainer.state.log_history[1]
    assert later["gere/tm"] > 0 and later["gere/violations"] > 0


@pytest.mark.parametrize("w", ["dy", "100"])
def test_rounding_noise_of_bf16_is_kept_out(make_trainer, arguments, w):
    trainer = make_trainer(args=arguments(bf16=True), w=w)
    trainer.train()
    first = trainer.state.log_history[0]
    share = first["gere/weight"] * first["gere/tm"] / first["loss"]
    assert share < 1e-3


@pytest.mark.parametrize(
    ("precision", "violated", "counts"),
    [
        ("torch.float32 weights, mixed precision bf16", 1, False),
        ("torch.bfloat16 weights, mixed precision no", 1, False),
        ("torch.bfloat16 weights, mixed precision no", 4, True),
        ("torch.float32 weights, mixed precision no", 1, True),
    ],
)
def test_single_violations_of_a_row_are_noise_in_16_bits_only(model, precision, violated, counts):
    ids = torch.arange(3, 203)[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        state = model(ids, output_hidden_states=True).hidden_states[-1]
    bands = Bands(torch.full((64,), -1.0), torch.full((64,), 1.0), torch.zeros(64))
    region = regions(state, bands.lower, bands.upper)
    outside = (state.abs() > 1.5).nonzero()[:violated]
    region[tuple(outside.T)] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "target_codes": pack(region), "base_ce": torch.zeros(1)}
    anchor = SimpleNamespace(dim=64, constants=bands._asdict(), fields={"dtype": precision})
    objective = ReplayObjective(FixedWeight(1.0), make_distance(GeReConfig(), "1", anchor))
    replay_pass = ReplayPass(model, StateReader(model, [depth_of(model)]), None, nullcontext)
    loss, sums = objective(replay_pass(model, batch), batch)
    assert sums["violated"] == violated and sums["elements"] == 200 * 64
    assert (sums["distance"] > 0.5) == counts and loss.requires_grad
    assert loss.item() == pytest.approx(sums["ce"].item() + sums["distance"].item())


def test_only_task_rows_give_the_parents_loss_bit_for_bit(make_trainer, task, tokenizer):
    """The data path of a mixed batch, with no replay row in the step."""
    for rows in ([task[0], task[3]], [task[5]] * 4):
        trainer, plain = anchored(make_trainer, replay=0), make_trainer(Trainer, model=drifted())
        batches = [trainer._gere._collator([TaskRow(row) for row in rows]) for _ in range(2)]
        loss, gradient = step_gradient(trainer, drifted(), batches)
        samples, items = plain.get_batch_samples(
            iter([DataCollatorForSeq2Seq(tokenizer)(rows) for _ in range(2)]), 2, torch.device("cpu")
        )
        plain.current_gradient_accumulation_steps = 2
        expected = sum(plain.training_step(plain.model, sample, items) for sample in samples)
        assert loss.item() == expected.item()
        assert torch.equal(gradient, torch.cat([p.grad.flatten() for p in plain.model.parameters()]))


def trajectory(trainer):
    trainer.train()
    logs = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
    return logs, [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_without_replay_training_equals_trainer_bit_for_bit(make_trainer, arguments, accumulation):
    def args():
        return arguments(max_steps=30, gradient_accumulation_steps=accumulation)

    plain = trajectory(make_trainer(Trainer, args=args()))
    ours = trajectory(make_trainer(args=args(), config={"replay_strategy": "none"}))
    assert len(plain[0]) == 30 and plain[0] == ours[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], ours[1], strict=True))


class InOrder(Trainer):
    """A trainer whose order of rows is known."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class GeReInOrder(GeReMixin, InOrder):
    """The same with an empty replay set: every batch goes through the collator and the shares of mixed batches."""

    def get_train_dataloader(self):
        self._gere._replay_set = ReplaySet([], 0, {})
        return super().get_train_dataloader()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_empty_replay_set_equals_trainer_bit_for_bit(make_trainer, arguments, task, monkeypatch, accumulation):
    def args():
        return arguments(max_steps=30, gradient_accumulation_steps=accumulation)

    monkeypatch.setattr("gere.run.ReplayRun.prepare", lambda *arguments, **keywords: None)
    plain = trajectory(make_trainer(InOrder, args=args()))
    ours = trajectory(make_trainer(GeReInOrder, args=args()))
    assert len(plain[0]) == 30 and plain[0] == ours[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], ours[1], strict=True))


def test_ce_strategy_has_no_margin(make_trainer):
    trainer = make_trainer(config={"replay_strategy": "ce"})
    trainer.train()
    log = trainer.state.log_history[-2]
    assert {"gere/ce", "gere/forgetting", "gere/task_loss"} <= set(log)
    assert "gere/tm" not in log and trainer._gere.anchor.dim == 0
    expected = (4 * log["gere/task_loss"] + 4 * log["gere/ce"]) / 8
    assert log["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_logged_parts_add_up_to_the_loss(make_trainer, arguments, accumulation):
    args = arguments(gradient_accumulation_steps=accumulation, max_steps=4, logging_steps=2)
    trainer = make_trainer(args=args, replay=3, w=5.0, config={"normalization": "elements"})
    trainer.train()
    size = 4 * accumulation
    for log in [log for log in trainer.state.log_history if "loss" in log]:
        replay = log["gere/ce"] + 5.0 * log["gere/tm"]
        assert log["loss"] == pytest.approx(((size - 3) * log["gere/task_loss"] + 3 * replay) / size, rel=1e-4)


def test_weight_dy_makes_both_terms_equal(make_trainer):
    trainer = make_trainer(w="dy", replay=2)
    trainer.train()
    log = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert log["loss"] == pytest.approx((6 * log["gere/task_loss"] + 2 * 2 * log["gere/ce"]) / 8, rel=1e-3)


def test_share_of_a_step():
    counted, mean = StepShare(12, 4, 2, None), StepShare(12, 4, 2, 2)
    assert counted.task_factor(3) == 0.75 and counted.replay_factor == 2 / 16
    assert mean.task_factor(4) == 4 * 2 * 2 / 16 and mean.replay_factor == 2 * 2 / 16
    assert StepShare(16, 0, 2, 2).task_factor(4) == 1.0
    assert math.isclose(mean.logged_factor(3), 0.5)
    assert counted.task_factor(0) == counted.logged_factor(0) == mean.task_factor(0) == 0.0
    own = StepShare(12, 4, 2, None, 8 / 6)  # the mean of this rank alone, which holds 8 of the 12 rows
    assert math.isclose(own.task_factor(3), 8 * 2 / 16) and math.isclose(own.logged_factor(3), 8 / 6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_does_not_depend_on_the_split(make_trainer, arguments, task, smoothing):
    trainer = anchored(make_trainer, args=arguments(label_smoothing_factor=smoothing), replay=5)
    rows = rows_of_a_step(task)
    results = []
    for steps, micro in SPLITS:
        batches = [trainer._gere._collator(rows[start : start + micro]) for start in range(0, steps * micro, micro)]
        results.append(step_gradient(trainer, drifted(), batches))
    for loss, gradient in results[1:]:
        assert loss.item() == pytest.approx(results[0][0].item(), rel=1e-5)
        assert (gradient - results[0][1]).norm() < 1e-5 * results[0][1].norm()


def test_no_value_is_read_back_between_logs(make_trainer, arguments, monkeypatch):
    """Replay must not wait for the device in a training step."""
    trainer = anchored(make_trainer)
    batches = list(trainer.get_train_dataloader())[:2]
    assert isinstance(batches[0][ROWS][0], int)
    replay = trainer._gere._collator.replay_batch([0, 1])
    model = trainer.model.train()

    def watched(original):
        def call(*arguments, **keywords):
            caller = sys._getframe(1).f_globals["__name__"]
            assert not caller.startswith("gere."), f"{caller} reads a tensor back by {original.__name__}"
            return original(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
            patch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
        trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
        trainer._gere.replay_part(model, replay, 2)
        trainer._gere.task_part(torch.tensor(1.0), 1)


def test_collator_keeps_parts_apart(tokenizer, task):
    seen = []

    def collate(rows):
        seen.append(rows)
        return DataCollatorForSeq2Seq(tokenizer)(rows)

    collator = MixedCollator(collate, [[1, 2, 3], [4, 5]], tokenizer.pad_token_id)
    batch = collator([ReplayRow(1), TaskRow(task[0]), ReplayRow(0)])
    assert "labels" not in batch and batch[ROWS] == (1, 2, 1, 2) and seen == [[task[0]]]
    assert batch[REPLAY]["input_ids"].tolist() == [[4, 5, tokenizer.pad_token_id], [1, 2, 3]]
    assert batch[REPLAY]["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["input_ids"].numel() == batch[TASK]["input_ids"].numel()
    assert TASK not in collator([ReplayRow(0)]) and REPLAY not in collator([TaskRow(task[0])])


def test_example_of_the_readme_signature():
    parameters = GeReTrainer.__init__.__kwdefaults__
    assert parameters["gere_hidden_state_saving_dir"] == "./gere_saving"
    assert parameters["reuse_gere_hidden_state"] is True
    assert parameters["num_interpolate_per_batch"] is None and parameters["w_strategy"] == "auto"
