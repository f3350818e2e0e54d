"""Every setting of replay, declared once: its default, its help and its check.

`GeReArguments`, `--set` of the command line and docs/settings.md are made from these declarations.
"""

# ruff: noqa: RUF009  (`_setting` returns a `dataclasses.field`)

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import math
import numbers
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Optional, get_args, get_type_hints

from gere.errors import ConfigError, brief

# The one list of strategies. Each class is imported when it is used, since settings are read without torch.
STRATEGIES = {
    "tm": "gere.losses.margin:Margin",
    "ce": "gere.losses.strategy:Strategy",
    "kl": "gere.losses.kl:LogitImitation",
    "l1": "gere.losses.imitation:AbsoluteImitation",
    "l2": "gere.losses.imitation:SquaredImitation",
}
NO_REPLAY = "none"
SELF = "self"
LAST, EVERY = "last", "every"
AUTO = "auto"
PAPER_SHARE = 4 / 64
DECAY = 0.7
MOST_KEPT = 1024
# High enough that `max_seq_length`, which other trainers had, is not taken for a misspelling of our `max_length`.
RESEMBLES = 0.85
Mode = Literal["auto", "replace", "add"]
Normalization = Literal["auto", "violations", "elements"]
Bands = Literal["mean_std", "quantile"]
Prompt = Literal["auto", "bos", "chat"]
DTYPES = ("auto", "float32", "bfloat16", "float16")


def _setting(
    default: Any,
    text: str,
    *,
    choices: Sequence[str] = (),
    least: int | None = None,
    positive: bool = False,
    example: object = None,
) -> Any:
    """Declare a setting with its help `text`, its check, and an `example` for docs/settings.md.

    It is one of `choices`, a whole number of at least `least`, or a finite `positive` number; `None` if that is the
    default.
    """
    rules = {"choices": tuple(choices), "least": least, "positive": positive}
    return dataclasses.field(default=default, metadata={"help": text, "example": example, **rules})


def _with_help(cls: Any) -> Any:
    """Add the help of each field to the docstring of a dataclass."""
    lines = [f"    {field.name}: {field.metadata['help']}" for field in dataclasses.fields(cls)]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Args:", *lines])
    return cls


