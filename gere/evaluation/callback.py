"""A callback that measures general ability in a training, with any `Trainer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gere import _compat
from gere._log import logger
from gere.config import require
from gere.errors import QuestionError, TokenizerError
from gere.evaluation.choices import ChoiceNormalization, ChoiceScore, choice_accuracy, require_normalization
from gere.evaluation.general import CHANGE, LOSS, change_of, text_losses
from gere.evaluation.lm_eval import PREFIX as LM_EVAL
from gere.evaluation.lm_eval import load_tasks
from gere.evaluation.questions import Question, read_questions, spread
from gere.replay.rows import tokenizer_of
from gere.replay.texts import Source as TextSource
from gere.replay.texts import read_rows

PREFIX, OF_TASK, ERROR = "general/", "_change", "_se"
Source = str | Path | Sequence[Question]
# Called as `scorer(model, tokenizer, batch_size=..., max_length=..., ranks=...)`.
Scorer = Callable[..., ChoiceScore]


class GeneralAbilityCallback(TrainerCallback):
    """Measures what the model can do apart from the task: before training, at each evaluation and after training.

    It logs `general/loss` in nats, and for each task `general/NAME` (accuracy) and `general/NAME_se` (its standard
    error). After the start it also logs `general/change`, the loss minus that at the start, with half of its 95 %
    interval, `general/change_interval`, and `general/NAME_change` of each task. The metrics of an evaluation have all
    of them with the prefix `eval_`. A resumed run reads its first values from the log of the checkpoint, and has no
    interval. The processes of a run share the work.

    `GeReTrainer` binds its callbacks. With a plain `Trainer`, call `bind`. Without it, the values are in
    `trainer.state.log_history` and `trainer_state.json`, but no reporter sees them.

    Args:
        texts: Held-out general texts: whatever `GeReConfig.replay_dataset` takes, but `"self"`.
        tasks: Multiple-choice tasks by name; each a file or a list as in `gere.evaluation.read_questions`, or a task
            of lm-evaluation-harness as `lm-eval:arc_easy` or `lm-eval:folder/mine.yaml`. A list of sources names
            them itself: `sciq` for `sciq.validation.jsonl`, `arc_easy` for `lm-eval:arc_easy`.
        limit: Most questions of each task and most texts, evenly spread.
        batch_size: Options of one forward pass.
        max_length: Tokens that are read of a text, or of a context with its option.
        normalization: As in `gere.evaluation.choice_accuracy`; or by name of the task, `"characters"` for the others.
            Of a task of lm-eval, `"characters"` takes its `acc_norm` and `"none"` its `acc`.
        lm_eval_path: A folder with YAML files of tasks of your own, several folders, or a `TaskManager` of lm-eval.

    Raises:
        ConfigError: If there is nothing to measure, two tasks have one name, or a task of lm-eval does not have the
            accuracy that `normalization` asks for.
        QuestionError: If a task cannot be read.
        ReplaySetError: If the texts cannot be read.
        MissingPackageError: If a task of lm-eval is named and the package is not installed.

    Example:
        >>> ability = GeneralAbilityCallback(texts="heldout.jsonl", tasks=["sciq.jsonl"], limit=200)  # doctest: +SKIP
        >>> ability.bind(trainer)  # instead of callbacks=[ability] of the trainer  # doctest: +SKIP
    """

    def __init__(
        self,
        texts: Any = None,
        tasks: Mapping[str, Source] | Iterable[str | Path] | None = None,
        *,
        limit: int | None = None,
        batch_size: int = 16,
        max_length: int = 1024,
        normalization: ChoiceNormalization | Mapping[str, ChoiceNormalization] = "characters",
        lm_eval_path: Any = None,
    ) -> None:
        named = _named(tasks or {})
        require(texts is not None or bool(named), "texts and tasks", "at least one of them", None)
        rows = [] if texts is None else read_rows(TextSource(texts, "texts"))
        self._texts = spread(rows, limit)
        self._sizes = {"batch_size": batch_size, "max_length": max_length}
        if not isinstance(normalization, Mapping):
            normalization = dict.fromkeys(named, normalization)
        expected = f"names of tasks: {', '.join(named)}"
        require(set(normalization) <= set(named), "normalization", expected, normalization)
        for rule in normalization.values():
            require_normalization(rule)
        rules: dict[str, ChoiceNormalization] = {**dict.fromkeys(named, "characters"), **normalization}
        self._scorers = _scorers(named, rules, limit, lm_eval_path)
        self._trainer: Any = None
        self._forget()

    def _forget(self) -> None:
        """Forget an earlier training: a trainer may train twice, and the second training has its own start."""
        self._start: dict[str, float] = {}
        self._start_losses: list[float] = []
        self._last: dict[str, float] = {}
        self._measured: int | None = None
        self._ended = False

    def bind(self, trainer: Any) -> None:
        """Log through a trainer, so that its reporters see the values.

        Args:
            trainer: A trainer; it gets this callback if it does not have it.
        """
        if self._trainer is trainer:
            return
        self._trainer = trainer
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            trainer.add_callback(self)
        # At the end of training reporters close before the callbacks of the user are called.
        callbacks.insert(0, AtTheEnd(self.on_train_end))

    def forget_last(self) -> None:
        """Measure again at the end of training, since the weights have been set since the last measurement."""
        self._measured = None

    def measure(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Measure a model; every process must call this.

        Args:
            model: The model.
            tokenizer: Its tokenizer.

        Returns:
            Values by their names in the log, without changes.

        Raises:
            TokenizerError: If there is no tokenizer.
        """
        return self._measure(model, tokenizer)[0]

    def _measure(self, model: Any, tokenizer: Any) -> tuple[dict[str, float], list[float]]:
        """Return the values by their names in the log, and the loss of each text."""
        tokenizer = tokenizer_of(tokenizer)
        if not hasattr(tokenizer, "eos_token_id"):
            raise TokenizerError(
                "Measuring general ability needs a tokenizer.",
                where="processing_class",
                expected="the tokenizer of the model",
                found=type(tokenizer).__name__,
                fix="Pass processing_class=tokenizer to the trainer.",
            )
        ranks = _compat.ranks_here()
        values: dict[str, float] = {}
        losses: list[float] = []
        if self._texts:
            length = self._sizes["max_length"]
            losses = text_losses(model, tokenizer, self._texts, max_length=length, ranks=ranks)
            values[LOSS] = math.fsum(losses) / len(losses)
        for name, scorer in self._scorers.items():
            score = scorer(model, tokenizer, **self._sizes, ranks=ranks)
            values[f"{PREFIX}{name}"] = score.accuracy
            values[f"{PREFIX}{name}{ERROR}"] = score.standard_error
        return values, losses

    @property
    def measures_texts(self) -> bool:
        """Whether it measures texts."""
        return bool(self._texts)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the untouched model; a resumed run reads its values from the log."""
        self._forget()
        if state.global_step == 0:
            self._start, self._start_losses = self._log(args, state, **kwargs)
            return
        # Logs of the start have step 0; one of another callback has none of our values.
        for entry in state.log_history:
            if entry.get("step") == 0 and not self._start:
                self._start = {name: value for name, value in entry.items() if name.startswith(PREFIX)}
        if not self._start:
            what = "The checkpoint has no general ability from before training: %s values are logged without a change."
            logger.warning(what, PREFIX)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Measure, once for all evaluation sets of a step, and add the values to the metrics of the evaluation."""
        if self._measured != state.global_step:
            self._log(args, state, **kwargs)
        # A search sums up whatever stands beside the loss.
        if metrics is not None and getattr(self._trainer, "hp_search_backend", None) is None:
            metrics.update({f"eval_{name}": value for name, value in self._last.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the trained model, unless the last evaluation did."""
        # A bound callback is called twice: by `AtTheEnd` and by the trainer. The weights are not those of the last
        # evaluation if the best checkpoint has been loaded.
        if not self._ended and (self._measured != state.global_step or args.load_best_model_at_end):
            self._log(args, state, **kwargs)
        self._ended = True

    def _log(
        self, args: Any, state: Any, model: Any, processing_class: Any, **_: Any
    ) -> tuple[dict[str, float], list[float]]:
        found, losses = self._measure(model, processing_class)
        self._measured, self._last = state.global_step, self._with_changes(found, losses)
        logs = dict(self._last)
        if self._trainer is not None:
            self._trainer.log(logs)
            return found, losses
        if args.report_to and state.global_step == 0:
            logger.warning("General ability is in the log history alone; bind the callback for reporters to see it.")
        if state.epoch is not None:
            logs["epoch"] = state.epoch
        state.log_history.append({**logs, "step": state.global_step})
        return found, losses

    def _with_changes(self, found: dict[str, float], losses: list[float]) -> dict[str, float]:
        logs = dict(found)
        for name, value in self._start.items():
            # The callback of a resumed run may have other tasks. The change of a standard error says nothing.
            if name in found and not name.endswith(ERROR):
                logs[name + OF_TASK] = found[name] - value
        if LOSS in self._start and LOSS in found:
            # Its name was general/loss_change, which stays for one release.
            logs[CHANGE] = found[LOSS] - self._start[LOSS]
        if self._start_losses:
            logs |= change_of(losses, self._start_losses).logs
        return logs


class AtTheEnd(TrainerCallback):
    """Calls back at the end of training; as the first callback it comes before the reporters close.

    Args:
        end: Takes what `on_train_end` takes.
    """

    def __init__(self, end: Callable[..., None]) -> None:
        self._end = end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call back."""
        self._end(args, state, control, **kwargs)


def _named(tasks: Mapping[str, Source] | Iterable[str | Path]) -> dict[str, Source]:
    """Return tasks by name; a file is called by its name up to the first point."""
    if isinstance(tasks, Mapping):
        named = dict(tasks)
    else:
        # A string is an iterable too, of its letters.
        expected = "a mapping of names to sources, or a list of sources"
        require(not isinstance(tasks, (str, Path)), "tasks", expected, tasks)
        sources = list(tasks)
        names = [Path(str(source).removeprefix(LM_EVAL)).name.split(".")[0] for source in sources]
        named = dict(zip(names, sources, strict=True))
        require(len(named) == len(names), "tasks", "each name once", names)
    require(not set(named) & {"loss", ""}, "tasks", "names other than 'loss'", list(named))
    return named


def _scorers(
    named: Mapping[str, Source], rules: Mapping[str, ChoiceNormalization], limit: int | None, path: Any
) -> dict[str, Scorer]:
    """Return the scorer of each task, in the order of the tasks."""
    theirs = {name: source for name, source in named.items() if isinstance(source, str) and source.startswith(LM_EVAL)}
    require(path is None or bool(theirs), "lm_eval_path", f"a task that begins with {LM_EVAL}, or None", path)
    # All at once: lm-eval takes seconds for the index of its tasks.
    loaded = load_tasks(theirs, rules, limit, path) if theirs else {}
    scorers: dict[str, Scorer] = {}
    for name, source in named.items():
        if name in loaded:
            scorers[name] = loaded[name].score
        else:
            questions = _questions(source, limit)
            scorers[name] = partial(choice_accuracy, questions=questions, normalization=rules[name])
    return scorers


def _questions(source: Source, limit: int | None) -> list[Question]:
    if isinstance(source, (str, Path)):
        return read_questions(source, limit)
    questions = list(source)
    if not questions or not all(isinstance(question, Question) for question in questions):
        raise QuestionError(
            "A task is not a list of questions.",
            where="tasks",
            expected="Question(...)",
            found=questions[:1],
            fix="Give a list of gere.evaluation.Question, or a .jsonl file.",
        )
    return spread(questions, limit)
