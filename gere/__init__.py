"""Fine-tune a language model without forgetting: replay of general texts for Hugging Face's Trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BatchInsertionSampler": "gere.sampler",
    "GeReArguments": "gere.config",
    "GeReConfig": "gere.config",
    "GeReError": "gere.errors",
    "GeReMixin": "gere.trainer",
    "GeReSeq2SeqTrainer": "gere.trainer",
    "GeReTrainer": "gere.trainer",
    "GeneralAbilityCallback": "gere.ability",
    "KIFConfig": "gere.kif",
    "RecurrentKIFTrainer": "gere.kif",
    "TaskMemory": "gere.kif",
    "general_loss": "gere.evaluation",
    "gere_trainer": "gere.trainer",
    "recurrent_kif_trainer": "gere.kif",
    "threshold_margin": "gere.losses",
}
_MODULES = ("ability", "cache", "continual", "errors", "kif", "losses", "sampler")
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from gere.ability import GeneralAbilityCallback as GeneralAbilityCallback
    from gere.config import GeReArguments as GeReArguments
    from gere.config import GeReConfig as GeReConfig
    from gere.errors import GeReError as GeReError
    from gere.evaluation.general import general_loss as general_loss
    from gere.kif.config import KIFConfig as KIFConfig
    from gere.kif.memory import TaskMemory as TaskMemory
    from gere.kif.trainer import RecurrentKIFTrainer as RecurrentKIFTrainer
    from gere.kif.trainer import recurrent_kif_trainer as recurrent_kif_trainer
    from gere.losses.margin import threshold_margin as threshold_margin
    from gere.sampler.insertion import BatchInsertionSampler as BatchInsertionSampler
    from gere.trainer import GeReMixin as GeReMixin
    from gere.trainer import GeReSeq2SeqTrainer as GeReSeq2SeqTrainer
    from gere.trainer import GeReTrainer as GeReTrainer
    from gere.trainer import gere_trainer as gere_trainer


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used; torch and transformers are heavy."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"gere.{name}")
    raise AttributeError(f"module 'gere' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_MODULES])
