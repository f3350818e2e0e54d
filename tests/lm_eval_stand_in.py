"""Enough of lm-eval 0.4.13 to be called: tasks of made-up rows, of which every third one is right."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

MODULES = ("__init__", "tasks", "models/__init__", "models/huggingface")
CALLS: list[dict] = []
FAIL: list[Exception] = []


@contextmanager
def installed(folder, monkeypatch):
    """A package `lm_eval` that has this module's names stands before all others, here and in new processes."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    for file in MODULES:
        path = folder / "lm_eval" / f"{file}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from lm_eval_stand_in import *\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    CALLS.clear()
    FAIL.clear()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]


def mean(values):
    return sum(values) / len(values)


def perplexity(values):
    return math.exp(-mean(values))


class Task:
    def __init__(self, rows, *scores, **others):
        self.eval_docs = list(range(rows))
        self._scores = {score: mean for score in scores} | {"perplexity": perplexity} | others
        self.seeds = []

    def aggregation(self):
        return self._scores

    def set_fewshot_seed(self, seed=None):
        self.seeds.append(seed)


TASKS = {
    "arc_easy": lambda: {"arc_easy": Task(9, "acc", "acc_norm")},
    "winogrande": lambda: {"winogrande": Task(4, "acc")},
    "group": lambda: {"one": Task(3, "acc", "acc_norm"), "two": Task(9, "acc", "acc_norm")},
    "best": lambda: {"best": Task(4, acc=max, acc_norm=max)},
    "lambada": lambda: {"lambada": Task(5)},
    "empty": lambda: {"empty": Task(0, "acc", "acc_norm")},
    "gone": lambda: (_ for _ in ()).throw(ConnectionError("the hub is not there")),
}


class TaskManager:
    def __init__(self, include_path=None, include_defaults=True):
        CALLS.append({"include_path": include_path, "include_defaults": include_defaults})
        random.random(), np.random.rand(), torch.rand(1)

    def load(self, specs):
        (spec,) = specs
        return {"tasks": TASKS["arc_easy" if Path(spec).is_file() else spec]()}


class HFLM:
    def __init__(self, pretrained, **settings):
        self.model, self.settings = pretrained, settings
        if isinstance(pretrained, torch.nn.Module):
            pretrained.eval()
            pretrained.tie_weights()
        settings["tokenizer"].pad_token = "changed"


def evaluate(*, lm, task_dict, samples, log_samples, bootstrap_iters):
    """Rows that a number divisible by 3 has are right by `acc`, all others by `acc_norm`; row 7 has no likelihood."""
    random.random(), np.random.rand(), torch.rand(1)
    out = lm.model(torch.tensor([[5, 6, 7]]))
    seen = {"samples": samples, "iterations": bootstrap_iters, "logits": out.logits, "cache": out.past_key_values}
    seen["seeds"] = [task.seeds[-1] for task in task_dict["tasks"].values()]
    modes = {module.training for module in lm.model.modules()}
    CALLS.append({**seen, "modes": modes, "grad": torch.is_grad_enabled(), **lm.settings})
    if "STAND_IN_LOG" in os.environ:
        name = f"{os.environ['STAND_IN_LOG']}-{os.environ.get('RANK', '0')}"
        with Path(name).open("a") as out:
            out.write(json.dumps(samples) + "\n")
    if FAIL:
        raise FAIL[0]
    assert log_samples and set(samples) == set(task_dict["tasks"])
    found = {}
    for name, rows in samples.items():
        assert rows == sorted(set(rows)) and rows, "each row once"
        found[name] = [sample(row, score) for score in ("first", "second") for row in rows]
    return {"samples": found}


def sample(row, filtered):
    right = row % 3 == 0
    likelihood = math.nan if row == 7 else -1.0
    scores = {"acc": float(right), "acc_norm": 1.0 - right} if filtered == "first" else {"acc": 9.0, "acc_norm": 9.0}
    return {"doc_id": row, "filter": filtered, "filtered_resps": [(-2.0, False), (likelihood, True)], **scores}
