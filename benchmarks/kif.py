"""Measure what Recurrent-KIF adds to a step of LoRA training, on the very same rows, the outer steps counted apart.

    python -m benchmarks.kif --steps 16 --rounds 5
    python -m benchmarks.kif --model MODEL --rank 8 --length 128

Both sides train from the same weights, in turns, a whole training each. Seconds are CPU time on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from benchmarks.lib import TINY
from benchmarks.lib.timing import Spread, interleaved, ratios, table
from gere import KIFConfig, RecurrentKIFTrainer, TaskMemory
from gere.kif import PRESETS


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(TINY), help="folder of a causal language model")
    add("--rank", type=int, default=8, help="rank of LoRA on q_proj and v_proj")
    add("--preset", choices=sorted(PRESETS), default="paper")
    add("--batch-size", type=int, default=8, help="rows of a step, and of an outer step")
    add("--length", type=int, default=32, help="tokens of every row")
    add("--steps", type=int, default=16, help="steps of a training")
    add("--rounds", type=int, default=5, help="trainings of each side")
    return parser.parse_args(words)


class _Stopwatch(TrainerCallback):
    """Seconds of a training, and of what comes between two callbacks at the end of each step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.begun, self.whole, self.apart = clock, 0.0, 0.0, 0.0

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        self.begun = self.clock()

    def on_train_end(self, *given: Any, **named: Any) -> None:
        self.whole = self.clock() - self.begun

    def on_step_end(self, *given: Any, **named: Any) -> None:
        self.apart -= self.clock()


class _Last(TrainerCallback):
    def __init__(self, first: _Stopwatch) -> None:
        self.first = first

    def on_step_end(self, *given: Any, **named: Any) -> None:
        self.first.apart += self.first.clock()


def main() -> None:
    """Measure, and print a table."""
    options = parse_arguments()
    cuda = torch.cuda.is_available()
    random = torch.Generator().manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(options.model)
    ids = torch.randint(3, base.config.vocab_size, (256, options.length), generator=random).tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ids]
    memory = TaskMemory().add("earlier", rows, ["x"] * len(rows), share=0.1)
    apart: list[float] = []

    def side(cls: type[Trainer], **settings: Any) -> Callable[[], float]:
        def measure() -> float:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_pretrained(options.model)
            lora = LoraConfig(r=options.rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            with tempfile.TemporaryDirectory() as folder:
                args = TrainingArguments(
                    folder,
                    max_steps=options.steps,
                    per_device_train_batch_size=options.batch_size,
                    learning_rate=1e-4,
                    save_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                )
                trainer = cls(get_peft_model(model, lora), args, default_data_collator, rows, **settings)
                watch = _Stopwatch(time.perf_counter if cuda else time.process_time)
                trainer.callback_handler.callbacks.insert(0, watch)
                trainer.add_callback(_Last(watch))
                trainer.train()
            if settings:
                apart.append(watch.apart)
            return watch.whole

        return measure

    config = KIFConfig.preset(options.preset, outer_batch=options.batch_size)
    plain, ours = interleaved(
        [side(Trainer), side(RecurrentKIFTrainer, kif_config=config, kif_memory=memory)], options.rounds
    )
    inner = [whole - outer for whole, outer in zip(ours, apart[-len(ours) :], strict=True)]
    outer_steps = options.steps // config.inner_steps * config.outer_steps if config.needs_memory else 0
    shown: dict[str, Spread] = {
        "inner steps over plain training": ratios(inner, plain),
        f"with outer steps ({outer_steps} beside {options.steps}) and fusions": ratios(ours, plain),
    }
    sys.stdout.write(table(["seconds", "ratio"], [(name, ratio.show(2)) for name, ratio in shown.items()]))


if __name__ == "__main__":
    main()
