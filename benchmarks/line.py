"""Train each way with and without base decay, and walk each result back along the line to the base.

    python -m benchmarks.line --model MODEL --task-file task.jsonl --dev-file dev.jsonl --general-file general.jsonl \
        --ways plain mixed ce tm l2 --decays 0 0.7 1.6 --seeds 0 1 2 --out OUT

`plain` is Trainer, `mixed` is Trainer on the same rows as one data set: what `datasets.interleave_datasets` gives.
Records are as in `benchmarks.strategies`. Runs that OUT/line.jsonl holds are not done again; the table goes to
OUT/line.md: at each share of the line the task accuracy, the task loss and the general change. With `--questions FILE`
the multiple-choice accuracy is measured, too, at the shares of `--asked`. OUT/line-REGIME.svg has a curve for each way
and base decay. `--report` makes table and pictures of the runs that OUT/line.jsonl holds, and trains nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, set_seed

from benchmarks.lib.experiment import Bench, Row, Scene, add_scene, read_jsonl, require_same_scene, scene_of, with_lora
from benchmarks.lib.timing import table
from gere import GeReConfig, GeReTrainer
from gere.blend import TrainedWeights, find_base, go_to
from gere.cache.fingerprint import weights_digest
from gere.evaluation import Question, choice_accuracy, read_questions
from gere.ranks import ALONE

SCORES = ("accuracy", "task_loss", "general_loss")
# Strategy and weight of each way; the margin is divided as the weight asks for.
WAYS = {
    "plain": ("none", "auto"),
    "mixed": ("none", "auto"),
    "ce": ("ce", "auto"),
    "tm": ("tm", "auto"),
    "tm-1": ("tm", "1"),
    "l2": ("l2", "auto"),
    "kl": ("kl", "auto"),
}


def parse_arguments() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_scene(parser, heldout=64)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--ways", nargs="+", default=["plain", "mixed", "ce", "tm"], choices=WAYS)
    add("--decays", type=float, nargs="+", default=[0.0, 0.7, 1.6])
    add("--regimes", nargs="+", default=["full"], choices=["full", "lora"])
    add("--seeds", type=int, nargs="+", default=[0])
    add("--shares", type=float, nargs="+", default=[1.0, 0.85, 0.7, 0.6, 0.5, 0.3])
    add("--questions", type=Path, help="multiple-choice questions; 200 of them are asked")
    add("--asked", type=float, nargs="+", default=[1.0], help="shares at which they are asked")
    add("--report", action="store_true", help="train nothing; make table and pictures again")
    return parser.parse_args()


class LineBench(Bench):
    """Trains a way and measures its line.

    Args:
        scene: As for `Bench`.
        folder: As for `Bench`.
        shares: Shares of the line to score, from the tuned model to the base.
        questions: What is asked at the shares of `asked`.
        asked: Some of `shares`.
    """

    def __init__(
        self,
        scene: Scene,
        folder: Path,
        shares: Sequence[float],
        questions: Sequence[Question],
        asked: Sequence[float],
    ) -> None:
        super().__init__(scene, folder)
        self.shares = shares
        self.questions = questions
        self.asked = asked

    def base(self) -> Row:
        """Score the base model."""
        model = self.load()
        return {**self.score(model), **self.ask(model)}

    def ask(self, model: Any) -> dict[str, float]:
        """Accuracy on the questions; nothing where there are none."""
        if not self.questions:
            return {}
        return {"questions": choice_accuracy(model, self.tokenizer, self.questions).accuracy}

    def line(self, way: str, decay: float, regime: str, seed: int) -> list[Row]:
        """Train, and score the model at each share.

        Args:
            way: A key of `WAYS`.
            decay: `gere_config.base_decay`.
            regime: `"full"` or `"lora"`.
            seed: Seed of the order of rows and of LoRA.
        """
        set_seed(seed)
        model: Any = self.load()
        digest = weights_digest(model)
        if regime == "lora":
            model = with_lora(model)
        with tempfile.TemporaryDirectory() as out:
            self.trainer_of(model, way, decay, regime, seed, out).train()
        trained = TrainedWeights(model, lambda: find_base(model, self.folder, digest, ALONE))
        tuned = trained.copies()
        points = []
        for share in self.shares:
            go_to(trained, tuned, share)
            answers = self.ask(model) if share in self.asked else {}
            points.append({"share": share, **self.score(model), **answers})
        return points

    def trainer_of(self, model: Any, way: str, decay: float, regime: str, seed: int, out: str) -> GeReTrainer:
        """Make the trainer of a way."""
        scene, (strategy, weight) = self.scene, WAYS[way]
        replay = scene.replay[: scene.replay_per_batch * scene.steps]
        own = scene.batch if way == "plain" else scene.batch - scene.replay_per_batch
        rows = [*itertools.islice(itertools.cycle(map(self.encode, scene.task)), own * scene.steps)]
        if way == "mixed":
            texts = itertools.islice(itertools.cycle(replay), scene.replay_per_batch * scene.steps)
            rows += map(self._general, texts)
        return GeReTrainer(
            model=model,
            args=self.arguments(regime, seed, out),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(self.tokenizer),
            processing_class=self.tokenizer,
            gere_hidden_state_saving_dir=self.folder,
            num_interpolate_per_batch=scene.replay_per_batch,
            w_strategy=weight,
            gere_config=GeReConfig(
                replay_dataset=replay,
                replay_heldout=0,  # the scene has texts of its own
                max_length=scene.lengths[1],
                replay_strategy=strategy,
                base_decay=decay,
            ),
        )

    def _general(self, text: str) -> Row:
        ids = self.tokenizer(text)["input_ids"][: self.scene.lengths[1]]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}


def grouped(runs: Sequence[Row]) -> dict[tuple[str, str, float], list[Row]]:
    """Return the runs of each regime, way and base decay: one for each seed."""
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for run in runs:
        groups.setdefault((run["regime"], run["way"], run["decay"]), []).append(run)
    return groups


def report(base: Row, runs: Sequence[Row]) -> str:
    """Markdown: a row for each way, regime and decay, means over seeds."""
    shares = [point["share"] for point in runs[0]["line"]]
    rows = []
    for (regime, way, decay), group in grouped(runs).items():
        cells = []
        for place in range(len(shares)):
            points = [run["line"][place] for run in group]
            accuracy, loss, general = (statistics.mean(point[name] for point in points) for name in SCORES)
            change = general - base["general_loss"]
            cell = f"{accuracy:.3f} / {loss:.3f} / {change:+.3f}"
            if all("questions" in point for point in points):
                cell += f" / {statistics.mean(point['questions'] for point in points):.3f}"
            cells.append(cell)
        rows.append((regime, way, f"{decay:g}", str(len(group)), *cells))
    head = ("regime", "way", "base decay", "seeds", *(f"share {share:g}" for share in shares))
    asked = f", questions {base['questions']:.3f}" if "questions" in base else ""
    return (
        f"Base model: accuracy {base['accuracy']:.3f}, task loss {base['task_loss']:.3f}, general loss "
        f"{base['general_loss']:.3f}{asked}.\nCells: task accuracy / task loss / general change, and accuracy on the "
        f"questions where they were asked.\n\n{table(head, rows)}\n"
    )


def draw(base: Row, runs: Sequence[Row], path: Path) -> None:
    """Draw the line of each way and base decay as SVG, means over seeds; the tuned end of each is its large point."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "gere"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    groups = grouped(runs)
    ways, decays = ([*dict.fromkeys(key[place] for key in groups)] for place in (1, 2))
    for (_, way, decay), group in groups.items():
        points = zip(*(run["line"] for run in group), strict=True)
        changes, losses = zip(*(map(partial(_mean, base), points)), strict=True)
        style = "-" if decay else ":"
        size = 30 + 60 * decays.index(decay)
        label = f"{way}, base decay {decay:g}" if decay else way
        axes.plot(changes, losses, style, color=f"C{ways.index(way)}", marker=".", ms=4, label=label)
        axes.scatter(changes[:1], losses[:1], s=size, color=f"C{ways.index(way)}")
    axes.set(xlabel="forgotten: general change on held-out texts (nats)", ylabel="task loss", title=path.stem)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _mean(base: Row, points: Sequence[Row]) -> tuple[float, float]:
    change = statistics.mean(point["general_loss"] - base["general_loss"] for point in points)
    return change, statistics.mean(point["task_loss"] for point in points)


