"""Compare the replay strategies by their curves: task accuracy over held-out general loss, in full and by LoRA.

    python -m benchmarks.strategies --model MODEL --steps 30 --seeds 0 1 2 --out OUT \
        --task-file task.jsonl --dev-file dev.jsonl --general-file general.jsonl

Task records have `input` and `output`, general records `text`; the last `--heldout` general texts are held out.
Runs that OUT/runs.jsonl holds are not done again. The tables go to OUT/table.md, the plots beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.curves import Point, plot, points_of, summary, table
from benchmarks.lib.experiment import Bench, Scene, Setting, add_scene, read_jsonl, require_same_scene, scene_of

# At least four fixed weights for each distance, and those that need no number.
GRID = {
    ("none", "violations"): ("0",),
    ("ce", "violations"): ("0",),
    ("tm", "violations"): ("1", "3", "10", "100", "dy", "auto"),
    ("tm", "elements"): ("3", "10", "30", "100", "auto"),
    ("kl", "violations"): ("1", "10", "30", "100", "auto"),
    ("l1", "violations"): ("1", "3", "10", "30", "auto"),
    ("l2", "violations"): ("0.1", "0.3", "1", "10", "auto"),
}
SHUFFLED = (
    ("ce", "violations", "0"),
    *(("tm", "violations", weight) for weight in ("1", "100", "dy", "auto")),
    ("kl", "violations", "10"),
    ("l1", "violations", "3"),
    ("l2", "violations", "1"),
)


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_scene(parser, heldout=48)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--regimes", nargs="+", default=["full", "lora"], choices=["full", "lora"])
    add("--seeds", type=int, nargs="+", default=[0])
    add("--only", nargs="+", choices=sorted({strategy for strategy, _ in GRID}), help="these strategies alone")
    add("--no-shuffled", action="store_true", help="leave out the points without batch insertion")
    add("--workers", type=int, default=1, help="trainings at a time, which share the cores")
    add("--report", action="store_true", help="train nothing, write the tables of what is there")
    return parser.parse_args()


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """All points, one seed after the other."""
    for seed, insertion in itertools.product(options.seeds, (True, False)):
        grid = [(*kind, weight) for kind, weights in GRID.items() for weight in weights] if insertion else SHUFFLED
        if not insertion and options.no_shuffled:
            continue
        for (strategy, normalization, weight), regime in itertools.product(grid, options.regimes):
            if not options.only or strategy in options.only:
                yield Setting(strategy, weight, normalization, regime, insertion, seed)


_bench: list[Bench] = []  # one for each worker process


def start_worker(scene: Scene, folder: Path, threads: int) -> None:
    """Prepare a worker process."""
    torch.set_num_threads(threads)
    _bench.append(Bench(scene, folder))


def work(setting: Setting | None) -> dict[str, Any]:
    """Train one point, or score the untouched model, in a worker process."""
    bench = _bench[0]
    return bench.score(bench.load()) if setting is None else bench.run(setting)


def train(options: argparse.Namespace) -> None:
    """Train what is missing, and add each result to the file as soon as it is there."""
    scene = scene_of(options)
    require_same_scene(options.out / "scene.json", scene)
    file = options.out / "runs.jsonl"
    done = {key_of(run) for run in read_jsonl(file)} if file.is_file() else set()
    missing = [setting for setting in settings(options) if key_of(dataclasses.asdict(setting)) not in done]
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    pool = ProcessPoolExecutor(
        options.workers, multiprocessing.get_context("spawn"), start_worker, (scene, options.out / "anchors", threads)
    )
    with pool, file.open("a", encoding="utf-8") as lines:
        base = options.out / "base.json"
        if not base.is_file():
            base.write_text(json.dumps(pool.submit(work, None).result()))
        jobs = [pool.submit(work, setting) for setting in missing]
        for number, job in enumerate(as_completed(jobs), start=1):
            run = job.result()
            lines.write(json.dumps(run) + "\n")
            lines.flush()
            sys.stderr.write(f"{number}/{len(jobs)} {run['regime']} {run['name']} seed {run['seed']}: accuracy "
                             f"{run['accuracy']:.3f}, general loss {run['general_loss']:.3f}\n")  # fmt: skip


def key_of(run: dict[str, Any]) -> tuple[Any, ...]:
    """Tell one run from another."""
    return tuple(run[field.name] for field in dataclasses.fields(Setting))


def report(options: argparse.Namespace) -> str:
    """Write tables and plots, and return the tables."""
    file = options.out / "runs.jsonl"
    if not file.is_file() or not file.stat().st_size:
        raise SystemExit(f"{options.out} holds no runs; leave out --report")
    runs = sorted(read_jsonl(file), key=order_of)
    base = json.loads((options.out / "base.json").read_text())
    parts = []
    for regime, insertion in itertools.product(("full", "lora"), (True, False)):
        points = points_of(runs, regime, insertion)
        if not points:
            continue
        title = f"{regime}, {'with' if insertion else 'without'} batch insertion"
        parts.append(f"## {title}\n\n{table(points, base)}")
        if insertion:
            parts.append(summary(points, base))
            draw(points, base, title, options.out / f"{regime}.svg")
    text = "\n".join(parts)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    return text


def draw(points: list[Point], base: dict[str, float], title: str, path: Path) -> None:
    """Draw the curves, if the library for it is there."""
    try:
        plot(points, base, title, path)
    except ModuleNotFoundError as error:
        sys.stderr.write(f'{path.name} is not drawn: {error}; pip install ".[bench]"\n')


def order_of(run: dict[str, Any]) -> int:
    """Place of a run in the grid, so that the order of the tables is not that of the workers."""
    names = [Setting(*kind[:1], weight, kind[1]).name for kind, weights in GRID.items() for weight in weights]
    return names.index(run["name"])


def main() -> None:
    """Train and report."""
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report:
        train(options)
    sys.stdout.write(report(options))


if __name__ == "__main__":
    main()
