"""One model over a sequence of tasks: train one, evaluate all, and resume after a kill."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import set_seed

from gere._files import file_sha256, folder_errors, make_folder
from gere.config import require
from gere.continual.answers import Scores, greedy_answers, likeliest_answers, score
from gere.continual.folder import Matrix, RunFolder, read_matrix
from gere.continual.settings import SequenceSettings, require_name, settings_of
from gere.continual.tasks import DEV, TRAIN, Task, answer_ids, encode, prompt_ids, read_tasks, require_reachable
from gere.continual.trainers import (
    TrainerFactory,
    factory_of,
    factory_settings,
    load_model,
    load_tokenizer,
    training_arguments,
)
from gere.errors import ConfigError
from gere.evaluation.callback import GeneralAbilityCallback
from gere.replay.texts import Source, read_rows

Measure = Callable[[Any, Any], dict[str, float]]
MULTITASK = "multitask"
KINDS = (TRAIN, DEV)
logger = logging.getLogger("gere.continual")


def run(
    settings: SequenceSettings | Mapping[str, Any],
    *,
    make_trainer: TrainerFactory | None = None,
    measure: Measure | None = None,
) -> Matrix:
    """Train one model over tasks, and evaluate all tasks after each.

    Call it again with the same settings to resume after a kill. A finished sequence returns its matrix at once.

    Args:
        settings: The settings, or a mapping with the names of `SequenceSettings`.
        make_trainer: Makes the trainer of a task from `(model, tokenizer, train_rows, args, **settings)`; by default
            the factory that `trainer` names.
        measure: Measures general ability of `(model, tokenizer)`, beside what `general` and `ability` name.

    Returns:
        The matrix, as it stands in `matrix.json`.

    Raises:
        ConfigError: If a setting cannot be used, or the run folder belongs to another sequence.
        GeReError: As the trainer.
    """
    if not isinstance(settings, SequenceSettings):
        settings = settings_of(settings, "settings")
    out = Path(settings.out)
    make_folder(out)
    with folder_errors(out):
        try:
            # The system releases this lock when its process is killed. A file that merely exists would stay.
            lock = FileLock(out / ".lock").acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                "The run folder is in use.",
                where=out,
                expected="one process at a time",
                found="another process that trains there",
                fix="Wait for it, or set out to another folder.",
            ) from error
    with lock:
        return _Sequence(settings, make_trainer or factory_of(settings), measure).run()


class _Sequence:
    """A sequence while it runs."""

    def __init__(self, settings: SequenceSettings, make_trainer: TrainerFactory, measure: Measure | None) -> None:
        self._settings = settings
        self._make_trainer = make_trainer
        self._measures = [*_measures(settings), *filter(None, [measure])]
        self._tasks = read_tasks(settings)
        self._tokenizer = load_tokenizer(settings.model)
        names = [task.name for task in self._tasks]
        self._rounds = [MULTITASK] if settings.mode == MULTITASK else names
        self._folder = RunFolder(Path(settings.out), self._rounds)
        self._matrix = read_matrix(self._folder.path) or Matrix(names)

    def run(self) -> Matrix:
        """Do what is left to do."""
        # Refuse bad settings of all tasks now, not after hours of the first one.
        training_arguments(self._settings, self._folder.task(0))
        factory_settings(self._settings, self._folder.path)
        longest = max(self._most_new(task) for task in self._tasks)
        require(self._settings.max_length > longest, "max_length", f"more than {longest}", self._settings.max_length)
        for task in self._tasks:
            require_reachable(self._tokenizer, task, self._settings.answers)
        self._folder.begin(self._content())
        done, path = len(self._matrix.accuracy), self._folder.path
        if self._matrix.general:
            logger.info("%s resumes: %d of %d trainings are done", path, done, len(self._rounds))
        else:
            self._evaluate(None)
        # A kill may have come after the matrix was written and before the folder was cleaned up.
        for index in range(done):
            self._folder.clean_up(index)
        for index in range(done, len(self._rounds)):
            if self._folder.model(index) is None:
                self._train(index)
            # Before the matrix: with the last task in it, a resumed run has nothing left to do.
            self._folder.write_logs(index)
            self._evaluate(index)
            self._folder.clean_up(index)
        return self._matrix

    def _content(self) -> dict[str, Any]:
        """Collect what tells this sequence from others."""
        settings = dataclasses.asdict(self._settings)
        # Another path may lead to the same folder. The folder makes no name either, since the report takes runs of
        # another name for runs of another group.
        del settings["out"]
        # By task and kind: files of two tasks may have one name in two folders.
        files = {
            f"{task.name}{kind}": path for task in self._tasks for kind, path in zip(KINDS, task.files, strict=True)
        }
        files |= _measured(self._settings)
        return {
            "name": settings.pop("name"),
            "seed": settings["seed"],
            "tasks": [task.name for task in self._tasks],
            "files": {name: file_sha256(path) for name, path in files.items()},
            "settings": settings,
        }

    def _train(self, index: int) -> None:
        """Train a task from its last checkpoint, or from the model of the task before it, and keep the model."""
        settings = self._settings
        args = training_arguments(settings, self._folder.task(index), index)
        # Before the model is loaded: a new adapter is random.
        set_seed(settings.seed)
        model = load_model(settings, self._folder.model(index - 1))
        tasks = self._tasks if settings.mode == MULTITASK else [self._tasks[index]]
        rows = [encode(self._tokenizer, row, settings.max_length) for task in tasks for row in task.train]
        extra = factory_settings(settings, self._folder.path)
        trainer = self._make_trainer(model, self._tokenizer, rows, args, **extra)
        checkpoint = self._folder.checkpoint(index)
        logger.info("%s: trains %d rows from %s", self._rounds[index], len(rows), checkpoint or "the start")
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        trainer.save_state()
        self._folder.keep(index, trainer.save_model)
        # Trainer and model refer to each other, and the next model needs the memory of the GPU.
        del trainer, model
        gc.collect()

    def _evaluate(self, index: int | None) -> None:
        """Evaluate the saved model of a task, or for `None` the base model, and write the matrix."""
        saved = None if index is None else self._folder.model(index)
        device = training_arguments(self._settings, self._folder.path).device
        set_seed(self._settings.seed)
        # Loaded from disk even after a training, so that a resumed run evaluates the very same model.
        model = load_model(self._settings, saved).to(device)
        scores = []
        if index is not None or self._settings.before:
            scores = [self._score(model, task) for task in self._tasks]
        general: dict[str, float] = {}
        for measure in self._measures:
            general |= measure(model, self._tokenizer)
        if index is None:
            self._matrix.begin(scores, general)
        else:
            self._matrix.add(scores, general)
        self._matrix.write(self._folder.path)

    def _score(self, model: Any, task: Task) -> Scores:
        settings, tokenizer = self._settings, self._tokenizer
        longest = self._most_new(task)
        prompts = [prompt_ids(tokenizer, row, settings.max_length - longest) for row in task.dev]
        if settings.answers == "likelihood":
            options = [answer_ids(tokenizer, label) for label in task.labels]
            chosen = likeliest_answers(model, tokenizer, prompts, options)
            answers = [None if place is None else task.labels[place] for place in chosen]
        else:
            lines = 1 + max(label.count("\n") for label in task.labels)
            answers = [*greedy_answers(model, tokenizer, prompts, longest, batch=settings.eval_batch, lines=lines)]
        scores = score(answers, [row.output for row in task.dev], task.labels)
        logger.info("%s: accuracy %.4f, invalid %.4f", task.name, scores.accuracy, scores.invalid)
        return scores

    def _most_new(self, task: Task) -> int:
        """Count the tokens of the longest label, and the one that ends it."""
        return max(len(answer_ids(self._tokenizer, label)) for label in task.labels) + 1


def _measured(settings: SequenceSettings) -> dict[str, Path]:
    """Name the files that general ability is measured on."""
    tasks = settings.ability.get("tasks") or {}
    sources = tasks if isinstance(tasks, Mapping) else dict(enumerate(tasks))
    named = {"general": settings.general, **{f"ability.{name}": source for name, source in sources.items()}}
    paths = {name: Path(str(source)) for name, source in named.items() if isinstance(source, str | Path)}
    return {name: path for name, path in paths.items() if path.is_file()}


def _measures(settings: SequenceSettings) -> list[Measure]:
    """Make the measures that `general` and the section `ability` ask for."""
    found: list[Measure] = []
    if settings.general is not None:
        texts = read_rows(Source(settings.general, "general"))[: settings.general_rows]
        found.append(GeneralAbilityCallback(texts, max_length=settings.max_length).measure)
    if settings.ability:
        known = [name for name in inspect.signature(GeneralAbilityCallback).parameters if name != "texts"]
        for name in settings.ability:
            require_name(name, known, "ability")
        found.append(GeneralAbilityCallback(**settings.ability).measure)
    return found
