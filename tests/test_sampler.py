"""The order of rows: exact counts for any geometry, and a pure function of (seed, epoch)."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import RandomSampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from gere.errors import ConfigError
from gere.sampler.insertion import BatchInsertionSampler, parent_order


@st.composite
def geometries(draw):
    micro, world, steps = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    batch = micro * world * steps
    return {
        "num_task": draw(st.integers(1, 150)),
        "num_replay": draw(st.integers(1, 60)),
        "batch_size": batch,
        "replay_per_batch": draw(st.integers(0, batch - 1)),
        "micro_batch_size": micro,
        "world_size": world,
        "seed": draw(st.integers(0, 2**40)),
        "epoch": draw(st.integers(0, 50)),
    }


@settings(max_examples=1000, deadline=None)
@given(geometry=geometries())
def test_counts_are_exact(geometry):
    sampler = BatchInsertionSampler(**geometry)
    order = list(sampler)
    n, batch, k = geometry["num_task"], geometry["batch_size"], geometry["replay_per_batch"]
    width = geometry["micro_batch_size"] * geometry["world_size"]
    assert len(order) == len(sampler) and len(order) % batch == 0
    assert order == list(sampler)
    blocks = [order[start : start + batch] for start in range(0, len(order), batch)]
    if k:
        assert all(sum(index >= n for index in block) == k for block in blocks)
        assert len(blocks) == -(-n // (batch - k))
    else:
        assert Counter(index for index in order if index >= n) == Counter(range(n, n + geometry["num_replay"]))
    tasks = [index for index in order if index < n]
    assert sorted(set(tasks)) == list(range(n))
    first = tasks[:n] if k else None
    assert first is None or len(tasks) - n < batch - k
    assert max(Counter(tasks).values()) - min(Counter(tasks).values()) <= 1
    for block in blocks:
        micro_steps = [block[start : start + width] for start in range(0, batch, width)]
        mixed = [step for step in micro_steps if 0 < sum(index >= n for index in step) < width]
        assert len(mixed) <= 1
        for step in mixed:
            size = geometry["micro_batch_size"]
            shares = [sum(index >= n for index in step[i : i + size]) for i in range(0, width, size)]
            assert max(shares) - min(shares) <= 1


@settings(max_examples=100, deadline=None)
@given(geometry=geometries().filter(lambda g: g["replay_per_batch"]))
def test_replay_runs_through_whole_permutations_across_epochs(geometry):
    sampler = BatchInsertionSampler(**{**geometry, "epoch": 0})
    n, size, batch = geometry["num_task"], geometry["num_replay"], geometry["batch_size"]
    stream: list[int] = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), batch):
            stream += [index - n for index in order[start : start + batch] if index >= n]
    counts = Counter(stream)
    assert max(counts.values()) - min(counts[row] for row in range(size)) <= 1
    for start in range(0, len(stream) - size + 1, size):
        chunk = Counter(stream[start : start + size])
        assert len(chunk) == size


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    def order(seed, epoch):
        return list(BatchInsertionSampler(50, 9, batch_size=8, replay_per_batch=2, seed=seed, epoch=epoch))

    torch.manual_seed(1)
    first = order(3, 2)
    torch.rand(100)
    assert order(3, 2) == first
    assert order(3, 1) != first and order(4, 2) != first


def test_last_block_of_one_row():
    sampler = BatchInsertionSampler(61, 10, batch_size=64, replay_per_batch=4)
    assert len(list(sampler)) == len(sampler) == 128


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"replay_per_batch": 8}, "num_interpolate_per_batch"),
        ({"replay_per_batch": 9}, "num_interpolate_per_batch"),
        ({"replay_per_batch": -1}, "num_interpolate_per_batch"),
        ({"num_task": 0}, "train_dataset"),
        ({"num_replay": 0}, "num_replay"),
        ({"micro_batch_size": 3}, "batch_size"),
        ({"micro_batch_size": 0}, "batch_size"),
        ({"batch_size": 0, "replay_per_batch": 0}, "batch_size"),
    ],
)
def test_impossible_geometry_is_refused(changes, named):
    settings_ = {"num_task": 10, "num_replay": 5, "batch_size": 8, "replay_per_batch": 2, **changes}
    with pytest.raises(ConfigError, match=named):
        BatchInsertionSampler(**settings_)


def test_parent_order():
    rows = list(range(20))
    random = parent_order(RandomSampler(rows), 5)
    assert random(2) == torch.randperm(20, generator=torch.Generator().manual_seed(7)).tolist()
    assert parent_order(SequentialSampler(rows), 0)(3) == rows
    lengths = [7, 3, 9, 1, 4, 8, 2, 6, 5, 10] * 2
    grouped = parent_order(LengthGroupedSampler(2, lengths=lengths), 5)
    torch.manual_seed(0)
    first = grouped(1)
    torch.rand(3)
    assert grouped(1) == first and grouped(2) != first and sorted(first) == rows
    subset = parent_order(RandomSampler(rows, num_samples=8), 0)
    sampler = BatchInsertionSampler(20, 4, batch_size=4, replay_per_batch=1, task_order=subset, tasks_per_epoch=8)
    assert len(list(sampler)) == len(sampler) == 12
