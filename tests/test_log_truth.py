"""What the log says is so: NaN stays NaN, and no loss is made up where there is nothing to learn."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

from gere import GeReConfig, gere_trainer
from gere.errors import NonFiniteStateError
from gere.losses import pack
from gere.losses.imitation import l1_distance, l2_distance
from gere.losses.kl import top_k_kl, top_logits
from gere.losses.margin import Margin, threshold_margin
from gere.losses.strategy import Seen


def logs_of(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "loss" in log]


class Poison(TrainerCallback):
    """Set a weight to NaN after the first step."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 1:
            with torch.no_grad():
                model.model.norm.weight[3] = math.nan


@pytest.mark.parametrize("strategy", ["tm", "kl", "l1", "l2"])
def test_a_model_that_gives_nan_is_named_at_that_step(make_trainer, strategy):
    trainer = make_trainer(config={"replay_strategy": strategy}, callbacks=[Poison()])
    with pytest.raises(NonFiniteStateError, match="step 2"):
        trainer.train()
    assert all(math.isfinite(value) for value in logs_of(trainer)[0].values())


@pytest.mark.parametrize("place", [0, 2])
def test_one_nan_element_is_not_within_any_tolerance(place):
    """Padding may hold NaN, a real token may not."""
    torch.manual_seed(0)
    state, mask = torch.randn(1, 3, 8), torch.tensor([[1, 1, 0]])
    region, edge = torch.zeros(1, 3, 8, dtype=torch.int8), torch.full((8,), 9.0)
    logits = state.clone()
    base = top_logits(logits, 3, 2.0)
    state[0, place, 5] = logits[0, place, 5] = math.nan
    found = [
        threshold_margin(state, region, -edge, edge, mask, tolerance=1e-2),
        l1_distance(state, torch.zeros(1, 3, 8), mask, 99.0),
        l2_distance(state, torch.zeros(1, 3, 8), mask, 99.0),
        top_k_kl(logits, base, mask, tolerance=1e-5),
    ]
    assert [bool(value.isnan()) for value in found] == [place == 0] * 4
    # In 16 bits a row counts from some violations on.
    strategy = Margin(depth=1, live=False, half=True)
    wide = torch.cat([state] * 4000, dim=-1)
    edge = torch.full((32000,), 9.0)
    constants = {"lower": -edge, "upper": edge, "tolerance": torch.zeros(32000)}
    targets = {"codes": pack(torch.zeros(1, 3, 32000, dtype=torch.int8))}
    wide[:, :, 8:] = 0.0
    distance = strategy.distance(Seen([wide], wide, mask, mask), targets, constants)[0]
    assert bool(distance.isnan()) == (place == 0)


def without_labels(rows: list[dict], steps: set[int]) -> list[dict]:
    """Drop the labels of the rows of some steps of 8."""
    empty = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    return [empty[place] if place // 8 in steps else row for place, row in enumerate(rows)]


class InOrder(Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def in_order(make_trainer, arguments, rows, texts, **changes):
    plain = make_trainer(Trainer)
    return gere_trainer(InOrder)(
        plain.model,
        arguments(learning_rate=0.0, **changes),
        plain.data_collator,
        rows,
        processing_class=plain.processing_class,
        num_interpolate_per_batch=2,
        gere_hidden_state_saving_dir=f"{arguments().output_dir}/saving",
        gere_config=GeReConfig(replay_dataset=texts, replay_heldout=0, max_length=48, replay_mode="add"),
    )


def test_steps_without_a_label_have_no_task_loss(make_trainer, arguments, task, general):
    def losses(dropped, **changes):
        rows = without_labels(task, dropped)
        trainer = in_order(make_trainer, arguments, rows, general, **changes)
        trainer.train()
        return logs_of(trainer)

    whole = [log["gere/task_loss"] for log in losses(set())]
    nothing = losses({0, 1, 2})
    assert not any("gere/task_loss" in log or "gere/first_task_loss" in log for log in nothing)
    assert all(math.isfinite(log["gere/ce"]) for log in nothing)
    assert [log.get("gere/task_loss") for log in losses({1})] == [whole[0], None, whole[2]]
    (together,) = losses({1}, logging_steps=3)
    assert together["gere/task_loss"] == pytest.approx((whole[0] + whole[2]) / 2, rel=1e-6)
    assert together["gere/first_task_loss"] == pytest.approx(whole[0], rel=1e-6)
    (late,) = losses({0}, logging_steps=3)
    assert "gere/first_task_loss" not in late
    assert late["gere/task_loss"] == pytest.approx((whole[1] + whole[2]) / 2, rel=1e-6)
