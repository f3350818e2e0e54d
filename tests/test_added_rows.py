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

from gere import gere_trainer
from gere.replay.batch import REPLAY, ROWS, TASK
from gere.sampler.insertion import added_rows, replay_stream

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
    assert sizes == sorted(sizes), "the last micro-steps hold them"


def watched(trainer):
    """The batches of each optimizer step."""
    steps, original = [], trainer.get_batch_samples

    def get_batch_samples(*args, **kwargs):
        samples, items = original(*args, **kwargs)
        steps.append(samples)
        return samples, items

    trainer.get_batch_samples = get_batch_samples
    return steps


def stream_of(task, count=400):
    return Dataset.from_list(task * (count // len(task))).to_iterable_dataset()


def real_rows(part):
    return [
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("replay", [1, 3, 9])
def test_streaming_adds_rows_and_says_so_once(make_trainer, task, replay, caplog):
    trainer = make_trainer(train_dataset=stream_of(task), replay=replay)
    steps = watched(trainer)
    with caplog.at_level(logging.WARNING, logger="gere"):
        trainer.train()
        trainer.train()
    said = [record.getMessage() for record in caplog.records if record.name == "gere"]
    assert len(said) == 1 and f"gets {replay} replay rows beside" in said[0] and "IterableDataset" in said[0]
    assert len(steps) == 6
    for samples in steps:
        assert sum(sample[ROWS][1] for sample in samples) == replay
        assert sum(len(sample[REPLAY]["input_ids"]) for sample in samples if REPLAY in sample) == replay
    replayed = [
        row for samples in steps[:3] for sample in samples if REPLAY in sample for row in real_rows(sample[REPLAY])
    ]
    assert len(set(replayed)) == min(24, 3 * replay), "every step has the next rows"
    first = [row for samples in steps[:3] for sample in samples for row in real_rows(sample[TASK])]
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


def test_another_dataset_may_replace_rows_again(make_trainer, task):
    trainer = make_trainer(train_dataset=stream_of(task))
    trainer.train()
    trainer.train_dataset = task
    trainer.train()
    assert not trainer._gere.adding and trainer.state.global_step == 3


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


def test_resume_adds_the_rows_of_the_uninterrupted_run(make_trainer, arguments, task, tmp_path):
    def args(**changes):
        return arguments(max_steps=6, save_strategy="steps", save_steps=4, **changes)

    whole = make_trainer(args=args(output_dir=str(tmp_path / "whole")), train_dataset=stream_of(task), replay=3)
    expected = watched(whole)
    whole.train()
    resumed = make_trainer(args=args(), train_dataset=stream_of(task), replay=3)
    found = watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert len(found) == 2
    for ours, theirs in zip(found, expected[4:], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert real_rows(a[TASK]) == real_rows(b[TASK])
            assert (REPLAY in a) == (REPLAY in b)
            assert REPLAY not in a or real_rows(a[REPLAY]) == real_rows(b[REPLAY])
    logs = [[log["loss"] for log in t.state.log_history if "loss" in log][-2:] for t in (whole, resumed)]
    assert logs[0] == logs[1]


class OwnLoader(Trainer):
    """A trainer whose loader takes a batch sampler."""

    def get_train_dataloader(self):
        batches = BatchSampler(SequentialSampler(self.train_dataset), 4, drop_last=False)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)


def test_a_loader_of_ones_own(make_trainer, task, tokenizer, general, tmp_path, arguments):
    from gere import GeReConfig

    trainer = gere_trainer(OwnLoader)(
        make_trainer(Trainer).model, arguments(max_steps=2), DataCollatorForSeq2Seq(tokenizer), task,
        processing_class=tokenizer, num_interpolate_per_batch=2, gere_hidden_state_saving_dir=tmp_path / "saving",
        gere_config=GeReConfig(replay_dataset=general, max_length=40, replay_mode="add"),
    )  # fmt: skip
    steps = watched(trainer)
    trainer.train()
    rows = [row for samples in steps for sample in samples for row in real_rows(sample[TASK])]
    assert rows == [tuple(row["input_ids"]) for row in task[:16]]


def test_batch_rebalance_adds_rows(make_trainer, arguments):
    if not hasattr(trainer_pt_utils, "BatchRebalanceSampler"):
        pytest.skip("this version of transformers has no such sampler, and 5.6 takes any name of one")
    trainer = make_trainer(args=arguments(train_sampling_strategy="batch_rebalance"))
    steps = watched(trainer)
    trainer.train()
    assert trainer._gere.adding and trainer.state.global_step == 3
    assert all(sum(sample[ROWS][1] for sample in samples) == 4 for samples in steps)


def test_dispatched_batches_add_rows(make_trainer, arguments, task):
    args = arguments(accelerator_config={"dispatch_batches": True})
    trainer = make_trainer(args=args, train_dataset=[row for row in task if len(row["input_ids"]) == 38] * 9)
    trainer.train()
    assert trainer._gere.adding and trainer.state.global_step == 3


def test_the_last_step_of_an_epoch_may_be_short(make_trainer, arguments, task):
    """9 rows in micro-batches of 4, two a step: the second step has one micro-batch, and half of the replay rows."""
    trainer = make_trainer(
        args=arguments(max_steps=-1, num_train_epochs=2), train_dataset=task[:9], config={"replay_mode": "add"}
    )
    steps = watched(trainer)
    trainer.train()
    assert [len(samples) for samples in steps] == [2, 1, 2, 1]
    assert [sum(sample[ROWS][1] for sample in samples) for samples in steps] == [4, 2, 4, 2]
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in trainer.state.log_history if "loss" in log)
