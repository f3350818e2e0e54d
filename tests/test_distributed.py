"""Two real processes over gloo: DDP with replay rows in whole micro-steps follows the one-process curve."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import conftest
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments
from gere import GeReConfig, GeReTrainer

root, ranks = Path({root!r}), int(os.environ.get("WORLD_SIZE", "1"))
tokenizer = AutoTokenizer.from_pretrained(conftest.TINY)
rows = [conftest.encode(tokenizer, row) for row in conftest.read_jsonl(conftest.DATA / "task.jsonl", 40)]
texts = [row["text"] for row in conftest.read_jsonl(conftest.DATA / "general.jsonl", 11)]
args = TrainingArguments(
    str(root / f"out-{{ranks}}"), max_steps=20, per_device_train_batch_size=4 // ranks, gradient_accumulation_steps=4,
    learning_rate=1e-3, logging_steps=5, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    ddp_find_unused_parameters=False,
)
trainer = GeReTrainer(
    conftest.load_tiny(), args, DataCollatorForSeq2Seq(tokenizer), rows, processing_class=tokenizer,
    num_interpolate_per_batch=int(sys.argv[1]), w_strategy="dy",
    gere_hidden_state_saving_dir=root / f"saving-{{ranks}}",
    gere_config=GeReConfig(replay_dataset=texts, max_length=40, normalization="elements"),
)
trainer.train()
if trainer.is_world_process_zero():
    trainer.state.save_to_json(str(root / f"state-{{ranks}}.json"))
"""


def run(root: Path, ranks: int, replay: int) -> subprocess.CompletedProcess:
    path = root / "script.py"
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parent), root=str(root)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, str(path), str(replay)]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    return subprocess.CompletedProcess(codes, max(map(abs, codes)), "\n".join(outputs))


def logs(root: Path, ranks: int) -> list[dict]:
    history = json.loads((root / f"state-{ranks}.json").read_text())["log_history"]
    return [log for log in history if "loss" in log]


def test_two_processes_follow_the_curve_of_one(tmp_path):
    for ranks in (1, 2):
        done = run(tmp_path, ranks, 4)
        assert done.returncode == 0, done.stdout
    one, two = logs(tmp_path, 1), logs(tmp_path, 2)
    assert len(one) == len(two) == 4
    for ours, theirs in zip(two, one, strict=True):
        assert {key for key in ours if key.startswith("gere/")} == {key for key in theirs if key.startswith("gere/")}
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key


def test_uneven_forwards_are_refused_and_do_not_hang(tmp_path):
    done = run(tmp_path, 2, 3)
    assert done.returncode != 0 and "a multiple of 4" in done.stdout and "UnsupportedSettingError" in done.stdout
