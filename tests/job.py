"""A training that a test starts as one or several real processes; run as a script with settings as JSON."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from pathlib import Path

import conftest
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments
from watching import Watch

from gere import GeneralAbilityCallback, GeReConfig, GeReTrainer
from gere.ability import Question
from gere.cache.base_model import BaseModel
from gere.cache.distil import Part

DEFAULTS = {
    "strategy": "ddp",
    "global_micro": 4,  # rows of a micro-step over all ranks
    "accumulation": 4,
    "steps": 20,
    "replay": 3,
    "texts": 11,
    "w": "dy",
    "save_steps": 0,
    "resume": None,
    "folders": "shared",  # or "own": each rank has a disk of its own
    "fail_rank": None,
    "stream": False,  # the task rows as an IterableDataset
    "slow": 0.0,  # seconds that each forward pass of the anchor takes more
    "stop_at": 0,
    "ability": False,  # measure general ability, too; or arguments of the callback
    "args": {},
    "config": {},
}
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
}


class StopAt(TrainerCallback):
    """Ends the training early."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


class ShardedTrainer(GeReTrainer):
    """FSDP2 by `fully_shard`, since accelerate takes FSDP for DDP on a CPU."""

    def __init__(self, model, *args, **kwargs):
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        super().__init__(model, *args, **kwargs)
        self.accelerator.prepare_model = lambda model, *arguments, **keywords: model


def texts_of(job: dict) -> list[str]:
    return [row["text"] for row in conftest.read_jsonl(conftest.DATA / "general.jsonl", job["texts"])]


def make(root: Path, job: dict, rank: int, ranks: int) -> GeReTrainer:
    extra = {}
    if job["strategy"].startswith("zero"):
        import deepspeed

        if ranks > 1:
            deepspeed.init_distributed("gloo")
        extra["deepspeed"] = {**ZERO, "zero_optimization": {"stage": int(job["strategy"][4:])}}
    tokenizer = AutoTokenizer.from_pretrained(conftest.TINY)
    args = TrainingArguments(
        **{
            "output_dir": str(root / "out"),
            "max_steps": job["steps"],
            "per_device_train_batch_size": job["global_micro"] // ranks,
            "gradient_accumulation_steps": job["accumulation"],
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "steps" if job["save_steps"] else "no",
            "save_steps": job["save_steps"] or 500,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **extra,
            **job["args"],
        }
    )
    encoded = [conftest.encode(tokenizer, row) for row in conftest.read_jsonl(conftest.DATA / "task.jsonl", 40)]
    if job["stream"]:
        longest = max(len(row["input_ids"]) for row in encoded)  # batches that one process deals out fit together
        pads = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        encoded = [{k: v + [pads[k]] * (longest - len(v)) for k, v in row.items()} for row in encoded]
        encoded = Dataset.from_list(encoded * 20).to_iterable_dataset()
    texts = texts_of(job)
    saving = root / ("saving" if job["folders"] == "shared" else f"saving-{rank}")
    return (ShardedTrainer if job["strategy"] == "fsdp2" and ranks > 1 else GeReTrainer)(
        conftest.load_tiny(),
        args,
        DataCollatorForSeq2Seq(tokenizer),
        encoded,
        processing_class=tokenizer,
        num_interpolate_per_batch=job["replay"],
        w_strategy=job["w"],
        gere_hidden_state_saving_dir=saving,
        gere_config=GeReConfig(
            **{
                "replay_dataset": texts,
                "replay_heldout": 0,
                "max_length": 40,
                "normalization": "elements",
                **job["config"],
            }
        ),
    )


def watch_calls(trainer: GeReTrainer) -> dict[str, int]:
    """Count the calls of the model in training: of DDP's wrapper, and of the decoder inside."""
    calls, original = {"wrapper": 0, "decoder": 0}, DistributedDataParallel.forward

    def forward(self, *args, **kwargs):
        calls["wrapper"] += self.training
        return original(self, *args, **kwargs)

    def called(module, args, output):
        calls["decoder"] += module.training

    DistributedDataParallel.forward = forward
    trainer.model.model.register_forward_hook(called)
    return calls


def watch_the_build(job: dict, rank: int) -> list[int]:
    """Count the replay rows that this rank distils, slow it down, or let it fail."""
    original, rows_done, calls = BaseModel.__call__, [0], []

    def watched(self, rows):
        calls.append(rows)
        if job["fail_rank"] == rank and job["strategy"] == "ddp" and len(calls) > 2:
            raise OSError("the disk of this rank is gone")
        time.sleep(job["slow"])
        result = original(self, rows)
        rows_done[0] += len(rows)
        return result

    def broken(self, *args):
        raise OSError("the disk of this rank is gone")

    BaseModel.__call__ = watched
    if job["fail_rank"] == rank and job["strategy"] != "ddp":
        Part.take = broken
    return rows_done


def ability() -> GeneralAbilityCallback:
    """Two batches of questions for one task, a single one for the other."""
    rows = conftest.read_jsonl(conftest.DATA / "task.jsonl", 9)
    options = ("good", "bad", "neither of the two")
    many = [Question(row["input"], options, options.index(row["output"])) for row in rows]
    texts = [row["text"] for row in conftest.read_jsonl(conftest.DATA / "heldout.jsonl", 7)]
    return GeneralAbilityCallback(texts, {"many": many, "few": many[:1]}, max_length=64)


def end() -> None:
    """Leave without the interpreter's own shutdown, in which torch's threads abort one process in forty."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    root, job = Path(sys.argv[1]), {**DEFAULTS, **json.loads(sys.argv[2])}
    faulthandler.dump_traceback_later(job.get("limit", 120), exit=True)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    trainer = make(root, job, rank, ranks)
    watch = Watch(trainer, texts_of(job), 40)
    trainer.add_callback(StopAt(job["stop_at"]))
    if job["ability"]:
        chosen = job["ability"]
        trainer.add_callback(GeneralAbilityCallback(**chosen) if isinstance(chosen, dict) else ability())
    calls = watch_calls(trainer)
    distilled = watch_the_build(job, rank)
    trainer.train(resume_from_checkpoint=job["resume"])
    anchor = trainer.replay.anchor
    result = {
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "rows": [[watch.task(step), watch.replay(step)] for step in range(len(watch.steps))],
        "calls": calls,
        "anchor": anchor and anchor.key,
        "files": anchor and {path.name: path.stat().st_mtime_ns for path in sorted(anchor.folder.iterdir())},
        "hashes": anchor and json.loads((anchor.folder / "manifest.json").read_text())["files"],
        "folder": anchor and str(anchor.folder),
        "distilled": distilled[0],
        "ability": [
            {key: value for key, value in log.items() if key != "gere/summary"}
            for log in trainer.state.log_history
            if "general/loss" in log
        ],
        "kind": trainer.accelerator.distributed_type.value,
    }
    (root / f"result-{rank}.json").write_text(json.dumps(result))
    end()


if __name__ == "__main__":
    main()
