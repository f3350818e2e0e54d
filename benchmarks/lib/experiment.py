"""One training of one strategy, and what is left afterwards: task score and held-out general loss."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from benchmarks.lib import DATA, TINY
from gere import GeReConfig, GeReTrainer, general_loss

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A point of the comparison.

    Attributes:
        strategy: `gere_config.replay_strategy`.
        weight: `w_strategy`.
        normalization: What the margin of TM is divided by.
        regime: `"full"` or `"lora"`.
        insertion: Whether every step has its replay rows, or the epoch has them anywhere.
        seed: Seed of the order of rows and of LoRA.
    """

    strategy: str
    weight: str = "0"
    normalization: str = "violations"
    regime: str = "full"
    insertion: bool = True
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the point in tables, without regime and seed."""
        if self.strategy in ("none", "ce"):
            return self.strategy
        kind = f"{self.strategy}/{self.normalization}" if self.strategy == "tm" else self.strategy
        return f"{kind} {self.weight}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Shared by all points: model, texts, and the shape of the training.

    Attributes:
        model: Folder or name of the base model.
        task: Records of `instruction`, `input`, `output` to train on.
        dev: Records to score.
        replay: Texts of the replay set.
        heldout: General texts that are never trained on.
        steps: Optimizer steps.
        batch: Rows of a step.
        replay_per_batch: Replay rows of a step, or of the mean step without insertion.
        lengths: Longest task row and longest general row in tokens.
        rates: Learning rate of each regime.
    """

    model: str
    task: list[Row]
    dev: list[Row]
    replay: list[str]
    heldout: list[str]
    steps: int
    batch: int
    replay_per_batch: int
    lengths: tuple[int, int]
    rates: dict[str, float]


