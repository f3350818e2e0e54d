"""Fine-tune one model twice, by `Trainer` and by `GeReTrainer`, and compare what is left of its general ability.

    python examples/train_demo.py
    bash run_multi_gpu.sh --nproc 2 --cpu
    python examples/train_demo.py --model FOLDER --task-file task.jsonl --replay-file general.jsonl \
        --heldout-file heldout.jsonl

Task files hold records of `input` and `output` (and `instruction`), the two others records of `text`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from gere import GeneralAbilityCallback, GeReConfig, GeReTrainer

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "base_llms" / "llama-tiny-random"
Rows = list[dict[str, Any]]
Table = list[tuple[str, float, float, float]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(TINY), help="folder or hub name of a causal language model")
    add("--task-file", default=str(HERE / "data" / "task.jsonl"))
    add("--replay-file", default=str(HERE / "data" / "general.jsonl"))
    add("--heldout-file", default=str(HERE / "data" / "heldout.jsonl"))
    add("--steps", type=int, default=60, help="optimizer steps of each training")
    add("--batch-size", type=int, default=16, help="rows of an optimizer step")
    add("--micro-batch-size", type=int, default=4, help="rows of a forward pass")
    add("--replay-per-batch", type=int, default=4, help="replay rows of an optimizer step")
    add("--w-strategy", default="auto", help="weight of the distance to the base model: auto, a number or dy")
    add("--learning-rate", type=float, default=5e-3)
    add("--task-rows", type=int, default=0, help="use only the N shortest task rows, 0 for all")
    add("--task-dev-rows", type=int, default=64, help="task rows held out for the task loss")
    add("--task-length", type=int, default=256, help="longest task row in tokens")
    add("--replay-rows", type=int, default=0, help="use only the first N replay texts, 0 for all")
    add("--replay-length", type=int, default=160, help="longest replay row in tokens")
    add("--heldout-rows", type=int, default=0, help="use only the first N held-out texts, 0 for all")
    add("--bf16", action="store_true", help="train under bfloat16 autocast")
    add("--seed", type=int, default=0)
    add("--out", default=None, help="folder for the anchor and the trainers' files (default: a temporary one)")
    add("--cpu", action="store_true", help="use the CPU")
    add(
        "--warm-up-steps",
        type=int,
        default=None,
        help="steps on the replay texts before the comparison, to give a random model something to forget "
        "(default: 300 for the bundled model, else 0)",
    )
    return parser.parse_args()


def read(path: str, limit: int = 0) -> Rows:
    with Path(path).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return rows[:limit] if limit else rows


def encode_task(row: dict[str, Any], tokenizer: Any, length: int) -> dict[str, list[int]]:
    """Only the answer is learned; a long prompt loses its beginning."""
    prompt = tokenizer(row.get("instruction", "") + row["input"])["input_ids"]
    answer = tokenizer(" " + row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    prompt = prompt[max(0, len(prompt) + len(answer) - length) :]
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer}


def encode_text(text: str, tokenizer: Any, length: int) -> dict[str, list[int]]:
    ids = tokenizer(text)["input_ids"][:length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}


def load(folder: str, tokenizer: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def arguments(options: argparse.Namespace, folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": max(1, options.batch_size // (options.micro_batch_size * RANKS)),
        "per_device_eval_batch_size": options.micro_batch_size,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(10, options.steps // 5),
        "logging_steps": max(1, options.steps // 10),
        "save_strategy": "no",
        "report_to": [],
        "bf16": options.bf16,
        "use_cpu": options.cpu,
        "save_on_each_node": True,
        "ddp_find_unused_parameters": False,
        "seed": options.seed,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**settings, **changes})


def working_folder() -> Path:
    """A new folder, which the processes of one machine share."""
    if RANKS == 1:
        return Path(tempfile.mkdtemp(prefix="gere-demo-"))
    return Path(tempfile.gettempdir()) / f"gere-demo-{os.getppid()}-{os.environ['MASTER_PORT']}"


def end_processes(rubbish: Path | None) -> None:
    """End together; a process group that is left to the interpreter's shutdown can abort it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rubbish is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        shutil.rmtree(rubbish, ignore_errors=True)


