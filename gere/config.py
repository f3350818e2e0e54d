"""Every knob of replay, its default and its check."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from gere.errors import ConfigError

STRATEGIES = ("tm", "ce", "none")
NORMALIZATIONS = ("violations", "elements")
MODES = ("auto", "replace", "add")
PROMPTS = ("auto", "bos", "chat")
SELF = "self"


@dataclasses.dataclass(frozen=True)
class GeReConfig:
    """Settings of replay beyond the four arguments of `GeReTrainer`.

    Args:
        replay_dataset: Where the general texts come from: a file (`.jsonl`, `.json`, `.parquet`, `.txt`), a folder or
            hub name for `datasets.load_dataset`, a `datasets.Dataset`, a list of strings or records, `"self"` for
            texts that the base model samples before it is trained, or `None` for the first 1,000 texts of
            `DKYoon/SlimPajama-6B`.
        replay_split: Split of a hub data set.
        replay_column: Column (or JSON key) that holds the text.
        replay_size: Number of texts; the first so many are taken. `None` takes all of a file, folder, dataset or list,
            and 1,000 of a hub data set or of `"self"`.
        max_length: Longest replay row in tokens; longer texts are cut.
        add_bos: Whether a row begins with the BOS token. `None` leaves it to the tokenizer.
        replay_strategy: `"tm"` (cross-entropy and threshold-based margin), `"ce"` (cross-entropy alone), or `"none"`
            (no replay: the parent trainer, bit for bit).
        replay_mode: Whether the replay rows of a step `"replace"` task rows of it, or are added to them (`"add"`).
            `"auto"` replaces, and adds where it has to: streaming datasets, batch samplers, dispatched batches.
        normalization: What the margin of a row is divided by: its violated elements (`"violations"`, the official
            rule) or all its elements (`"elements"`).
        band_width: k of the bands mu - k sigma and mu + k sigma.
        std_floor: Smallest sigma, as a share of the root mean square of all sigma.
        anchor: Key of the anchor to use, or `"auto"`: the one that the checkpoint or the loaded model names, else the
            one that belongs to the model as it stands.
        anchor_batch_tokens: Padded tokens of one forward pass while the anchor is built.
        self_prompt: What the base model goes on from, with `replay_dataset="self"`: the BOS token (`"bos"`), or its
            chat template, so that it makes up a user's message and answers it (`"chat"`). `"auto"` is chat where
            the tokenizer has a chat template.
        self_temperature: Temperature of the sampling.
        self_top_p: Share of the probability that the tokens to draw from hold at each place.
        self_batch_size: Texts that are sampled at a time. Another number gives other texts.
        self_seed: Seed of the sampling.

    Raises:
        ConfigError: If a value cannot be used.

    Example:
        >>> GeReConfig(replay_dataset="general.jsonl", band_width=1.5).max_length
        563
    """

    replay_dataset: Any = None
    replay_split: str = "train"
    replay_column: str = "text"
    replay_size: int | None = None
    max_length: int = 563
    add_bos: bool | None = None
    replay_strategy: Literal["tm", "ce", "none"] = "tm"
    replay_mode: Literal["auto", "replace", "add"] = "auto"
    normalization: Literal["violations", "elements"] = "violations"
    band_width: float = 1.0
    std_floor: float = 1e-3
    anchor: str = "auto"
    anchor_batch_tokens: int = 8192
    self_prompt: Literal["auto", "bos", "chat"] = "auto"
    self_temperature: float = 1.0
    self_top_p: float = 0.95
    self_batch_size: int = 32
    self_seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        closed = {"replay_strategy": STRATEGIES, "replay_mode": MODES, "normalization": NORMALIZATIONS}
        closed["self_prompt"] = PROMPTS
        for name, choices in closed.items():
            value = getattr(self, name)
            require(value in choices, f"gere_config.{name}", " or ".join(map(repr, choices)), value)
        self._check_numbers()
        require(self.add_bos in (None, True, False), "gere_config.add_bos", "True, False or None", self.add_bos)
        for name in ("replay_split", "replay_column"):
            value = getattr(self, name)
            require(isinstance(value, str) and bool(value), f"gere_config.{name}", "a name", value)
        named = isinstance(self.anchor, str) and bool(self.anchor)
        require(named, "gere_config.anchor", '"auto" or the key of an anchor', self.anchor)

    @property
    def samples_itself(self) -> bool:
        """Whether the base model itself is the source of the texts."""
        return isinstance(self.replay_dataset, str) and self.replay_dataset == SELF

    def _check_numbers(self) -> None:
        least_of = {"max_length": 2, "anchor_batch_tokens": 1, "replay_size": 1, "self_batch_size": 1, "self_seed": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            optional = name == "replay_size" and value is None
            require(optional or _whole(value, least), f"gere_config.{name}", f"a whole number >= {least}", value)
        for name in ("band_width", "std_floor", "self_temperature"):
            value = getattr(self, name)
            require(_finite(value) and value > 0, f"gere_config.{name}", "a finite number above 0", value)
        value = self.self_top_p
        require(_finite(value) and 0 < value <= 1, "gere_config.self_top_p", "a number above 0, at most 1", value)


def parse_weight(w_strategy: float | str) -> float | Literal["dy"]:
    """Read `w_strategy`.

    Args:
        w_strategy: A number, its string, or `"dy"`.

    Returns:
        The number as a float, or `"dy"`.

    Raises:
        ConfigError: If it is neither.
    """
    if w_strategy == "dy":
        return "dy"
    try:
        weight = math.nan if isinstance(w_strategy, bool) else float(w_strategy)
    except (TypeError, ValueError):
        weight = math.nan
    require(math.isfinite(weight) and weight >= 0, "w_strategy", 'a number >= 0, its string, or "dy"', w_strategy)
    return weight


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
    require(_whole(value, 0), "num_interpolate_per_batch", "a whole number >= 0, or None", value)
    return value


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
