"""What one optimizer step computes: the same gradient for every split of the same rows, nothing at step 0."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import load_tiny
from test_losses import oracle_ce, oracle_margin
from transformers import DataCollatorForSeq2Seq, Trainer
from watching import Gradient, Watch, train_logs

from gere import GeReTrainer
from gere.cache import Bands, pack, regions
from gere.losses.objective import ReplayObjective
from gere.losses.strategy import Seen, make_strategy
from gere.losses.weighting import FixedWeight
from gere.session.step import StepShare

SPLITS = [(16, 1), (8, 2), (4, 4), (1, 16)]  # accumulation steps x rows of a micro-batch


def drifted(seed=1, size=0.02):
    """The tiny model moved away from the base, so that regions are violated."""
    model = load_tiny()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def make_drifted(make_trainer, arguments):
    """Make a trainer of a model that has drifted from the base of its anchor, for one step of 16 rows."""

    def make(*, model=None, config=None, split=(4, 4), settings=None, **changes):
        config = config or {}
        first = make_trainer(args=arguments(max_steps=1, save_strategy="no"), config=config, **changes)
        first.train()
        steps, micro = split
        shape = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}
        args = arguments(max_steps=1, max_grad_norm=1e9, **shape, **(settings or {}))
        config = {**config, "anchor": first.replay.anchor.key}
        return make_trainer(model=model or drifted(), args=args, config=config, **changes)

    return make


def with_longer_answers(task):
    """The same rows with different numbers of tokens to learn."""
    rows = []
    for number, row in enumerate(task):
        kept = row["labels"].count(-100) - 3 * (number % 5)
        rows.append({**row, "labels": [-100] * kept + row["input_ids"][kept:]})
    return rows


def one_step(trainer):
    gradient = Gradient(trainer)
    trainer.train()
    return train_logs(trainer)[0], gradient.value


@pytest.mark.parametrize(("w", "normalization"), [("dy", "violations"), (3.0, "elements")])
@pytest.mark.parametrize("counted", [True, False])
def test_gradient_does_not_depend_on_the_split(make_drifted, task, w, normalization, counted):
    # A parent that does not count tokens averages over a micro-batch: its rows have answers of one length here.
    rows = with_longer_answers(task) if counted else task
    lengths = {sum(label != -100 for label in row["labels"]) for row in rows}
    assert len(lengths) == (5 if counted else 1)
    results = []
    for split in SPLITS:
        config = {"normalization": normalization}
        trainer = make_drifted(split=split, w=w, replay=5, config=config, train_dataset=rows)
        trainer.model_accepts_loss_kwargs = counted
        results.append(one_step(trainer))
    for log, gradient in results[1:]:
        assert log["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-4)
        error = (gradient - results[0][1]).norm() / results[0][1].norm()
        assert error < 1e-5, error


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_does_not_depend_on_the_split(make_drifted, task, smoothing):
    results = []
    for split in SPLITS:
        settings = {"label_smoothing_factor": smoothing}
        results.append(one_step(make_drifted(split=split, replay=5, settings=settings)))
    for _, gradient in results[1:]:
        assert (gradient - results[0][1]).norm() < 1e-5 * results[0][1].norm()


@pytest.mark.parametrize(("strategy", "kept"), [("tm", ["layers", [1, 2]]), ("kl", None), ("l2", None), ("ce", None)])
def test_every_strategy_has_one_gradient_for_whole_and_mixed_micro_steps(make_drifted, strategy, kept):
    """With one micro-step both kinds of rows are in it; with rows of one each they never meet."""
    config = {"replay_strategy": strategy, **({kept[0]: kept[1]} if kept else {})}
    (_, mixed), (_, apart) = (
        one_step(make_drifted(split=split, w=3.0, replay=5, config=config)) for split in ((1, 16), (16, 1))
    )
    assert (mixed - apart).norm() < 1e-5 * apart.norm()


def test_loss_of_a_step_equals_the_definition(make_drifted, task, tokenizer, general):
    """L = T/B L_task + 1/B sum (CE_i + w D_i), each part computed by other means."""
    model = drifted()
    trainer = make_drifted(model=model, w=3.0, replay=5, train_dataset=with_longer_answers(task))
    watch = Watch(trainer, general)
    trainer.args.learning_rate = 0.0
    log, _ = one_step(trainer)
    rows = {tuple(row["input_ids"]): row for row in with_longer_answers(task)}
    with torch.no_grad():
        batch = DataCollatorForSeq2Seq(tokenizer)([rows[row] for row in watch.task(0)])
        untouched = drifted()
        l_task = untouched(**batch).loss.item()
        replay = tokenizer.pad({"input_ids": [list(row) for row in watch.replay(0)]}, return_tensors="pt")
        outputs = untouched(replay["input_ids"], replay["attention_mask"], output_hidden_states=True)
        base = load_tiny()(replay["input_ids"], replay["attention_mask"], output_hidden_states=True)
    assert watch.counts == [(11, 5)]
    mask = replay["attention_mask"].bool().numpy()
    ce = oracle_ce(outputs.logits.double().numpy(), replay["input_ids"].numpy(), mask)
    constants = trainer.replay.anchor.constants
    lower, upper = (constants[name].double().numpy() for name in ("lower", "upper"))
    states = [result.hidden_states[-1].double().numpy() for result in (base, outputs)]
    margin = oracle_margin(*states, lower, upper, mask, "violations")
    expected = (11 * l_task + np.sum(ce + 3.0 * margin)) / 16
    assert log["loss"] == pytest.approx(expected, rel=1e-4)
    assert log["gere/tm"] == pytest.approx(margin.mean(), rel=1e-4)


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


@pytest.mark.parametrize(("half", "violated", "counts"), [(True, 1, False), (True, 4, True), (False, 1, True)])
def test_single_violations_of_a_row_are_noise_in_16_bits_only(model, half, violated, counts):
    ids = torch.arange(3, 203)[None]
    mask = torch.ones_like(ids)
    outputs = model(ids, output_hidden_states=True)
    state = outputs.hidden_states[-1]
    bands = Bands(torch.full((64,), -1.0), torch.full((64,), 1.0), torch.zeros(64))
    region = regions(state.detach(), bands.lower, bands.upper)
    outside = (state.abs() > 1.5).nonzero()[:violated]
    region[tuple(outside.T)] = 0
    strategy = make_strategy("tm", {"normalization": "violations"}, depth=2, live=False, half=half)
    objective = ReplayObjective(strategy, bands._asdict(), FixedWeight(1.0))
    seen = Seen([state], outputs.logits, ids, mask)
    loss, sums = objective(seen, torch.zeros(1), {"codes": pack(region)})
    assert sums.violated == violated and sums.elements == 200 * 64
    assert (sums.distance > 0.5) == counts and loss.requires_grad
    assert loss.item() == pytest.approx(sums.ce.item() + sums.distance.item())


def trajectory(trainer):
    trainer.train()
    logs = [(log["loss"], log["grad_norm"]) for log in train_logs(trainer)]
    return logs, [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_without_replay_training_equals_trainer_bit_for_bit(make_trainer, arguments, accumulation):
    def args():
        return arguments(max_steps=30, gradient_accumulation_steps=accumulation)

    plain = trajectory(make_trainer(Trainer, args=args()))
    ours = trajectory(make_trainer(args=args(), config={"replay_strategy": "none"}))
    assert len(plain[0]) == 30 and plain[0] == ours[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], ours[1], strict=True))


def test_ce_strategy_has_no_margin(make_trainer):
    trainer = make_trainer(config={"replay_strategy": "ce"})
    trainer.train()
    log = trainer.state.log_history[-2]
    assert {"gere/ce", "gere/forgetting", "gere/task_loss"} <= set(log)
    assert "gere/tm" not in log and trainer.replay.anchor.dim == 0
    expected = (4 * log["gere/task_loss"] + 4 * log["gere/ce"]) / 8
    assert log["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_logged_parts_add_up_to_the_loss(make_trainer, arguments, accumulation):
    args = arguments(gradient_accumulation_steps=accumulation, max_steps=4, logging_steps=2)
    trainer = make_trainer(args=args, replay=3, w=5.0, config={"normalization": "elements"})
    trainer.train()
    size = 4 * accumulation
    for log in train_logs(trainer):
        replay = log["gere/ce"] + 5.0 * log["gere/tm"]
        assert log["loss"] == pytest.approx(((size - 3) * log["gere/task_loss"] + 3 * replay) / size, rel=1e-4)


def test_weight_dy_makes_both_terms_equal(make_trainer):
    trainer = make_trainer(w="dy", replay=2)
    trainer.train()
    log = train_logs(trainer)[-1]
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


def test_example_of_the_readme_signature():
    parameters = GeReTrainer.__init__.__kwdefaults__
    assert parameters["gere_hidden_state_saving_dir"] == "./gere_saving"
    assert parameters["reuse_gere_hidden_state"] is True
    assert parameters["num_interpolate_per_batch"] == "auto" and parameters["w_strategy"] == "auto"
