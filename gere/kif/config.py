"""Settings of Recurrent-KIF and TaSL, and their presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from gere.config import is_finite, require, require_known
from gere.kif.fusion import FusionWeights
from gere.kif.importance import RULES, Rule

Score = Literal["sensitivity", "sensitivity x uncertainty"]
Consolidation = Literal["rounds", "matrix", "rank"]


@dataclasses.dataclass(frozen=True)
class KIFConfig:
    """Settings of Recurrent-KIF, those of the paper by default.

    Args:
        inner_steps: Q, optimizer steps on the task before each fusion.
        outer_steps: M, optimizer steps on the memory before each fusion; 0 for none.
        share: Share of the entries that count as important, above 0 and below 1.
        inner_smoothing: Smoothing of the importance for the task, at least 0 and below 1.
        outer_smoothing: Smoothing of the importance for the memory.
        score: What an entry is ranked by: E, or E times U.
        rule: Importance of a step: |w g|, (w g)^2, or |w g - (w g)^2 / 2|.
        observe: Read the weight `"before"` the optimizer moves it, where the gradient belongs, or `"after"`.
        fusion_weights: Shares of the inner and of the outer update where both matter, and of both where neither does.
        outer_learning_rate: Learning rate of the outer steps, whose optimizer begins anew in each fusion; `None` for
            the optimizer of the trainer at its rate of the moment.
        outer_batch: Rows of the memory in an outer step, over all processes.
        optimizer_state: `"keep"` the state of the optimizer after a fusion, or `"reset"` it.
        consolidate: `"rounds"` fuses after every `inner_steps`; `"matrix"` and `"rank"` consolidate once after the
            task, as TaSL does, and need no memory.
        temperature: Softness of the choice between present and previous ranks, above 0.
        memory_share: Share of each task that the memory keeps, above 0 and below 1.

    Raises:
        ConfigError: If a value cannot be used.

    Example:
        >>> KIFConfig.preset("code", inner_steps=4).fusion_weights
        FusionWeights(both_inner=0.4, both_outer=0.6, neither=0.5)
    """

    inner_steps: int = 8
    outer_steps: int = 4
    share: float = 0.2
    inner_smoothing: float = 0.55
    outer_smoothing: float = 0.55
    score: Score = "sensitivity"
    rule: Rule = "first order"
    observe: Literal["before", "after"] = "before"
    fusion_weights: tuple[float, float, float] = FusionWeights(1.0, 1.0, 0.0)
    outer_learning_rate: float | None = 1e-3
    outer_batch: int = 8
    optimizer_state: Literal["keep", "reset"] = "keep"
    consolidate: Consolidation = "rounds"
    temperature: float = 0.25
    memory_share: float = 0.02

    def __post_init__(self) -> None:
        """Check every field."""
        for name, least in {"inner_steps": 1, "outer_steps": 0, "outer_batch": 1}.items():
            value = getattr(self, name)
            sound = isinstance(value, int) and not isinstance(value, bool) and value >= least
            require(sound, f"kif_config.{name}", f"a whole number >= {least}", value)
        for name in ("share", "memory_share"):
            value = getattr(self, name)
            require(is_finite(value) and 0 < value < 1, f"kif_config.{name}", "above 0 and below 1", value)
        for name in ("inner_smoothing", "outer_smoothing"):
            value = getattr(self, name)
            require(is_finite(value) and 0 <= value < 1, f"kif_config.{name}", "at least 0 and below 1", value)
        for name in ("temperature", "outer_learning_rate"):
            value = getattr(self, name)
            open_rate = value is None and name == "outer_learning_rate"
            require(open_rate or (is_finite(value) and value > 0), f"kif_config.{name}", "a number above 0", value)
        choices = {
            "score": get_args(Score),
            "rule": tuple(RULES),
            "observe": ("before", "after"),
            "optimizer_state": ("keep", "reset"),
            "consolidate": get_args(Consolidation),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            require(value in known, f"kif_config.{name}", " or ".join(map(repr, known)), value)
        weights = self.fusion_weights
        sound = isinstance(weights, (tuple, list)) and len(weights) == 3 and all(map(is_finite, weights))
        require(sound, "kif_config.fusion_weights", "three numbers: both_inner, both_outer, neither", weights)
        object.__setattr__(self, "fusion_weights", FusionWeights(*weights))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> KIFConfig:
        """Make the settings of a preset, some of them changed.

        Args:
            name: `"paper"`, `"code"`, `"tasl"` or `"taslora"`.
            **changes: Fields with other values.

        Raises:
            ConfigError: If a name is unknown, or a value cannot be used.
        """
        require_known(name, [*PRESETS], "preset", "A preset of KIFConfig")
        return kif_config_of({**PRESETS[name], **changes}, "KIFConfig.preset")

    @property
    def needs_memory(self) -> bool:
        """Whether a task after the first needs rows of the earlier ones."""
        return self.consolidate == "rounds"


_TASL = {"score": "sensitivity x uncertainty", "inner_smoothing": 0.85, "observe": "after"}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "code": {
        **_TASL,
        "outer_smoothing": 0.85,
        "fusion_weights": (0.4, 0.6, 0.5),
        "outer_learning_rate": None,
    },
    "tasl": {**_TASL, "consolidate": "matrix"},
    "taslora": {**_TASL, "consolidate": "rank", "rule": "mixed"},
}


def kif_config_of(section: Mapping[str, Any], where: str) -> KIFConfig:
    """Read a section of a config file: fields of `KIFConfig`, and `preset`; `where` names its place in messages."""
    if "preset" in section:
        rest = {name: value for name, value in section.items() if name != "preset"}
        return KIFConfig.preset(section["preset"], **rest)
    known = [field.name for field in dataclasses.fields(KIFConfig)]
    for key in section:
        require_known(key, [*known, "preset"], where, "A setting of KIF")
    return KIFConfig(**section)
