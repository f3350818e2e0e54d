"""How much of the batches is padding: real tokens over padded tokens of task rows and replay rows.

    python -m benchmarks.batches                                                          # rows of the demo
    python -m benchmarks.batches --model MODEL --task-file yelp.train.jsonl --replay-file replay.jsonl \
        --task-length 512 --replay-length 563 --batch-size 64

The replay rows of a step have similar lengths by themselves. Task rows keep the order of the trainer, so that their
padding is a matter of its `group_by_length`. No model is called.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoTokenizer
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.lib import DATA, TINY
from benchmarks.lib.experiment import read_jsonl
from benchmarks.lib.timing import table
from gere import BatchInsertionSampler
from gere.sampler import parent_order


def parse_arguments() -> argparse.Namespace:
    """Options of the command line; the defaults are those of the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(TINY), help="folder of a tokenizer")
    add("--task-file", type=Path, default=DATA / "task.jsonl")
    add("--replay-file", type=Path, default=DATA / "general.jsonl")
    add("--task-length", type=int, default=256)
    add("--replay-length", type=int, default=160)
    add("--batch-size", type=int, default=16)
    add("--micro-batch-size", type=int, default=4)
    add("--replay-per-batch", type=int, default=4, help="0 for no batch insertion")
    add("--steps", type=int, default=60)
    return parser.parse_args()


def shares(
    options: argparse.Namespace,
    task: Sequence[int],
    replay: Sequence[int],
    *,
    group_task: bool,
    group_replay: bool,
) -> tuple[float, float]:
    """Real tokens over padded tokens of the first steps, of task rows and of replay rows.

    Args:
        options: Of the command line.
        task: Length of each task row.
        replay: Length of each replay row.
        group_task: Order task rows as Trainer's `group_by_length` does.
        group_replay: Tell the sampler the lengths of the replay rows, as the trainer does.
    """
    order = LengthGroupedSampler(options.batch_size, lengths=list(task)) if group_task else None
    sampler = BatchInsertionSampler(
        len(task),
        len(replay),
        batch_size=options.batch_size,
        replay_per_batch=options.replay_per_batch,
        micro_batch_size=options.micro_batch_size,
        task_order=parent_order(order, 0) if order else None,
        replay_lengths=replay if group_replay else None,
    )
    lengths = [*task, *replay]
    real, padded = [0, 0], [0, 0]
    count = options.steps * options.batch_size // options.micro_batch_size
    for step in itertools.islice(micro_steps(sampler), count):
        task_rows = [lengths[row] for row in step if row < len(task)]
        replay_rows = [lengths[row] for row in step if row >= len(task)]
        for kind, rows in enumerate((task_rows, replay_rows)):
            real[kind] += sum(rows)
            padded[kind] += len(rows) * max(rows, default=0)
    return real[0] / padded[0], real[1] / padded[1]


def micro_steps(sampler: BatchInsertionSampler) -> Iterator[list[int]]:
    """Rows of each micro-step, epoch after epoch."""
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        rows = iter(sampler)
        while step := list(itertools.islice(rows, sampler.micro_batch_size)):
            yield step


def main() -> None:
    """Count and print."""
    options = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def lengths(texts: list[str], longest: int) -> list[int]:
        return [min(len(ids), longest) for ids in tokenizer(texts, verbose=False)["input_ids"]]

    records = read_jsonl(options.task_file)
    answered = [f"{row.get('instruction', '')}{row['input']} {row['output']}" for row in records]
    task = lengths(answered, options.task_length)
    replay = lengths([row["text"] for row in read_jsonl(options.replay_file)], options.replay_length)
    rows = []
    for name, group_task, group_replay in (
        ("replay rows in any order", False, False),
        ("as it is", False, True),
        ("and task rows with `group_by_length`", True, True),
    ):
        found = shares(options, task, replay, group_task=group_task, group_replay=group_replay)
        rows.append([name, *(f"{share:.3f}" for share in found)])
    sys.stdout.write(
        f"{options.task_file.name}, {options.replay_file.name}: {options.steps} steps of {options.batch_size} rows in "
        f"micro-batches of {options.micro_batch_size}, {options.replay_per_batch or 'no'} replay rows inserted\n\n"
        + table(("order", "real / padded, task rows", "replay rows"), rows)
    )


if __name__ == "__main__":
    main()
