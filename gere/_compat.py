"""Every difference between versions of transformers and torch, and the only place that knows them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import BatchSampler

from gere.ranks import ALONE, Ranks


def divides_by_accumulation(trainer: Any, num_items_in_batch: Any) -> bool:
    """Return whether `Trainer.training_step` divides the loss by the accumulation steps."""
    # From transformers 5.19 on, a class can overrule the rule of 4.53.
    overruled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if overruled is not None:
        return not overruled
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return not counted and trainer.compute_loss_func is None


def with_processing_class(parent_init: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Rename `tokenizer=` to `processing_class=`, unless the parent uses `tokenizer` itself."""
    known = inspect.signature(parent_init).parameters
    # transformers 5.0 dropped the name `tokenizer`. LLaMA-Factory's trainer still expects it.
    if "tokenizer" not in kwargs or "processing_class" in kwargs or "processing_class" not in known:
        return kwargs
    renamed = dict(kwargs)
    renamed["processing_class"] = renamed.pop("tokenizer")
    return renamed


def arguments_of(trainer_class: type) -> set[str]:
    """Return the names of all arguments that a trainer class and its parents take."""
    names = {"tokenizer"}  # an argument until transformers 5, see `with_processing_class`
    for cls in trainer_class.__mro__:
        if "__init__" in vars(cls):
            names.update(inspect.signature(vars(cls)["__init__"]).parameters)
    return names


def ranks_of(trainer: Any, *, lockstep: bool = False) -> Ranks:
    """Return the processes of a trainer's run."""
    return _ranks(trainer.accelerator, lockstep)


def ranks_here() -> Ranks:
    """Return the processes of the run that this process belongs to, where no trainer is at hand."""
    return _ranks(PartialState(), False)


def _ranks(processes: Any, lockstep: bool) -> Ranks:
    gather = ALONE.gather
    if processes.num_processes > 1:
        gather = _gather
    return Ranks(processes.process_index, processes.num_processes, processes.is_local_main_process, lockstep, gather)


def _gather(item: Any) -> list[Any]:
    # accelerate joins the lists of all processes; a list of one keeps an item that is a list itself together.
    return gather_object([item])


def parallel_sizes(trainer: Any) -> dict[str, int]:
    """Return the sizes above 1 of parallelism that splits a row, or a batch, over processes."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {name: getattr(config, name, 1) for name in ("cp_size", "sp_size", "tp_size")}
    # Accelerate's configuration does not show that a model was loaded with a tensor-parallel plan.
    sizes["tp_size"] = max(int(sizes["tp_size"] or 1), int(getattr(trainer, "get_tp_size", lambda: 1)()))
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    settings = getattr(plugin, "deepspeed_config", None) or {}
    sizes["sequence_parallel_size"] = settings.get("sequence_parallel_size", 1)
    return {name: size for name, size in sizes.items() if size and size > 1}


def gives_batches(sampler: Any) -> bool:
    """Return whether a sampler gives lists of rows."""
    # BatchRebalanceSampler, new in transformers 5.17, gives lists but is no BatchSampler.
    return isinstance(sampler, BatchSampler) or type(sampler).__name__ == "BatchRebalanceSampler"


def uses_fsdp1(trainer: Any) -> bool:
    """Return whether the first FSDP shards the model: it hides the weights of a module in one flat tensor."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return plugin is not None and getattr(plugin, "fsdp_version", 1) == 1


def counts_over_ranks(trainer: Any) -> bool:
    """Return whether the tokens that the parent divides a loss by are those of all ranks."""
    averages = bool(getattr(trainer.args, "average_tokens_across_devices", False))
    return averages or trainer.accelerator.num_processes == 1


def usable_count(trainer: Any, items: Any) -> Any:
    """Return the parent's count of task tokens in a step, at least 1; `None` if its loss does not divide by it."""
    smoother = getattr(trainer, "label_smoother", None)
    # Before transformers 5.15, label smoothing ignores the count, and the trainer, which believes that the loss was
    # divided by it, leaves out the division by the accumulation steps.
    ignored = smoother is not None and "num_items_in_batch" not in inspect.signature(smoother.__call__).parameters
    if items is None or ignored:
        return None
    # A rank that has dummy rows alone counts 0 tokens, and its loss would be infinite.
    if isinstance(items, torch.Tensor):
        return items.clamp(min=1)
    return max(1, items)


def without_unused_columns(trainer: Any) -> tuple[Any, Any]:
    """Return the user's training set and collator as the trainer would use them, unused columns removed."""
    dataset, collator = trainer.train_dataset, trainer.data_collator
    # As in Trainer.get_train_dataloader: columns of a `datasets.Dataset` are removed there, of others by the collator.
    if isinstance(dataset, Dataset):
        return trainer._remove_unused_columns(dataset, description="training"), collator
    return dataset, trainer._get_collator_with_removed_columns(collator, description="training")


def repacks_in_eval_mode(module: torch.nn.Module) -> bool:
    """Return whether a 4-bit layer of bitsandbytes changes its weights when it is called in eval mode.

    On CPUs with AVX512-BF16 it packs them for inference and rounds their scales to bfloat16, for good. The model would
    no longer be the base that is trained. Nothing else depends on the mode of such a layer.
    """
    return bool(getattr(module, "support_avx512bf16_for_cpu", False))


def as_saved(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model by the names, and in the shapes, that `save_pretrained` writes."""
    tensors = model.state_dict()
    try:
        # From transformers 5 on, tensors have other names on disk than in many models.
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return dict(tensors)
    return dict(revert_weight_conversion(model, tensors))
