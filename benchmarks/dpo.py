"""What DPO leaves of general ability, without replay and with it, over seeds.

    python -m benchmarks.dpo --model MODEL --out dpo.jsonl

The pairs are a task's answers, each against another answer of the task. Both ways learn from the same pairs; replay
adds rows to them. The general loss is that of texts that nobody trains on. Runs that the file holds are not repeated.
A model of random weights has nothing to forget: `--pretrain STEPS` first teaches it the general texts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.lib import DATA, TINY
from benchmarks.lib.experiment import read_jsonl
from gere import GeReConfig, general_loss, gere_trainer

WAYS = ("plain", "replay")


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(TINY))
    add("--task-file", type=Path, default=DATA / "task.jsonl", help="records of `instruction`, `input`, `output`")
    add("--general-file", type=Path, default=DATA / "general.jsonl", help="records of `text`, to replay")
    add("--heldout-file", type=Path, default=DATA / "heldout.jsonl", help="records of `text`, to judge by")
    add("--out", type=Path, required=True, help="file of the runs, a JSON line each")
    add("--pretrain", type=int, default=0, help="steps on the general texts, before")
    add("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--steps", type=int, default=40)
    add("--batch", type=int, default=8, help="pairs of a step")
    add("--replay", type=int, default=4, help="replay rows added to them")
    add("--learning-rate", type=float, default=1e-4)
    add("--length", type=int, default=96, help="tokens of a row")
    return parser.parse_args()


def pairs(file: Path, seed: int) -> Dataset:
    """Pair each answer with another answer of the file."""
    rows = read_jsonl(file)
    answers = sorted({row["output"] for row in rows})
    draw = np.random.default_rng(seed)
    found = []
    for row in rows:
        other = draw.choice([answer for answer in answers if answer != row["output"]])
        prompt = row["instruction"] + row["input"]
        found.append({"prompt": prompt, "chosen": f" {row['output']}", "rejected": f" {other}"})
    return Dataset.from_list(found)


def base_model(options: argparse.Namespace, tokenizer: Any) -> str:
    """Give the folder of the base model; make it, if it has to learn general texts first."""
    folder = options.out.parent / "base"
    if not options.pretrain:
        return str(options.model)
    if not folder.is_dir():
        texts = [row["text"] for row in read_jsonl(options.general_file)]
        rows = tokenizer(texts, truncation=True, max_length=options.length)
        set_seed(0)
        trainer = Trainer(
            AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
            TrainingArguments(
                str(folder),
                max_steps=options.pretrain,
                per_device_train_batch_size=16,
                learning_rate=3e-3,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            DataCollatorForLanguageModeling(tokenizer, mlm=False),
            Dataset.from_dict(dict(rows)),
        )
        trainer.train()
        trainer.save_model()
    return str(folder)


def train(options: argparse.Namespace, way: str, seed: int) -> dict[str, Any]:
    """Train one way, and measure before and after."""
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    heldout = [row["text"] for row in read_jsonl(options.heldout_file)]
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base_model(options, tokenizer), dtype=torch.float32)
    base = general_loss(model, tokenizer, heldout, max_length=options.length)
    trainer_class, replay = DPOTrainer, {}
    if way == "replay":
        texts = [row["text"] for row in read_jsonl(options.general_file)]
        trainer_class = gere_trainer(DPOTrainer)
        replay = {
            "num_interpolate_per_batch": options.replay,
            "gere_hidden_state_saving_dir": options.out.parent / "anchors",
            "gere_config": GeReConfig(
                replay_dataset=texts,
                heldout_dataset=heldout,
                max_length=options.length,
                replay_mode="add",
                base_decay=0,
            ),
        }
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_class(
            model=model,
            args=DPOConfig(
                out,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                learning_rate=options.learning_rate,
                max_length=options.length,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=seed,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=pairs(options.task_file, seed),
            processing_class=tokenizer,
            **replay,
        )
        trainer.train()
    logs = [log for log in trainer.state.log_history if "rewards/accuracies" in log]
    last = logs[-max(1, len(logs) // 4) :]
    return {
        "way": way,
        "seed": seed,
        "steps": options.steps,
        "base_loss": base,
        "general_loss": general_loss(trainer.model, tokenizer, heldout, max_length=options.length),
        "dpo_loss": float(np.mean([log.get("gere/task_loss", log["loss"]) for log in last])),
        "reward_accuracy": float(np.mean([log["rewards/accuracies"] for log in last])),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Make the table of the document: a line for each way, with its seeds."""
    lines = ["| | general loss | of the base | reward accuracy |", "|---|---|---|---|"]
    for way in WAYS:
        own = [run for run in runs if run["way"] == way]
        if own:
            losses = ", ".join(f"{run['general_loss']:.2f}" for run in own)
            accuracy = np.mean([run["reward_accuracy"] for run in own])
            lines.append(f"| {way} | {losses} | {own[0]['base_loss']:.2f} | {accuracy:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is missing, and print the table."""
    options = parse_arguments()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    runs = read_jsonl(options.out) if options.out.is_file() else []
    done = {(run["way"], run["seed"]) for run in runs}
    for seed in options.seeds:
        for way in options.ways:
            if (way, seed) not in done:
                runs.append(train(options, way, seed))
                with options.out.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(runs[-1]) + "\n")
    sys.stdout.write(table(runs))


if __name__ == "__main__":
    main()
