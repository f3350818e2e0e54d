"""What is known of a training before it begins: the settings of replay, and the replay set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from gere.cache import named_fields
from gere.config import NO_REPLAY, GeReConfig, parse_replay_per_batch, parse_weight, require
from gere.errors import ReplaySetError
from gere.ranks import Ranks
from gere.replay import ReplaySet, load_replay_set
from gere.replay.written import own_texts
from gere.session.checkpoint import named_key


@dataclass(frozen=True)
class ReplaySettings:
    """What the user asks for.

    Attributes:
        folder: Cache folder.
        reuse: Reuse an anchor that is there.
        rows_per_step: Replay rows in each optimizer step over all ranks, or their share of it; 0 for no insertion.
        w_strategy: Weight of the distance.
        config: All other settings.
    """

    folder: Path
    reuse: bool
    rows_per_step: int | float
    w_strategy: float | Literal["dy", "auto"]
    config: GeReConfig

    @property
    def active(self) -> bool:
        """Whether there is replay."""
        return self.config.replay_strategy != NO_REPLAY

    @property
    def values(self) -> dict[str, Any]:
        """Settings of a strategy by name."""
        values = {name: getattr(self.config, name) for name in self.config.__dataclass_fields__}
        return {**values, "normalization": self.config.normalization_for(self.w_strategy)}


def replay_settings(
    saving_dir: object,
    reuse: object,
    replay_per_batch: int | float | str | None,
    w_strategy: float | str,
    config: object,
) -> ReplaySettings:
    """Check the five arguments of a trainer.

    Raises:
        ConfigError: Naming the argument that cannot be used.
    """
    sound = isinstance(saving_dir, str | Path) and "\0" not in str(saving_dir)
    require(sound, "gere_hidden_state_saving_dir", "a path", saving_dir)
    require(isinstance(reuse, bool), "reuse_gere_hidden_state", "True or False", reuse)
    require(isinstance(config, GeReConfig | None), "gere_config", "GeReConfig(...)", config)
    return ReplaySettings(
        folder=Path(str(saving_dir)),
        reuse=bool(reuse),
        rows_per_step=parse_replay_per_batch(replay_per_batch),
        w_strategy=parse_weight(w_strategy),
        config=config if isinstance(config, GeReConfig) else GeReConfig(),
    )


@dataclass(frozen=True)
class ReplayPlan:
    """What the data loader needs.

    Attributes:
        settings: What the user asks for.
        replay: The replay set.
        lengths: Tokens of each replay row, int64 [rows].
    """

    settings: ReplaySettings
    replay: ReplaySet
    lengths: np.ndarray


def make_plan(
    settings: ReplaySettings,
    tokenizer: Any,
    model: nn.Module,
    ranks: Ranks,
    *,
    checkpoint: Path | None,
    progress: bool,
) -> ReplayPlan:
    """Read the replay set, the same on every rank.

    Args:
        settings: What the user asks for.
        tokenizer: The user's tokenizer.
        model: The model without its distributed wrapper, which may be the source of the texts.
        ranks: All processes; each must call this.
        checkpoint: The checkpoint that training resumes from.
        progress: Show a progress bar.

    Raises:
        ReplaySetError: If the set cannot be used, or differs between machines.
        CacheError: If texts of the base model are missing or cannot be kept.
        RankFailedError: If another process failed.
    """
    config, folder = settings.config, settings.folder
    own = None
    if config.samples_itself:
        base = _base_weights(settings, model, ranks, checkpoint)
        own = own_texts(model, tokenizer, config, folder, base_weights=base, ranks=ranks, progress=progress)
    replay = ranks.first_here_first(lambda: load_replay_set(config, tokenizer, folder, own))
    fields = ranks.gather(replay.fields)
    ranks.together(lambda: _require_same_texts(fields))
    return ReplayPlan(settings, replay, np.array([len(row) for row in replay.rows], dtype=np.int64))


def _base_weights(settings: ReplaySettings, model: nn.Module, ranks: Ranks, checkpoint: Path | None) -> str | None:
    """Digest of the base model's weights, from the anchor that a tuned model names; `None` for its own base."""
    key = named_key(settings.config, settings.reuse, model, checkpoint, ranks)
    if key is None:
        return None
    return named_fields(settings.folder, key, ranks)["weights"]


def _require_same_texts(fields: Sequence[Mapping[str, str]]) -> None:
    """Refuse a replay set that differs between machines, whose files need not be the same."""
    for rank, other in enumerate(fields):
        names = [name for name in other if other[name] != fields[0].get(name)]
        if names:
            raise ReplaySetError(
                "The processes do not have the same replay set.",
                where=f"{', '.join(names)} of gere_config.replay_dataset",
                expected="the same texts and the same tokenizer on every machine",
                found=f"others on rank {rank} than on rank 0",
                fix="Copy the file of rank 0 to the other machines.",
            )
