"""What goes together with replay: settings, losses and data loaders that are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening

from gere import _compat
from gere.collator import ROWS, RowCounts
from gere.errors import ConfigError, UnsupportedSettingError
from gere.sharded import is_sharded
from gere.states import depth_of, is_compiled, is_reentrant, reads_rows_itself

LOSSES_OF = ("transformers", "trl", "llamafactory", "gere")
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
    kind = _kind(trainer)
    known = kind in ("DEEPSPEED", "FSDP") or _is_whole(kind)
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


def refuse_reentrant(trainer: Any, model: nn.Module) -> None:
    """Refuse reentrant checkpointing where a micro-step can hold task rows and replay rows.

    It can have two forward passes then, and DDP and ZeRO take the second backward pass through a weight for a fault.

    Raises:
        UnsupportedSettingError: If such a micro-step can occur.
    """
    if several_wrapped(trainer) and may_mix(trainer) and is_reentrant(model):
        width = _rows_of_micro_step(trainer)
        ways = "" if trainer._gere.adding else f"; or make num_interpolate_per_batch a multiple of {width}"
        raise UnsupportedSettingError(
            "Reentrant checkpointing does not allow two forward passes in a micro-step on several processes.",
            where="gradient_checkpointing_kwargs",
            expected='{"use_reentrant": False}',
            found="use_reentrant True",
            fix=f"Set it so (LLaMA-Factory: use_reentrant_gc: false){ways}.",
        )


def refuse_hidden_layers(layers: Sequence[int], model: nn.Module) -> None:
    """Refuse to hold inner layers whose states reentrant checkpointing cuts off from the graph.

    Raises:
        UnsupportedSettingError: If it is on and a layer but the last is held.
    """
    if {*layers} - {depth_of(model)} and is_reentrant(model):
        raise UnsupportedSettingError(
            "Reentrant checkpointing lets no gradient through the states of inner layers.",
            where="gradient_checkpointing_kwargs",
            expected='{"use_reentrant": False} with gere_config.layers',
            found="use_reentrant True",
            fix='Set it so, or leave gere_config.layers at "last".',
        )


def may_join(trainer: Any, model: nn.Module) -> bool:
    """Whether replay rows may go along in the parent's call of the model on task rows, in a micro-step with both.

    Processes that hold a part of the weights each would have to agree on it before each call, and compiled code does
    not know a hook that came later.
    """
    whole = _is_whole(_kind(trainer)) and not is_sharded(model)
    plain = not is_compiled(trainer.model_wrapped) and not reads_rows_itself(model)
    return whole and may_mix(trainer) and plain


def may_deal(trainer: Any) -> bool:
    """Whether the task rows of a step may be dealt to its forward passes by length.

    They may where the losses of a step add up to a mean over all of its tokens, in whatever batches they come: by the
    losses of transformers and of those who build on it, not by one that may take a mean over each batch. And they may
    not be dealt to a collator that lays rows end to end, which pads nothing, and whose largest batch would grow.
    """
    counted = not _compat.divides_by_accumulation(trainer, 1) and _compat.loss_uses_count(trainer)
    own = [cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls)]
    known = trainer.compute_loss_func is None and all(cls.__module__.split(".")[0] in LOSSES_OF for cls in own)
    collator = trainer.data_collator
    flat = getattr(collator, "padding_free", False) or isinstance(collator, DataCollatorWithFlattening)
    return counted and known and _compat.counts_over_ranks(trainer) and not flat


def may_mix(trainer: Any) -> bool:
    """Whether a micro-step can hold task rows and replay rows."""
    rows = trainer._gere.replay_per_batch
    return bool(trainer._gere.adding or not rows or rows % _rows_of_micro_step(trainer))


def _kind(trainer: Any) -> str:
    """How the processes share the work, by accelerate's name."""
    return str(trainer.accelerator.distributed_type).rsplit(".", 1)[-1]


def _is_whole(kind: str) -> bool:
    """Whether each process holds the whole model: one process, or DDP."""
    return kind == "NO" or kind.startswith("MULTI_")


def _rows_of_micro_step(trainer: Any) -> int:
    return int(trainer.accelerator.num_processes * trainer._train_batch_size)


def several_wrapped(trainer: Any) -> bool:
    """Whether the model is wrapped in what takes a second backward pass through a weight for a fault."""
    return trainer.accelerator.num_processes > 1 or _kind(trainer) == "DEEPSPEED"


def why_added(trainer: Any) -> str | None:
    """Why replay rows have to be added to the batches, and cannot replace task rows in them; `None` if they can."""
    data = trainer.train_dataset
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)
    if trainer._gere.config.replay_mode == "add":
        return 'gere_config.replay_mode is "add"'
    if not sized:
        return f"train_dataset has no length ({type(data).__name__})"
    if trainer.accelerator.dataloader_config.dispatch_batches:
        return "accelerator_config.dispatch_batches is True"
    return None


def why_no_row_sampler(sampler: Any) -> str | None:
    """Why the parent's sampler cannot be used row by row; `None` if it can."""
    if sampler is None or _compat.gives_batches(sampler) or not hasattr(sampler, "__len__"):
        return f"the sampler is a {type(sampler).__name__}, which does not give single rows in a known number"
    return None


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


def require_replay(trainer: Any, samples: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a step whose batches do not come from the sampler of replay.

    Args:
        trainer: The trainer.
        samples: Micro-batches of an optimizer step.

    Raises:
        UnsupportedSettingError: If a data loader of the user's own left the replay rows out.
    """
    wanted = trainer._gere.replay_per_batch
    rows = [RowCounts(*sample.get(ROWS, (0, 0, 0, 0))) for sample in samples]
    found = sum(counts.all_replay for counts in rows)
    if not all(map(any, rows)) or (wanted and found != wanted):
        raise UnsupportedSettingError(
            "The training batches do not hold the replay rows.",
            where=f"{type(trainer).__name__}.get_train_dataloader",
            expected=f"{wanted or 'some'} replay rows in an optimizer step, put there by the trainer's sampler",
            found=f"{found} replay rows",
            fix='Set gere_config.replay_mode to "add"; or build the loader from self.train_dataset, '
            "self.data_collator and self._get_train_sampler() in a subclass of Trainer, and use gere_trainer(...) of "
            "it; or override _get_train_sampler alone.",
        )
