"""`GeReTrainer`: overrides `compute_loss` and the train sampler of `Trainer`, and delegates.

The states of the base model are in `gere.cache`, the losses in `gere.losses`, batch insertion in `gere.sampler`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Seq2SeqTrainer, Trainer

from gere import _compat
from gere._log import logger, say
from gere.blend import BaseDecay, BaseWeights, TrainedWeights, find_base
from gere.config import AUTO, GeReConfig, refuse_unknown_arguments, replay_rows, require
from gere.evaluation import GeneralAbilityCallback
from gere.evaluation.callback import AtTheEnd
from gere.evaluation.general import CHANGE, INTERVAL, LOSS
from gere.model.adapters import refuse_unanchorable
from gere.model.sharded import is_sharded
from gere.replay.batch import MicroBatch, MixedCollator, MixedDataset, RowCounts, unpacked
from gere.replay.rows import tokenizer_of
from gere.sampler import BatchInsertionSampler, parent_order
from gere.session import checks, policy
from gere.session.anchor import ReadyModel, precision_name
from gere.session.callbacks import LineCallback, ReplayCallback
from gere.session.checkpoint import (
    base_digest,
    base_of_checkpoint,
    loaded_key,
    read_key,
    remember,
    write_base,
    write_key,
    write_weight,
)
from gere.session.heldout import HeldOut
from gere.session.line import (
    NOT_MOVED,
    SHARE,
    Decay,
    TrainedLine,
    chooses,
    decay_of,
    evaluation_loss,
    move_back,
    require_measures,
)
from gere.session.plan import ReplayPlan, make_plan, replay_settings
from gere.session.resume import adapters_arriving, checkpoint_of, require_arrived
from gere.session.session import ReplaySession, begin_session
from gere.session.step import Steps, added_parts, share_of
from gere.session.summary import ReplayFacts, advice_of, append_to_card, facts_of, opening
from gere.session.trackers import tell_trackers

if TYPE_CHECKING:
    from transformers import Trainer as _Parent
else:
    _Parent = object

OWN_LOADER = "the trainer makes its own data loader"


class GeReMixin(_Parent):
    """Replay of general texts for any `Trainer` class; stands before it in the bases.

    Args:
        *args: Arguments of the parent trainer.
        gere_hidden_state_saving_dir: Folder of the anchor, the base model's regions and losses on the replay set.
        reuse_gere_hidden_state: Reuse an anchor that is there; `False` rebuilds it.
        num_interpolate_per_batch: Replay rows in each optimizer step over all ranks: a number, a share of the step, or
            `"auto"` for the share of the paper, 4 of 64. `None` or 0 for no batch insertion: the replay set is
            shuffled into each epoch once.
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
        training_step: Any

    def __init__(
        self,
        *args: Any,
        gere_hidden_state_saving_dir: str | Path = "./gere_saving",
        reuse_gere_hidden_state: bool = True,
        num_interpolate_per_batch: int | float | str | None = AUTO,
        w_strategy: float | str = "auto",
        gere_config: GeReConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self._gere = replay_settings(
            gere_hidden_state_saving_dir, reuse_gere_hidden_state, num_interpolate_per_batch, w_strategy, gere_config
        )
        self._gere_session: ReplaySession | None = None
        self._gere_steps = Steps(type(self).__name__)
        self._gere_checkpoint: Path | None = None
        self._gere_loads_from: Path | None = None
        self._gere_why_added = ""
        self._gere_line: TrainedLine | None = None
        decay = self._gere.config.base_decay
        self._gere_decay = Decay(0.0 if isinstance(decay, str) else decay, "")
        self._gere_at_the_end = AtTheEnd(self._gere_move_back)
        refuse_unknown_arguments(kwargs, _compat.arguments_of(type(self)))
        super().__init__(*args, **_compat.with_processing_class(super().__init__, kwargs))
        if self._gere.active:
            self._gere_follow_events()
        if str(self.args.metric_for_best_model).endswith(CHANGE) and self.args.greater_is_better:
            # Transformers takes every metric that does not end in "loss" for one that is better when it is greater.
            self.args.greater_is_better = False
            logger.warning("greater_is_better is set to False, since %s is what was forgotten.", CHANGE)
        if self._gere.config.base_decay or chooses(self._gere.config):
            self.add_callback(LineCallback(self._gere_begin_line, self._gere_pull))
        self.callback_handler.callbacks.insert(0, AtTheEnd(self._gere_finish))

    def _gere_follow_events(self) -> None:
        refuse_unanchorable(self.model)
        if type(self).compute_loss is not GeReMixin.compute_loss:
            # A subclass of this one has its own loss, which knows task rows alone. Replay goes around it.
            self.compute_loss = partial(self._gere_loss, partial(type(self).compute_loss, self))  # type: ignore[method-assign]
        # On the instance, so that it is the outermost even if a subclass of this class has its own.
        self.training_step = partial(self._gere_training_step, self.training_step)
        self.add_callback(ReplayCallback(self._gere_begin, self._gere_close_step, self._gere_end_step))

    @property
    def replay(self) -> ReplayFacts:
        """What is known of the replay now."""
        # The plan is a cached property: asking for it here would read the texts.
        plan = self.__dict__.get("_gere_plan")
        rows = self._gere_rows
        advice = advice_of(self, rows, policy.rows_of_step(self), self._gere_decay)
        return facts_of(self._gere, rows, plan, self._gere_session, self.state.log_history, advice)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does; a checkpoint names the anchor of its run, and `True` takes the last whole one."""
        self._gere_checkpoint = checkpoint_of(self, resume_from_checkpoint)
        if self._gere_checkpoint is not None:
            resume_from_checkpoint = str(self._gere_checkpoint)
        self._gere_loads_from = self._gere_checkpoint
        for callback in self._gere_abilities():
            callback.bind(self)
        if chooses(self._gere.config):
            # Before the abilities are measured, which are those of the model that is left.
            callbacks = self.callback_handler.callbacks
            callbacks[:] = [callback for callback in callbacks if callback is not self._gere_at_the_end]
            callbacks.insert(0, self._gere_at_the_end)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @cached_property
    def _gere_plan(self) -> ReplayPlan:
        return make_plan(
            self._gere,
            tokenizer_of(self.processing_class),
            self.model,
            _compat.ranks_of(self),
            checkpoint=self._gere_checkpoint,
            progress=self._gere_shows_progress,
        )

    def get_train_dataloader(self) -> Any:
        """Data loader of the parent over task rows and replay rows."""
        if not self._gere.active or self.train_dataset is None:
            return super().get_train_dataloader()
        checks.refuse_settings(self)
        plan = self._gere_plan
        why = policy.why_added(self, self._gere)
        if why is None:
            task, collator = _compat.without_unused_columns(self)
            with self._gere_data(task, self.data_collator):
                order = self._get_train_sampler(task)
            why = policy.why_no_row_sampler(order, len(task))
        if why is not None:
            self._gere_add_from_now_on(why)
            return super().get_train_dataloader()
        self._gere_why_added = ""
        checks.warn_of_half(self._gere_rows, policy.rows_of_step(self))
        mixed = MixedDataset(task, len(plan.replay.rows))
        sampler = self._gere_sampler(mixed, order, plan)
        mixed.total_dataset_length = len(sampler)
        asked: list[Sampler[Any]] = []

        def give_sampler(*_: Any) -> Sampler[Any]:
            asked.append(sampler)
            return sampler

        with self._gere_data(mixed, MixedCollator(collator), sampler=give_sampler):
            loader = super().get_train_dataloader()
        if asked:
            return loader
        # The class below makes its loader by other means, over rows in an order that is not ours.
        self._gere_add_from_now_on(OWN_LOADER)
        return super().get_train_dataloader()

    @property
    def _gere_rows(self) -> int:
        """Replay rows of a step: a share follows the batch, which `auto_find_batch_size` may shrink."""
        return replay_rows(self._gere.rows_per_step, policy.rows_of_step(self))

    def _gere_sampler(self, dataset: MixedDataset, parent: Any, plan: ReplayPlan) -> _EpochOfTrainer:
        ranks = self.accelerator.num_processes
        sampler = BatchInsertionSampler(
            dataset.num_task,
            dataset.num_replay,
            batch_size=policy.rows_of_step(self),
            replay_per_batch=self._gere_rows,
            seed=self._gere_seed,
            micro_batch_size=self._train_batch_size,
            world_size=ranks,
            task_order=parent_order(parent, self._gere_seed, seedable=self.accelerator.use_seedable_sampler),
            tasks_per_epoch=len(parent),
            replay_lengths=plan.lengths,
        )
        return _EpochOfTrainer(sampler, self)

    @property
    def _gere_seed(self) -> int:
        if self.args.data_seed is None:
            return self.args.seed
        return self.args.data_seed

    def _gere_add_from_now_on(self, why: str) -> None:
        """Add replay rows to the batches, and replace none in them; say why, once."""
        checks.require_addable(self._gere.config.replay_mode, self._gere_rows, why)
        if self.is_world_process_zero() and not self._gere_why_added:
            what = "Each optimizer step gets %d replay rows beside its task rows, and none is replaced, since %s."
            logger.warning(what, self._gere_rows, why)
        self._gere_why_added = why

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights as the parent does, and make sure that those of an adapter arrive."""
        inner: Any = self.model if model is None else model
        with adapters_arriving(inner, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the best checkpoint as the parent does, and make sure that it arrives."""
        self._gere_loads_from = Path(str(self.state.best_model_checkpoint))
        with adapters_arriving(self.model, self._gere_loads_from):
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse what the parent would warn of, where it means wrong weights."""
        if self._gere_loads_from is not None:
            require_arrived(self.model, load_result.missing_keys, load_result.unexpected_keys, self._gere_loads_from)
        super()._issue_warnings_after_load(load_result)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> Any:
        """Collect the batches of one optimizer step as the parent does, and keep their replay rows aside."""
        if self.state.global_step >= self.state.max_steps:
            # Resumed from its last step: the parent looks whether it is done only after one step more.
            self.control.should_training_stop = True
            return [], None
        session = self._gere_session
        if session is None:
            return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        sent: list[MicroBatch] = []
        batches = unpacked(epoch_iterator, sent, self.args.device)
        samples, items = super().get_batch_samples(batches, num_batches, *args, **kwargs)
        if not samples:
            return samples, items
        if len(sent) == len(samples):
            parts = [(batch.rows, batch.replay) for batch in sent]
        else:
            if not self._gere_why_added:
                self._gere_add_from_now_on(OWN_LOADER)
            parts = self._gere_added_parts(len(samples))
        labels, items = items, _compat.usable_count(self, items)
        divisor = len(parts) if _compat.divides_by_accumulation(self, items) else None
        share = share_of(
            [rows for rows, _ in parts],
            ranks=self.accelerator.num_processes,
            divisor=divisor,
            own_mean=not _compat.counts_over_ranks(self),
        )
        self._gere_steps.begin([session.micro_step(*part) for part in parts], share)
        if share.task_rows:
            session.meters.step(None if items is None else labels)
        return samples, items

    def _gere_added_parts(self, micro_steps: int) -> list[tuple[RowCounts, list[int]]]:
        """Rows of each micro-step, and the replay rows that are added to it on this rank."""
        return added_parts(
            self._gere_plan,
            _compat.ranks_of(self),
            wanted=self._gere_rows,
            seed=self._gere_seed,
            step=self.state.global_step,
            micro_steps=micro_steps,
            rows=self._train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
        )

    def _gere_training_step(self, parent: Callable[..., Tensor], /, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a micro-step as the parent does; it knows nothing of one that has replay rows alone."""
        if not (self._gere_steps.open and self._gere_steps.replay_alone):
            return parent(*args, **kwargs)
        self._prepare_inputs = lambda inputs: inputs  # type: ignore[method-assign]
        try:
            return Trainer.training_step(self, *args, **kwargs)
        finally:
            del self._prepare_inputs

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Loss of the parent for the task rows, and of the replay rows of the micro-step, each with its share."""
        return self._gere_loss(super().compute_loss, *args, **kwargs)

    def _gere_loss(self, parent: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        session, steps = self._gere_session, self._gere_steps
        # An evaluation computes losses without gradients, and those are the parent's alone.
        if session is None or not (steps.open and torch.is_grad_enabled()):
            return parent(*args, **kwargs)
        step, share = steps.take(), steps.share
        if not step.rows.all_task:
            return session.replay_part(self.model_wrapped, step, share)
        # A backward pass begins with the later call, and has all of its gradients before the activations of the
        # earlier one go. So the replay rows, mostly the fewer ones, come first.
        replay_parts = [session.replay_part(self.model_wrapped, step, share)] if step.replay else []
        # The parent gets its arguments in the form that the caller chose: classes differ in order and names.
        with steps.held():
            found = parent(*args, **kwargs)
        loss, *outputs = found if isinstance(found, tuple) else (found,)
        total = sum(replay_parts, session.task_part(loss, step.rows.task, share))
        return (total, *outputs) if outputs else total

    def _gere_close_step(self) -> None:
        self._gere_steps.close()
        if self._gere_session is not None:
            self._gere_session.finite.check(self.state.global_step + 1)

    def _gere_end_step(self) -> None:
        session = self._gere_session
        if session is not None:
            session.weight.end_step(self._gere_steps.end(), self._gere_join)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the parent does, with the averages of the replay since the last log."""
        # Evaluations have it with a prefix. A log of its own would take what TRL adds to that of the evaluation.
        own = {name: logs[f"eval_{name}"] for name in (LOSS, CHANGE, INTERVAL) if f"eval_{name}" in logs}
        if self._gere_session is not None and "loss" in logs:
            own = self._gere_session.meters.read(self._gere_join)
        more = {**logs, **own}
        super().log(more, *args, **kwargs)
        # TRL adds its metrics to the dict that it is given, which is that of the evaluation.
        logs.update({name: value for name, value in more.items() if name not in own})

    def _gere_join(self, vector: Tensor) -> Tensor:
        """Mean of a vector over the ranks."""
        return self.accelerator.reduce(vector.to(self.args.device), reduction="mean")

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save as the parent does, with the key of the anchor and the state of the weight."""
        super().save_model(output_dir, *args, **kwargs)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        session = self._gere_session
        if session is not None:
            write_key(folder, session.anchor.key, self._gere_decay.c)
            write_weight(folder, session.weight.state_dict())
            return
        write_base(folder, self.model)
        # Training without replay hands on what its model was given, since it is still tuned from that base.
        key = read_key(self._gere_checkpoint) or loaded_key(self.model)
        if key is not None:
            write_key(folder, key)

    def _gere_begin(self) -> None:
        """Open or build the anchor: the model is ready, and no step has been taken."""
        checks.refuse_settings(self)  # again, for a class whose own data loader went past ours
        inner = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        refuse_unanchorable(inner)  # again, for an adapter that came after construction
        adding = bool(self._gere_why_added)
        mixes = policy.may_mix(self, self._gere_rows, adding=adding)
        checks.refuse_reentrant(self, inner, mixes=mixes, adding=adding)
        sharded = is_sharded(inner)
        model = ReadyModel(
            inner=inner,
            device=self.args.device,
            autocast=self.accelerator.autocast,
            precision=precision_name(self.accelerator.mixed_precision, self.args.tf32),
            ranks=_compat.ranks_of(self, lockstep=sharded),
        )
        # A second `train()` of the same model keeps the anchor of the first, since the weights have moved.
        previous = self._gere_session
        if self._gere_checkpoint is not None or self.model_init is not None:
            previous = None
        self._gere_session = begin_session(
            self._gere_plan,
            model,
            checkpoint=self._gere_checkpoint,
            previous=previous,
            every_rank_calls=sharded or not policy.is_whole(policy.kind_of(self)),
            progress=self._gere_shows_progress,
            claim=self._gere_claim,
        )
        self._gere_decay = decay_of(
            self._gere.config,
            inner,
            tuned=self._gere_session.tuned,
            spread=checks.is_spread(self, inner),
            checkpoint=self._gere_checkpoint,
        )
        remember(inner, self._gere_session.anchor.key, self._gere_session.anchor.fields["weights"])
        if self.is_world_process_zero():
            tell_trackers(self.callback_handler.callbacks, self._gere, self._gere_session.anchor.key)
            plan = policy.step_plan(self, self._gere_rows, self._gere_decay, added=adding)
            say(opening(self._gere_session, plan))
            logger.info("gere/forgetting is now gere/replay_change; the old name goes with the next release.")

    def _gere_claim(self, key: str) -> None:
        """Name the anchor in the output folder, before it could be taken for one that no run needs."""
        # A model that is saved past the trainer, or by a killed run, must not be taken for a base later, either.
        if self.args.should_save:
            write_key(Path(str(self.args.output_dir)), key)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the parent does; the metrics of `evaluate()` have the change on held-out texts, too."""
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        heldout = self._gere_heldout()
        if heldout is not None and description == "Evaluation":  # `predict()` comes here, too
            change = heldout.measure_once(self.state.global_step) if self.is_in_train else heldout.measure()
            logs = {f"eval_{name}": value for name, value in change.logs.items()}
            # A search sums up whatever stands beside the loss, unless it is told what to look at.
            if self.hp_search_backend is None:
                output.metrics.update(logs)
            else:
                self.log(logs)
        return output

    def _gere_heldout(self) -> HeldOut | None:
        """What measures the held-out texts, unless a callback measures texts that the user chose."""
        measures = [callback.measures_texts for callback in self._gere_abilities()]
        if self._gere_session is None or any(measures):
            return None
        return self._gere_session.heldout

    def _gere_abilities(self) -> list[GeneralAbilityCallback]:
        return [
            callback for callback in self.callback_handler.callbacks if isinstance(callback, GeneralAbilityCallback)
        ]

    def _gere_finish(self, *_: Any, **__: Any) -> None:
        """Measure the trained model, and say what was kept."""
        heldout = self._gere_heldout()
        if heldout is not None:
            # The weights are not those of the last evaluation if the best checkpoint has been loaded.
            best = self.args.load_best_model_at_end
            self.log((heldout.measure() if best else heldout.measure_once(self.state.global_step)).logs)
        if self._gere_session is None and not chooses(self._gere.config):
            return
        summary = self.replay.summary()
        self.state.log_history[-1]["gere/summary"] = summary
        if self.is_world_process_zero():
            say(f"gere: {summary}")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card as the parent does, with what was kept."""
        super().create_model_card(*args, **kwargs)
        card = Path(str(self.args.output_dir)) / "README.md"
        if self._gere_session is not None and self.is_world_process_zero() and card.is_file():
            append_to_card(card, self.replay)

    def _gere_begin_line(self) -> None:
        """Find the base of the trained weights; the anchor is there."""
        config, session, decay = self._gere.config, self._gere_session, self._gere_decay.c
        self._gere_line = None  # an earlier `train()` had one
        if not decay and not chooses(config):
            return
        heldout = session is not None and len(session.plan.replay.heldout) > 1
        require_measures(config, heldout=heldout, evaluation=self.eval_dataset is not None)
        inner = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        if decay:
            checks.refuse_sharded_decay(self, inner)
        elif checks.is_spread(self, inner):
            return  # the answer at the end names the command that can do it
        ranks = _compat.ranks_of(self)

        def find() -> BaseWeights:
            if session is not None:
                digest = session.anchor.fields["weights"]
            elif self._gere_checkpoint is not None:
                digest = base_of_checkpoint(self._gere_checkpoint, ranks)
            else:
                digest = base_digest(inner, ranks)
            return find_base(inner, self._gere.folder, digest, ranks)

        trained = TrainedWeights(inner, find)
        self._gere_line = TrainedLine(trained, BaseDecay(decay, self.state.max_steps, trained, self.args.seed))

    def _gere_pull(self, step: int) -> None:
        if self._gere_line is not None:
            self._gere_line.decay.after(step)

    def _gere_move_back(self, *_: Any, **__: Any) -> None:
        """Choose a point of the line between base and tuned weights, and move the weights there."""
        config, session, line = self._gere.config, self._gere_session, self._gere_line
        if line is None:
            self.state.log_history[-1][NOT_MOVED] = 1
            return
        heldout = self._gere_heldout()
        if heldout is not None:
            self.log(heldout.measure().logs)  # of the tuned end
        if not self._gere_has_saved_this_step:
            self.save_model(str(Path(str(self.args.output_dir)) / "tuned"), _internal_call=True)
        evaluate = None
        if self.eval_dataset is not None:
            evaluate = partial(evaluation_loss, self)
        measures = session is not None and session.heldout is not None
        measure = session.heldout.measure if measures else None  # type: ignore[union-attr]
        share = move_back(line.trained, config.forgetting_budget, measure, evaluate)  # type: ignore[arg-type]
        for callback in self._gere_abilities():
            callback.forget_last()
        self.log({SHARE: share})

    @property
    def _gere_has_saved_this_step(self) -> bool:
        """Whether a checkpoint has the weights as they are."""
        checkpoint: Any = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            checkpoint = Path(self.state.best_model_checkpoint)
        return _compat.ranks_of(self).ask(checkpoint.is_dir)[0]

    @property
    def _gere_shows_progress(self) -> bool:
        return self.is_world_process_zero() and not self.args.disable_tqdm

    @contextmanager
    def _gere_data(self, dataset: Any, collator: Any, sampler: Callable[..., Any] | None = None) -> Iterator[None]:
        """Show the parent another training set, collator and sampler for a moment; the user's stay as they are."""
        kept = self.train_dataset, self.data_collator
        self.train_dataset, self.data_collator = dataset, collator
        if sampler is not None:
            # On the instance, so that it is the outermost even if a subclass of this class has its own.
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
