"""Settings of a sequence: checked, and read from a file and words of a command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gere._files import read_settings, read_yaml
from gere.config import DTYPES, require, require_known
from gere.errors import ConfigError

MODES = ("sequence", "multitask")
ANSWERS = ("greedy", "likelihood")


@dataclasses.dataclass(frozen=True)
class SequenceSettings:
    """Settings of a sequence of tasks.

    Args:
        model: Folder or hub name of the base model.
        tasks: Names in `task_dir`, paths of `NAME.train.jsonl`, or mappings of `train`, `dev`, `name` and `labels`.
        out: Run folder.
        task_dir: Folder of the tasks that `tasks` names.
        name: Name of the run for the report, which otherwise groups runs by their settings.
        mode: One task after the other (`"sequence"`), or all at once (`"multitask"`), an upper bound.
        trainer: `"plain"`, `"gere"`, or a `TrainerFactory` as `"module:function"`.
        seed: Seed of the choice of rows, of LoRA and of the training.
        rows: Training rows of each task, drawn by the seed; `None` for all.
        dev_rows: Rows that a task is evaluated on; `None` for all.
        dev_skip: First rows of each dev file to leave out. Choose settings on these.
        max_length: Longest row in tokens; a longer prompt loses its middle.
        dtype: Precision of the weights.
        answers: Greedy decoding (`"greedy"`), or the likeliest of the labels (`"likelihood"`).
        eval_batch: Rows of a batch of the evaluation.
        before: Evaluate the base model, too.
        training: Arguments of `TrainingArguments`, but for the output folder and the seed.
        gere: Arguments of `GeReTrainer` and fields of `GeReConfig` by their names.
        settings: Further arguments of your own trainer factory.
        lora: Arguments of PEFT's `LoraConfig`; `None` for full training.
        general: File of held-out general texts. Their loss is measured before training and after each task.
        general_rows: Texts of that file; `None` for all.
        ability: Arguments of `GeneralAbilityCallback` except its texts: multiple-choice tasks.

    Raises:
        ConfigError: If a value cannot be used.
    """

    model: str
    tasks: Sequence[Any]
    out: str
    task_dir: str | None = None
    name: str | None = None
    mode: Literal["sequence", "multitask"] = "sequence"
    trainer: str = "plain"
    seed: int = 0
    rows: int | None = None
    dev_rows: int | None = None
    dev_skip: int = 0
    max_length: int = 512
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    answers: Literal["greedy", "likelihood"] = "greedy"
    eval_batch: int = 16
    before: bool = True
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gere: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    general: str | None = None
    general_rows: int | None = None
    ability: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("model", "out"):
            value = getattr(self, name)
            require(isinstance(value, str) and bool(value), name, "a path or a name", value)
        # A string is a sequence, too: each of its letters would count as a task.
        listed = isinstance(self.tasks, Sequence) and not isinstance(self.tasks, str) and len(self.tasks) > 0
        require(listed, "tasks", "a list of at least one task", self.tasks)
        for name, choices in {"mode": MODES, "answers": ANSWERS, "dtype": DTYPES}.items():
            value = getattr(self, name)
            require(value in choices, name, " or ".join(map(repr, choices)), value)
        numbers = {"seed": 0, "dev_skip": 0, "max_length": 8, "eval_batch": 1}
        for name, least in {**numbers, "rows": 1, "dev_rows": 1, "general_rows": 1}.items():
            value = getattr(self, name)
            sound = isinstance(value, int) and not isinstance(value, bool) and value >= least
            require(sound or (value is None and name not in numbers), name, f"a whole number >= {least}", value)
        for name in ("training", "gere", "settings", "ability", "lora"):
            value = getattr(self, name)
            sound = isinstance(value, Mapping) or (name == "lora" and value is None)
            require(sound, name, "settings by name, indented below it", value)
        named = isinstance(self.trainer, str) and (self.trainer in ("plain", "gere") or self.trainer.count(":") == 1)
        require(named, "trainer", '"plain", "gere" or "module:function"', self.trainer)
        require(not (self.trainer == "plain" and self.gere), "gere", "no such section with trainer: plain", self.gere)
        own = ":" in self.trainer
        require(own or not self.settings, "settings", "settings with your own trainer only", self.settings)


def settings_of(content: Mapping[str, Any], where: object) -> SequenceSettings:
    """Make settings from values by name; `where` names their place in messages."""
    known = [field.name for field in dataclasses.fields(SequenceSettings)]
    for key in content:
        require_name(key, known, where)
    missing = [name for name in ("model", "tasks", "out") if name not in content]
    require(not missing, str(where), "model, tasks and out", f"no {', '.join(missing)}")
    # sequence.json holds the settings, and JSON knows no paths.
    paths = {name: str(value) for name, value in content.items() if isinstance(value, Path)}
    return SequenceSettings(**{**content, **paths})


def require_name(key: object, known: Sequence[str], where: object) -> None:
    """Refuse a name that no setting of a sequence has, as `require_known` does."""
    require_known(key, known, where, "A setting of the sequence")


def read_sequence(file: Path, words: Sequence[str] = ()) -> SequenceSettings:
    """Read the settings of a sequence.

    Args:
        file: YAML or JSON.
        words: `name=value` or `section.name=value`, which override the file.

    Raises:
        ConfigError: If the file cannot be read, a name is unknown, or a value cannot be used.
    """
    try:
        content = read_settings(file)
        values = [read_yaml(word.partition("=")[2]) for word in words]
    except (OSError, ValueError) as error:
        raise ConfigError(
            "The settings of the sequence cannot be read.",
            where=f"{file}, --set",
            expected="a .yaml, .yml or .json file of settings by name, and words such as training.max_steps=20",
            found=f"{type(error).__name__}: {error}",
            fix="Correct the path, the file or the word.",
        ) from error
    require(isinstance(content, dict), str(file), "settings by name", content)
    # Outside of `try`: a ConfigError is a ValueError, too.
    for word, value in zip(words, values, strict=True):
        name, equals, _ = word.partition("=")
        require(bool(equals), "--set", "name=value, such as training.max_steps=20", word)
        _put(content, name.split("."), value)
    return settings_of(content, file)


def _put(content: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set a value in nested sections, and make those that are missing."""
    *sections, last = path
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        require(isinstance(content, dict), "--set", f"a section {section}", content)
    content[last] = value
