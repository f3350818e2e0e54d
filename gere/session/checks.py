"""Settings, losses and data loaders that do not go together with replay: refused by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from gere import _compat
from gere._log import logger
from gere.errors import ConfigError, UnsupportedSettingError
from gere.model.sharded import is_sharded
from gere.model.states import is_reentrant
from gere.session import policy

FSDP_FIX = (
    'Set fsdp_config={"fsdp_version": 2}; on transformers 4 set FSDP_VERSION=2 in the environment, or start by '
    "accelerate launch --fsdp_version 2."
)


def refuse_settings(trainer: Any) -> None:
    """Refuse settings under which a batch would not be what was planned.

    Raises:
        UnsupportedSettingError: Naming the setting.
    """
    accelerator, args = trainer.accelerator, trainer.args
    kind = policy.kind_of(trainer)
    known = kind in ("DEEPSPEED", "FSDP") or policy.is_whole(kind)
    split = bool(accelerator.dataloader_config.split_batches)
    several = bool(getattr(trainer, "is_model_parallel", False))
    parallel = _compat.parallel_sizes(trainer)
    one = "one process, DDP, DeepSpeed ZeRO or FSDP2"
    problems = (
        (args.n_gpu > 1, "nn.DataParallel", "one GPU for each process", f"{args.n_gpu} GPUs", "Start with torchrun."),
        (split, "accelerator_config.split_batches", "False", True, "Leave it out."),
        (not known, "distributed training", one, kind, "Use DDP."),
        (_compat.uses_fsdp1(trainer), "fsdp_config", "version 2", "version 1", FSDP_FIX),
        (several, "device_map", "the whole model on one device", "a model on several", "Load it without device_map."),
        (
            bool(parallel),
            "context, sequence or tensor parallelism",
            "rows that belong to one process",
            ", ".join(f"{name} {size}" for name, size in parallel.items()),
            "Set these sizes to 1; use DDP, ZeRO or FSDP2.",
        ),
    )
    for wrong, where, expected, found, fix in problems:
        if wrong:
            what = "A training setting does not go together with replay."
            raise UnsupportedSettingError(what, where=where, expected=expected, found=found, fix=fix)


def is_spread(trainer: Any, model: nn.Module) -> bool:
    """Return whether a process holds only a part of the weights, or a copy of them that others overwrite."""
    return is_sharded(model) or not policy.is_whole(policy.kind_of(trainer))


def refuse_sharded_decay(trainer: Any, model: nn.Module) -> None:
    """Refuse base decay where a process holds only a part of the weights, or a copy of them that others overwrite.

    Raises:
        UnsupportedSettingError: Naming the way in which they are spread.
    """
    if is_spread(trainer, model):
        raise UnsupportedSettingError(
            "Base decay needs the whole weights on each process.",
            where="gere_config.base_decay",
            expected="one process, or DDP",
            found=policy.kind_of(trainer),
            fix="Use DDP, or leave base_decay out.",
        )


def refuse_reentrant(trainer: Any, model: nn.Module, *, mixes: bool, adding: bool) -> None:
    """Refuse reentrant checkpointing where a micro-step can hold task rows and replay rows.

    Such a micro-step has two forward passes. DDP and ZeRO take a second backward pass through a weight for a fault.

    Args:
        trainer: The trainer.
        model: Its model without the distributed wrapper.
        mixes: Whether such a micro-step can occur.
        adding: Whether replay rows are added to task rows.

    Raises:
        UnsupportedSettingError: If it is on.
    """
    if not (mixes and policy.is_wrapped(trainer) and is_reentrant(model)):
        return
    ways = ""
    if not adding:
        ways = f"; or make num_interpolate_per_batch a multiple of {policy.rows_of_micro_step(trainer)}"
    raise UnsupportedSettingError(
        "Reentrant checkpointing does not allow two forward passes in a micro-step on several processes.",
        where="gradient_checkpointing_kwargs",
        expected='{"use_reentrant": False}',
        found="use_reentrant True",
        fix=f"Set it so (LLaMA-Factory: use_reentrant_gc: false){ways}.",
    )


def warn_of_half(replay: int, rows: int) -> None:
    """Warn of a step that is replay for the most part."""
    if 2 * replay > rows:
        what = "%d of the %d rows of each step are replay rows, more than half: the task gets the others alone."
        logger.warning(what, replay, rows)


def require_addable(mode: str, rows: int, why: str) -> None:
    """Refuse to add rows where that is not wanted or not defined.

    Raises:
        UnsupportedSettingError: If the user asked for replacement.
        ConfigError: If the number of replay rows of a step is open.
    """
    if mode == "replace":
        raise UnsupportedSettingError(
            "Replay rows cannot replace task rows here.",
            where="gere_config.replay_mode",
            expected='"auto" or "add"',
            found=f'"replace", while {why}',
            fix="Leave replay_mode out, or give the trainer a dataset and a sampler of single rows with a length.",
        )
    if not rows:
        raise ConfigError(
            "Without a number of replay rows for each step they cannot be added to the batches.",
            where="num_interpolate_per_batch",
            expected=f"at least 1, since {why}",
            found=rows,
            fix="Set it, for example to a fifth of the rows of an optimizer step.",
        )
