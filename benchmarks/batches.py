"""How much of the batches is padding: real tokens over padded tokens of task rows and replay rows.

    python -m benchmarks.batches                                                          # rows of the demo
    python -m benchmarks.batches --model MODEL --task-file yelp.train.jsonl --replay-file replay.jsonl \
        --task-rows 0 --task-length 512 --replay-length 563 --steps 60

Rows are batched by the trainer's own data loader; no model is called. Rows in any order are those of a sampler that is
not told their lengths.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, TrainingArguments

from benchmarks.experiment import read_jsonl
from gere import GeReConfig, GeReTrainer
from gere.replay.batch import REPLAY, TASK

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "data"


def parse_arguments() -> argparse.Namespace:
    """Options of the command line; the defaults are those of the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ROOT / "base_llms" / "llama-tiny-random"), help="folder of a tokenizer")
    add("--task-file", type=Path, default=DATA / "task.jsonl")
    add("--replay-file", type=Path, default=DATA / "general.jsonl")
    add("--task-rows", type=int, default=0, help="so many of the shortest, 0 for all")
    add("--task-length", type=int, default=256)
    add("--replay-length", type=int, default=160)
    add("--batch-size", type=int, default=16)
    add("--micro-batch-size", type=int, default=4)
    add("--replay-per-batch", type=int, default=4, help="0 for no batch insertion")
    add("--steps", type=int, default=60)
    return parser.parse_args()


class AnyOrder(GeReTrainer):
    """Takes rows as they come, whatever their length."""

    def _gere_sampler(self, *args: Any) -> Any:
        epochs = super()._gere_sampler(*args)
        epochs.sampler.replay_lengths = epochs.sampler.task_lengths = None
        return epochs


def batches(options: argparse.Namespace, cls: type[GeReTrainer], group: bool, folder: str) -> list[dict[str, Any]]:
    """Micro-batches of the first steps."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = cls(
        model=LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)),
        args=_arguments(options, group, folder),
        train_dataset=[encode(row, tokenizer, options.task_length) for row in task_rows(options)],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        num_interpolate_per_batch=options.replay_per_batch,
        gere_config=GeReConfig(
            replay_dataset=[row["text"] for row in read_jsonl(options.replay_file)], max_length=options.replay_length
        ),
    )
    loader, found = trainer.get_train_dataloader(), []
    wanted = options.steps * options.batch_size // options.micro_batch_size
    while len(found) < wanted:
        found += list(loader)
        trainer.state.epoch = (trainer.state.epoch or 0) + 1
    return found[:wanted]


def _arguments(options: argparse.Namespace, group: bool, folder: str) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": options.batch_size // options.micro_batch_size,
        "report_to": [],
        "use_cpu": True,
    }
    if not group:
        return TrainingArguments(**settings)
    new = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
    return TrainingArguments(
        **settings, **({"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True})
    )


def task_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of the task."""
    rows = read_jsonl(options.task_file)
    return sorted(rows, key=lambda row: len(row["input"]))[: options.task_rows] if options.task_rows else rows


def encode(row: dict[str, Any], tokenizer: Any, length: int) -> dict[str, list[int]]:
    """A task row as the demo makes it: a long prompt loses its beginning."""
    prompt = tokenizer(row.get("instruction", "") + row["input"], verbose=False)["input_ids"]
    answer = tokenizer(" " + row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = prompt[max(0, len(prompt) + len(answer) - length) :] + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}


def real_share(samples: Sequence[dict[str, Any]], part: str) -> float:
    """Real tokens over padded tokens of a part of the batches."""
    masks: list[Tensor] = [sample[part]["attention_mask"] for sample in samples if part in sample]
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def main() -> None:
    """Count and print."""
    options = parse_arguments()
    replay = f"{options.replay_per_batch} replayed" if options.replay_per_batch else "replay shuffled into the epoch"
    lines = [
        f"{options.task_file.name}, {options.replay_file.name}: {options.steps} steps of {options.batch_size} rows in "
        f"micro-batches of {options.micro_batch_size}, {replay}",
        "",
        "| order | real / padded, task rows | replay rows |",
        "| --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, cls, group in (
            ("rows in any order", AnyOrder, False),
            ("as it is", GeReTrainer, False),
            ("and task rows with `group_by_length`", GeReTrainer, True),
        ):
            samples = batches(options, cls, group, folder)
            lines.append(f"| {name} | {real_share(samples, TASK):.3f} | {real_share(samples, REPLAY):.3f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
