"""The benchmarks run, and their figures are what they say."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import batches, start
from benchmarks.lib import timing
from benchmarks.lib.curves import area, best_accuracy, points_of, summary, table
from gere.cache import Anchor

COMMANDS = {
    "ability": "--model MODEL --tasks task.jsonl",
    "anchor": "--count 8 --only speed",
    "batches": "--steps 2",
    "budget": "--out out --budgets 0.05 --seeds 0 1",
    "dpo": "--out dpo.jsonl --ways replay --seeds 0",
    "line": "--out out --ways plain ce --decays 0 1",
    "start": "--rows 8",
    "step": "--random tiny --json step.json",
    "strategies": "--out out --only tm ce",
    "targets": "--model MODEL --general-file general.jsonl --task-file task.jsonl",
}

BASE = {"general_loss": 1.0, "accuracy": 0.1, "task_loss": 5.0}


def test_every_command_is_named_here():
    found = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main(" in path.read_text()]
    assert sorted(found) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_parses_its_options(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    words = COMMANDS[name].split()
    monkeypatch.setattr(sys, "argv", [name, *words])
    options = vars(module.parse_arguments())
    assert {word[2:].replace("-", "_") for word in words if word.startswith("--")} <= {*options}
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.parse_arguments()
    assert f"python -m benchmarks.{name}" in capsys.readouterr().out


def a_run(name, general, accuracy, *, seed=0, regime="full", insertion=True):
    strategy, _, weight = name.partition(" ")
    return {
        "name": name, "strategy": strategy.split("/")[0], "weight": weight or "0", "regime": regime,
        "insertion": insertion, "seed": seed, "general_loss": general, "accuracy": accuracy, "task_loss": 4.0,
        "seconds": 2.0 + seed, "bytes": 1500,
    }  # fmt: skip


def points(*pairs):
    return points_of([a_run(f"l2 {i}", *pair) for i, pair in enumerate(pairs)], "full", True)


def test_area_by_hand():
    """From (1, .1) to (2, .3) in a line, and level up to 3: the mean of .2 and .3."""
    assert area(points((2.0, 0.3)), (1.0, 0.1), 3.0) == pytest.approx(0.25, abs=1e-3)
    assert area([], (1.0, 0.1), 3.0) == pytest.approx(0.1)
    assert area(points((2.0, 0.3), (2.5, 0.2)), (1.0, 0.1), 3.0) == pytest.approx(0.25, abs=1e-3)
    better = best_accuracy(points((2.0, 0.3), (1.5, 0.3)), (1.0, 0.1), np.array([1.0, 1.25, 1.5, 2.0]))
    np.testing.assert_allclose(better, [0.1, 0.2, 0.3, 0.3])


def test_seeds_are_joined_and_auto_is_judged_by_the_best_curve():
    runs = [a_run("ce", 3.0, 0.3), a_run("l2 1", 2.0, 0.2), a_run("l2 1", 2.0, 0.4, seed=1)]
    runs += [a_run("l2 auto", 1.5, 0.25), a_run("l2 1", 9.0, 0.9, regime="lora"), a_run("l2 1", 9, 0, insertion=False)]
    found = points_of(runs, "full", True)
    assert [(p.name, p.seeds) for p in found] == [("ce", 1), ("l2 1", 2), ("l2 auto", 1)]
    assert found[1].accuracy == pytest.approx(0.3) and found[1].spread[1] == pytest.approx(0.1414, abs=1e-3)
    assert "| l2 1 | 0.300 ± 0.141 | 4.000 | 2.000 ± 0.000 | +1.000 | 2 | 2 | 2 |" in table(found, BASE)
    shown = summary(found, BASE)
    assert "| l2 | 1 | 0.2500 |" in shown and "| l2 auto | 1.500 | 0.2500 | 0.2000 | +0.0500 |" in shown


@pytest.mark.slow
def test_a_comparison_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks.strategies", "--steps", "1", "--heldout", "8", "--no-shuffled"]
    command += ["--regimes", "full", "--only", "ce", "l2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert {run["name"] for run in runs} == {"ce", "l2 0.1", "l2 0.3", "l2 1", "l2 10", "l2 auto"}
    assert "| l2 auto |" in done.stdout and done.stdout.endswith((tmp_path / "table.md").read_text())
    again = subprocess.run([*command, "--batch-size", "8"], capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert again.returncode == 1 and "another --out" in again.stderr


def test_spread_and_turns_by_hand():
    assert timing.spread([3.0, 1.0, 2.0, 9.0]) == (2.5, 1.0, 9.0)
    assert timing.ratios([2.0, 3.0, 8.0], [1.0, 3.0, 2.0]).show(1) == "2.0 (1.0 to 4.0)"
    calls = []

    def side(name):
        return lambda: calls.append(name) or float(len(calls))

    assert timing.interleaved([side("a"), side("b")], 2) == [[3.0, 6.0], [4.0, 5.0]]
    assert "".join(calls) == "ba" + "ab" + "ba", "a slow moment must not always meet the same side"


def test_padding_by_hand():
    """Long and short rows in pairs: pairs of one length have no padding, a mixed one has 10 real tokens of 18."""
    options = argparse.Namespace(batch_size=4, micro_batch_size=2, replay_per_batch=2, steps=40)
    task, replay = [9, 1] * 8, [1, 9] * 4
    task_any, replay_grouped = batches.shares(options, task, replay, group_task=False, group_replay=True)
    task_grouped, replay_any = batches.shares(options, task, replay, group_task=True, group_replay=False)
    assert 10 / 18 < replay_any < replay_grouped == 1.0
    assert 10 / 18 < task_any < task_grouped


def test_an_anchor_of_random_codes_is_read_as_one(tmp_path):
    start.make_anchor(tmp_path, rows=7, length=5, dim=10)
    anchor = Anchor(tmp_path)
    assert anchor.rows == 7 and {anchor.targets(row)["codes"].shape for row in range(7)} == {(5, 3)}
    assert start.run("print([1, 2.5])") == [1, 2.5]


@pytest.mark.slow
def test_the_start_is_measured():
    command = [
        sys.executable,
        "-m",
        "benchmarks.start",
        "--rows",
        "12",
        "--length",
        "5",
        "--dim",
        "10",
        "--repeats",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for line in ("| `import gere` |", "| open and verify beyond hashing, CPU s |", "| batch of 4 replay rows, ms |"):
        assert line in done.stdout


@pytest.mark.slow
def test_lines_of_ways_with_and_without_base_decay(tmp_path):
    command = [sys.executable, "-m", "benchmarks.line", "--steps", "2", "--heldout", "8", "--dev-rows", "5"]
    command += ["--ways", "plain", "mixed", "ce", "--decays", "0", "1", "--out", str(tmp_path)]
    for _ in range(2):  # the second finds all runs
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        runs = [json.loads(line) for line in (tmp_path / "line.jsonl").read_text().splitlines()]
        assert len(runs) == 6 and (tmp_path / "line.md").read_text() in done.stdout
    for plain, mixed, ce in (runs[:3], runs[3:]):
        assert plain["decay"] == mixed["decay"] == ce["decay"]
        # At share 1 the trained model, towards 0 the base.
        losses = [point["task_loss"] for point in plain["line"]]
        assert losses == sorted(losses)
