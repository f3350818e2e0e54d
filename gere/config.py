"""Every knob of replay, its default and its check."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from gere.errors import ConfigError

# One line for each strategy: its name, and the class that says what is kept of the base model and how far a row is from
# it. The class is imported when it is used, since losses need torch.
STRATEGIES = {
    "tm": "gere.losses.margin:Margin",
    "ce": "gere.losses.strategy:Strategy",
    "kl": "gere.losses.kl:LogitImitation",
    "l1": "gere.losses.imitation:AbsoluteImitation",
    "l2": "gere.losses.imitation:SquaredImitation",
}
NO_REPLAY = "none"
BANDS = ("mean_std", "quantile")
LAST, EVERY = "last", "every"
MOST_KEPT = 1024
NORMALIZATIONS = ("auto", "violations", "elements")
MODES = ("auto", "replace", "add")
PROMPTS = ("auto", "bos", "chat")
DTYPES = ("auto", "float32", "bfloat16", "float16")
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
        replay_strategy: What is added to the cross-entropy of the replay rows: `"tm"` (threshold-based margin), `"kl"`
            (divergence of the logits), `"l1"` or `"l2"` (difference of the last-layer states), or `"ce"`: nothing.
            `"none"` replays nothing: the parent trainer, bit for bit.
        replay_mode: Whether the replay rows of a step `"replace"` task rows of it, or are added to them (`"add"`).
            `"auto"` replaces, and adds where it has to: streaming datasets, batch samplers, dispatched batches.
        normalization: What the margin of a row is divided by: its violated elements (`"violations"`, the official
            rule) or all its elements (`"elements"`). `"auto"` is the second where w_strategy is `"auto"`, else the
            first, so that the official weights mean what they mean there.
        layers: States that TM holds: of the `"last"` layer, of every n-th and the last (`"every 4"`), or of those in a
            list (`[6, 12]` or `"6, 12"`, 1 for the first). Their distances are averaged, so that the weight keeps its
            meaning. Inner layers, whose states are not normalised and have outliers, get quantile bands.
        bands: Bands of the last layer: around the mean (`"mean_std"`), or between two quantiles (`"quantile"`).
        band_width: k of the bands mu - k sigma and mu + k sigma. At 1, 16 % of a normal distribution lie in either of
            the outer regions, at 0.5 31 %, at 2 2 %.
        std_floor: Smallest sigma, as a share of the root mean square of all sigma.
        lower_quantile: Share of the negative region where bands lie between quantiles.
        upper_quantile: 1 - share of the positive region, likewise.
        kl_top_k: Likeliest tokens of each distribution that KL compares one by one; all others count as one.
        kl_temperature: What KL divides the logits by.
        anchor: Key of the anchor to use, or `"auto"`: the one that the checkpoint or the loaded model names, else the
            one that belongs to the model as it stands. `"live"`, with PEFT: nothing of each token is stored; the model
            with its adapter disabled gives the targets, for one more forward pass of the replay rows in each step.
        anchor_batch_tokens: Padded tokens of one forward pass while the anchor is built; a CPU takes 512 at most.
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
    replay_strategy: Literal["tm", "ce", "kl", "l1", "l2", "none"] = "tm"
    replay_mode: Literal["auto", "replace", "add"] = "auto"
    normalization: Literal["auto", "violations", "elements"] = "auto"
    layers: str | Sequence[int] = LAST
    bands: Literal["mean_std", "quantile"] = "mean_std"
    band_width: float = 1.0
    std_floor: float = 1e-3
    lower_quantile: float = 0.16
    upper_quantile: float = 0.84
    kl_top_k: int = 64
    kl_temperature: float = 2.0
    anchor: str = "auto"
    anchor_batch_tokens: int = 8192
    self_prompt: Literal["auto", "bos", "chat"] = "auto"
    self_temperature: float = 1.0
    self_top_p: float = 0.95
    self_batch_size: int = 32
    self_seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        closed = {"replay_strategy": (*STRATEGIES, NO_REPLAY), "replay_mode": MODES, "normalization": NORMALIZATIONS}
        closed |= {"bands": BANDS, "self_prompt": PROMPTS}
        for name, choices in closed.items():
            value = getattr(self, name)
            require(value in choices, f"gere_config.{name}", " or ".join(map(repr, choices)), value)
        self._check_numbers()
        parse_layers(self.layers, None)
        known = self.add_bos is None or isinstance(self.add_bos, bool)
        require(known, "gere_config.add_bos", "True, False or None", self.add_bos)
        for name in ("replay_split", "replay_column"):
            value = getattr(self, name)
            require(isinstance(value, str) and bool(value), f"gere_config.{name}", "a name", value)
        named = isinstance(self.anchor, str) and bool(self.anchor)
        require(named, "gere_config.anchor", '"auto", "live" or the key of an anchor', self.anchor)

    @property
    def samples_itself(self) -> bool:
        """Whether the base model itself is the source of the texts."""
        return isinstance(self.replay_dataset, str) and self.replay_dataset == SELF

    def _check_numbers(self) -> None:
        least_of = {"max_length": 2, "replay_size": 1, "kl_top_k": 1, "anchor_batch_tokens": 1}
        least_of |= {"self_batch_size": 1, "self_seed": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            optional = name == "replay_size" and value is None
            require(optional or _whole(value, least), f"gere_config.{name}", f"a whole number >= {least}", value)
        for name in ("band_width", "std_floor", "kl_temperature", "self_temperature"):
            value = getattr(self, name)
            require(_finite(value) and value > 0, f"gere_config.{name}", "a finite number above 0", value)
        few = self.kl_top_k <= MOST_KEPT
        require(few, "gere_config.kl_top_k", f"at most {MOST_KEPT}, since all others count as one", self.kl_top_k)
        quantiles = (self.lower_quantile, self.upper_quantile)
        ordered = all(map(_finite, quantiles)) and 0 < quantiles[0] < quantiles[1] < 1
        require(ordered, "gere_config.lower_quantile, upper_quantile", "0 < lower < upper < 1", quantiles)
        value = self.self_top_p
        require(_finite(value) and 0 < value <= 1, "gere_config.self_top_p", "a number above 0, at most 1", value)

    def normalization_for(self, w_strategy: float | str) -> Literal["violations", "elements"]:
        """What the margin of a row is divided by with this weight."""
        if self.normalization != "auto":
            return self.normalization
        return "elements" if w_strategy == "auto" else "violations"


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
    listed = layers.replace(",", " ").split() if isinstance(layers, str) else layers
    words = [str(layer) for layer in (listed if isinstance(listed, Sequence) else [listed])]
    every = words[0] == EVERY and len(words) == 2 if words else False
    numbers = [int(word) for word in words[every:] if word.isascii() and word.isdigit() and int(word) > 0]
    most = depth or math.inf
    sound = words == [LAST] or (len(numbers) == len(words) - every > 0 and (every or max(numbers) <= most))
    expected = '"last", "every N", or numbers of layers' + ("" if depth is None else f" from 1 to {depth}")
    require(sound, "gere_config.layers", expected, layers)
    if depth is None:
        return ()
    if words == [LAST]:
        return (depth,)
    return tuple(sorted(range(depth, 0, -numbers[0]) if every else set(numbers)))


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
