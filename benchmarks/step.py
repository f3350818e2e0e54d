"""Measure what replay adds to a training step: `GeReTrainer` over plain `Trainer` on the very same rows.

    python -m benchmarks.step --model MODEL --general-file general.jsonl --length 32 --steps 10
    python -m benchmarks.step --random 1b --bf16 --length 512 --steps 40 --json step.json         # for a GPU

Both sides train a model of their own in one process and take turns, a step each. The plain side has the replay rows as
ordinary rows of its dataset, in the same steps and micro-batches. All rows have the same length, so that neither side
pads. `--micro-batch-size 4` puts the 4 replay rows into a micro-step of their own, `--micro-batch-size 16` makes a
micro-step with both kinds of rows. Peak memory is measured after time, in a fresh process for each side, with the
anchor ready.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import DATA, ROOT, TINY
from benchmarks.lib.memory import process_bytes
from benchmarks.lib.pair import SIDES, SIZES, Pair
from benchmarks.lib.timing import Spread, ratios, table
from benchmarks.lib.turns import PARTS, Clock, Turns, together

PLAIN, OURS = SIDES
CALIBRATION_ROWS = 64
Figures = dict[str, Any]


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(TINY), help="folder of a causal language model")
    add("--random", choices=sorted(SIZES), help="a random Llama of about that size in place of --model")
    add("--general-file", type=Path, default=DATA / "general.jsonl")
    add("--batch-size", type=int, default=16, help="rows of an optimizer step")
    add("--micro-batch-size", type=int, default=4, help="rows of a forward pass")
    add("--replay-per-batch", type=int, default=4)
    add("--length", type=int, default=32, help="tokens of every row")
    add("--w-strategy", default="auto")
    add("--strategy", default="tm", help="gere_config.replay_strategy")
    add(
        "--base-decay",
        type=float,
        default=0.0,
        help="gere_config.base_decay; judge it by 200 steps, with --null beside",
    )
    add("--warm-up", type=int, default=2, help="steps before the first that counts")
    add("--steps", type=int, default=20, help="steps that count")
    add("--parts", type=int, default=4, help="further steps on a GPU, slower, for the table of where time goes")
    add("--bf16", action="store_true", help="the whole model in bfloat16")
    add("--cpu", action="store_true", help="use the CPU")
    add("--null", action="store_true", help="plain Trainer on both sides: the noise of the measurement")
    add("--no-time", action="store_true", help="measure memory alone")
    add("--no-memory", action="store_true", help="measure time alone")
    add("--json", type=Path, help="file for the figures, written after each part")
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.cuda = torch.cuda.is_available() and not options.cpu
    return options


def measure_time(options: argparse.Namespace) -> Figures:
    """Train both sides in turns: the ratio of their step times, and where the time goes."""
    extra = options.parts if options.cuda else 0
    counted = slice(options.warm_up, options.warm_up + options.steps)
    turns = Turns(SIDES)
    clocks = [Clock(side, turns, options.cuda, parts_from=counted.stop) for side in SIDES]
    pair = Pair(options, counted.stop + extra + 1)  # the last step ends with the training, and is not counted
    trainers = [pair.trainer(side) for side in SIDES]
    for trainer, clock in zip(trainers, clocks, strict=True):
        trainer.watch(clock)
    together({clock.name: trainer.train for clock, trainer in zip(clocks, trainers, strict=True)}, turns)
    for clock in clocks:
        clock.close()
    parts = slice(counted.stop, counted.stop + extra) if extra else counted
    measures = {"step time": [clock.seconds[counted] for clock in clocks]}
    if not options.cuda:
        measures["CPU time of a step"] = [clock.work[counted] for clock in clocks]
    name, (plain, ours) = list(measures.items())[-1]
    known = _calibrating(options)
    if 0 < known < options.steps:
        measures[f"{name} while the weight is calibrated"] = [plain[:known], ours[:known]]
        measures[f"{name} afterwards"] = [plain[known:], ours[known:]]
    return {
        "sides": {clock.name: _figures_of(clock, counted, parts) for clock in clocks},
        "ratios": {name: _ratio(*sides) for name, sides in measures.items()},
    }


def _calibrating(options: argparse.Namespace) -> int:
    """Counted steps in which `--w-strategy auto` still looks for its weight."""
    if options.w_strategy != "auto":
        return 0
    return -(-CALIBRATION_ROWS // options.replay_per_batch) - options.warm_up


def _figures_of(clock: Clock, counted: slice, parts: slice) -> Figures:
    return {
        "step_ms": 1e3 * statistics.median(clock.seconds[counted]),
        "tokens": sorted(set(clock.tokens[counted])),
        "calls": sorted(set(clock.calls[counted])),
        "parts_ms": {part: 1e3 * statistics.fmean(step[part] for step in clock.parts[parts]) for part in PARTS},
    }


def _ratio(plain: Sequence[float], ours: Sequence[float]) -> Figures:
    by_medians = statistics.median(ours) / statistics.median(plain)
    return {**ratios(ours, plain)._asdict(), "pairs": len(plain), "by_medians": by_medians}


def show_time(figures: Figures) -> str:
    """Tables of `measure_time`."""
    sides = figures["sides"]
    rows = [
        [name, f"{side['step_ms']:.1f}", _one(side["tokens"]), _one(side["calls"])] for name, side in sides.items()
    ]
    lines = [table(("", "ms a step, median", "padded tokens a step", "calls of the model a step"), rows)]
    for name, ratio in figures["ratios"].items():
        spread = Spread(ratio["median"], ratio["least"], ratio["most"]).show()
        pairs = f"median of {ratio['pairs']} pairs of steps"
        lines.append(f"{name}, {OURS} / {PLAIN}: {spread}, {pairs}; {ratio['by_medians']:.3f} by medians")
    rows = []
    for part in PARTS:
        plain, ours = (sides[name]["parts_ms"][part] for name in SIDES)
        rows.append([part, f"{plain:.2f}", f"{ours:.2f}", f"{ours - plain:+.2f}"])
    return "\n".join([*lines, "", table(("ms of a step, mean", *SIDES, "more"), rows)])


def _one(counts: Sequence[int]) -> str:
    return " to ".join(str(count) for count in sorted({counts[0], counts[-1]}))


def measure_memory(options: argparse.Namespace, words: list[str]) -> Figures:
    """Peak memory in a fresh process for each side; one before them builds the anchor."""
    found: dict[str, list[int]] = {side: [] for side in SIDES}
    measure_alone(words, OURS)
    for _ in range(1 if options.cuda else 2):
        for side in SIDES:
            found[side].append(measure_alone(words, side))
    least = {side: min(peaks) for side, peaks in found.items()}
    what = "max_memory_allocated" if options.cuda else "peak resident memory, the smaller of two processes"
    return {"what": what, "bytes": least, "ratio": least[OURS] / least[PLAIN]}


def show_memory(figures: Figures) -> str:
    """Tables of `measure_memory`."""
    rows = [[side, f"{size / 1e6:.1f}"] for side, size in figures["bytes"].items()]
    return f"{table((figures['what'], 'MB'), rows)}\npeak memory, {OURS} / {PLAIN}: {figures['ratio']:.3f}\n"


def measure_alone(words: list[str], side: str) -> int:
    """Peak bytes of one side in a fresh process."""
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


def _shape(options: argparse.Namespace) -> str:
    return (
        f"{options.batch_size} rows of {options.length} tokens a step in micro-batches of "
        f"{options.micro_batch_size}, {options.replay_per_batch} of them replayed by {options.strategy}"
    )


def show(text: str) -> None:
    """Write at once, so that a run that is cut off has shown what is done."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Measure and print, time first."""
    words = sys.argv[1:]
    options = parse_arguments(words)
    if options.side:
        show(json.dumps({"peak": one_side(options)}))
        return
    device = torch.cuda.get_device_name() if options.cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    about = {name: value for name, value in vars(options).items() if isinstance(value, str | int)}
    figures: Figures = {"options": about, "device": device, "torch": torch.__version__}

    def finish(part: str, found: Figures, text: str) -> None:
        figures[part] = found
        show(text)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")

    model = options.random or Path(options.model).name
    show(f"{model} on {device}, torch {torch.__version__}: {_shape(options)}\n")
    with tempfile.TemporaryDirectory() as folder:
        if options.folder is None:
            options.folder, words = Path(folder), [*words, "--folder", folder]
        if not options.no_time:
            found = measure_time(options)
            finish("time", found, show_time(found))
        gc.collect()  # the processes below need the memory of the GPU
        torch.cuda.empty_cache()
        if not options.no_memory:
            found = measure_memory(options, words)
            finish("memory", found, show_memory(found))


if __name__ == "__main__":
    main()
