"""A task in LLaMA-Factory's own format, its settings, and what its trainer saw."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "base_llms" / "llama-tiny-random"
GENERAL = ROOT / "examples" / "data" / "general.jsonl"
KEYS = {"gere/ce", "gere/tm", "gere/weight", "gere/violations", "gere/forgetting", "gere/task_loss"}
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all", "learning_rate": 1e-2}
STEPS, REPLAY = 20, 3


def settings(folder: Path, gere: dict | None = None, **changes) -> dict:
    """20 steps of 2 x 4 rows, 3 of them replayed, in a folder of its own."""
    data = folder / "data"
    data.mkdir(exist_ok=True, parents=True)
    lines = (ROOT / "examples" / "data" / "task.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:160]]
    (data / "reviews.json").write_text(json.dumps(rows), encoding="utf-8")
    (data / "dataset_info.json").write_text(json.dumps({"reviews": {"file_name": "reviews.json"}}))
    replay = {
        "replay_dataset": str(GENERAL), "replay_size": 24, "max_length": 48, "w_strategy": "dy",
        "num_interpolate_per_batch": REPLAY, "gere_hidden_state_saving_dir": str(folder / "gere_saving"),
    }  # fmt: skip
    config = {
        "model_name_or_path": str(TINY), "template": "empty", "stage": "sft", "do_train": True,
        "finetuning_type": "full", "dataset": "reviews", "dataset_dir": str(data), "cutoff_len": 64,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": STEPS,
        "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "output_dir": str(folder / "out"), "cache_dir": str(folder / "cache"), "disable_tqdm": True,
    }  # fmt: skip
    return {**config, **changes, "gere": {**replay, **(gere or {})}}


def record() -> list[dict]:
    """Note the batches of every optimizer step from here on, and the rows of each call of the model that trains it."""
    from gere import GeReMixin

    collect, steps, watched = GeReMixin.get_batch_samples, [], []

    def called(module, args, kwargs):
        import torch

        if torch.is_grad_enabled() and steps:
            steps[-1]["calls"].append(len(kwargs.get("input_ids", args[0] if args else None)))

    @functools.wraps(collect)
    def watch(trainer, *args, **kwargs):
        if trainer.model not in watched:
            watched.append(trainer.model)
            model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
            model.get_decoder().register_forward_pre_hook(called, with_kwargs=True)
        samples, items = collect(trainer, *args, **kwargs)
        tokens = [sample["input_ids"].tolist() for sample in samples]
        steps.append({"tokens": tokens, "calls": [], "trainer": trainer})
        return samples, items

    GeReMixin.get_batch_samples = watch
    return steps


def require_rows(steps: list[dict], task: int, replay: int) -> None:
    """Make sure that every optimizer step had these numbers of rows."""
    assert len(steps) == STEPS
    for step in steps:
        assert sum(map(len, step["tokens"])) == task
        assert sum(step["calls"]) == task + replay, step["calls"]


def require_order(steps: list[dict]) -> None:
    """The steps have the task rows in the order of the file, each in some order."""
    texts = iter(row["input_ids"] for row in steps[0]["trainer"].train_dataset)
    for step in steps:
        found = [row for batch in step["tokens"] for row in batch]
        for text in itertools.islice(texts, len(found)):
            found.remove(next(row for row in found if row[: len(text)] == text))
        assert not found


def train_logs(folder: Path) -> list[dict]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [log for log in history if "loss" in log]


def start(command: list[str], folder: Path, *first_on_path: Path, timeout: float = 100, **environ: str) -> str:
    """Run a program in a folder and give its output; the output is in the message if it fails."""
    paths = [*map(str, first_on_path), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environ}
    for _ in range(3):
        code, output = _finish([sys.executable, *command], folder, environ, timeout)
        if "terminate called without an active exception" not in output:
            break
        shutil.rmtree(folder / "out", ignore_errors=True)  # torch's threads abort one shutdown in forty
    assert code == 0, output
    return output


def _finish(command: list[str], folder: Path, environ: dict[str, str], timeout: float) -> tuple[int, str]:
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environ, start_new_session=True, **pipe)
    try:
        output = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its workers
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=40)
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"no end after {timeout} s:\n{process.communicate()[0]}") from None
    return process.returncode, output
