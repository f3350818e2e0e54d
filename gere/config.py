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
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from gere.errors import ConfigError

# The one list of strategies. Each class says what is kept of the base model and how far a row has moved from it; it is
# imported when it is used, since losses need torch.
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
MOST_KEPT = 1024
# High enough that `max_seq_length`, which other trainers had, is not taken for a misspelling of our `max_length`.
RESEMBLES = 0.85
Mode = Literal["auto", "replace", "add"]
Normalization = Literal["auto", "violations", "elements"]
Bands = Literal["mean_std", "quantile"]
Prompt = Literal["auto", "bos", "chat"]
PROMPTS = get_args(Prompt)
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
    """Declare a setting.

    Args:
        default: Its default. `None` is allowed where it is the default.
        text: What it does, for `help(GeReConfig)`, command lines and docs/settings.md.
        choices: The values that are allowed.
        least: It is a whole number of at least this.
        positive: It is a finite number above 0.
        example: A value, for the docs.
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
        "General texts: a file (.jsonl, .json, .parquet, or .txt with one text a line), a folder or hub name for "
        'datasets.load_dataset, a datasets.Dataset, a list of strings or records, or "self" for texts that the base '
        "model samples before training. The default is the first 1,000 texts of DKYoon/SlimPajama-6B.",
        example="general.jsonl",
    )
    replay_split: str = _setting("train", "Split of a hub data set.")
    replay_column: str = _setting("text", "Column or JSON key that holds the text.")
    replay_size: int | None = _setting(
        None,
        "Use the first N texts. The default is all texts of a file, folder, dataset or list, and 1,000 texts of a hub "
        'data set or of "self".',
        least=1,
        example=500,
    )
    max_length: int = _setting(563, "Longest replay row in tokens. Longer texts are cut.", least=2)
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
        choices=PROMPTS,
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
                object.__setattr__(self, field.name, _checked(value, f"gere_config.{field.name}", field.metadata))
        parse_layers(self.layers, None)
        known = self.add_bos is None or isinstance(self.add_bos, bool)
        require(known, "gere_config.add_bos", "True, False or None", self.add_bos)
        words = {
            "replay_split": "a name",
            "replay_column": "a name",
            "anchor": '"auto", "live" or the key of an anchor',
        }
        for name, expected in words.items():
            value = getattr(self, name)
            require(isinstance(value, str) and bool(value), f"gere_config.{name}", expected, value)
        few = self.kl_top_k <= MOST_KEPT
        require(few, "gere_config.kl_top_k", f"at most {MOST_KEPT}, since all others count as one", self.kl_top_k)
        quantiles = (self.lower_quantile, self.upper_quantile)
        ordered = all(map(_finite, quantiles)) and 0 < quantiles[0] < quantiles[1] < 1
        require(ordered, "gere_config.lower_quantile, upper_quantile", "0 < lower < upper < 1", quantiles)
        value = self.self_top_p
        require(_finite(value) and 0 < value <= 1, "gere_config.self_top_p", "a number above 0, at most 1", value)

    @property
    def samples_itself(self) -> bool:
        """Whether the base model itself is the source of the texts."""
        return isinstance(self.replay_dataset, str) and self.replay_dataset == SELF

    def normalization_for(self, w_strategy: float | str) -> Literal["violations", "elements"]:
        """What the margin of a row is divided by with this weight."""
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
    num_interpolate_per_batch: int | None = _setting(
        None,
        "Replay rows in each optimizer step, over all ranks and accumulation steps. By default, and with 0, the "
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
    "layers": str,
}


def argument_name(name: str) -> str:
    """Name of a setting in `GeReArguments`.

    Example:
        >>> argument_name("max_length"), argument_name("reuse_gere_hidden_state")
        ('gere_max_length', 'gere_reuse_hidden_state')
    """
    return f"gere_{name.replace('gere_', '')}"


def _with_every_setting(cls: type) -> Any:
    """Make a dataclass of `cls` with one field for each setting, of a type that text can be read as."""
    fields = []
    for name, setting in {**TRAINER_FIELDS, **CONFIG_FIELDS}.items():
        choices = setting.metadata["choices"]
        kind = Literal.__getitem__(choices) if choices else _TYPES[name]
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

        def __init__(self, **settings: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        """Check every field, so that a command line fails before a model is loaded."""
        self.trainer_kwargs()

    def trainer_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `GeReTrainer`, `gere_config` among them.

        Raises:
            ConfigError: If a value cannot be used.
        """
        section = {name: getattr(self, argument_name(name)) for name in (*TRAINER_FIELDS, *CONFIG_FIELDS)}
        return kwargs_of_section(section, "GeReArguments")