@_with_help
@dataclasses.dataclass(frozen=True)
class GeReConfig:
    """Settings of replay beside the four arguments of `GeReTrainer`.

    Raises:
        ConfigError: If a value cannot be used.

    Example:
        >>> GeReConfig(replay_dataset="general.jsonl", band_width=1.5).max_length
        563
    """

    replay_dataset: Any = _setting(
        None,
        "General texts or chats: a file (.jsonl, .json, .csv, .tsv, .parquet, or .txt with one text a line), a folder "
        "or hub name for datasets.load_dataset, a datasets.Dataset, a list of texts, of records or of paths, or "
        '"self" for texts that the base model samples before training. The default is the first 1,000 texts of '
        "DKYoon/SlimPajama-6B.",
        example="general.jsonl",
    )
    replay_split: str = _setting("train", "Split of a hub data set.")
    replay_subset: str | None = _setting(
        None, "Configuration of a hub data set that has several.", example="wikitext-2-raw-v1"
    )
    replay_column: str = _setting("text", "Column or JSON key that holds the text, or the messages of a chat.")
    replay_size: int | None = _setting(
        None,
        "Use the first N texts. The default is all texts of a file, folder, dataset or list, and 1,000 texts of a hub "
        'data set or of "self".',
        least=1,
        example=500,
    )
    replay_heldout: int = _setting(
        64,
        "Texts that are never replayed and only measured, evenly spread over the replay set, at most a tenth of it. 0 "
        "measures nothing.",
        least=0,
    )
    heldout_dataset: Any = _setting(
        None,
        "Measure on these texts in place of a part of the replay set: any source that replay_dataset takes, but "
        '"self". Of more than replay_heldout texts, that many are taken, evenly spread.',
        example="heldout.jsonl",
    )
    max_length: int = _setting(
        563, "Longest replay row and longest held-out text in tokens. Longer texts are cut.", least=2
    )
    add_bos: bool | None = _setting(
        None,
        "Begin each row with the BOS token (True), or add no special token (False). By default the tokenizer decides.",
    )
    replay_strategy: str = _setting(
        "tm",
        'Distance to the base model that is added to the cross-entropy of the replay rows: "tm" (threshold margin), '
        '"kl" (divergence of the logits), "l1" or "l2" (difference of the last-layer states), "ce" (no distance). '
        '"none" turns replay off: training is that of the parent trainer, bit for bit.',
        choices=(*STRATEGIES, NO_REPLAY),
    )
    base_decay: float | str = _setting(
        0.0,
        "Pull the weights back to those of the base model while they are trained: over the whole training, what was "
        "learned at its start fades to exp(-base_decay). 0 is off; 0.7 to 1.6 are sensible. It also works with "
        f'replay_strategy "none". "auto" is {DECAY}; it is 0 without replay, for a model that was tuned before, and '
        "where weights are sharded or have no base. The line at the start says so.",
        example=0.7,
    )
    forgetting_budget: float | None = _setting(
        None,
        "Most that may be forgotten, in nats of general loss. After training, the weights move back along the line to "
        "the base weights, as little as is needed, until the change on the held-out texts, with its interval, is "
        "within it. With an eval_dataset, the point within it that has the least evaluation loss is taken.",
        example=0.05,
    )
    blend: Literal["best"] | None = _setting(
        None,
        '"best" moves the weights back after training to the point of the line with the least evaluation loss, with '
        "or without a budget.",
        choices=("best",),
        example="best",
    )
    replay_mode: Mode = _setting(
        "auto",
        '"replace" task rows of a step by replay rows, or "add" replay rows to them. "auto" replaces, and adds where '
        "rows cannot be replaced: streaming datasets, batch samplers, dispatched batches.",
        choices=get_args(Mode),
    )
    normalization: Normalization = _setting(
        "auto",
        'Divide the margin of a row by its violated elements ("violations", the official rule) or by all its elements '
        '("elements"). "auto" takes "elements" with w_strategy "auto", and "violations" with any other.',
        choices=get_args(Normalization),
    )
    layers: str | Sequence[int] = _setting(
        LAST,
        'Layers whose states tm holds: the "last", every n-th and the last ("every 4"), or numbers from 1. Their '
        "distances are averaged, and inner layers always have quantile bands.",
        example="6, 12",
    )
    bands: Bands = _setting(
        "mean_std",
        'Bands of the last layer: around the mean ("mean_std") or between two quantiles ("quantile").',
        choices=get_args(Bands),
    )
    band_width: float = _setting(
        1.0,
        "Half the width of a mean_std band in standard deviations: k of mu - k sigma and mu + k sigma.",
        positive=True,
    )
    std_floor: float = _setting(
        1e-3, "Smallest sigma, as a share of the root mean square of all sigma.", positive=True
    )
    lower_quantile: float = _setting(0.16, "Share of the values below a quantile band.")
    upper_quantile: float = _setting(0.84, "1 minus the share of the values above a quantile band.")
    kl_top_k: int = _setting(
        64,
        f"Likeliest tokens that kl compares one by one, at most {MOST_KEPT}. All others count as one token.",
        least=1,
    )
    kl_temperature: float = _setting(2.0, "Number that kl divides the logits by.", positive=True)
    anchor: str = _setting(
        "auto",
        'Key of the anchor to use. "auto" takes the one that the checkpoint or the loaded model names, else the one '
        'that belongs to the model. "live" (PEFT) stores no targets: the model with its adapter disabled gives them, '
        "by one more forward pass of the replay rows in each step.",
    )
    anchor_batch_tokens: int = _setting(
        8192, "Padded tokens of a forward pass while the anchor is built. A CPU takes 512 at most.", least=1
    )
    self_prompt: Prompt = _setting(
        "auto",
        'Where texts that the base model samples begin: at the BOS token ("bos"), or in the chat template, so that it '
        'writes a user\'s message and the answer ("chat"). "auto" is "chat" if the tokenizer has a chat template.',
        choices=get_args(Prompt),
    )
    self_temperature: float = _setting(1.0, "Temperature of the sampling.", positive=True)
    self_top_p: float = _setting(0.95, "Draw from the likeliest tokens that hold this share of the probability.")
    self_batch_size: int = _setting(32, "Texts that are sampled at a time. Another number gives other texts.", least=1)
    self_seed: int = _setting(0, "Seed of the sampling.", least=0)

    def __post_init__(self) -> None:
        """Check every field."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                # The checked value, since integers of NumPy become Python's: JSON does not know the former.
                object.__setattr__(self, field.name, _checked(value, f"gere_config.{field.name}", field.metadata))
        parse_layers(self.layers, None)
        known = self.add_bos is None or isinstance(self.add_bos, bool)
        require(known, "gere_config.add_bos", "True, False or None", self.add_bos)
        words = {
            "replay_split": "a name",
            "replay_subset": "a name, or None",
            "replay_column": "a name",
            "anchor": '"auto", "live" or the key of an anchor',
        }
        for name, expected in words.items():
            value = getattr(self, name)
            named = isinstance(value, str) and bool(value)
            require(named or (value is None and name == "replay_subset"), f"gere_config.{name}", expected, value)
        most = f"at most {MOST_KEPT}, since all others count as one"
        require(self.kl_top_k <= MOST_KEPT, "gere_config.kl_top_k", most, self.kl_top_k)
        budget = self.forgetting_budget
        sound = budget is None or (is_finite(budget) and budget >= 0)
        require(sound, "gere_config.forgetting_budget", "a finite number >= 0, or None", budget)
        if self.base_decay != AUTO:
            object.__setattr__(self, "base_decay", _parse_decay(self.base_decay))
        quantiles = (self.lower_quantile, self.upper_quantile)
        ordered = all(map(is_finite, quantiles)) and 0 < quantiles[0] < quantiles[1] < 1
        require(ordered, "gere_config.lower_quantile, upper_quantile", "0 < lower < upper < 1", quantiles)
        measured = self.heldout_dataset is None or self.replay_heldout > 0
        require(measured, "gere_config.replay_heldout", "above 0 with a heldout_dataset", self.replay_heldout)
        where, texts = "gere_config.heldout_dataset", 'texts that nobody trained on, and not "self"'
        require(not isinstance(self.heldout_dataset, str) or self.heldout_dataset != SELF, where, texts, SELF)
        value = self.self_top_p
        require(is_finite(value) and 0 < value <= 1, "gere_config.self_top_p", "a number above 0, at most 1", value)

    @property
    def samples_itself(self) -> bool:
        """Whether the base model itself is the source of the texts."""
        return isinstance(self.replay_dataset, str) and self.replay_dataset == SELF

    def normalization_for(self, w_strategy: float | str) -> Literal["violations", "elements"]:
        """Return the divisor of a row's margin with this weight."""
        if self.normalization != "auto":
            return self.normalization
        return "elements" if w_strategy == "auto" else "violations"


