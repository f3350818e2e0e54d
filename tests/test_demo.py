"""The demo runs as the README says, on its own files and on others; the quickstart logs what replay does."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import DATA, ROOT, TINY, read_jsonl

pytestmark = pytest.mark.slow


def run_example(name: str, *arguments: str, cwd=ROOT) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures(output: str, name: str) -> list[float]:
    line = next(line for line in output.splitlines() if line.startswith(f"{name} "))
    return [float(part) for part in line.removeprefix(name).split()]


def test_demo_shows_what_replay_keeps(tmp_path):
    output = run_example("train_demo.py", "--out", str(tmp_path))
    base, plain, ours = (figures(output, name) for name in ("base model", "Trainer", "GeReTrainer"))
    assert plain[0] < base[0] / 2 and ours[0] < base[0] / 2, "both learn the task"
    assert plain[2] > 0.3, "plain training forgets"
    assert ours[2] < plain[2] / 2, "replay keeps"
    assert list((tmp_path / "gere_saving").glob("anchor-*"))


def test_demo_takes_other_files(tmp_path):
    task = [{"input": row["input"], "output": row["output"]} for row in read_jsonl(DATA / "task.jsonl", 40)]
    texts = read_jsonl(DATA / "general.jsonl", 20)
    for name, rows in (("task", task), ("replay", texts[:15]), ("heldout", texts[15:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [f"--{name}-file={tmp_path / name}.jsonl" for name in ("task", "replay", "heldout")]
    sizes = ["--steps=2", "--warm-up-steps=0", "--task-dev-rows=8", "--replay-rows=12", "--task-rows=30"]
    output = run_example(
        "train_demo.py", f"--model={TINY}", f"--out={tmp_path / 'out'}", "--w-strategy=100", *files, *sizes
    )
    assert "replays 4 of 12 general texts" in output and len(figures(output, "GeReTrainer")) == 4


def test_quickstart_logs_what_replay_does(tmp_path):
    output = run_example("quickstart.py", cwd=tmp_path)
    logs = [line for line in output.splitlines() if "'gere/task_loss'" in line]
    assert len(logs) == 4 and all("'gere/tm'" in line and "'gere/ce'" in line for line in logs)
    task_loss = [float(re.search(r"'gere/task_loss': '?([\d.]+)", line)[1]) for line in logs]
    assert task_loss[-1] < task_loss[0]
    assert list((tmp_path / "tmp_trainer" / "gere_saving").glob("anchor-*"))
    lines = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 25


def test_committed_model_is_what_its_script_makes(tmp_path):
    """The binary has a recipe."""
    script = (ROOT / "base_llms" / "make_llama_tiny_random.py").read_text(encoding="utf-8")
    changed = script.replace("HERE = Path(__file__).parent", f"HERE = Path({str(ROOT / 'base_llms')!r})")
    changed = changed.replace('FOLDER = HERE / "llama-tiny-random"', f"FOLDER = Path({str(tmp_path / 'made')!r})")
    done = subprocess.run([sys.executable, "-c", changed], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "made" / name).stat().st_size == (TINY / name).stat().st_size
    made, committed = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "made", TINY))
    assert made[-4000:] == committed[-4000:]
