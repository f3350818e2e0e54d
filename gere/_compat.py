"""Every difference between versions of transformers, and the only place that knows them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch.utils.data import BatchSampler

from gere.errors import UnsupportedSettingError


def divides_by_accumulation(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether `Trainer.training_step` divides the loss by the accumulation steps.

    The rule of transformers 4.53 and later; from 5.19 a class can overrule it by `loss_is_scaled_for_ga`.
    """
    overruled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if overruled is not None:
        return not overruled
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return not counted and trainer.compute_loss_func is None


def with_processing_class(parent_init: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take `tokenizer=` as `processing_class=`, unless the parent has an own use for it.

    The name was dropped in transformers 5.0. LLaMA-Factory's trainer still expects it.
    """
    known = inspect.signature(parent_init).parameters
    if "tokenizer" not in kwargs or "processing_class" in kwargs or "processing_class" not in known:
        return kwargs
    return {"processing_class" if name == "tokenizer" else name: value for name, value in kwargs.items()}


def data_parallel_size(trainer: Any) -> int:
    """Ranks that see different rows."""
    size = getattr(trainer, "get_tp_size", lambda: 1)()
    return int(trainer.accelerator.num_processes // max(1, size))


def count_items(trainer: Any, collect: Any, tasks: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """Tokens of the task rows of a step, as the parent counts them; `None` if its loss does not use them.

    Before transformers 5, label smoothing ignores the count, and the trainer leaves out the division all the same.
    """
    smoother = getattr(trainer, "label_smoother", None)
    if smoother is not None and "num_items_in_batch" not in inspect.signature(smoother.__call__).parameters:
        return None
    if hasattr(trainer, "_get_num_items_in_batch"):
        return trainer._get_num_items_in_batch(list(tasks), *args, **kwargs)
    return collect(iter(tasks), len(tasks), *args, **kwargs)[1]


def without_unused_columns(trainer: Any) -> tuple[Any, Any]:
    """The user's training set and collator as the trainer would use them, unused columns removed."""
    dataset, collator = trainer.train_dataset, trainer.data_collator
    if hasattr(dataset, "column_names"):
        return trainer._remove_unused_columns(dataset, description="training"), collator
    return dataset, trainer._get_collator_with_removed_columns(collator, description="training")


def refuse_settings(trainer: Any) -> None:
    """Refuse settings under which a batch would not be what the sampler planned.

    Raises:
        UnsupportedSettingError: Naming the setting.
    """
    accelerator = trainer.accelerator
    loader = accelerator.dataloader_config
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    problems = (
        (
            not hasattr(trainer.train_dataset, "__len__"),
            "train_dataset",
            "a dataset with a length",
            "Load the dataset instead of streaming it.",
        ),
        (
            trainer.args.n_gpu > 1,
            "nn.DataParallel",
            "one GPU for each process",
            "Start with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU.",
        ),
        (bool(loader.split_batches), "accelerator_config.split_batches", "False", "Leave it out."),
        (bool(loader.dispatch_batches), "accelerator_config.dispatch_batches", "False or None", "Leave it out."),
        (kind != "NO" and not kind.startswith("MULTI_"), kind, "one process, or DDP", "Use DDP."),
        (
            bool(getattr(trainer, "is_model_parallel", False)),
            "device_map",
            "the whole model on one device",
            "Load the model without device_map.",
        ),
        (
            getattr(trainer.args, "train_sampling_strategy", "") == "batch_rebalance",
            "train_sampling_strategy",
            "'random', 'sequential' or 'group_by_length'",
            "Use 'group_by_length' against padding.",
        ),
    )
    for wrong, where, expected, fix in problems:
        if wrong:
            what = "A training setting does not go together with replay."
            raise UnsupportedSettingError(what, where=where, expected=expected, fix=fix)
    _refuse_uneven_forwards(trainer)


def _refuse_uneven_forwards(trainer: Any) -> None:
    """Several processes wait for each other for ever if they call the model a different number of times."""
    ranks, rows = data_parallel_size(trainer), trainer._gere.replay_per_batch
    width = ranks * trainer._train_batch_size
    if ranks > 1 and (rows == 0 or rows % width):
        raise UnsupportedSettingError(
            "Replay rows do not fill whole micro-steps of all processes.",
            where="num_interpolate_per_batch",
            expected=f"a multiple of {width} (processes x per_device_train_batch_size)",
            found=rows,
            fix="Lower per_device_train_batch_size and raise gradient_accumulation_steps, or change the replay rows.",
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