@dataclasses.dataclass(frozen=True)
class _TrainerArguments:
    """The arguments of `GeReTrainer` beside `gere_config`; `GeReMixin` takes them with the same defaults."""

    gere_hidden_state_saving_dir: str = _setting(
        "./gere_saving", "Folder of the anchor: what the base model says about the replay set."
    )
    reuse_gere_hidden_state: bool = _setting(
        True, "Reuse an existing anchor. False rebuilds it at every start; other anchors in the folder are kept."
    )
    num_interpolate_per_batch: int | float | str | None = _setting(
        AUTO,
        "Replay rows in each optimizer step, over all ranks and accumulation steps: a number, or a share of the step "
        'such as 0.1. "auto" is the share of the paper, 4 of 64; a share gives one row at least. With 0 or None the '
        "replay set is shuffled into each epoch once.",
        example=4,
    )
    w_strategy: str = _setting(
        "auto",
        'Weight of the distance to the base model: "auto" (needs no tuning), a number, or "dy" (the paper\'s dynamic '
        "weight, which follows the cross-entropy).",
    )


TRAINER_FIELDS = {field.name: field for field in dataclasses.fields(_TrainerArguments)}
CONFIG_FIELDS = {field.name: field for field in dataclasses.fields(GeReConfig)}
# A command line has text where Python also takes objects.
_TYPES = {
    **get_type_hints(_TrainerArguments),
    **get_type_hints(GeReConfig),
    "replay_dataset": str | None,
    "heldout_dataset": str | None,
    "num_interpolate_per_batch": str | None,
    "base_decay": str,
    "layers": str,
}


def argument_name(name: str) -> str:
    """Return the name of a setting in `GeReArguments`.

    Example:
        >>> argument_name("max_length"), argument_name("reuse_gere_hidden_state")
        ('gere_max_length', 'gere_reuse_hidden_state')
    """
    return f"gere_{name.replace('gere_', '')}"


def _with_every_setting(cls: type) -> Any:
    """Make a dataclass of `cls` with one field for each setting, of a type that text can be read as."""
    fields = []
    for name, setting in {**TRAINER_FIELDS, **CONFIG_FIELDS}.items():
        kind = _TYPES[name]
        if choices := setting.metadata["choices"]:
            kind = Literal.__getitem__(choices)  # `Literal[choices]`, which mypy refuses
            if setting.default is None:
                kind = Optional[kind]  # noqa: UP045 (mypy does not know the type)
        # `HfArgumentParser` hands the metadata on to argparse, which knows no other key of ours.
        field = dataclasses.field(default=setting.default, metadata={"help": setting.metadata["help"]})
        fields.append((argument_name(name), kind, field))
    namespace = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), namespace=namespace)


