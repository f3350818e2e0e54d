"""What goes together with replay: settings, losses and data loaders that are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import BatchSampler

from gere.collator import RowCounts
from gere.errors import UnsupportedSettingError


def refuse_settings(trainer: Any) -> None:
    """Refuse settings under which a batch would not be what the sampler planned.

    Raises:
        UnsupportedSettingError: Naming the setting.
    """
    accelerator = trainer.accelerator
    loader = accelerator.dataloader_config
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    data, args = trainer.train_dataset, trainer.args
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    names = "accelerator_config."
    problems = (
        (
            not sized,
            "train_dataset",
            "a dataset with a length",
            type(data).__name__,
            "Load it, do not stream it.",
        ),
        (args.n_gpu > 1, "nn.DataParallel", "one GPU for each process", f"{args.n_gpu} GPUs", "Start with torchrun."),
        (bool(loader.split_batches), f"{names}split_batches", "False", True, "Leave it out."),
        (bool(loader.dispatch_batches), f"{names}dispatch_batches", "False or None", True, "Leave it out."),
        (
            kind != "NO" and not kind.startswith("MULTI_"),
            "distributed training",
            "one process or DDP",
            kind,
            "Use DDP.",
        ),
        (
            bool(getattr(trainer, "is_model_parallel", False)),
            "device_map",
            "the whole model on one device",
            "a model on several",
            "Load the model without device_map.",
        ),
        (
            getattr(args, "train_sampling_strategy", "") == "batch_rebalance",
            "train_sampling_strategy",
            "'random', 'sequential' or 'group_by_length'",
            "'batch_rebalance'",
            "Use 'group_by_length' against padding.",
        ),
    )
    for wrong, where, expected, found, fix in problems:
        if wrong:
            what = "A training setting does not go together with replay."
            raise UnsupportedSettingError(what, where=where, expected=expected, found=found, fix=fix)


def require_replay(trainer: Any, rows: Sequence[RowCounts]) -> None:
    """Refuse a step whose batches do not come from the sampler of replay.

    Args:
        trainer: The trainer.
        rows: Rows of each micro-step.

    Raises:
        UnsupportedSettingError: If a data loader of the user's own left the replay rows out.
    """
    wanted = trainer._gere.replay_per_batch
    found = sum(counts.all_replay for counts in rows)
    if not all(map(any, rows)) or (wanted and found != wanted):
        raise UnsupportedSettingError(
            "The training batches do not hold the replay rows.",
            where=f"{type(trainer).__name__}.get_train_dataloader",
            expected=f"{wanted or 'some'} replay rows in an optimizer step, put there by the trainer's sampler",
            found=f"{found} replay rows",
            fix="Build the loader from self.train_dataset, self.data_collator and self._get_train_sampler() in a "
            "subclass of Trainer, and use gere_trainer(...) of it; or override _get_train_sampler alone.",
        )


def require_row_sampler(sampler: Any) -> Any:
    """Refuse what does not give single rows in a known number.

    Raises:
        UnsupportedSettingError: For a batch sampler or none at all.
    """
    if sampler is None or isinstance(sampler, BatchSampler) or not hasattr(sampler, "__len__"):
        raise UnsupportedSettingError(
            "The trainer's sampler does not go together with replay.",
            where=type(sampler).__name__,
            expected="a sampler of single rows with a length",
            fix="Return such a sampler from _get_train_sampler.",
        )
    return sampler
