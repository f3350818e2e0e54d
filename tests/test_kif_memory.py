"""The memory of earlier tasks: its share, its balance, its file and its order of rows."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gere import TaskMemory
from gere.errors import ConfigError, TaskMemoryError


def rows_of(count: int) -> list[dict]:
    return [{"input_ids": [number, number + 1], "labels": [number]} for number in range(count)]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=300), st.floats(0.01, 0.6))
def test_it_keeps_the_share_and_is_balanced(labels, share):
    rows = rows_of(len(labels))
    memory = TaskMemory().add("one", rows, labels, share=share)
    assert len(memory.rows) == max(1, int(share * len(rows)))
    kept, there = Counter(row.label for row in memory.rows), Counter(labels)
    most = max(kept.values())
    assert all(kept[label] >= min(most - 1, there[label]) for label in there), "none is short that has more rows"
    numbers = [row.row["labels"][0] for row in memory.rows]
    assert len({*numbers}) == len(numbers) and all(labels[row.row["labels"][0]] == row.label for row in memory.rows)


def test_a_task_gives_the_same_rows_in_every_order():
    rows, labels = rows_of(200), ["yes", "no"] * 100
    one = TaskMemory().add("a", rows, labels).add("b", rows, labels)
    two = TaskMemory().add("b", rows, labels).add("a", rows, labels)
    assert {*map(str, one.rows)} == {*map(str, two.rows)} and one.sha256 != two.sha256
    a, b = ([row.row for row in one.rows if row.task == task] for task in "ab")
    assert len(a) == len(b) == 4 and a != b
    assert TaskMemory().add("a", rows, labels, seed=1).rows != TaskMemory().add("a", rows, labels).rows


def test_the_file_has_its_hash(tmp_path):
    rows = [{"input_ids": torch.tensor([n]), "text": "ü\u2028"} for n in range(100)]
    memory = TaskMemory().add("one", rows, [n % 3 for n in range(100)], share=0.1)
    file = tmp_path / "memory.jsonl"
    memory.write(file)
    assert TaskMemory.read(file) == memory and len(file.read_text().split("\n")) == 12
    assert memory.rows[0].row == {
        "input_ids": rows[memory.rows[0].row["input_ids"][0]]["input_ids"].tolist(),
        "text": "ü\u2028",
    }
    file.write_text(file.read_text().replace('"0"', '"1"', 1))
    with pytest.raises(TaskMemoryError, match="its hash"):
        TaskMemory.read(file)
    with pytest.raises(TaskMemoryError, match="cannot be read"):
        TaskMemory.read(tmp_path / "none.jsonl")


def test_every_row_comes_equally_often():
    memory = TaskMemory().add("one", rows_of(100), ["x"] * 100, share=0.07)
    stream = [str(row) for index in range(14) for row in memory.batch(index, 3, seed=5)]
    assert {*Counter(stream).values()} == {6}
    assert stream[:7] != stream[7:14] and {*stream[:7]} == {*stream[7:14]}
    assert memory.batch(3, 3, seed=5) != memory.batch(3, 3, seed=6)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"task": "old"}, ConfigError),
        ({"labels": ["x"]}, ConfigError),
        ({"rows": [], "labels": []}, ConfigError),
        ({"share": 0}, ConfigError),
        ({"share": 1}, ConfigError),
        ({"rows": [{"a": object()}] * 4}, TaskMemoryError),
        ({"rows": ["text"] * 4}, TaskMemoryError),
    ],
)
def test_what_cannot_be_kept_is_refused(change, error):
    memory = TaskMemory().add("old", rows_of(3), ["x"] * 3)
    given_values = {"task": "new", "rows": rows_of(4), "labels": ["x"] * 4, **change}
    with pytest.raises(error):
        memory.add(**given_values)
