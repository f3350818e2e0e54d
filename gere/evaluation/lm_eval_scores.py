"""Accuracy of a model on tasks of lm-evaluation-harness, by its own prompts and its own score."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from gere.evaluation.choices import ChoiceScore, require_sizes, score_of
from gere.evaluation.general import evaluating
from gere.evaluation.lm_eval import HarnessTask, module, same_luck
from gere.model.sharded import is_sharded
from gere.ranks import ALONE, Ranks
from gere.replay.rows import private_copy

logger = logging.getLogger("gere")
SEED = 1234  # lm-eval's own, of the examples that stand before a question


def harness_accuracy(
    model: nn.Module,
    tokenizer: Any,
    task: HarnessTask,
    *,
    batch_size: int = 16,
    max_length: int = 1024,
    ranks: Ranks = ALONE,
) -> ChoiceScore:
    """Share of rows that lm-eval counts as right.

    The model is handed over as it is, with its mode, its tied weights, its `use_cache` and all random states put back.
    The examples before a question, if a task has some, are the same at each call with as many processes.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; unchanged.
        task: The task, from `load_tasks`.
        batch_size: Rows with an option of one forward pass.
        max_length: Tokens of context and option that are read; a longer context loses its beginning.
        ranks: The processes that share the rows. Where the weights of the model are spread over them, each measures
            all rows, since all must call the model equally often.

    Returns:
        Accuracy with its standard error; a row with a score that is NaN counts as wrong.
    """
    require_sizes(batch_size, max_length)
    whole = ranks.count > 1 and is_sharded(model)
    if whole:
        logger.info("The weights are spread over the processes: each of them measures all rows of lm-eval.")
    own = task.rows if whole else ranks.share(task.rows)

    def measure() -> dict[tuple[str, int], float]:
        return _measured(model, private_copy(tokenizer), task, own, batch_size, max_length)

    with evaluating(model), _left_alone(model), same_luck(next(model.parameters()).device):
        found = {row: right for part in ranks.ask(measure) for row, right in part.items()}
    return score_of(sum(found[row] for row in task.rows), len(task.rows))


def _measured(
    model: nn.Module, tokenizer: Any, task: HarnessTask, rows: Sequence[tuple[str, int]], batch: int, length: int
) -> dict[tuple[str, int], float]:
    """1 for each row that is right, 0 for the others."""
    numbers: dict[str, list[int]] = {}
    for name, row in sorted(set(rows)):
        numbers.setdefault(name, []).append(row)
    parts = {name: task.parts[name] for name in numbers}
    for part in parts.values():
        part.set_fewshot_seed(SEED)
    # `simple_evaluate` gives nothing but on the first process of a machine, and sets the seeds of the whole program.
    # lm-eval does not count the last token of a row, which the model does not read.
    found = module("lm_eval").evaluate(
        lm=_language_model(model, tokenizer, batch, length - 1),
        task_dict={"tasks": parts},
        samples=numbers,
        log_samples=True,
        bootstrap_iters=0,
    )
    right: dict[tuple[str, int], float] = {}
    for name, samples in found["samples"].items():
        for sample in samples:  # of several filters the first
            right.setdefault((name, sample["doc_id"]), 0.0 if _has_nan(sample) else float(sample[task.score]))
    return right


def _has_nan(sample: Mapping[str, Any]) -> bool:
    """Whether an option has no likelihood; lm-eval would take it for the best one."""
    answers = [answer for answer in sample["filtered_resps"] if isinstance(answer, (tuple, list)) and answer]
    return any(isinstance(answer[0], float) and math.isnan(answer[0]) for answer in answers)


def _language_model(model: nn.Module, tokenizer: Any, batch_size: int, max_length: int) -> Any:
    """lm-eval's view of a model; its warnings are about what the model being one already takes from the user."""
    found = module("lm_eval.models.huggingface")
    log = logging.getLogger(found.__name__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return found.HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",
        )
    finally:
        log.setLevel(level)


@contextmanager
def _left_alone(model: Any) -> Iterator[None]:
    """Keep lm-eval from tying weights anew, and the model from keeping keys and values; both are put back."""
    own = vars(model)
    tie, config = own.get("tie_weights"), model.config
    cache = getattr(config, "use_cache", None)
    own["tie_weights"] = lambda *args, **kwargs: None
    if cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        del own["tie_weights"]
        own |= {} if tie is None else {"tie_weights": tie}
        if cache is not None:
            config.use_cache = cache
