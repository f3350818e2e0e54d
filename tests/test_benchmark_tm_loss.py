"""The benchmark of the TM loss runs, and its figures are what they say."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks.tm_loss import Measured, line, make_run, most_memory, moved_bytes


def test_figures_by_hand():
    """2 x 5 x 10 elements of 2 bytes, 30 bytes of codes; a copy of 100 bytes in a second."""
    assert moved_bytes(100, 30, 2) == 200 + 30 + 30 + 30 + 200
    text = line(
        (2, 5, 10), "bf16", Measured([2.0, 4.0, 8.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 5_000_000, 400_000), 980
    )
    assert "| 10 | bf16 | 4000.000 ms | 1000.000 ms | 0.250 (0.125 to 0.500) | 5.0 MB | 0.4 MB | 0.0 MB |" in text
    assert text.endswith("| 0.50 (0.50 to 0.50) |")


def test_memory_is_that_of_the_allocator():
    assert most_memory("cpu", lambda: torch.ones(1000).add(1).mul(2)) in range(
        8000, 12100
    )  # the first or both of the others
    run = make_run((2, 40, 8000), torch.float32, "cpu")
    run(False)
    size = 2 * 40 * 8000 * 4
    assert most_memory("cpu", lambda: run(True)) > 4 * size
    assert size < most_memory("cpu", lambda: run(False)) < 2 * size


@pytest.mark.parametrize("options", [[], ["--chunks", "64", "128"]])
def test_a_comparison_from_the_command_line(options):
    command = [sys.executable, "-m", "benchmarks.tm_loss", "--rows", "2", "--tokens", "8", "--dims", "12", "13"]
    command += ["--repeats", "2", "--copy-bytes", "4096", "--device", "cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [text.split(" | ") for text in done.stdout.splitlines() if text.startswith("| 1")]
    assert [row[:2] for row in lines] == [["| 12", "bf16"], ["| 12", "fp32"], ["| 13", "bf16"], ["| 13", "fp32"]]
    assert all(len(row) == (4 if options else 9) for row in lines)
