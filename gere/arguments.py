"""The arguments of `GeReTrainer` for command lines and config files."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gere.config import GeReConfig, parse_replay_per_batch, parse_weight
from gere.errors import ConfigError

# The four arguments that `GeReTrainer` has beside `gere_config`, and their names in `GeReArguments`.
TRAINER_FIELDS = {
    "gere_hidden_state_saving_dir": "gere_hidden_state_saving_dir",
    "reuse_gere_hidden_state": "gere_reuse_hidden_state",
    "num_interpolate_per_batch": "gere_num_interpolate_per_batch",
    "w_strategy": "gere_w_strategy",
}
CONFIG_FIELDS = tuple(field.name for field in dataclasses.fields(GeReConfig))


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
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

    gere_hidden_state_saving_dir: str = _option("./gere_saving", "Folder of the anchor.")
    gere_reuse_hidden_state: bool = _option(True, "Open an anchor that is there; false builds it anew.")
    gere_num_interpolate_per_batch: int | None = _option(
        None, "Replay rows in each optimizer step, over all ranks; 0 or nothing shuffles them into the epoch once."
    )
    gere_w_strategy: str = _option(
        "auto", "Weight of the distance: auto, a number, or dy to follow the cross-entropy."
    )
    gere_replay_dataset: str | None = _option(
        None, "File, folder or hub name of the general texts, or self; nothing for 1,000 texts of SlimPajama-6B."
    )
    gere_replay_split: str = _option("train", "Split of a hub data set.")
    gere_replay_column: str = _option("text", "Column or JSON key that holds the text.")
    gere_replay_size: int | None = _option(
        None, "Take the first so many texts; nothing for all of a file, and 1,000 of a hub data set or of self."
    )
    gere_max_length: int = _option(563, "Longest replay row in tokens; longer texts are cut.")
    gere_add_bos: bool | None = _option(None, "Begin each row with the BOS token; nothing for the tokenizer's habit.")
    gere_replay_strategy: Literal["tm", "ce", "kl", "l1", "l2", "none"] = _option(
        "tm",
        "What the cross-entropy of the replay rows gets beside it: tm a margin, kl a divergence of the logits, "
        "l1 or l2 a difference of the states, ce nothing; none for no replay.",
    )
    gere_replay_mode: Literal["auto", "replace", "add"] = _option(
        "auto", "Replay rows replace task rows of a step, or are added to them; auto adds where it has to."
    )
    gere_normalization: Literal["auto", "violations", "elements"] = _option(
        "auto", "What the margin of a row is divided by: its violated elements, or all of them; auto fits w_strategy."
    )
    gere_layers: str = _option(
        "last", "States that tm holds: last, every N (and the last), or numbers of layers such as 6,12."
    )
    gere_bands: Literal["mean_std", "quantile"] = _option(
        "mean_std", "Bands of the last layer: around the mean, or between two quantiles."
    )
    gere_band_width: float = _option(1.0, "Half the width of the neutral band, in standard deviations.")
    gere_std_floor: float = _option(1e-3, "Least standard deviation, as a share of the root mean square of them all.")
    gere_lower_quantile: float = _option(0.16, "Share of the negative region where bands lie between quantiles.")
    gere_upper_quantile: float = _option(0.84, "1 - share of the positive region, likewise.")
    gere_kl_top_k: int = _option(64, "Likeliest tokens that kl compares one by one; all others count as one.")
    gere_kl_temperature: float = _option(2.0, "What kl divides the logits by.")
    gere_anchor: str = _option(
        "auto", "Key of an anchor, for a tuned model that does not name its own; live takes PEFT's base model itself."
    )
    gere_anchor_batch_tokens: int = _option(8192, "Padded tokens of a forward pass while the anchor is built.")
    gere_self_prompt: Literal["auto", "bos", "chat"] = _option(
        "auto",
        "What the base model goes on from, with replay_dataset self; auto is chat with a chat template, else bos.",
    )
    gere_self_temperature: float = _option(1.0, "Temperature of the texts that the base model samples.")
    gere_self_top_p: float = _option(0.95, "Share of the probability that the tokens to draw from hold.")
    gere_self_batch_size: int = _option(32, "Texts that are sampled at a time; another number gives other texts.")
    gere_self_seed: int = _option(0, "Seed of the texts that the base model samples.")

    def __post_init__(self) -> None:
        """Check every field, so that a command line fails before a model is loaded."""
        self.trainer_kwargs()

    def trainer_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `GeReTrainer`, `gere_config` among them.

        Raises:
            ConfigError: If a value cannot be used.
        """
        section = {name: getattr(self, field) for name, field in TRAINER_FIELDS.items()}
        section |= {name: getattr(self, f"gere_{name}") for name in CONFIG_FIELDS}
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