class Bench:
    """Runs the points of a scene.

    Args:
        scene: What they share.
        folder: Where anchors are kept.
    """

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.scene = scene
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(scene.model)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token

    def load(self) -> PreTrainedModel:
        """Load the base model in float32."""
        model = AutoModelForCausalLM.from_pretrained(self.scene.model, dtype=torch.float32)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def run(self, setting: Setting) -> Row:
        """Train one point and score it."""
        set_seed(setting.seed)
        model: Any = with_lora(self.load()) if setting.regime == "lora" else self.load()
        with tempfile.TemporaryDirectory() as out:
            trainer = self._trainer(model, setting, out)
            seconds = trainer.train().metrics["train_runtime"]
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return {**dataclasses.asdict(setting), "name": setting.name, "seconds": seconds, "bytes": self._bytes(trainer),
                **self.score(trainer.model), "logs": logs}  # fmt: skip

    def score(self, model: Any) -> dict[str, float]:
        """Accuracy and loss on the task, loss on held-out general text."""
        accuracy, loss = self._task(model)
        general = general_loss(model, self.tokenizer, self.scene.heldout, max_length=self.scene.lengths[1])
        return {"accuracy": accuracy, "task_loss": loss, "general_loss": general}

    def arguments(self, regime: str, seed: int, out: str) -> TrainingArguments:
        """Return the arguments of a training in `out`."""
        scene = self.scene
        return TrainingArguments(
            output_dir=out,
            max_steps=scene.steps,
            per_device_train_batch_size=scene.batch,
            learning_rate=scene.rates[regime],
            lr_scheduler_type="cosine",
            warmup_steps=min(10, scene.steps // 5),
            logging_steps=max(1, scene.steps // 10),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
        )

    def _trainer(self, model: Any, setting: Setting, out: str) -> Trainer:
        scene = self.scene
        replays = setting.strategy != "none"
        rows = [self.encode(row) for row in scene.task]
        share = scene.batch - scene.replay_per_batch if replays else scene.batch
        rows = rows[: share * scene.steps]
        replay = scene.replay[: scene.replay_per_batch * scene.steps]
        shared: Any = {
            "model": model,
            "args": self.arguments(setting.regime, setting.seed, out),
            "train_dataset": rows,
            "data_collator": DataCollatorForSeq2Seq(self.tokenizer),
            "processing_class": self.tokenizer,
        }
        if not replays:
            return Trainer(**shared)
        return GeReTrainer(
            **shared,
            gere_hidden_state_saving_dir=self._anchors(setting),
            num_interpolate_per_batch=scene.replay_per_batch if setting.insertion else None,
            w_strategy=setting.weight,
            gere_config=GeReConfig(
                replay_dataset=replay,
                replay_heldout=0,  # the scene has texts of its own
                max_length=scene.lengths[1],
                replay_strategy=setting.strategy,
                base_decay=0.0,
                normalization=setting.normalization,
            ),
        )

    def _anchors(self, setting: Setting) -> Path:
        return self.folder / f"anchor-{'l1' if setting.strategy == 'l2' else setting.strategy}"

    def _bytes(self, trainer: Trainer) -> int:
        anchor = trainer.replay.anchor if isinstance(trainer, GeReTrainer) else None
        return sum(path.stat().st_size for path in anchor.folder.iterdir()) if anchor else 0

    def encode(self, row: Row) -> Row:
        """Only the answer is learned; a long prompt loses its beginning, a long answer its end."""
        longest = self.scene.lengths[0]
        prompt = self.tokenizer(row["input"])["input_ids"]
        ids = self.tokenizer(" " + row["output"], add_special_tokens=False)["input_ids"][: longest - 1]
        prompt = prompt[max(0, len(prompt) + len(ids) - longest) :]
        return {
            "input_ids": prompt + ids,
            "attention_mask": [1] * (len(prompt) + len(ids)),
            "labels": [-100] * len(prompt) + ids,
        }

    @torch.no_grad()
    def _task(self, model: Any) -> tuple[float, float]:
        """Share of answer tokens that are the likeliest of the whole vocabulary, and their mean loss."""
        model.eval()
        device = next(model.parameters()).device
        right, total, tokens = 0, 0.0, 0
        for start in range(0, len(self.scene.dev), 25):
            rows = [self.encode(row) for row in self.scene.dev[start : start + 25]]
            batch = DataCollatorForSeq2Seq(self.tokenizer)(rows).to(device)
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
            answered = labels != -100
            right += int((logits.argmax(dim=-1) == labels)[answered].sum())
            total += float(F.cross_entropy(logits[answered], labels[answered], reduction="sum"))
            tokens += int(answered.sum())
        return right / tokens, total / tokens


def add_scene(parser: argparse.ArgumentParser, *, heldout: int) -> None:
    """Add the options that a scene is read from; `heldout` is the default of one."""
    add = parser.add_argument
    add("--model", default=str(TINY))
    add("--task-file", type=Path, default=DATA / "task.jsonl")
    add("--dev-file", type=Path, default=DATA / "task.jsonl")
    add("--general-file", type=Path, default=DATA / "general.jsonl")
    add("--steps", type=int, default=30)
    add("--batch-size", type=int, default=16)
    add("--replay-per-batch", type=int, default=4)
    add("--dev-rows", type=int, default=100)
    add("--heldout", type=int, default=heldout, help="general texts that are held out")
    add("--task-length", type=int, default=40)
    add("--general-length", type=int, default=64)
    add("--rates", type=float, nargs=2, default=(5e-4, 4e-3), metavar=("FULL", "LORA"), help="learning rates")


def scene_of(options: argparse.Namespace) -> Scene:
    """Read what all points share."""
    texts = [row["text"] for row in read_jsonl(options.general_file)]
    return Scene(
        model=options.model,
        task=read_jsonl(options.task_file),
        dev=read_jsonl(options.dev_file)[: options.dev_rows],
        replay=texts[: -options.heldout],
        heldout=texts[-options.heldout :],
        steps=options.steps,
        batch=options.batch_size,
        replay_per_batch=options.replay_per_batch,
        lengths=(options.task_length, options.general_length),
        rates=dict(zip(("full", "lora"), options.rates, strict=True)),
    )


def require_same_scene(path: Path, *scene: object) -> None:
    """Refuse to add runs to those of another model, other texts or another length."""
    digest = hashlib.sha256(repr(scene).encode()).hexdigest()
    if path.is_file() and json.loads(path.read_text())["sha256"] != digest:
        raise SystemExit(f"{path.parent} holds runs of another scene (model, texts, steps, rates); use another --out")
    path.write_text(json.dumps({"sha256": digest}))


def with_lora(model: PreTrainedModel) -> Any:
    """Put an adapter on all linear layers."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def read_jsonl(path: Path) -> list[Row]:
    """Records of a file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]
