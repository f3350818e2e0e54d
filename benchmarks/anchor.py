"""Measure the cost of making an anchor: against the plainest way, by processes, by size, and in memory.

    python -m benchmarks.anchor --model MODEL --texts general.jsonl --count 24

The plainest way runs one text at a time with all states and all logits, keeps the last state in float32 by pickle, and
does so on every process. Without a model: a random Llama and random tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.anchor_sides import Made, Setup, bare, build, naive, on_ranks, peak_bytes
from benchmarks.lib.timing import ratios, spread, table

SECTIONS = ("speed", "ranks", "growth", "memory")
VOCABULARIES = (8192, 16384, 32768)


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder or name")
    parser.add_argument("--texts", type=Path, help="file of records of `text`")
    parser.add_argument("--count", type=int, default=24, help="texts")
    parser.add_argument("--max-length", type=int, default=563, help="longest row in tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default=device)
    parser.add_argument("--dtype", default="bfloat16" if device == "cuda" else "float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="over all processes")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: where other work runs beside")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS)
    return parser.parse_args()


def speed(setup: Setup, options: argparse.Namespace, folder: Path) -> str:
    """Texts a second of both ways, and of the forward passes that both must do."""
    model, rows = setup.load(), setup.rows(options.count)
    naive(model, rows[:2], folder / "first", setup.clock)
    rounds = [
        [way(model, rows, folder / f"{way.__name__}-{turn}", setup.clock) for way in (naive, build, bare)]
        for turn in range(options.repeats)
    ]
    plain, ours, floor = zip(*rounds, strict=True)
    without = [made._replace(seconds=made.seconds - made.fixed) for made in ours]
    real = sum(map(len, rows))
    flops = 2 * sum(p.numel() for p in model.parameters())

    def line(name: str, sides: Sequence[Made], noise: bool = True) -> list[str]:
        rate = spread([len(rows) / made.seconds for made in sides]).show()
        ratio = ratios([made.seconds for made in plain], [made.seconds for made in sides]).show(2)
        work = sides[0].work
        per_second = spread([flops * work["tokens"] / made.seconds / 1e9 for made in sides]).median
        counts = [""] * 4
        if noise:
            shares = [f"{work[kind] / real:.2f}" for kind in ("tokens", "logits")]
            counts = [*shares, str(work["forwards"]), f"{per_second:.0f}"]
        return [name, rate, ratio, *counts, f"{sides[0].size / len(rows):.0f}"]

    head = ("way", "texts a second", "ratio", "tokens", "logits", "forwards", "GFLOP/s", "bytes a text")
    lines = [line("plain", plain), line("gere", ours), line("gere, noise apart", without, noise=False)]
    lines.append(line("forward passes alone", floor))
    return f"{len(rows)} texts, {real} tokens\n\n" + table(head, lines)


def shares(setup: Setup, options: argparse.Namespace, folder: Path) -> str:
    """Tokens and seconds of each of 1 and 2 processes."""
    lines = []
    for count in (1, 2):
        for rank, (ours, plain) in enumerate(on_ranks(setup, options.count, options.threads, folder, count)):
            figures = [made.work["tokens"] for made in (ours, plain)]
            seconds = [f"{s:.2f}" for s in (ours.seconds, ours.seconds - ours.fixed, plain.seconds)]
            ratio = f"{plain.seconds / ours.seconds:.2f}"
            lines.append([count, rank, *figures, *seconds, ratio])
    head = ("processes", "rank", "tokens", "tokens, plain", "s", "s, noise apart", "s, plain", "ratio")
    return table(head, lines)


def growth(setup: Setup, options: argparse.Namespace, folder: Path) -> str:
    """Seconds by texts, length and vocabulary, with the measurement of the noise apart."""
    count, longest = options.count, options.max_length
    model, rows = setup.load(), setup.rows(count)
    cases: list[tuple[str, int, Any, list[list[int]]]] = []
    for size in (count // 4, count // 2, count):
        cases.append(("texts", size, model, setup.rows(size)))
    for cut in (longest // 4, longest // 2, longest):
        cases.append(("length", cut, model, [_stretched(row, cut) for row in rows]))
    for size in VOCABULARIES:
        random = setup._replace(model="", vocabulary=size)
        cases.append(("vocabulary", size, random.load(), random.rows(count)))
    first: dict[str, tuple[float, float]] = {}
    lines = []
    for name, size, own, texts in cases:
        folders = [folder / f"{name}-{size}-{turn}" for turn in range(options.repeats)]
        made = [build(own, texts, into, setup.clock) for into in folders]
        seconds = spread([one.seconds - one.fixed for one in made])
        least, of_least = first.setdefault(name, (size, seconds.median))
        linear = seconds.median / of_least / (size / least)
        lines.append([name, size, made[0].work["tokens"], seconds.show(2), f"{linear:.2f}"])
    return table(("what grows", "size", "tokens", "s", "over linear"), lines)


def _stretched(row: list[int], length: int) -> list[int]:
    return (row * (length // len(row) + 1))[:length]


def memory(setup: Setup, options: argparse.Namespace, folder: Path) -> str:
    """Peak memory of a fresh process, by number of texts."""
    lines = []
    for count in (options.count, 2 * options.count, 4 * options.count):
        peak, before = peak_bytes(setup, count, options.threads, folder)
        lines.append([count, *(f"{size / 2**20:.0f}" for size in (before, peak, peak - before))])
    return table(("texts", "MiB before", "MiB at most", "MiB more"), lines)


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    setup = Setup(options.model, options.texts, options.max_length, options.dtype, options.device, options.clock)
    sections = dict(zip(SECTIONS, (speed, shares, growth, memory), strict=True))
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            sys.stdout.write(f"{sections[name](setup, options, Path(folder))}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