def main() -> None:
    """Train what is missing, and write table and pictures."""
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report:
        train_missing(options)
    base, runs = json.loads((options.out / "base.json").read_text()), read_jsonl(options.out / "line.jsonl")
    for regime in dict.fromkeys(run["regime"] for run in runs):
        try:
            draw(base, [run for run in runs if run["regime"] == regime], options.out / f"line-{regime}.svg")
        except ModuleNotFoundError as error:
            sys.stderr.write(f'No picture is drawn: {error}; pip install ".[bench]"\n')
    text = report(base, runs)
    (options.out / "line.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def train_missing(options: argparse.Namespace) -> None:
    """Train and score what OUT/line.jsonl does not hold."""
    scene = scene_of(options)
    questions = read_questions(options.questions, 200) if options.questions else []
    require_same_scene(options.out / "scene.json", scene, options.shares, questions, options.asked)
    bench = LineBench(scene, options.out / "anchors", options.shares, questions, options.asked)
    file, start = options.out / "line.jsonl", options.out / "base.json"
    if not start.is_file():
        start.write_text(json.dumps(bench.base()))
    runs = read_jsonl(file) if file.is_file() else []
    done = {tuple(run[name] for name in ("way", "decay", "regime", "seed")) for run in runs}
    for seed, regime, decay, way in itertools.product(options.seeds, options.regimes, options.decays, options.ways):
        if (way, decay, regime, seed) in done:
            continue
        line = bench.line(way, decay, regime, seed)
        runs.append({"way": way, "decay": decay, "regime": regime, "seed": seed, "line": line})
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(runs[-1]) + "\n")
        sys.stderr.write(f"{regime} {way}, base decay {decay:g}, seed {seed}: {line[0]}\n")


if __name__ == "__main__":
    main()