def warm_up(options: argparse.Namespace, tokenizer: Any, texts: list[str], out: Path) -> str:
    """Teach the base model the replay texts' language first, if it is random."""
    steps = options.warm_up_steps
    if steps is None:
        steps = 300 if Path(options.model).resolve() == TINY else 0
    if not steps:
        return str(options.model)
    rows = [encode_text(text, tokenizer, options.replay_length) for text in texts]
    args = arguments(options, out / "warm-up", max_steps=steps, gradient_accumulation_steps=1)
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(load(options.model, tokenizer), args, collator, rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(out / "warm-up" / "model"))
    trainer.accelerator.wait_for_everyone()
    return str(out / "warm-up" / "model")


def logged(trainer: Trainer, key: str) -> list[float]:
    """Values of the log: the first was measured before training."""
    return [log[key] for log in trainer.state.log_history if key in log]


def table(rows: Table, before: tuple[float, float]) -> str:
    head = f"{'':<14}{'task loss':>12}{'general loss':>14}{'forgetting':>12}{'seconds':>10}"
    lines = [head, "-" * len(head), f"{'base model':<14}{before[0]:>12.3f}{before[1]:>14.3f}{'':>12}{'':>10}"]
    for name, task, general, seconds in rows:
        lines.append(f"{name:<14}{task:>12.3f}{general:>14.3f}{general - before[1]:>+12.3f}{seconds:>10.1f}")
    return "\n".join(lines)


def main() -> None:
    options = parse_arguments()
    out = Path(options.out) if options.out else working_folder()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    replay = [row["text"] for row in read(options.replay_file, options.replay_rows)]
    heldout = [row["text"] for row in read(options.heldout_file, options.heldout_rows)]
    records = read(options.task_file)
    if options.task_rows:
        records = sorted(records, key=lambda row: len(row["input"]))[: options.task_rows]
    task = [encode_task(row, tokenizer, options.task_length) for row in records]
    step = max(1, len(task) // options.task_dev_rows)
    dev = task[::step][: options.task_dev_rows]
    train = [row for index, row in enumerate(task) if index % step or index // step >= options.task_dev_rows]
    base = warm_up(options, tokenizer, replay, out)

    rows = []
    for kind in (Trainer, GeReTrainer):
        name = kind.__name__
        extra: dict[str, Any] = {}
        if kind is GeReTrainer:
            extra = {
                "gere_hidden_state_saving_dir": out / "gere_saving",
                "num_interpolate_per_batch": options.replay_per_batch,
                "w_strategy": options.w_strategy,
                "gere_config": GeReConfig(
                    replay_dataset=replay,
                    replay_heldout=0,  # --heldout-file is measured
                    max_length=options.replay_length,
                ),
            }
        trainer = kind(
            args=arguments(options, out / name, eval_on_start=True),
            model=load(base, tokenizer),  # after the arguments: only then ZeRO-3 splits it while loading
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=train,
            eval_dataset=dev,
            processing_class=tokenizer,
            callbacks=[GeneralAbilityCallback(heldout, max_length=options.replay_length)],
            **extra,
        )
        seconds = trainer.train().metrics["train_runtime"]
        trainer.evaluate()
        task_loss, general = (logged(trainer, key) for key in ("eval_loss", "general/loss"))
        before = task_loss[0], general[0]
        rows.append((name, task_loss[-1], general[-1], seconds))
    if trainer.is_world_process_zero():
        show(options, rows, before, len(train), len(replay))
    end_processes(None if options.out else out)


def show(options: argparse.Namespace, rows: Table, before: tuple[float, float], train: int, replay: int) -> None:
    shown = f"{options.steps} steps of {options.batch_size} rows, learning rate {options.learning_rate:g}"
    print(
        f"\n{Path(options.model).name}: {shown}, {train} task rows, {RANKS} process(es); GeReTrainer replays "
        f"{options.replay_per_batch} of {replay} general texts a step, w_strategy {options.w_strategy}\n"
    )
    print(table(rows, before))
    print("\nforgetting = loss on held-out general text after training - before")


if __name__ == "__main__":
    main()
