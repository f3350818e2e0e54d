"""What the classes and the data of a user see: the same as under plain `Trainer`."""

from __future__ import annotations

import inspect
from itertools import permutations
from typing import Any

import pytest
import torch
from conftest import load_tiny
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import RandomSampler, Sampler, SequentialSampler, WeightedRandomSampler
from transformers import DataCollatorForSeq2Seq, Trainer
from watching import Watch, train_logs

from gere import GeReTrainer, gere_trainer

REPLAY = 5  # of 8 rows in micro-steps of 4: one micro-step is mixed, and one has replay rows alone


def ours_of(base: type[Trainer]) -> dict[str, type[Trainer]]:
    """Both ways to add replay to a class."""
    return {"wrapped": gere_trainer(base), "derived": type("Derived", (base, GeReTrainer), {})}


class Epochs(torch.utils.data.Dataset):
    """Rows that depend on the epoch; what is asked of it is noted."""

    def __init__(self, rows):
        self.rows, self.told, self.read = rows, [], []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.read.append((type(index), index))
        return {**self.rows[index], "epoch": self.told[-1]}

    def set_epoch(self, epoch):
        self.told.append(epoch)


def test_the_dataset_is_told_of_each_epoch(make_trainer, arguments, task):
    """The first epoch is told, too, and every row of the dataset is read by a plain number."""
    told = []
    for cls in (Trainer, GeReTrainer):
        rows = Epochs(task[:6])
        make_trainer(cls, train_dataset=rows, args=arguments(max_steps=-1, num_train_epochs=3)).train()
        told.append(rows.told)
        assert {index for _, index in rows.read} == set(range(6)) and {kind for kind, _ in rows.read} == {int}
    assert told[0] == told[1] and set(told[0]) == {0, 1, 2}


class Columns(Epochs):
    """Reads several rows at once, and gives columns."""

    def __getitems__(self, places):
        self.read.append(places)
        return {name: [self.rows[place][name] for place in places] for name in self.rows[0]}


class NotAtOnce(Epochs):
    __getitems__ = None


