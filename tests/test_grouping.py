"""Replay rows of a step have similar lengths: the same rows as often as before, from any position, on any ranks."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import SequentialSampler
from watching import Watch

from gere import GeReTrainer
from gere.errors import ConfigError
from gere.sampler import BatchInsertionSampler, added_rows, replay_stream
from gere.sampler.lengths import grouped, step_sizes


def some_lengths(size, seed):
    return np.random.default_rng(seed).integers(2, 500, size)


@given(st.integers(1, 40), st.integers(0, 9), st.integers(1, 50))
def test_steps_cut_the_permutations_without_a_gap(size, number, rows_per_step):
    before, cuts = number * size, step_sizes(size, number, rows_per_step)
    assert cuts.sum() == size and (cuts > 0).all()
    bounds = before + np.cumsum(cuts)
    inside = [bound for bound in range(before + 1, before + size) if bound % rows_per_step == 0]
    assert bounds.tolist() == [*inside, before + size]


@given(st.integers(1, 700), st.integers(0, 5), st.data())
def test_grouping_moves_rows_and_loses_none(size, seed, data):
    rng = np.random.default_rng(seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=9)))
    sizes = np.diff([0, *cuts, size])
    order, lengths = rng.permutation(size), some_lengths(size, seed)
    found = grouped(order, lengths, sizes, rng.permutation(len(sizes)))
    assert sorted(found) == list(range(size))
    groups = [lengths[group] for group in np.split(found, np.cumsum(sizes)[:-1]) if len(group)]
    if size <= 256:  # one block: no group reaches into another
        groups.sort(key=lambda group: (group.min(), group.max()))
        assert all(a.max() <= b.min() for a, b in itertools.pairwise(groups))


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 12), st.integers(0, 200), st.integers(0, 3))
def test_stream_can_be_entered_anywhere_and_has_every_row_once(size, rows, start, seed):
    lengths = some_lengths(size, seed)
    whole = list(itertools.islice(replay_stream(size, seed, 0, lengths, rows), start + 3 * size))
    entered = list(itertools.islice(replay_stream(size, seed, start, lengths, rows), 3 * size))
    assert entered == whole[start:]
    for first in range(0, len(whole) - size + 1, size):
        assert sorted(whole[first : first + size]) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(st.integers(5, 60), st.integers(0, 7), st.sampled_from([(8, 1), (4, 1), (4, 2), (2, 4), (1, 8), (2, 1)]))
def test_a_step_has_the_same_rows_on_any_ranks(size, replay, shape):
    """Eight rows a step, however many of them are one forward pass."""

    def steps(micro, world):
        sampler = BatchInsertionSampler(
            40, size, batch_size=8, replay_per_batch=replay, micro_batch_size=micro, world_size=world, seed=3, epoch=2,
            replay_lengths=some_lengths(size, 1),
        )  # fmt: skip
        order = list(sampler)
        assert len(order) == len(sampler)
        return [sorted(order[start : start + 8]) for start in range(0, len(order), 8)]

    assert steps(*shape) == steps(8, 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(3, 60), st.integers(1, 8), st.integers(0, 30), st.integers(1, 4), st.integers(1, 3))
def test_added_rows_are_those_that_would_replace(size, rows, step, micro_steps, ranks):
    lengths = some_lengths(size, 2)
    plan = added_rows(
        size, rows, seed=5, start=step * rows, micro_steps=micro_steps, micro_batch_size=2, world_size=ranks,
        lengths=lengths,
    )  # fmt: skip
    found = [row for shares in plan for share in shares for row in share]
    stream = itertools.islice(replay_stream(size, 5, step * rows, lengths, rows), rows)
    assert sorted(found) == sorted(stream)
    short = added_rows(
        size, -(-rows // 2), seed=5, start=step * rows, micro_steps=1, micro_batch_size=2, lengths=lengths,
        rows_per_step=rows,
    )  # fmt: skip
    assert not Counter(short[0][0]) - Counter(found), "a short step has a part of the rows of the whole one"


def test_epochs_without_insertion_have_every_row_once():
    lengths = some_lengths(70, 4)
    for epoch in range(3):
        sampler = BatchInsertionSampler(
            200, 70, batch_size=16, replay_per_batch=0, micro_batch_size=4, epoch=epoch, replay_lengths=lengths
        )
        plain = BatchInsertionSampler(200, 70, batch_size=16, replay_per_batch=0, micro_batch_size=4, epoch=epoch)
        ours, theirs = list(sampler), list(plain)
        assert Counter(ours) == Counter(theirs)
        kinds = [[index >= 200 for index in order] for order in (ours, theirs)]
        assert kinds[0] == kinds[1], "the lengths move replay rows alone"
        assert [i for i in ours if i < 200] == [i for i in theirs if i < 200]


@pytest.mark.parametrize(("replay", "size"), [(4, 1000), (16, 1000), (6, 300), (4, 60)])
def test_nine_in_ten_tokens_are_real(replay, size):
    lengths = some_lengths(size, 6)

    def share(of_rows):
        sampler = BatchInsertionSampler(
            2000, size, batch_size=32, replay_per_batch=replay, micro_batch_size=4, replay_lengths=of_rows
        )
        order = list(sampler)
        passes = [[i - 2000 for i in order[at : at + 4] if i >= 2000] for at in range(0, len(order), 4)]
        passes = [lengths[rows] for rows in passes if rows]
        return sum(rows.sum() for rows in passes) / sum(rows.max() * len(rows) for rows in passes)

    assert share(None) < 0.7 < 0.9 < share(lengths)


def test_company_changes_from_one_permutation_to_the_next():
    lengths = some_lengths(1000, 7)
    rows = list(itertools.islice(replay_stream(1000, 0, 0, lengths, 4), 2000))
    steps = [frozenset(rows[start : start + 4]) for start in range(0, 2000, 4)]
    assert not set(steps[:250]) & set(steps[250:])
    means = [lengths[list(step)].mean() for step in steps[:50]]
    assert sum(a < b for a, b in itertools.pairwise(means)) < 40, "short and long steps come in no order"


def test_epochs_without_insertion_do_not_go_from_short_to_long():
    lengths = np.arange(200)
    sampler = BatchInsertionSampler(200, 200, batch_size=8, replay_per_batch=0, replay_lengths=lengths)
    order = list(sampler)
    steps = [[i - 200 for i in order[at : at + 8] if i >= 200] for at in range(0, 400, 8)]
    means = [np.mean(rows) for rows in steps if rows]
    assert sum(a < b for a, b in itertools.pairwise(means)) < 0.8 * len(means)
    assert all(rows == sorted(rows) and max(rows) - min(rows) == len(rows) - 1 for rows in steps if rows)


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 9))
def test_rows_of_a_step_share_a_forward_pass_by_length(rows, ranks, step):
    """Seven rows are no multiple of anything: most steps have rows of two permutations."""
    lengths = some_lengths(7, 1)
    plan = added_rows(
        7, rows, seed=0, start=step * rows, micro_steps=4, micro_batch_size=1, world_size=ranks, lengths=lengths
    )
    found = [lengths[list(itertools.chain(*shares))] for shares in plan if any(shares)]
    assert all(a.max() <= b.min() for a, b in itertools.pairwise(found))
    sampler = BatchInsertionSampler(
        30, 7, batch_size=24, replay_per_batch=rows, micro_batch_size=2, world_size=ranks, replay_lengths=lengths
    )
    order = list(sampler)
    for at in range(0, len(order), 24):
        of_step = [lengths[i - 30] for i in order[at : at + 24] if i >= 30]
        assert of_step == sorted(of_step)


def test_lengths_of_another_set_are_refused():
    with pytest.raises(ConfigError, match="replay_lengths"):
        BatchInsertionSampler(10, 5, batch_size=8, replay_per_batch=2, replay_lengths=[1, 2, 3])


def real_share(watch, replayed):
    """Real tokens over padded ones, in calls on replay rows or on task rows."""
    calls = [call for step in watch.steps for call in step if (call.rows[0] in watch.replay_set) is replayed]
    return sum(len(row) for call in calls for row in call.rows) / sum(call.padded for call in calls)


@pytest.mark.parametrize("replay", [4, 3, 0])
def test_group_by_length_holds_beside_replay_rows(make_trainer, arguments, general, replay):
    """The user's own setting, under its old and its new name; without it his order is left alone."""
    lengths = np.random.default_rng(0).integers(4, 60, 300)
    rows = [{"input_ids": [5] * n, "attention_mask": [1] * n, "labels": [5] * n} for n in lengths]
    texts = [" ".join(text.split()[: 2 + 3 * i]) for i, text in enumerate(general)]
    shares = {}
    for grouping in (True, False):
        names = {"train_sampling_strategy": "group_by_length"} if grouping else {}
        try:
            args = arguments(max_steps=-1, num_train_epochs=1, **names)
        except TypeError:
            args = arguments(max_steps=-1, num_train_epochs=1, group_by_length=True)
        trainer = make_trainer(args=args, replay=replay, train_dataset=rows, config={"replay_dataset": texts})
        watch = Watch(trainer, texts)
        trainer.train()
        shares[grouping] = [real_share(watch, replayed) for replayed in (False, True)]
    assert shares[False][0] < 0.8 < 0.9 < shares[True][0]
    assert min(shares[True][1], shares[False][1]) > 0.9 - 0.1 * (replay == 0)


