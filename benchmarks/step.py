"""What a training step costs with replay: `GeReTrainer` over plain `Trainer` on the very same rows.

    python -m benchmarks.step --model MODEL --general-file general.jsonl --length 32 --steps 10
    python -m benchmarks.step --random 1b --bf16 --length 512 --steps 40                          # for a GPU

Both sides train a model of their own in one process and take turns, a step each. The plain side has the replay rows as
ordinary rows of its dataset, in the same steps and micro-batches; all rows have the same length, so that neither side
pads. Peak memory is measured in a fresh process for each side, with the anchor ready.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.memory import process_bytes
from benchmarks.pair import SIDES, SIZES, TINY, Pair
from benchmarks.timing import ratios
from benchmarks.turns import PARTS, Clock, Turns, together

ROOT = Path(__file__).resolve().parents[1]
PLAIN, OURS = SIDES
CALIBRATING = "--w-strategy auto finds its weight in the first 64 replay rows"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(TINY), help="folder of a causal language model")
    add("--random", choices=sorted(SIZES), help="a random Llama of about that size in place of --model")
    add("--general-file", type=Path, default=ROOT / "examples" / "data" / "general.jsonl")
    add("--batch-size", type=int, default=16, help="rows of an optimizer step")
    add("--micro-batch-size", type=int, default=4, help="rows of a forward pass")
    add("--replay-per-batch", type=int, default=4)
    add("--length", type=int, default=32, help="tokens of every row")
    add("--w-strategy", default="auto")
    add("--strategy", default="tm", help="gere_config.replay_strategy")
    add("--warm-up", type=int, default=2, help="steps before the first that counts")
    add("--steps", type=int, default=20, help="steps that count")
    add("--parts", type=int, default=4, help="further steps on a GPU, slower, for the table of where time goes")
    add("--bf16", action="store_true", help="the whole model in bfloat16")
    add("--cpu", action="store_true", help="use the CPU")
    add("--null", action="store_true", help="plain Trainer on both sides: what the measurement itself shows")
    add("--no-memory", action="store_true", help="measure time alone")
    add("--no-time", action="store_true", help="measure memory alone")
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.cuda = torch.cuda.is_available() and not options.cpu
    return options


def time_both(options: argparse.Namespace) -> list[str]:
    """Ratio of the step times, and where the time goes."""
    extra = options.parts if options.cuda else 0
    first = options.warm_up
    last = first + options.steps
    turns = Turns(SIDES)
    clocks = [Clock(side, turns, options.cuda, parts_from=last) for side in SIDES]
    pair = Pair(options, last + extra + 1)  # the last step ends with the training, and is not counted
    trainers = [pair.trainer(side) for side in SIDES]
    for trainer, clock in zip(trainers, clocks, strict=True):
        trainer.watch(clock)
    together({clock.name: trainer.train for clock, trainer in zip(clocks, trainers, strict=True)}, turns)
    for clock in clocks:
        clock.close()
    plain, ours = (clock.seconds[first:last] for clock in clocks)
    lines = [
        "| | ms a step, median | padded tokens a step | calls of the model a step |",
        "| --- | --- | --- | --- |",
        *(f"| {clock.name} | {1e3 * statistics.median(seconds):.1f} | {_one(clock.tokens[first:last])} | "
          f"{_one(clock.calls[first:last])} |" for clock, seconds in zip(clocks, (plain, ours), strict=True)),
        "",
        f"step time, {OURS} / {PLAIN}: {_spread(plain, ours)}",
        "",
    ]  # fmt: skip
    if not options.cuda:
        plain, ours = (clock.work[first:last] for clock in clocks)
        lines[-1:] = [f"CPU time of a step, likewise: {_spread(plain, ours)}", ""]
    known = max(0, -(-64 // options.replay_per_batch) - first) if options.w_strategy == "auto" else 0
    if 0 < known < len(plain):
        lines[-1:] = [f"while {CALIBRATING}: {_spread(plain[:known], ours[:known])}"]
        lines += [f"afterwards: {_spread(plain[known:], ours[known:])}", ""]
    begin, end = (last, last + extra) if extra else (first, last)
    return [*lines, *parts_table(clocks, begin, end), ""]


def parts_table(clocks: list[Clock], begin: int, end: int) -> list[str]:
    """Mean milliseconds of each part of a step, of CPU time on a CPU."""
    lines = [f"| ms of a step, mean | {' | '.join(SIDES)} | more |", "| --- | --- | --- | --- |"]
    for part in PARTS:
        plain, ours = (1e3 * statistics.fmean(step[part] for step in clock.parts[begin:end]) for clock in clocks)
        lines.append(f"| {part} | {plain:.2f} | {ours:.2f} | {ours - plain:+.2f} |")
    return lines


def _spread(plain: list[float], ours: list[float]) -> str:
    whole = statistics.median(ours) / statistics.median(plain)
    return f"{ratios(ours, plain).show()}, median of {len(plain)} pairs of steps; {whole:.3f} by medians"


def _one(counts: list[int]) -> str:
    return " to ".join(str(count) for count in sorted({min(counts), max(counts)}))


def memory_of_both(options: argparse.Namespace, words: list[str]) -> list[str]:
    """Ratio of the peak memory, in a fresh process for each side; a first one builds the anchor."""
    found: dict[str, list[int]] = {side: [] for side in SIDES}
    measure_alone(words, OURS)
    for _ in range(1 if options.cuda else 2):
        for side in SIDES:
            found[side].append(measure_alone(words, side))
    least = {side: min(peaks) for side, peaks in found.items()}
    what = "max_memory_allocated" if options.cuda else "peak resident memory, the smaller of two processes"
    lines = [f"| {what} | MB |", "| --- | --- |"]
    lines += [f"| {side} | {least[side] / 1e6:.1f} |" for side in SIDES]
    return [*lines, "", f"peak memory, {OURS} / {PLAIN}: {least[OURS] / least[PLAIN]:.3f}", ""]


def measure_alone(words: list[str], side: str) -> int:
    """Peak bytes of one side in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", *words, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def one_side(options: argparse.Namespace) -> int:
    """Train one side; peak bytes of this process, or of its GPU."""
    trainer = Pair(options, 3).trainer(options.side)
    trainer.watch(Clock(options.side, Turns([options.side]), options.cuda, parts_from=3))
    trainer.train()
    if options.cuda:
        return int(torch.cuda.max_memory_allocated())
    return process_bytes("VmHWM")


def main() -> None:
    """Measure and print."""
    words = sys.argv[1:]
    options = parse_arguments(words)
    if options.side:
        sys.stdout.write(json.dumps({"peak": one_side(options)}) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.folder is None:
            options.folder, words = Path(folder), [*words, "--folder", folder]
        device = torch.cuda.get_device_name() if options.cuda else f"CPU, {torch.get_num_threads()} thread(s)"
        shape = (
            f"{options.batch_size} rows of {options.length} tokens a step in micro-batches of "
            f"{options.micro_batch_size}, {options.replay_per_batch} of them replayed by {options.strategy}"
        )
        lines = [f"{options.random or Path(options.model).name} on {device}: {shape}", ""]
        if not options.no_memory:
            lines += memory_of_both(options, words)
        if not options.no_time:
            lines += time_both(options)
    sys.stdout.write("\n".join(lines) + f"torch {torch.__version__}, process {os.getpid()}\n")


if __name__ == "__main__":
    main()
