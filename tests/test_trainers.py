"""Trainers of other shapes: replay rides beside their batches, and they see what they always see."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from conftest import load_tiny
from transformers import DataCollatorForSeq2Seq, Trainer
from watching import Watch, train_logs

from gere import GeReConfig, GeReTrainer, gere_trainer
from gere.errors import UnsupportedSettingError

REPLAY = 3


class OwnStep(Trainer):
    """A training step of one's own, which never asks the one of `Trainer`."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class OwnInputs(Trainer):
    """Makes what the model is called on from the batch."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        return {**inputs, "labels": inputs["labels"].masked_fill(inputs["labels"] == 5, -100)}


class KeywordLoss(Trainer):
    """Takes its arguments by name, in another order than `Trainer`."""

    def compute_loss(self, model, inputs, num_items_in_batch=None, return_outputs=False):
        return super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )


class NoOutputs(Trainer):
    """Never gives outputs."""

    def compute_loss(self, model, inputs, num_items_in_batch=None):
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


class OfTuples(Trainer):
    """Its collator gives a tuple of tensors."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert type(inputs) is tuple and len(inputs) == 3
        ids, mask, labels = inputs
        outputs = model(input_ids=ids, attention_mask=mask, labels=labels)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OfLists(Trainer):
    """Its collator gives the rows as they are."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert type(inputs) is list and all(type(row) is dict for row in inputs)
        batch = DataCollatorForSeq2Seq(self.processing_class)([dict(row) for row in inputs])
        return super().compute_loss(model, batch, return_outputs, num_items_in_batch)


def tupled(tokenizer):
    def collate(rows):
        batch = DataCollatorForSeq2Seq(tokenizer)(rows)
        return batch["input_ids"], batch["attention_mask"], batch["labels"]

    return collate


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("base", [OwnStep, OwnInputs, KeywordLoss, NoOutputs, OfTuples, OfLists])
def test_a_class_of_ones_own_sees_what_it_always_sees(make_trainer, tokenizer, general, base, mode):
    collators = {OfTuples: tupled(tokenizer), OfLists: list}
    given = {"data_collator": collators[base]} if base in collators else {}
    config = GeReConfig(replay_dataset=general, max_length=48, replay_mode=mode)
    settings = make_trainer(GeReTrainer)
    ours = gere_trainer(base)(
        load_tiny(), settings.args, given.get("data_collator", settings.data_collator), settings.train_dataset,
        processing_class=tokenizer, num_interpolate_per_batch=REPLAY, gere_config=config, w_strategy="dy",
        gere_hidden_state_saving_dir=settings.replay.folder,
    )  # fmt: skip
    watch = Watch(ours, general)
    ours.train()
    assert watch.counts == [(8 if mode == "add" else 8 - REPLAY, REPLAY)] * 3
    assert train_logs(ours)[0]["gere/tm"] == 0 < train_logs(ours)[-1]["gere/tm"]
    if mode == "add":
        plain = make_trainer(base, **given)
        plain.train()
        assert train_logs(ours)[0]["gere/task_loss"] == pytest.approx(train_logs(plain)[0]["loss"], rel=1e-5)


class UnchangedBatch(GeReTrainer):
    """Keeps the batches that its loss is asked for."""

    seen: list[Any]

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


class Batch(UserDict):
    """A batch of a class of one's own."""

    def to(self, device):
        return self

    def keys(self):
        return self.data.keys()


def test_a_batch_keeps_its_class_and_its_bytes(make_trainer, tokenizer, task):
    def collate(rows):
        batches.append(DataCollatorForSeq2Seq(tokenizer)(rows))
        return batches[-1]

    batches: list[Any] = []
    trainer = make_trainer(UnchangedBatch, data_collator=collate, replay=4)
    trainer.seen = []
    trainer.train()
    assert len(trainer.seen) == 3, "a micro-step of replay rows alone asks the parent's loss for nothing"
    for ours, theirs in zip(trainer.seen, batches, strict=False):
        assert type(ours) is type(theirs) and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class TwiceInAStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


class NeverInAStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()


class OwnLoop(Trainer):
    def get_batch_samples(self, epoch_iterator, num_batches, *args, **kwargs):
        return [next(epoch_iterator) for _ in range(num_batches)], None


@pytest.mark.parametrize(("base", "found"), [(TwiceInAStep, r"3 calls or more"), (NeverInAStep, r"found: +0 calls")])
def test_replay_rows_are_taken_up_exactly_once(make_trainer, base, found):
    """Never in silence: the error names the trainer's method, and comes before the optimizer moves."""
    cls = type("Ours", (base, GeReTrainer), {})
    trainer = make_trainer(cls, config={"replay_mode": "add"})
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(UnsupportedSettingError, match=rf"Ours\.training_step[\s\S]*{found}[\s\S]*next:"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_loop_that_never_asks_for_replay_rows_is_refused(make_trainer):
    class Ours(GeReTrainer):
        def get_batch_samples(self, epoch_iterator, num_batches, *args, **kwargs):
            samples = [next(epoch_iterator).task for _ in range(num_batches)]
            return [sample for sample in samples if sample is not None], None

    with pytest.raises(UnsupportedSettingError, match=r"get_batch_samples"):
        make_trainer(Ours).train()
