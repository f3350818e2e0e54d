"""A plain trainer and one with replay that see the very same rows in the same micro-batches."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)

from benchmarks.lib import TINY
from benchmarks.lib.experiment import read_jsonl
from benchmarks.lib.turns import Timed
from gere import GeReConfig, GeReTrainer
from gere.replay.rows import tokenize
from gere.sampler import BatchInsertionSampler, parent_order

SIDES = PLAIN, OURS = "Trainer", "GeReTrainer"
REPLAY_ROWS = 32
# hidden size, layers, heads, key-value heads, intermediate size, vocabulary
SIZES = {
    "tiny": (64, 2, 4, 2, 128, 1000),
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "3b": (3072, 28, 24, 8, 8192, 128256),
}


class Pair:
    """Makes the trainers of both sides.

    Args:
        options: Of `benchmarks.step`.
        steps: Optimizer steps.
    """

    def __init__(self, options: argparse.Namespace, steps: int) -> None:
        self.options = options
        self.steps = steps
        tokens = options.model if options.random is None else str(TINY)
        self.tokenizer = AutoTokenizer.from_pretrained(tokens)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        texts = [row["text"] for row in read_jsonl(options.general_file)]
        self.config = GeReConfig(
            replay_heldout=0,
            max_length=options.length,
            replay_strategy=options.strategy,
            base_decay=options.base_decay,
        )
        self.replay = long_texts(texts, self.tokenizer, options.length, REPLAY_ROWS)
        self.task = self._task_rows(texts)

    def trainer(self, side: str) -> Any:
        """Make a trainer with its own model."""
        options = self.options
        args = TrainingArguments(
            output_dir=str(options.folder / "out"),
            max_steps=self.steps,
            per_device_train_batch_size=options.micro_batch_size,
            gradient_accumulation_steps=options.batch_size // options.micro_batch_size,
            learning_rate=1e-5,
            logging_steps=10,
            logging_first_step=True,  # the first log imports modules, which must not count for one side
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not options.cuda,
        )
        collator = DataCollatorForSeq2Seq(self.tokenizer)
        shared = {"model": self._model(), "args": args, "data_collator": collator, "processing_class": self.tokenizer}
        if side == OURS and not options.null:
            return _Ours(
                **shared,
                train_dataset=self.task,
                gere_hidden_state_saving_dir=options.folder / "anchor",
                num_interpolate_per_batch=options.replay_per_batch,
                w_strategy=options.w_strategy,
                gere_config=dataclasses.replace(self.config, replay_dataset=self.replay),
            )
        rows = self.task + [_row(ids) for ids in tokenize(self.replay, self.tokenizer, self.config)]
        plain = _Plain(**shared, train_dataset=rows)
        plain.order = _Order(list(self._order(args.seed)))
        return plain

    def _order(self, seed: int) -> BatchInsertionSampler:
        """Rows as the trainer with replay takes them."""
        options = self.options
        return BatchInsertionSampler(
            len(self.task),
            len(self.replay),
            batch_size=options.batch_size,
            replay_per_batch=options.replay_per_batch,
            seed=seed,
            micro_batch_size=options.micro_batch_size,
            task_order=parent_order(RandomSampler(self.task), seed),
            replay_lengths=[options.length] * len(self.replay),
        )

    def _model(self) -> PreTrainedModel:
        dtype = torch.bfloat16 if self.options.bf16 else torch.float32
        if self.options.random is None:
            model = AutoModelForCausalLM.from_pretrained(self.options.model, dtype=dtype)
        else:
            torch.manual_seed(0)
            with torch.device("cuda" if self.options.cuda else "cpu"):  # a large model takes long to fill on a CPU
                model = LlamaForCausalLM(_llama(self.options.random)).to(dtype)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def _task_rows(self, texts: Sequence[str]) -> list[dict[str, list[int]]]:
        """One epoch of rows of the asked length, cut from the texts in a row."""
        wanted = (self.options.batch_size - self.options.replay_per_batch) * self.steps
        ids = [token for text in texts for token in self.tokenizer(text, verbose=False)["input_ids"]]
        length = self.options.length
        rows = [_row(ids[start : start + length]) for start in range(0, len(ids) - length, length)]
        return (rows * -(-wanted // len(rows)))[:wanted]


class _Order(Sampler[int]):
    def __init__(self, order: Sequence[int]) -> None:
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)


class _Plain(Timed):
    order: _Order

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self.order


class _Ours(Timed, GeReTrainer):
    pass


def long_texts(texts: Sequence[str], tokenizer: Any, length: int, count: int) -> list[str]:
    """Join texts until each has at least `length` tokens; `count` of them."""
    found: list[str] = []
    text, place = "", 0
    while len(found) < count:
        text = f"{text}\n{texts[place % len(texts)]}" if text else texts[place % len(texts)]
        place += 1
        if len(tokenizer(text, verbose=False)["input_ids"]) >= length:
            found, text = [*found, text], ""
    return found


def _row(ids: list[int]) -> dict[str, list[int]]:
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}


def _llama(size: str) -> LlamaConfig:
    hidden, layers, heads, key_value_heads, inner, vocabulary = SIZES[size]
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )
