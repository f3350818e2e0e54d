"""Replay rows that are added to the batches where they cannot replace task rows: streams, batch samplers, dispatch."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import DataCollatorForSeq2Seq, Trainer, trainer_pt_utils
from watching import Watch

from gere import GeReConfig, gere_trainer
from gere.errors import ConfigError
from gere.sampler import added_rows, replay_stream

KEYS = {"gere/ce", "gere/tm", "gere/weight", "gere/violations", "gere/forgetting", "gere/task_loss"}


@given(
    st.integers(1, 12), st.integers(1, 20), st.integers(0, 50), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)
)
def test_every_step_adds_the_next_rows_of_the_stream(size, rows, step, micro_steps, micro, ranks):
    settings = {"seed": 3, "micro_steps": micro_steps, "micro_batch_size": micro, "world_size": ranks}
    plan = added_rows(size, rows, start=step * rows, **settings)
    assert len(plan) == micro_steps and all(len(shares) == ranks for shares in plan)
    found = [row for shares in plan for share in shares for row in share]
    stream = list(itertools.islice(replay_stream(size, 3, 0), (step + 1) * rows))
    assert sorted(found) == sorted(stream[step * rows :])
    width = max(micro * ranks, -(-rows // micro_steps))
    sizes = [sum(map(len, shares)) for shares in plan]
    assert max(sizes) <= width and sum(1 for size in sizes if size) == -(-rows // width)
    assert all(max(map(len, shares)) - min(map(len, shares)) <= 1 for shares in plan)
    assert sizes == sorted(sizes, reverse=True), "the first micro-steps hold them"


def stream_of(task, count=400):
    return Dataset.from_list(task * (count // len(task))).to_iterable_dataset()


@pytest.mark.parametrize("replay", [1, 3, 9])
def test_streaming_adds_rows_and_says_so_once(make_trainer, task, general, replay, caplog):
    trainer = make_trainer(train_dataset=stream_of(task), replay=replay)
    watch = Watch(trainer, general)
    with caplog.at_level(logging.WARNING, logger="gere"):
        trainer.train()
        trainer.train()
    said = [record.getMessage() for record in caplog.records if record.name == "gere"]
    assert len(said) == 1 and f"gets {replay} replay rows beside" in said[0] and "IterableDataset" in said[0]
    assert watch.counts == [(8, replay)] * 6
    replayed = [row for step in range(3) for row in watch.replay(step)]
    assert len(set(replayed)) == min(24, 3 * replay), "every step has the next rows"
    first = [row for step in range(3) for row in watch.task(step)]
    assert first == [tuple(row["input_ids"]) for row in task[:24]], "no task row is lost or replaced"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(set(log) >= KEYS for log in logs)


def test_added_rows_weigh_as_rows_of_a_larger_step(make_trainer, arguments, task):
    """8 task rows and 3 replay rows: L = 8/11 L_task + 1/11 sum over replay rows."""
    trainer = make_trainer(train_dataset=stream_of(task), replay=3, w=5.0, config={"normalization": "elements"})
    trainer.train()
    for log in [log for log in trainer.state.log_history if "loss" in log]:
        replay = log["gere/ce"] + 5.0 * log["gere/tm"]
        assert log["loss"] == pytest.approx((8 * log["gere/task_loss"] + 3 * replay) / 11, rel=1e-4)


def test_another_dataset_may_replace_rows_again(make_trainer, task, general):
    trainer = make_trainer(train_dataset=stream_of(task))
    watch = Watch(trainer, general)
    trainer.train()
    trainer.train_dataset = task
    trainer.train()
    assert watch.counts == [(8, 4)] * 3 + [(4, 4)] * 3


def test_task_loss_of_an_untouched_model_is_the_parents(make_trainer, task):
    args = {"train_dataset": stream_of(task)}
    ours, plain = make_trainer(**args, replay=2), make_trainer(Trainer, **args)
    for trainer in (ours, plain):
        trainer.train()
    first = ours.state.log_history[0]
    assert first["gere/tm"] == 0.0
    assert first["gere/task_loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_task_loss_does_not_depend_on_the_accumulation(make_trainer, arguments, task, smoothing):
    """Before transformers 5.15 a smoothed loss is a mean over its micro-batch, which the trainer does not divide."""
    found = []
    for micro, steps in ((8, 1), (2, 4)):
        args = arguments(
            per_device_train_batch_size=micro, gradient_accumulation_steps=steps, label_smoothing_factor=smoothing
        )
        trainer = make_trainer(args=args, train_dataset=stream_of(task), replay=3)
        trainer.train()
        found.append(trainer.state.log_history[0])
    for key in ("gere/task_loss", "grad_norm"):
        assert found[0][key] == pytest.approx(found[1][key], rel=0.05)


def test_resume_adds_the_rows_of_the_uninterrupted_run(make_trainer, arguments, task, general, tmp_path):
    def args(**changes):
        return arguments(max_steps=6, save_strategy="steps", save_steps=4, **changes)

    whole = make_trainer(args=args(output_dir=str(tmp_path / "whole")), train_dataset=stream_of(task), replay=3)
    expected = Watch(whole, general)
    whole.train()
    resumed = make_trainer(args=args(), train_dataset=stream_of(task), replay=3)
    found = Watch(resumed, general)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert found.steps == expected.steps[4:] and len(found.steps) == 2
    logs = [[log["loss"] for log in t.state.log_history if "loss" in log][-2:] for t in (whole, resumed)]
    assert logs[0] == logs[1]


class OwnLoader(Trainer):
    """A trainer whose loader takes a batch sampler."""

    def get_train_dataloader(self):
        batches = BatchSampler(SequentialSampler(self.train_dataset), 4, drop_last=False)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)


@pytest.mark.parametrize("mode", ["add", "auto"])
def test_a_loader_of_ones_own(make_trainer, task, tokenizer, general, tmp_path, arguments, mode, caplog):
    trainer = gere_trainer(OwnLoader)(
        make_trainer(Trainer).model, arguments(max_steps=2), DataCollatorForSeq2Seq(tokenizer), task,
        processing_class=tokenizer, num_interpolate_per_batch=2, gere_hidden_state_saving_dir=tmp_path / "saving",
        gere_config=GeReConfig(replay_dataset=general, max_length=48, replay_mode=mode),
    )  # fmt: skip
    watch = Watch(trainer, general)
    trainer.train()
    assert watch.counts == [(8, 2)] * 2
    assert watch.task(0) + watch.task(1) == [tuple(row["input_ids"]) for row in task[:16]]
    assert caplog.text.count("and none is replaced") == 1


@pytest.mark.parametrize(("mode", "replay"), [("replace", 2), ("auto", None)])
def test_a_loader_of_ones_own_that_leaves_no_room_is_refused(
    make_trainer, task, tokenizer, general, tmp_path, arguments, mode, replay
):
    trainer = gere_trainer(OwnLoader)(
        make_trainer(Trainer).model, arguments(max_steps=2), DataCollatorForSeq2Seq(tokenizer), task,
        processing_class=tokenizer, num_interpolate_per_batch=replay, gere_hidden_state_saving_dir=tmp_path / "saving",
        gere_config=GeReConfig(replay_dataset=general, max_length=48, replay_mode=mode),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"makes its own data loader[\s\S]*next:"):
        trainer.train()


def test_batch_rebalance_adds_rows(make_trainer, arguments, general):
    if not hasattr(trainer_pt_utils, "BatchRebalanceSampler"):
        pytest.skip("this version of transformers has no such sampler, and 5.6 takes any name of one")
    trainer = make_trainer(args=arguments(train_sampling_strategy="batch_rebalance"))
    watch = Watch(trainer, general)
    trainer.train()
    assert watch.counts == [(8, 4)] * 3


def test_dispatched_batches_add_rows(make_trainer, arguments, task, general):
    args = arguments(accelerator_config={"dispatch_batches": True})
    trainer = make_trainer(args=args, train_dataset=[row for row in task if len(row["input_ids"]) == 38] * 9)
    watch = Watch(trainer, general)
    trainer.train()
    assert watch.counts == [(8, 4)] * 3


def test_the_last_step_of_an_epoch_may_be_short(make_trainer, arguments, task, general):
    """9 rows in micro-batches of 4, two a step: the second step has one micro-batch, and half of the replay rows."""
    trainer = make_trainer(
        args=arguments(max_steps=-1, num_train_epochs=2), train_dataset=task[:9], config={"replay_mode": "add"}
    )
    watch = Watch(trainer, general)
    trainer.train()
    assert watch.counts == [(8, 4), (1, 2), (8, 4), (1, 2)]
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in trainer.state.log_history if "loss" in log)
