"""Is a forgetting budget kept on texts that did not choose the share? Trainings over budgets and seeds.

    python -m benchmarks.budget --model MODEL --task-file task.jsonl --general-file general.jsonl --out OUT

Each seed splits the general texts anew: `--replay` texts to replay, 64 held out to choose by, all others to judge by.
Runs that OUT/budget.jsonl holds are not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from benchmarks.lib import DATA, TINY
from benchmarks.lib.experiment import read_jsonl
from gere import GeReConfig, GeReTrainer
from gere.evaluation.general import change_of, text_losses

HELD_OUT = 64


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(TINY))
    add("--task-file", type=Path, default=DATA / "task.jsonl", help="records of `output`, which are learned")
    add("--general-file", type=Path, default=DATA / "general.jsonl", help="records of `text`")
    add("--out", type=Path, required=True)
    add("--budgets", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    add("--seeds", type=int, nargs="+", default=[*range(10)])
    add("--replay", type=int, default=384)
    add("--steps", type=int, default=20)
    add("--learning-rate", type=float, default=5e-4)
    add("--task-length", type=int, default=40)
    add("--general-length", type=int, default=64)
    return parser.parse_args()


def load(options: argparse.Namespace) -> PreTrainedModel:
    """Load the base model in float32."""
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)


def shuffled(items: list[Any], seed: int) -> list[Any]:
    """Return items in an order of a seed."""
    return [items[place] for place in np.random.default_rng(seed).permutation(len(items))]


def train(options: argparse.Namespace, tokenizer: Any, budget: float, seed: int) -> dict[str, Any]:
    """Train within a budget, and judge by the texts that nobody saw."""
    texts = [row["text"] for row in read_jsonl(options.general_file)]
    texts = shuffled(list(dict.fromkeys(texts)), seed)
    replayed, rest = texts[: options.replay], texts[options.replay :]
    chosen_by, judged_by = rest[:HELD_OUT], rest[HELD_OUT:]
    rows = []
    for row in read_jsonl(options.task_file):
        ids = tokenizer(" " + row["output"])["input_ids"][: options.task_length]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    set_seed(seed)
    model = load(options)
    length = options.general_length
    base = text_losses(model, tokenizer, judged_by, max_length=length)
    with tempfile.TemporaryDirectory() as out:
        trainer = GeReTrainer(
            model=model,
            args=TrainingArguments(
                out,
                max_steps=options.steps,
                per_device_train_batch_size=16,
                learning_rate=options.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=options.steps // 5,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=seed,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=shuffled(rows, seed),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            gere_hidden_state_saving_dir=options.out / "anchors",
            num_interpolate_per_batch=4,
            gere_config=GeReConfig(
                replay_dataset=replayed,
                heldout_dataset=chosen_by,
                max_length=length,
                base_decay=0.0,  # so that there is something to move back
                forgetting_budget=budget,
            ),
        )
        trainer.train()
    logs = [log for log in trainer.state.log_history if "general/change" in log]
    shares = [log["gere/share"] for log in trainer.state.log_history if "gere/share" in log]
    judged = change_of(text_losses(trainer.model, tokenizer, judged_by, max_length=length), base)
    return {
        "budget": budget,
        "seed": seed,
        "share": shares[-1],
        "tuned": logs[0]["general/change"],
        "chosen": logs[-1]["general/change"],
        "interval": logs[-1]["general/change_interval"],
        "judged": judged.change,
        "texts": judged.texts,
    }


def main() -> None:
    """Train what is missing, and count."""
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "budget.jsonl"
    runs = read_jsonl(file) if file.is_file() else []
    done = {(run["budget"], run["seed"]) for run in runs}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for seed, budget in itertools.product(options.seeds, options.budgets):
        if (budget, seed) not in done:
            runs.append(train(options, tokenizer, budget, seed))
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(runs[-1]) + "\n")
    kept = sum(run["judged"] <= run["budget"] for run in runs)
    sys.stdout.write(f"within the budget on texts that did not choose the share: {kept} of {len(runs)}\n")


if __name__ == "__main__":
    main()
