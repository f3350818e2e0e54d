"""Compare ways to train a sequence of LoRA tasks: OP, BWT and general change by `gere sequence`, over seeds.

    python -m benchmarks.kif_table --config seq.yaml --out runs/kif --seeds 0 1 2

`seq.yaml` has what all ways share: model, tasks, lora, training, `general`; and a section `gere` with replay_dataset
for the two ways that replay general texts. Each run resumes after a kill. The page of the report is in `--out`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer

from gere._files import read_settings
from gere.continual import run
from gere.continual.trainers import plain_trainer
from gere.report import make_report

WAYS: dict[str, dict[str, Any]] = {
    "SeqLoRA": {"trainer": "plain"},
    "memory replay": {"trainer": "benchmarks.kif_table:memory_trainer", "kif": {"preset": "paper"}},
    "TaSL": {"trainer": "kif", "kif": {"preset": "tasl"}},
    "KIF paper": {"trainer": "kif", "kif": {"preset": "paper"}},
    "KIF code": {"trainer": "kif", "kif": {"preset": "code"}},
    "GeRe": {"trainer": "gere"},
    "KIF + GeRe": {"trainer": "kif", "kif": {"preset": "paper"}},
}
REPLAYS = ("GeRe", "KIF + GeRe")


def memory_trainer(
    model: Any,
    tokenizer: Any,
    train_rows: Sequence[Any],
    args: Any,
    *,
    kif_memory: Any,
    **_: Any,
) -> Trainer:
    """Make a plain trainer over the rows of the task and those of the memory, each once an epoch."""
    rows = [*train_rows, *(dict(row.row) for row in kif_memory.rows)]
    return plain_trainer(model, tokenizer, rows, args)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, required=True, help="YAML or JSON with what all ways share")
    add("--out", type=Path, required=True, help="folder of the runs")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    return parser.parse_args(words)


def settings_of(shared: dict[str, Any], way: str, seed: int, out: Path) -> dict[str, Any]:
    """Settings of one run."""
    common = {name: value for name, value in shared.items() if name not in ("kif", "gere", "trainer", "settings")}
    given = {**common, **WAYS[way], "seed": seed, "name": way, "out": str(out)}
    if "kif" in given:
        # Settings that all KIF ways share, such as inner_steps, may stand in the file.
        given["kif"] = {**shared.get("kif", {}), **given["kif"]}
    if way in REPLAYS:
        given["gere"] = shared["gere"]
    return given


def main() -> None:
    """Run what is left to run, and print the table."""
    options = parse_arguments()
    shared, folders = read_settings(options.config), []
    for seed in options.seeds:
        for way in options.ways:
            out = options.out / f"{way.replace(' ', '-').lower()}-seed-{seed}"
            run(settings_of(shared, way, seed, out))
            folders.append(out)
    report = make_report(folders)
    (options.out / "report.html").write_text(report.html, encoding="utf-8")
    sys.stdout.write(report.markdown)


if __name__ == "__main__":
    main()