@pytest.mark.parametrize("replay", [3, REPLAY])
def test_rows_that_are_read_at_once_come_as_the_dataset_gives_them(make_trainer, arguments, task, tokenizer, replay):
    def collate(columns):
        assert type(columns) is dict
        return DataCollatorForSeq2Seq(tokenizer)(
            [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        )

    rows = [Columns(task[:20]), Columns(task[:20])]
    for cls, dataset in zip((Trainer, GeReTrainer), rows, strict=True):
        args = arguments(remove_unused_columns=False)
        make_trainer(cls, args=args, train_dataset=dataset, data_collator=collate, replay=replay).train()
    plain, ours = ([place for places in dataset.read for place in places] for dataset in rows)
    assert len(ours) >= 3 * (8 - replay) and ours == plain[: len(ours)]


def test_a_dataset_without_reading_at_once(make_trainer, task):
    dataset = NotAtOnce(task[:20])
    dataset.set_epoch(0)
    make_trainer(train_dataset=dataset).train()
    assert dataset.read


def test_a_transform_sees_the_rows_of_a_batch_together(make_trainer, arguments, task):
    sizes: dict[type, list[int]] = {Trainer: [], GeReTrainer: []}
    for cls, seen in sizes.items():

        def transform(batch, seen=seen):
            seen.append(len(batch["input_ids"]))
            return {**batch, "labels": [[-100 if token == 5 else token for token in row] for row in batch["labels"]]}

        dataset = Dataset.from_list(task)
        dataset.set_transform(transform)
        make_trainer(cls, args=arguments(remove_unused_columns=False), train_dataset=dataset, replay=REPLAY).train()
    assert set(sizes[Trainer]) == {4} and sizes[GeReTrainer][:3] == [3] * 3


class ReadsTheBatch(Trainer):
    """Reads each batch before its loss, as if there were rows in it."""

    seen: list[Any]

    def training_step(self, model, inputs, *args, **kwargs):
        assert inputs["input_ids"][0, 0] >= 0 and "labels" in inputs
        self.seen.append(len(inputs["input_ids"]))
        return super().training_step(model, inputs, *args, **kwargs)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        longest = inputs["attention_mask"].sum(-1).max()
        return {**inputs, "labels": inputs["labels"].roll(1, 0), "input_ids": inputs["input_ids"][:, :longest]}


@pytest.mark.parametrize("replay", [3, 4, REPLAY])
@pytest.mark.parametrize("way", ["wrapped", "derived"])
def test_a_micro_step_of_replay_rows_alone_does_not_come_to_the_class(make_trainer, general, way, replay):
    trainer = make_trainer(GeReTrainer, replay=replay)
    ours = ours_of(ReadsTheBatch)[way](
        trainer.model, trainer.args, trainer.data_collator, trainer.train_dataset,
        processing_class=trainer.processing_class, num_interpolate_per_batch=replay, w_strategy="dy",
        gere_hidden_state_saving_dir=trainer.replay.folder, gere_config=trainer._gere.config,
    )  # fmt: skip
    ours.seen, watch = [], Watch(ours, general)
    ours.train()
    assert watch.counts == [(8 - replay, replay)] * 3 and sum(ours.seen) == 3 * (8 - replay)
    assert train_logs(ours)[0]["gere/tm"] == 0


class Reversed(Sampler):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        yield from reversed(range(len(self.rows)))


class Backwards(RandomSampler):
    """A random sampler of one's own; accelerate replaces it, unless it is told not to."""

    def __iter__(self):
        yield from reversed(range(len(self.data_source)))


SAMPLERS = {
    "as Trainer has it": None,
    "sequential": SequentialSampler,
    "reversed": Reversed,
    "random": lambda rows: RandomSampler(rows, generator=torch.Generator().manual_seed(7)),
    "part": lambda rows: RandomSampler(rows, num_samples=9),
    "replacement": lambda rows: RandomSampler(rows, replacement=True),
    "random subclass": Backwards,
}


@pytest.mark.parametrize(
    "changes", [{}, {"data_seed": 11}, {"seed": 3, "accelerator_config": {"use_seedable_sampler": False}}]
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_come_in_the_order_of_the_parent(make_trainer, arguments, name, changes):
    own = {"_get_train_sampler": lambda self, dataset=None: SAMPLERS[name](self.train_dataset)}
    base = type("Own", (Trainer,), own if SAMPLERS[name] else {})
    random = name not in ("sequential", "reversed", "random subclass")
    if random and "accelerator_config" in changes:
        pytest.skip("drawn from the global generator, which nobody can repeat")
    places = [{"input_ids": [place]} for place in range(18)]
    args = arguments(max_steps=-1, num_train_epochs=3, remove_unused_columns=False, **changes)
    plain, ours = (
        make_trainer(cls, args=args, train_dataset=places, data_collator=list, replay=2)
        for cls in (base, type("Ours", (base, GeReTrainer), {}))
    )
    theirs, mixed = plain.get_train_dataloader(), ours.get_train_dataloader()
    for epoch in range(3):
        ours.state.epoch = epoch
        for loader in (theirs, mixed):
            loader.set_epoch(epoch)
        expected = [row["input_ids"][0] for batch in theirs for row in batch]
        found = [row["input_ids"][0] for batch in mixed for row in batch.task or []]
        assert found[: len(expected)] == expected
        # The last step of an epoch is filled from the epoch's first rows.
        assert found[len(expected) :] == expected[: len(found) - len(expected)] and len(found) % 6 == 0


def test_an_order_of_weights_is_repeated_on_resume(make_trainer, task):
    sampler = WeightedRandomSampler([1.0] * len(task), 24)
    cls = type("Weighted", (GeReTrainer,), {"_get_train_sampler": lambda self, dataset=None: sampler})
    orders = []
    for _ in range(2):
        torch.rand(len(orders) + 1)
        trainer = make_trainer(cls)
        loader = trainer.get_train_dataloader()
        orders.append([batch.task["input_ids"].tolist() for batch in loader if batch.task is not None])
    assert orders[0] == orders[1]


def forms() -> st.SearchStrategy[str]:
    """Parameters of a `compute_loss` that `Trainer` can call, as they stand in its definition."""
    count, outputs = "num_items_in_batch=None", "return_outputs=False"
    named = [
        ", ".join(order)
        for chosen in ([count], [count, outputs], [outputs, "**kwargs"], ["**kwargs"])
        for order in permutations(chosen)
        if "**kwargs" not in order[:-1]
    ]
    own = st.sampled_from(["model, inputs", "net, batch", "model, batch, /", "model, inputs, *args"])
    star = st.sampled_from(["", "*, "])
    return st.builds(
        lambda first, star, rest: f"self, {first}, {'' if '*' in first or rest.startswith('**') else star}{rest}",
        own, star, st.sampled_from(named),
    )  # fmt: skip


def own_loss(parameters: str) -> Any:
    """A loss with these parameters, which asks the model itself."""
    names = list(inspect.signature(eval(f"lambda {parameters}: 0")).parameters)
    known = "**kwargs" in parameters
    outputs = "return_outputs" if "return_outputs" in names else ("kwargs.get('return_outputs')" if known else "False")
    body = f"""
def compute_loss({parameters}):
    found = {names[1]}(**{names[2]})
    return (found.loss, found) if {outputs} else found.loss
"""
    scope: dict[str, Any] = {}
    exec(body, scope)
    return scope["compute_loss"]


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parameters=forms(), way=st.sampled_from(["wrapped", "derived"]), own_step=st.booleans())
def test_a_loss_in_any_form_that_trainer_can_call(make_trainer, arguments, general, parameters, way, own_step):
    """Its task loss in the first step is the loss of the plain trainer, on the same rows."""

    def by_name(self, model, inputs, num_items_in_batch=None):
        names = list(inspect.signature(own_loss(parameters)).parameters)[1:3]
        loss = self.compute_loss(**dict(zip(names, (model, self._prepare_inputs(inputs)), strict=True)))
        self.accelerator.backward(loss / self.args.gradient_accumulation_steps)
        return loss.detach() / self.args.gradient_accumulation_steps

    body = {"compute_loss": own_loss(parameters)}
    if own_step and "*" not in parameters.replace("*,", "") and "/" not in parameters:
        body["training_step"] = by_name
    base = type("Own", (Trainer,), body)
    base.loss_is_scaled_for_ga = False
    plain = make_trainer(base, args=arguments(max_steps=1))
    plain.train()
    like = make_trainer(GeReTrainer, config={"replay_mode": "add"})
    ours = ours_of(base)[way](
        load_tiny(), arguments(max_steps=2), plain.data_collator, plain.train_dataset,
        processing_class=plain.processing_class, num_interpolate_per_batch=REPLAY,
        gere_hidden_state_saving_dir=like.replay.folder, gere_config=like._gere.config,
    )  # fmt: skip
    watch = Watch(ours, general)
    ours.train()
    assert watch.counts == [(8, REPLAY)] * 2
    first = train_logs(ours)[0]
    assert first["gere/tm"] == 0
    assert first["gere/task_loss"] == pytest.approx(train_logs(plain)[0]["loss"], rel=1e-5)
