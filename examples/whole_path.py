"""Two tasks in a row, plain and with replay, general loss measured throughout, and one page that shows what was kept.

    pip install "gere[report]"
    python examples/whole_path.py --out whole_path --seeds 0 1

As it stands it takes the random model and the texts of this repository, a minute on two CPU cores. For your own, take
your model in place of `teach`, and change `tasks`, `general` and `replay`. The same settings as YAML are what
`gere sequence --config` reads; its section `ability` adds multiple-choice questions.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from gere.continual import run
from gere.report import make_report

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "data"
RANDOM = ROOT / "base_llms" / "llama-tiny-random"
# A second task from the rows of the first: another question, other answers.
OTHER_ANSWERS = {"good": "very nice", "bad": "not at all"}


def read(path: Path) -> list[dict[str, Any]]:
    """Records of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def teach(folder: Path) -> str:
    """Teach the random model of this repository some general text; yours has learned it already."""
    model = folder / "base"
    if not (model / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(RANDOM)
        ids = [tokenizer(record["text"])["input_ids"][:64] for record in read(DATA / "general.jsonl")]
        rows = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ids]
        args = TrainingArguments(
            output_dir=str(folder / "teaching"),
            max_steps=300,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to=[],
        )
        base = AutoModelForCausalLM.from_pretrained(RANDOM)
        trainer = Trainer(base, args, DataCollatorForSeq2Seq(tokenizer), rows, processing_class=tokenizer)
        trainer.train()
        trainer.save_model(str(model))
    return str(model)


def write_tasks(folder: Path) -> list[dict[str, Any]]:
    """Write the tasks as files; yours are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    for name, answers in {"first": {}, "second": OTHER_ANSWERS}.items():
        rows = []
        for row in read(DATA / "task.jsonl"):
            question, answer = f"{name}: {row['instruction']}{row['input']}", row["output"]
            rows.append({"input": question, "output": answers.get(answer, answer)})
        parts = {"train": rows[:-32], "dev": rows[-32:]}
        for part, records in parts.items():
            (folder / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
        tasks.append({"name": name, **{part: str(folder / f"{name}.{part}.jsonl") for part in parts}})
    return tasks


def settings(out: Path, model: str, trainer: str, seed: int, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """One run."""
    replay = {"replay_dataset": str(DATA / "general.jsonl"), "max_length": 64, "num_interpolate_per_batch": 4}
    return {
        "model": model,
        "tasks": tasks,
        "out": str(out / f"{trainer}-{seed}"),
        "name": trainer,
        "trainer": trainer,
        "seed": seed,
        "max_length": 96,
        "gere": replay if trainer == "gere" else {},
        "general": str(DATA / "heldout.jsonl"),
        "training": {
            "per_device_train_batch_size": 16,
            "max_steps": 60,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "cosine",
            "save_steps": 20,
        },
    }


def main() -> None:
    """Run all, then report; after a kill the same command goes on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("whole_path"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    tasks = write_tasks(options.out / "tasks")
    model = teach(options.out)
    kinds = [(trainer, seed) for trainer in ("plain", "gere") for seed in options.seeds]
    runs = [settings(options.out, model, *kind, tasks) for kind in kinds]
    for one in runs:
        run(one)
    report = make_report([Path(one["out"]) for one in runs])
    page = options.out / "report.html"
    page.write_text(report.html, encoding="utf-8")
    sys.stdout.write(f"{report.markdown}\n{page}\n")


if __name__ == "__main__":
    main()
