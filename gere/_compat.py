"""Every difference between versions of transformers and torch, and the only place that knows them."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import BatchSampler

from gere.ranks import ALONE, Ranks


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


def arguments_of(trainer_class: type) -> set[str]:
    """Names of all arguments that a trainer class and its parents take; `tokenizer` was one before transformers 5."""
    names = {"tokenizer"}
    for cls in trainer_class.__mro__:
        if "__init__" in vars(cls):
            names.update(inspect.signature(vars(cls)["__init__"]).parameters)
    return names


def ranks_of(trainer: Any, *, lockstep: bool = False) -> Ranks:
    """The processes of a trainer's run."""
    return _ranks(trainer.accelerator, lockstep)


def ranks_here() -> Ranks:
    """The processes of the run that this process belongs to, for those that know no trainer."""
    return _ranks(PartialState(), False)


def _ranks(processes: Any, lockstep: bool) -> Ranks:
    return Ranks(
        index=processes.process_index,
        count=processes.num_processes,
        first_here=processes.is_local_main_process,
        lockstep=lockstep,
        gather=(lambda item: gather_object([item])) if processes.num_processes > 1 else ALONE.gather,
    )


def parallel_sizes(trainer: Any) -> dict[str, int]:
    """Sizes above 1 of parallelism that splits a row, or a batch, over processes."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {name: getattr(config, name, 1) for name in ("cp_size", "sp_size", "tp_size")}
    sizes["tp_size"] = max(int(sizes["tp_size"] or 1), int(getattr(trainer, "get_tp_size", lambda: 1)()))
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    settings = getattr(plugin, "deepspeed_config", None) or {}
    sizes["sequence_parallel_size"] = settings.get("sequence_parallel_size", 1)
    return {name: size for name, size in sizes.items() if size and size > 1}


def gives_batches(sampler: Any) -> bool:
    """Whether a sampler gives lists of rows; that of transformers 5.17 is no `BatchSampler`."""
    return isinstance(sampler, BatchSampler) or type(sampler).__name__ == "BatchRebalanceSampler"


def uses_fsdp1(trainer: Any) -> bool:
    """Whether the model is sharded by the first FSDP, which hides the weights of a module in one flat tensor."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return plugin is not None and getattr(plugin, "fsdp_version", 1) == 1


def counts_over_ranks(trainer: Any) -> bool:
    """Whether the tokens that the parent divides a loss by are those of all ranks."""
    return (
        bool(getattr(trainer.args, "average_tokens_across_devices", False)) or trainer.accelerator.num_processes == 1
    )


def usable_count(trainer: Any, items: Any) -> Any:
    """Tokens of the task rows of a step as the parent counted them, at least 1; `None` if its loss does not use them.

    A rank that has dummy rows alone counts 0 tokens, and its loss would be infinite.
    """
    if items is None or not loss_uses_count(trainer):
        return None
    return items.clamp(min=1) if isinstance(items, torch.Tensor) else max(1, items)


def loss_uses_count(trainer: Any) -> bool:
    """Whether the parent's loss divides by the tokens that the trainer counts.

    Before transformers 5.15, label smoothing ignores them, and the trainer leaves out its own division all the same.
    """
    smoother = getattr(trainer, "label_smoother", None)
    return smoother is None or "num_items_in_batch" in inspect.signature(smoother.__call__).parameters


def without_unused_columns(trainer: Any) -> tuple[Any, Any]:
    """The user's training set and collator as the trainer would use them, unused columns removed."""
    dataset, collator = trainer.train_dataset, trainer.data_collator
    if hasattr(dataset, "column_names"):
        return trainer._remove_unused_columns(dataset, description="training"), collator
    return dataset, trainer._get_collator_with_removed_columns(collator, description="training")


def uncompiled() -> AbstractContextManager[Any]:
    """Call compiled models as if they were not, where states are read.

    Code that was compiled before does not know a hook that came later. And compiled code rounds in another way than
    the base model did when it was anchored, which would count as drift.
    """
    return torch.compiler.set_stance("force_eager")


def repacks_in_eval_mode(module: torch.nn.Module) -> bool:
    """Whether a 4-bit layer of bitsandbytes changes its weights when it is called in eval mode.

    On CPUs with AVX512-BF16 it packs them for inference and rounds their scales to bfloat16, for good. The model would
    no longer be the base that is trained. Its mode matters for nothing else.
    """
    return bool(getattr(module, "support_avx512bf16_for_cpu", False))