def kwargs_of_section(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read the replay section of a config file.

    Args:
        section: Values by the names of the four arguments of `GeReTrainer` and of the fields of `GeReConfig`.
        where: The place of the section, for messages.

    Returns:
        Keyword arguments of `GeReTrainer`: those of the four that the section sets, and `gere_config`.

    Raises:
        ConfigError: If the section is no mapping, a key is unknown, or a value cannot be used.
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
    parse_weight(section.get("w_strategy", "auto"))
    parse_replay_per_batch(section.get("num_interpolate_per_batch"))
    kwargs = {name: section[name] for name in TRAINER_FIELDS if name in section}
    return kwargs | {"gere_config": GeReConfig(**{name: section[name] for name in CONFIG_FIELDS if name in section})}


def require_known(key: object, known: Sequence[str], where: object, what: str) -> None:
    """Refuse a name that is not known.

    Args:
        key: The name.
        known: All names that there are.
        where: The place of it, for the message.
        what: What bears the name, as the message begins.

    Raises:
        ConfigError: With the nearest known name.
    """
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

    A name that resembles none of these is left to the parent trainer, which has an error of its own for it.

    Args:
        kwargs: Keyword arguments of the trainer.
        known_of_parent: Names that the parent trainer takes, or hands on to its own parents by `**kwargs`.

    Raises:
        ConfigError: Naming the argument that was meant, and where it belongs.
    """
    own = (*TRAINER_FIELDS, "gere_config")
    parents = set(known_of_parent) - set(own)
    meant = {spelling: name for name in (*own, *CONFIG_FIELDS) for spelling in (name, argument_name(name))}
    for key in kwargs:
        # The parent's names take part, so that a misspelling of one of them is not taken for one of ours.
        nearest = difflib.get_close_matches(key, [*parents, *meant], n=1, cutoff=RESEMBLES)
        if key in own or not nearest or nearest[0] in parents:
            continue
        name = meant[nearest[0]]
        fix = f"Did you mean {name}?"
        if name in CONFIG_FIELDS:
            place = f"belongs in GeReConfig: gere_config=GeReConfig({name}=...)."
            fix = f"{name} {place}" if key in (name, argument_name(name)) else f"{fix} It {place}"
        raise ConfigError(
            "The trainer has no such argument.",
            where="arguments of the trainer",
            expected=f"those of the parent trainer, and {', '.join(own)}",
            found=repr(key),
            fix=fix,
        )


def parse_weight(w_strategy: float | str) -> float | Literal["dy", "auto"]:
    """Read `w_strategy`.

    Args:
        w_strategy: A number, its string, `"dy"` or `"auto"`.

    Returns:
        The number as a float, or the word.

    Raises:
        ConfigError: If it is none of these.
    """
    if w_strategy in ("dy", "auto"):
        return w_strategy  # type: ignore[return-value]
    try:
        weight = math.nan if isinstance(w_strategy, bool) else float(w_strategy)
    except (TypeError, ValueError):
        weight = math.nan
    require(
        math.isfinite(weight) and weight >= 0, "w_strategy", 'a number >= 0, its string, "dy" or "auto"', w_strategy
    )
    return weight


def parse_layers(layers: str | Sequence[int], depth: int | None) -> tuple[int, ...]:
    """Read `layers`.

    Args:
        layers: `"last"`, `"every N"`, or numbers from 1, as a sequence or as a string with commas.
        depth: Number of layers of the model; `None` if it is not known yet.

    Returns:
        Numbers of layers, ascending; empty while the depth is not known.

    Raises:
        ConfigError: If it is none of these, or a number is greater than the depth.
    """
    if isinstance(layers, str):
        words = layers.replace(",", " ").split()
    else:
        words = [str(layer) for layer in (layers if isinstance(layers, Sequence) else [layers])]
    if words == [LAST]:
        return () if depth is None else (depth,)
    every = len(words) == 2 and words[0] == EVERY
    listed = words[1:] if every else words
    numbers = [int(word) for word in listed if word.isascii() and word.isdigit()]
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


def parse_replay_per_batch(num_interpolate_per_batch: int | None) -> int:
    """Read `num_interpolate_per_batch`.

    Args:
        num_interpolate_per_batch: Replay rows in each optimizer step, or 0 or `None` for no batch insertion.

    Returns:
        The number of rows, 0 for no batch insertion.

    Raises:
        ConfigError: If it is not a whole number of at least 0.
    """
    value = 0 if num_interpolate_per_batch is None else num_interpolate_per_batch
    return _whole(value, 0, "num_interpolate_per_batch", "a whole number >= 0, or None")


def _checked(value: Any, where: str, rules: Mapping[str, Any]) -> Any:
    """The value, if the metadata of its setting allow it; a whole number as an int."""
    choices, least = rules["choices"], rules["least"]
    require(not choices or value in choices, where, " or ".join(map(repr, choices)), value)
    require(not rules["positive"] or (_finite(value) and value > 0), where, "a finite number above 0", value)
    return value if least is None else _whole(value, least, where, f"a whole number >= {least}")


def _whole(value: Any, least: int, where: str, expected: str) -> int:
    """An int of whatever Python takes as an index, such as the integers of NumPy."""
    number = least - 1
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(value)
    require(number >= least, where, expected, value)
    return number


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require(ok: bool, where: str, expected: str, found: object) -> None:
    """Raise a `ConfigError` about the argument `where` unless `ok`."""
    if not ok:
        raise ConfigError(
            "A setting has a value that cannot be used.",
            where=where,
            expected=expected,
            found=repr(found),
            fix="Set it to an expected value, or leave it out for the default.",
        )
