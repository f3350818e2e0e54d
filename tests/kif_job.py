"""A training of `RecurrentKIFTrainer` that a test starts as one or several real processes."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path

import conftest
import torch
from job import ZERO, end
from safetensors.torch import save_file
from test_lora import with_lora
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from gere import KIFConfig, RecurrentKIFTrainer, TaskMemory


class ShardedTrainer(RecurrentKIFTrainer):
    """FSDP2 by `fully_shard`, since accelerate takes FSDP for DDP on a CPU."""

    def __init__(self, model, *args, **kwargs):
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
        super().__init__(model, *args, **kwargs)
        self.accelerator.prepare_model = lambda model, *arguments, **keywords: model


def main() -> None:
    root, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    faulthandler.dump_traceback_later(job["limit"], exit=True)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    strategy, extra = job.get("strategy", "ddp"), {}
    if strategy.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo")
        extra["deepspeed"] = {**ZERO, "zero_optimization": {"stage": int(strategy[4:])}}
    tokenizer = AutoTokenizer.from_pretrained(conftest.TINY)
    rows = [conftest.encode(tokenizer, row) for row in conftest.read_jsonl(conftest.DATA / "task.jsonl", 40)]
    model = with_lora()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    args = TrainingArguments(
        str(root / "out"),
        max_steps=20,
        per_device_train_batch_size=4 // ranks,
        gradient_accumulation_steps=2,
        learning_rate=1e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **extra,
    )
    trainer = (ShardedTrainer if strategy == "fsdp2" else RecurrentKIFTrainer)(
        model,
        args,
        DataCollatorForSeq2Seq(tokenizer),
        rows,
        processing_class=tokenizer,
        kif_config=KIFConfig(score=job.get("score", "sensitivity"), outer_learning_rate=1e-4),
        kif_memory=TaskMemory().add("earlier", rows[20:], ["x"] * 20, share=0.5),
    )
    trainer.train()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    save_file(weights, root / f"trained-{rank}.safetensors")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    (root / f"result-{rank}.json").write_text(json.dumps({"logs": logs}))
    end()


if __name__ == "__main__":
    main()