def test_task_rows_keep_the_order_of_the_parent(make_trainer, arguments, task, general):
    """Replay rows take places at either end of each step; what is left of the steps is the parent's order."""

    class InOrder(GeReTrainer):
        def _get_train_sampler(self, *arguments):
            return SequentialSampler(self.train_dataset)

    trainer = make_trainer(InOrder, args=arguments(max_steps=6), replay=3)
    watch = Watch(trainer, general)
    trainer.train()
    rows = [row for step in range(6) for row in watch.task(step)]
    assert rows == [tuple(row["input_ids"]) for row in task[:30]]


def test_rows_that_are_added_have_similar_lengths_too(make_trainer, arguments, task, general):
    texts = [" ".join(text.split()[: 2 + 3 * i]) for i, text in enumerate(general)]
    trainer = make_trainer(
        args=arguments(max_steps=6), train_dataset=Dataset.from_list(task).to_iterable_dataset(), replay=4,
        config={"replay_dataset": texts},
    )  # fmt: skip
    watch = Watch(trainer, texts)
    trainer.train()
    assert real_share(watch, True) > 0.9
    assert len({row for step in range(6) for row in watch.replay(step)}) == len(texts), (
        "six steps replay each row once"
    )


def test_a_short_step_leaves_the_later_ones_whole(make_trainer, arguments, task, tokenizer, general):
    """9 rows in micro-batches of 4, two a step: every second step has half of the rows."""
    trainer = make_trainer(
        args=arguments(max_steps=4), train_dataset=task[:9], config={"replay_mode": "add"}, replay=4
    )
    watch = Watch(trainer, general)
    trainer.train()
    rows = [tuple(tokenizer(text)["input_ids"][:48]) for text in general]
    lengths, seed = np.array([len(row) for row in rows]), trainer.args.seed
    for step in range(4):
        stream = replay_stream(len(rows), seed, 4 * step, lengths, 4)
        expected = sorted(rows[index] for index in itertools.islice(stream, 2 if step % 2 else 4))
        assert sorted(watch.replay(step)) == expected
