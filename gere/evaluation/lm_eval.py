"""Tasks of lm-evaluation-harness (package `lm-eval`) on the model in training: its rows, its prompts, its score."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gere.config import require
from gere.errors import ConfigError, MissingPackageError, QuestionError
from gere.evaluation.choices import ChoiceNormalization, ChoiceScore, require_sizes
from gere.evaluation.questions import spread
from gere.model.forward import evaluating
from gere.model.sharded import is_sharded
from gere.ranks import ALONE, Ranks
from gere.replay.rows import private_copy

PREFIX = "lm-eval:"
METRICS = {"characters": "acc_norm", "none": "acc"}
FEWSHOT_SEED = 1234  # lm-eval's default


class LmEvalTask(NamedTuple):
    """A task of lm-eval, or a group such as `mmlu`, whose rows all count the same."""

    parts: Mapping[str, Any]  # lm-eval's tasks by name
    rows: list[tuple[str, int]]  # part and index
    metric: str  # "acc" or "acc_norm"

    def score(
        self, model: nn.Module, tokenizer: Any, *, batch_size: int = 16, max_length: int = 1024, ranks: Ranks = ALONE
    ) -> ChoiceScore:
        """Compute the share of rows that lm-eval counts as right; arguments as in `choice_accuracy`."""
        require_sizes(batch_size, max_length)
        # Processes that share weights must call the model equally often, and lm-eval chooses its batches: equal rows
        # alone make equal calls.
        rows = self.rows if is_sharded(model) else ranks.share(self.rows)

        def own() -> dict[tuple[str, int], float]:
            from lm_eval.models.huggingface import HFLM

            # `max_length` of lm-eval does not count the last token of a row, which the model does not read.
            settings = {"batch_size": batch_size, "max_length": max_length - 1, "softmax_dtype": "float32"}
            lm = HFLM(pretrained=_Lent(model), backend="causal", tokenizer=private_copy(tokenizer), **settings)
            return self._right(lm, rows)

        right: dict[tuple[str, int], float] = {}
        with evaluating(model), _random_states_kept():
            for part in ranks.ask(own):
                right |= part
        return ChoiceScore.of(sum(right[row] for row in self.rows), len(self.rows))

    def _right(self, lm: Any, rows: list[tuple[str, int]]) -> dict[tuple[str, int], float]:
        """Return 1 for each row that is right, 0 for the others."""
        import lm_eval

        numbers: dict[str, list[int]] = {}
        for name, row in sorted(set(rows)):  # the last row may be there several times, to make equal shares
            numbers.setdefault(name, []).append(row)
        parts = {name: self.parts[name] for name in numbers}
        for part in parts.values():
            part.set_fewshot_seed(FEWSHOT_SEED)  # draws the same examples in each call
        # `simple_evaluate` returns results on one process alone, and seeds the whole program.
        settings = {"samples": numbers, "log_samples": True, "bootstrap_iters": 0}
        found = lm_eval.evaluate(lm=lm, task_dict={"tasks": parts}, **settings)
        right: dict[tuple[str, int], float] = {}
        for name, samples in found["samples"].items():
            for sample in samples:
                value = float(sample[self.metric])
                for answer in sample["filtered_resps"]:
                    # lm-eval takes an option that scores NaN for the best one.
                    if isinstance(answer, tuple) and math.isnan(answer[0]):
                        value = 0.0
                # A task with several filters gives a row several times: the first counts.
                right.setdefault((name, sample["doc_id"]), value)
        return right


class _Lent:
    """Hides from lm-eval that a model is an `nn.Module`.

    lm-eval would tie its weights, which replaces a head that is trained apart from the embeddings.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, ids: Tensor) -> Any:
        return self._model(ids, use_cache=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def load_tasks(
    sources: Mapping[str, str], rules: Mapping[str, ChoiceNormalization], limit: int | None = None, path: Any = None
) -> dict[str, LmEvalTask]:
    """Load tasks by name, with their rows.

    Sources, rules (its `normalization`), limit, path and errors are those of `GeneralAbilityCallback`.
    """
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise MissingPackageError(
            "A task of lm-eval is named, and the package cannot be imported.",
            where="tasks",
            expected="package lm-eval, 0.4.13 or later",
            found=error,
            fix='pip install "gere[lm-eval]", or give a .jsonl file of questions.',
        ) from error
    specs = {name: source.removeprefix(PREFIX) for name, source in sources.items()}
    with _random_states_kept():  # a task may shuffle its rows
        if not hasattr(path, "load"):  # not a `TaskManager`
            folders = [path] if isinstance(path, (str, Path)) else path
            for folder in folders or []:
                require(Path(folder).is_dir(), "lm_eval_path", "a folder, several, or a TaskManager", folder)
            # The index of lm-eval's own tasks takes seconds, and files do without it.
            named = not all(Path(spec).is_file() for spec in specs.values())
            path = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=named)
        return {name: _load(path, name, spec, rules[name], limit) for name, spec in specs.items()}


def _load(manager: Any, name: str, spec: str, rule: str, limit: int | None) -> LmEvalTask:
    require(rule in METRICS, f"normalization of {name}", "'characters' or 'none'", rule)
    try:
        parts = manager.load([spec])["tasks"]
        rows = [(part, row) for part, task in parts.items() for row in range(len(task.eval_docs))]
        if not rows:
            raise ValueError("no questions")
    except Exception as error:
        raise QuestionError(
            "A task of lm-eval cannot be loaded.",
            where=PREFIX + spec,
            expected="a task or a group of `lm-eval ls tasks`, or a YAML file",
            found=f"{type(error).__name__}: {error}"[:500],
            fix="Correct the name. Without a network, give a YAML file whose rows are on this machine.",
        ) from error
    # Rows can be counted only where the accuracy of each part is the mean over its rows.
    means: dict[str, int] = {}
    for task in parts.values():
        for metric, aggregate in task.aggregation().items():
            is_mean = getattr(aggregate, "__name__", "") == "mean"
            means[metric] = means.get(metric, 0) + is_mean
    usable = [other for other, metric in METRICS.items() if means.get(metric) == len(parts)]
    if rule not in usable:
        fix = "Choose another task."
        if usable:
            fix = f"Set normalization={{{name!r}: {usable[0]!r}}}."
        raise ConfigError(
            "A task of lm-eval does not have the accuracy that its normalization asks for.",
            where=PREFIX + spec,
            expected=f"{METRICS[rule]}, a mean over rows, for normalization={rule!r}",
            found=", ".join(sorted(means)) or "none",
            fix=fix,
        )
    return LmEvalTask(parts, spread(rows, limit), METRICS[rule])


@contextmanager
def _random_states_kept() -> Iterator[None]:
    # Tasks draw from the global generators, as the training does.
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):  # in evaluation mode a model draws nothing on its device
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