@_with_every_setting
class GeReArguments:
    """Replay settings for `transformers.HfArgumentParser`, each with the prefix `gere_`.

    The fields are the four arguments of `GeReTrainer` and those of `GeReConfig`, with the same defaults.

    Raises:
        ConfigError: If a value cannot be used.

    Example:
        >>> arguments = GeReArguments(gere_num_interpolate_per_batch=4, gere_w_strategy="dy")
        >>> arguments.trainer_kwargs()["num_interpolate_per_batch"]
        4
    """

    if TYPE_CHECKING:
        # A type checker does not see the fields, which are made from the settings.
        def __init__(self, **settings: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        """Check every field, so that a command line fails before a model is loaded."""
        self.trainer_kwargs()

    def trainer_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of `GeReTrainer`, `gere_config` among them.

        Raises:
            ConfigError: If a value cannot be used.
        """
        section = {name: getattr(self, argument_name(name)) for name in (*TRAINER_FIELDS, *CONFIG_FIELDS)}
        return kwargs_of_section(section, "GeReArguments")


def kwargs_of_section(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read the replay section of a config file into the keyword arguments of `GeReTrainer`.

    Its keys are the four arguments of `GeReTrainer` and the fields of `GeReConfig`. Messages name its place, `where`.
    """
    if not isinstance(section, Mapping):
        raise ConfigError(
            "The replay section of a config is no mapping.",
            where=where,
            expected="settings by name, such as num_interpolate_per_batch: 4",
            found=repr(section),
            fix="Write each setting as `name: value`, indented below the name of the section.",
        )
    for key in section:
        require_known(key, [*TRAINER_FIELDS, *CONFIG_FIELDS], where, "A replay setting")
    parse_weight(section.get("w_strategy", AUTO))
    parse_replay_per_batch(section.get("num_interpolate_per_batch", AUTO))
    kwargs = {name: section[name] for name in TRAINER_FIELDS if name in section}
    config = {name: section[name] for name in CONFIG_FIELDS if name in section}
    return {**kwargs, "gere_config": GeReConfig(**config)}


def require_known(key: object, known: Sequence[str], where: object, what: str) -> None:
    """Refuse an unknown name by a `ConfigError` with the nearest known one; `what` begins its message."""
    if key in known:
        return
    nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"{what} has a name that is not known.",
        where=where,
        expected=f"one of {', '.join(known)}",
        found=repr(key),
        fix=f"Did you mean {nearest}? Rename the setting or take it out.",
    )


def refuse_unknown_arguments(kwargs: Mapping[str, Any], known_of_parent: Collection[str]) -> None:
    """Refuse arguments of a trainer that are settings of replay, but misspelled or in the wrong place.

    The parent trainer has its own error for a name that resembles none of ours. `known_of_parent` are the names that
    it takes, or hands on to its own parents by `**kwargs`.
    """
    own = (*TRAINER_FIELDS, "gere_config")
    parents = set(known_of_parent) - set(own)
    meant = {}
    for name in (*own, *CONFIG_FIELDS):
        meant[name] = meant[argument_name(name)] = name
    for key in kwargs:
        # The parent's names take part, so that a misspelling of one of them is not taken for one of ours.
        nearest = difflib.get_close_matches(key, [*parents, *meant], n=1, cutoff=RESEMBLES)
        if key in own or not nearest or nearest[0] in parents:
            continue
        name = meant[nearest[0]]
        fix = f"Did you mean {name}?"
        if name in CONFIG_FIELDS:
            place = f"belongs in GeReConfig: gere_config=GeReConfig({name}=...)."
            fix = f"{fix} It {place}"
            if key in (name, argument_name(name)):
                fix = f"{name} {place}"
        raise ConfigError(
            "The trainer has no such argument.",
            where="arguments of the trainer",
            expected=f"those of the parent trainer, and {', '.join(own)}",
            found=repr(key),
            fix=fix,
        )


def parse_weight(w_strategy: float | str) -> float | Literal["dy", "auto"]:
    """Read `w_strategy`: `"dy"`, `"auto"`, a number, or the string of a number."""
    if w_strategy in ("dy", "auto"):
        return w_strategy  # type: ignore[return-value]
    weight = math.nan
    if not isinstance(w_strategy, bool):  # `float` takes True for 1
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            weight = float(w_strategy)
    expected = 'a number >= 0, its string, "dy" or "auto"'
    require(math.isfinite(weight) and weight >= 0, "w_strategy", expected, w_strategy)
    return weight


