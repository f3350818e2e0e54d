"""`GeReTrainer`: wires replay into the hooks of `Trainer`, and computes nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Sampler
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import get_last_checkpoint

from gere import _compat, checks
from gere.ability import GeneralAbilityCallback
from gere.anchoring import ReadyModel, precision_name
from gere.callbacks import AnchorCallback
from gere.collator import REPLAY, ROWS, TASK, MixedDataset, RowCounts, countable_tasks
from gere.config import GeReConfig, require
from gere.grouping import row_lengths
from gere.run import ReplayRun
from gere.sampler import BatchInsertionSampler, parent_order
from gere.sharded import is_sharded
from gere.states import refuse_unanchorable

if TYPE_CHECKING:
    from transformers import Trainer as _Parent
else:
    _Parent = object


class GeReMixin(_Parent):
    """Replay of general texts for any `Trainer` class; stands before it in the bases.

    Args:
        *args: Arguments of the parent trainer.
        gere_hidden_state_saving_dir: Folder of the anchor, the base model's regions and losses on the replay set.
        reuse_gere_hidden_state: Open an anchor that is there; `False` builds it anew.
        num_interpolate_per_batch: Replay rows in each optimizer step over all ranks. `None` or 0 for no batch
            insertion: the replay set is shuffled into each epoch once.
        w_strategy: Weight of the distance: `"auto"`, a number (or its string), or `"dy"` to follow the cross-entropy.
        gere_config: All other settings.
        **kwargs: Keyword arguments of the parent trainer; `tokenizer=` is taken as `processing_class=`.

    Raises:
        ConfigError: If an argument cannot be used.
        UnsupportedModelError: If the model is an encoder-decoder.
    """

    if TYPE_CHECKING:
        train_dataset: Any
        data_collator: Any
        _get_train_sampler: Any

    def __init__(
        self,
        *args: Any,
        gere_hidden_state_saving_dir: str | Path = "./gere_saving",
        reuse_gere_hidden_state: bool = True,
        num_interpolate_per_batch: int | None = None,
        w_strategy: float | str = "auto",
        gere_config: GeReConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self._gere = ReplayRun(
            gere_hidden_state_saving_dir, reuse_gere_hidden_state, num_interpolate_per_batch, w_strategy, gere_config
        )
        super().__init__(*args, **_compat.with_processing_class(super().__init__, kwargs))
        if self._gere.active:
            refuse_unanchorable(self.model)
            if type(self).compute_loss is not GeReMixin.compute_loss:
                self.compute_loss = self._gere_outer_loss  # type: ignore[method-assign]
            self.add_callback(AnchorCallback(self._gere_prepare, lambda: self._gere.end_step(self._gere_join)))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does; a checkpoint names the anchor of its run."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(str(self.args.output_dir))
        self._gere.checkpoint = Path(checkpoint) if checkpoint else None
        for callback in list(self.callback_handler.callbacks):
            if isinstance(callback, GeneralAbilityCallback):
                callback.bind(self)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Data loader of the parent over task rows and replay rows."""
        if not self._gere.active or self.train_dataset is None:
            return super().get_train_dataloader()
        checks.refuse_settings(self)
        replay = self._gere.replay_set(
            self.processing_class, _compat.ranks_of(self), self.model, progress=self._gere_shows_progress
        )
        why, order = checks.why_added(self), None
        if why is None:
            task, collator = _compat.without_unused_columns(self)
            with self._gere_data(task, self.data_collator):
                order = self._get_train_sampler(task)
            why = checks.why_no_row_sampler(order)
        if why is not None:
            checks.require_addable(self._gere.config.replay_mode, self._gere.replay_per_batch, why)
            self._gere.collator(self.data_collator, self.processing_class)
            self._gere.add_from_now_on(why, tell=self.is_world_process_zero())
            return super().get_train_dataloader()
        self._gere.adding = False
        mixed = MixedDataset(task, len(replay.rows))
        deals = bool(replay.rows) and checks.may_deal(self)  # without replay: the parent's order, bit for bit
        mixed_collator = self._gere.collator(collator, self.processing_class, mixed.spare)
        with self._gere_data(mixed, mixed_collator, sampler=lambda *_: self._gere_sampler(mixed, order, deals)):
            return super().get_train_dataloader()

    def _gere_sampler(self, dataset: MixedDataset, parent: Any, deals: bool) -> Sampler[Any]:
        ranks = self.accelerator.num_processes
        sampler = BatchInsertionSampler(
            dataset.num_task,
            dataset.num_replay,
            batch_size=self._train_batch_size * ranks * self.args.gradient_accumulation_steps,
            replay_per_batch=self._gere.replay_per_batch,
            seed=self._gere_seed,
            micro_batch_size=self._train_batch_size,
            world_size=ranks,
            task_order=parent_order(parent, self._gere_seed),
            tasks_per_epoch=len(parent),
            replay_lengths=self._gere.replay_lengths,
            task_lengths=row_lengths(dataset.task) if deals else None,
        )
        dataset.total_dataset_length = len(sampler)
        return _EpochOfTrainer(sampler, self)

    @property
    def _gere_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> Any:
        """Collect the micro-batches of one optimizer step, and let the parent count the tokens of the task rows."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        if not samples or not self._gere.active:
            return samples, items
        ranks = _compat.ranks_of(self)
        if self._gere.adding:
            samples = self._gere.add_rows(
                samples,
                step=self.state.global_step,
                seed=self._gere_seed,
                rows=self._train_batch_size,
                accumulation=self.args.gradient_accumulation_steps,
                ranks=ranks,
            )
            items = items if _compat.loss_uses_count(self) else None
        else:
            checks.require_replay(self, samples)
            items = _compat.count_items(self, super().get_batch_samples, countable_tasks(samples), *args, **kwargs)
        rows = [RowCounts(*sample[ROWS]) for sample in samples]
        divisor = len(samples) if _compat.divides_by_accumulation(self, items) else None
        self._gere.begin_step(rows, ranks.count, divisor, own_mean=not _compat.counts_over_ranks(self))
        return samples, items

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Loss of the parent for a plain batch; for a mixed one, its parts with their shares of the step."""
        return self._gere_loss(super().compute_loss, model, inputs, return_outputs, *args, **kwargs)

    def _gere_outer_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The same around the loss of a class that stands before this one, which knows task rows alone, too."""
        return self._gere_loss(partial(type(self).compute_loss, self), model, inputs, return_outputs, *args, **kwargs)

    def _gere_loss(
        self, parent: Callable[..., Any], model: Any, inputs: Any, return_outputs: bool, *args: Any, **kwargs: Any
    ) -> Any:
        if ROWS not in inputs:
            return parent(model, inputs, return_outputs, *args, **kwargs)
        rows = RowCounts(*inputs[ROWS])
        parts, outputs = [], None
        if TASK in inputs:
            with self._gere.along(inputs.get(REPLAY)):
                task_loss = parent(model, dict(inputs[TASK]), return_outputs, *args, **kwargs)
            task_loss, outputs = task_loss if return_outputs else (task_loss, None)
            parts.append(self._gere.task_part(task_loss, rows.task))
        if REPLAY in inputs:
            parts.append(self._gere.replay_part(model, inputs[REPLAY], rows.replay))
        loss = sum(parts[1:], parts[0])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the parent does, with the averages of the replay since the last log."""
        if self._gere.active and "loss" in logs:
            logs = {**logs, **self._gere.meters.read(self._gere_join, self.args.device)}
        super().log(logs, *args, **kwargs)

    def _gere_join(self, vector: Tensor) -> Tensor:
        """Mean of a vector over the ranks."""
        return self.accelerator.reduce(vector.to(self.args.device), reduction="mean")

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save as the parent does, with the key of the anchor and the state of the weight."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            self._gere.name_anchor(folder, self.model)
            self._gere.save_weight(folder)

    def _gere_prepare(self, resumed: bool) -> None:
        inner = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        checks.refuse_reentrant(self, inner)
        checks.refuse_hidden_layers(self._gere.layers_of(inner), inner)
        model = ReadyModel(
            inner=inner,
            device=self.args.device,
            autocast=self.accelerator.autocast,
            precision=precision_name(self.accelerator.mixed_precision, self.args.tf32),
            fresh=self.model_init is not None,
            ranks=_compat.ranks_of(self, lockstep=is_sharded(inner)),
            joins=checks.may_join(self, inner),
        )
        self._gere.prepare(model, self.processing_class, resumed=resumed, progress=self._gere_shows_progress)

    @property
    def _gere_shows_progress(self) -> bool:
        return self.is_world_process_zero() and not self.args.disable_tqdm

    @contextmanager
    def _gere_data(self, dataset: Any, collator: Any, sampler: Callable[..., Any] | None = None) -> Iterator[None]:
        """Show the parent another training set, collator and sampler for a moment; the user's stay as they are.

        The sampler is set on the instance, so that it is the outermost even if a subclass of this class has its own.
        """
        kept = self.train_dataset, self.data_collator
        self.train_dataset, self.data_collator = dataset, collator
        if sampler is not None:
            self._get_train_sampler = sampler
        try:
            yield
        finally:
            self.train_dataset, self.data_collator = kept
            if sampler is not None:
                del self._get_train_sampler


