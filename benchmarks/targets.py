"""Judge the stored targets on a model: shares of the regions by bands, and what the likeliest tokens miss of KL.

    python -m benchmarks.targets --model MODEL --general-file general.jsonl --task-file task.jsonl

The divergence is measured twice, to a model that is trained on the task for some steps: on its kept tokens, and whole.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.lib.experiment import read_jsonl
from benchmarks.lib.timing import table
from gere.losses import regions, top_k_kl, top_logits
from gere.losses.bands import BandRule, MeanStd, Quantiles

RULES: tuple[BandRule, ...] = (*(MeanStd(width, 1e-3) for width in (0.5, 1.0, 1.5, 2.0)), Quantiles(0.16, 0.84))
KEPT = (1, 16, 64, 256)
TEMPERATURE = 2.0


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--general-file", type=Path, required=True)
    parser.add_argument("--task-file", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="of plain training on the task")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    return parser.parse_args()


def shares(states: torch.Tensor) -> str:
    """Table of the negative, neutral and positive share of all elements, by rule."""
    lines = []
    for rule in RULES:
        bands = rule.bands([rule.summary(states, 1.0, 0)], torch.zeros(states.shape[-1]))
        code = regions(states, bands.lower, bands.upper)
        found = [f"{100 * (code == side).float().mean().item():.1f} %" for side in (-1, 0, 1)]
        lines.append([str(rule).split(",")[0], *found])
    return table(("bands", "negative", "neutral", "positive"), lines)


def train(model: Any, rows: list[torch.Tensor], steps: int, rate: float) -> None:
    """Plain training on one row a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for ids in (rows * steps)[:steps]:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@torch.no_grad()
def missed(base: Any, tuned: Any, rows: list[torch.Tensor]) -> str:
    """Table by number of kept tokens: mass of the rest, divergence that is seen, and its share of the whole one."""
    pairs = [(base(ids).logits, tuned(ids).logits, torch.ones_like(ids)) for ids in rows]

    def divergence(top_k: int) -> float:
        found = [top_k_kl(now, top_logits(then, top_k, TEMPERATURE), mask, TEMPERATURE) for then, now, mask in pairs]
        return torch.cat(found).mean().item()

    whole = divergence(pairs[0][0].shape[-1])
    lines = []
    for top_k in KEPT:
        rest = torch.cat([top_logits(then, top_k, TEMPERATURE).rest.exp().flatten() for then, _, _ in pairs]).mean()
        seen = divergence(top_k)
        lines.append([top_k, f"{rest:.3f}", f"{seen:.4f}", f"{whole:.4f}", f"{100 * (1 - seen / whole):.1f} %"])
    return table(("tokens kept", "mass of the rest", "divergence seen", "whole", "missed"), lines)


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    def encode(texts: list[str]) -> list[torch.Tensor]:
        return [torch.tensor([tokenizer(text)["input_ids"][: options.length]]) for text in texts]

    general = encode([row["text"] for row in read_jsonl(options.general_file)[: options.texts]])
    task = encode([row["input"] + " " + row["output"] for row in read_jsonl(options.task_file)[: options.steps]])
    with torch.no_grad():
        hidden = [model(ids, output_hidden_states=True).hidden_states for ids in general]
    middle = len(hidden[0]) // 2
    for name, layer in (("last layer", -1), (f"layer {middle}", middle)):
        sys.stdout.write(f"{name}:\n\n{shares(torch.cat([states[layer][0] for states in hidden]))}\n")
    tuned = copy.deepcopy(model)
    train(tuned, task, options.steps, options.rate)
    sys.stdout.write(missed(model, tuned.eval(), general))


if __name__ == "__main__":
    main()
