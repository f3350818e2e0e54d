"""The memory: a small share of the rows of each earlier task, in one file that carries its own hash."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gere._files import numbered_lines, sha256, write_atomic
from gere.config import require
from gere.errors import TaskMemoryError

FORMAT = 1


class MemoryRow(NamedTuple):
    """A row of an earlier task.

    Attributes:
        task: Name of the task.
        label: Its answer, by which the memory is balanced.
        row: What the data collator takes, JSON values only.
    """

    task: str
    label: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class TaskMemory:
    """Rows of the earlier tasks of a sequence; `TaskMemory()` is that of the first task.

    Attributes:
        tasks: Names of the tasks in the order in which they were trained.
        rows: Their rows.

    Example:
        >>> rows = [{"input_ids": [n]} for n in range(100)]
        >>> memory = TaskMemory().add("sentiment", rows, ["good", "bad"] * 50)
        >>> [row.label for row in memory.rows]
        ['bad', 'good']
    """

    tasks: tuple[str, ...] = ()
    rows: tuple[MemoryRow, ...] = field(default=(), repr=False)

    def add(
        self,
        task: str,
        rows: Sequence[Mapping[str, Any]],
        labels: Sequence[Any],
        *,
        share: float = 0.02,
        seed: int = 0,
    ) -> TaskMemory:
        """Return a memory that also has rows of one more task.

        The numbers of rows of two labels differ by one at most, unless a label has no more rows. A task gives the same
        rows in every order of tasks.

        Args:
            task: Its name, another one than those before.
            rows: Its training rows as the data collator takes them; tensors become lists.
            labels: The answer of each row.
            share: Share of the rows to keep, above 0 and below 1; one row at least.
            seed: Seed of the choice.

        Raises:
            ConfigError: If an argument cannot be used.
            TaskMemoryError: If a row cannot be written as JSON.
        """
        require(task not in self.tasks, "task", f"another name than {', '.join(self.tasks)}", task)
        require(0 < share < 1, "share", "above 0 and below 1", share)
        require(0 < len(rows) == len(labels), "labels", f"one for each of {len(rows)} rows, at least one", len(labels))
        random = np.random.default_rng([seed, *task.encode()])
        taken: Counter[str] = Counter()
        turns: list[tuple[int, int, int]] = []
        for place in random.permutation(len(rows)).tolist():
            label = str(labels[place])
            # The first row of every label comes before the second of any.
            turns.append((taken[label], len(turns), place))
            taken[label] += 1
        size = max(1, int(share * len(rows)))
        chosen = sorted(place for *_, place in sorted(turns)[:size])
        own = [MemoryRow(task, str(labels[place]), _plain(rows[place], task, place)) for place in chosen]
        return TaskMemory((*self.tasks, task), (*self.rows, *sorted(own, key=lambda row: row.label)))

    def batch(self, index: int, size: int, seed: int) -> list[Mapping[str, Any]]:
        """Return the rows of an outer step: whole permutations of all rows one after another, by (seed, index)."""
        found, count = [], len(self.rows)
        for place in range(index * size, (index + 1) * size):
            # A permutation for each round, computed anew: nothing has to survive a kill.
            order = np.random.default_rng([seed, place // count]).permutation(count)
            found.append(self.rows[order[place % count]].row)
        return found

    @property
    def sha256(self) -> str:
        """Hash of the names of the tasks, in their order, and of the rows."""
        return sha256(json.dumps(self.tasks).encode() + _lines(self.rows))

    def write(self, path: Path) -> None:
        """Write one file of JSON lines, whole or not at all; its first line has the tasks and the hash."""
        head = {"format": FORMAT, "tasks": self.tasks, "sha256": self.sha256}
        write_atomic(path, (json.dumps(head) + "\n").encode() + _lines(self.rows))

    @classmethod
    def read(cls, path: Path) -> TaskMemory:
        """Read a file that `write` wrote.

        Raises:
            TaskMemoryError: If it is missing or damaged.
        """
        try:
            (_, head), *lines = numbered_lines(path)
            memory = cls(tuple(head["tasks"]), tuple(MemoryRow(**line) for _, line in lines))
            if head["format"] != FORMAT or head["sha256"] != memory.sha256:
                raise ValueError("its hash is not that of its rows")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TaskMemoryError(
                "The memory of earlier tasks cannot be read.",
                where=path,
                expected="a file that TaskMemory.write wrote",
                found=f"{type(error).__name__}: {error}",
                fix="Restore the file, or make the memory again from the training rows of the earlier tasks.",
            ) from error
        return memory


def _lines(rows: Sequence[MemoryRow]) -> bytes:
    return "".join(json.dumps(row._asdict(), sort_keys=True) + "\n" for row in rows).encode()


def _plain(row: Mapping[str, Any], task: str, place: int) -> Mapping[str, Any]:
    """Return a row of JSON values."""
    try:
        plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
        return json.loads(json.dumps(plain))
    except (TypeError, ValueError, AttributeError) as error:
        raise TaskMemoryError(
            "A row cannot be kept in the memory.",
            where=f"row {place} of {task}",
            expected="numbers, texts, lists and tensors by name, as the data collator takes them",
            found=f"{type(error).__name__}: {error}",
            fix="Encode the rows before the memory is made.",
        ) from error