class _EpochOfTrainer(Sampler[Any]):
    """Reads the epoch from the trainer's state, since `set_epoch` does not arrive in several version pairs."""

    def __init__(self, sampler: BatchInsertionSampler, trainer: Trainer) -> None:
        self.sampler = sampler
        self._trainer = trainer

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self.sampler.set_epoch(int(self._trainer.state.epoch or 0))
        return self.sampler.slots()


class GeReTrainer(GeReMixin, Trainer):
    """`transformers.Trainer` that keeps the model's general ability by replay.

    Takes every argument of `Trainer`, positional or by keyword, and those of `GeReMixin`.

    Example:
        >>> trainer = GeReTrainer(  # doctest: +SKIP
        ...     model=model, args=args, train_dataset=train, data_collator=collator, processing_class=tokenizer,
        ...     gere_hidden_state_saving_dir="./gere_saving", num_interpolate_per_batch=4, w_strategy="dy",
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """


class GeReSeq2SeqTrainer(GeReMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with replay, for its generation in evaluation; the model is decoder-only."""


def gere_trainer(base: type[Trainer]) -> type[Trainer]:
    """Make a trainer class with replay from any `Trainer` subclass.

    Args:
        base: The class, such as TRL's `SFTTrainer` or your own.

    Returns:
        A subclass that also takes the arguments of `GeReMixin`; `base` itself if it does already.

    Raises:
        ConfigError: If `base` is no trainer class.
    """
    require(isinstance(base, type) and issubclass(base, Trainer), "gere_trainer", "a subclass of Trainer", base)
    if issubclass(base, GeReMixin):
        return base
    return type(f"GeRe{base.__name__}", (GeReMixin, base), {"__module__": __name__, "__doc__": GeReMixin.__doc__})