def parse_layers(layers: str | Sequence[int], depth: int | None) -> tuple[int, ...]:
    """Read `layers`: `"last"`, `"every N"`, or numbers from 1, as a sequence or as a string with commas.

    Returns:
        Numbers of layers, ascending. Empty while the `depth` of the model is not known: then only the form is checked.
    """
    if isinstance(layers, str):
        words = layers.replace(",", " ").split()
    elif isinstance(layers, Sequence):
        words = list(map(str, layers))
    else:
        words = [str(layers)]
    if words == [LAST]:
        return () if depth is None else (depth,)
    every = len(words) == 2 and words[0] == EVERY
    listed = words[1:] if every else words
    # `isdigit` alone takes other digits, such as superscripts, which `int` refuses.
    numbers = [int(word) for word in listed if word.isascii() and word.isdigit() and len(word) < 10]
    sound = len(numbers) == len(listed) > 0 and min(numbers) > 0
    expected = '"last", "every N", or numbers of layers'
    if depth is not None:
        sound = sound and (every or max(numbers) <= depth)
        expected += f" from 1 to {depth}"
    require(sound, "gere_config.layers", expected, layers)
    if depth is None:
        return ()
    chosen = range(depth, 0, -numbers[0]) if every else set(numbers)
    return tuple(sorted(chosen))


def parse_replay_per_batch(num_interpolate_per_batch: int | float | str | None) -> int | float:
    """Read `num_interpolate_per_batch`, also as the string of a command line.

    Returns:
        A whole number of rows, 0 for no batch insertion; or, as a float between 0 and 1, the share of a step.
    """
    value: Any = num_interpolate_per_batch
    if value == AUTO:
        return PAPER_SHARE
    if isinstance(value, str):
        value = None if value in ("none", "None") else _number_in(value)
    if value is None:
        return 0
    # Compared before it is a float, which holds no integer of 400 digits.
    if isinstance(value, numbers.Real) and bool(0 < value < 1):  # type: ignore[operator]
        return float(value)
    expected = '"auto", a whole number >= 0, a share between 0 and 1, or None'
    return _whole(value, 0, "num_interpolate_per_batch", expected)


def _number_in(text: str) -> object:
    """Return the number that a text stands for; the text itself if it stands for none."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _parse_decay(base_decay: Any) -> float:
    """Read a number for `base_decay`, also as the string of a command line."""
    value: Any = _number_in(base_decay) if isinstance(base_decay, str) else base_decay
    sound = isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) < math.inf
    require(sound, "gere_config.base_decay", '"auto", or a finite number >= 0', base_decay)
    return float(value)


def replay_rows(wanted: int | float, rows: int) -> int:
    """Return the replay rows of a step of so many rows: `wanted` as `parse_replay_per_batch` gives it.

    Example:
        >>> replay_rows(0.0625, 64), replay_rows(0.0625, 8), replay_rows(3, 8)
        (4, 1, 3)
    """
    if isinstance(wanted, int):
        return wanted
    return max(1, round(wanted * rows))


def _checked(value: Any, where: str, rules: Mapping[str, Any]) -> Any:
    """Return the value, a whole number as an int, if the metadata of its setting allow it."""
    choices, least = rules["choices"], rules["least"]
    require(not choices or value in choices, where, " or ".join(map(repr, choices)), value)
    require(not rules["positive"] or (is_finite(value) and value > 0), where, "a finite number above 0", value)
    if least is None:
        return value
    return _whole(value, least, where, f"a whole number >= {least}")


def _whole(value: Any, least: int, where: str, expected: str) -> int:
    """Return an int for whatever Python takes as an index, such as the integers of NumPy."""
    number = least - 1
    if not isinstance(value, bool):  # True is an index, too
        with contextlib.suppress(TypeError):
            number = operator.index(value)
    require(number >= least, where, expected, value)
    return number


def is_finite(value: object) -> bool:
    """Return whether a value is a finite number; True and False are none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def require(ok: bool, where: str, expected: str, found: object) -> None:
    """Raise a `ConfigError` about the argument `where` unless `ok`."""
    if not ok:
        raise ConfigError(
            "A setting has a value that cannot be used.",
            where=where,
            expected=expected,
            found=brief(found),
            fix="Set it to an expected value, or leave it out for the default.",
        )
