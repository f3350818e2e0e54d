"""`RecurrentKIFTrainer`: hooks on the trainer's own events; the formulas are in `importance` and `fusion`."""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from gere import _compat
from gere._log import logger
from gere.config import require
from gere.errors import ConfigError, TaskMemoryError, UnsupportedModelError, UnsupportedSettingError
from gere.kif.config import KIFConfig
from gere.kif.memory import TaskMemory
from gere.kif.state import History, KIFState, write_history
from gere.model.adapters import is_adapted
from gere.model.generate import own_randomness
from gere.model.sharded import is_sharded
from gere.session.checks import is_spread
from gere.session.policy import kind_of
from gere.session.resume import checkpoint_of

if TYPE_CHECKING:
    from transformers import Trainer as _Parent
else:
    _Parent = object


class KIFMixin(_Parent):
    """Recurrent-KIF or TaSL for any `Trainer` class; stands before it in the bases.

    One trainer trains one task. The adapter, the memory and, for TaSL, `kif_history` go from task to task.

    Args:
        *args: Arguments of the parent trainer.
        kif_config: The settings; by default those of the paper.
        kif_memory: Rows of the earlier tasks; `None` or an empty one for the first task, which is plain training.
        kif_earlier: Names of the tasks that the model was trained on before, in order. The memory must hold these.
            `None` takes those of the memory.
        kif_history: `trainer.kif_history` of the task before, for TaSL.
        **kwargs: Keyword arguments of the parent trainer; `tokenizer=` is taken as `processing_class=`.

    Raises:
        ConfigError: If an argument cannot be used.
        TaskMemoryError: If the memory is missing, or that of other tasks.
        UnsupportedModelError: If the model has no adapter to train.
    """

    def __init__(
        self,
        *args: Any,
        kif_config: KIFConfig | None = None,
        kif_memory: TaskMemory | None = None,
        kif_earlier: Sequence[str] | None = None,
        kif_history: History | None = None,
        **kwargs: Any,
    ) -> None:
        config = KIFConfig() if kif_config is None else kif_config
        require(isinstance(config, KIFConfig), "kif_config", "a KIFConfig", config)
        memory = TaskMemory() if kif_memory is None else kif_memory
        require(isinstance(memory, TaskMemory), "kif_memory", "a TaskMemory", memory)
        _require_earlier(config, memory, kif_earlier, kif_history)
        self._kif_config, self._kif_memory = config, memory
        self._kif_history: History = dict(kif_history or {})
        self._kif_scores: History = {}
        self._kif_state: KIFState | None = None
        self._kif_checkpoint: Path | None = None
        self._kif_logs: dict[str, Tensor] = {}
        super().__init__(*args, **_compat.with_processing_class(super().__init__, kwargs))
        self._kif_refuse_spread()
        before = config.observe == "before"
        events = {
            "on_train_begin": self._kif_begin,
            "on_pre_optimizer_step" if before else "on_optimizer_step": self._kif_observe,
            "on_step_end": self._kif_end_step,
        }
        self.add_callback(_Events(events))
        # Before whatever measures the trained model.
        self.callback_handler.callbacks.insert(0, _Events({"on_train_end": self._kif_finish}))

    @property
    def kif_history(self) -> History:
        """Scores of all tasks so far by unit, for the trainer of the next task; empty before the end of a training."""
        return self._kif_scores

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does; `True` takes the last whole checkpoint."""
        self._kif_checkpoint = checkpoint_of(self, resume_from_checkpoint)
        if self._kif_checkpoint is not None:
            resume_from_checkpoint = str(self._kif_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _kif_begin(self) -> None:
        """Begin or resume the task; the weights of a checkpoint are loaded."""
        config = self._kif_config
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        self._kif_refuse_sizes()
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if not (is_adapted(model) and weights):
            raise UnsupportedModelError(
                "KIF fuses the entries of an adapter, and this model has none to train.",
                where=type(model).__name__,
                expected="a model of PEFT with trained weights, such as get_peft_model(model, LoraConfig(...))",
                found="no adapter" if weights else "no weight that requires a gradient",
                fix="Add an adapter. To load a saved one: PeftModel.from_pretrained(..., is_trainable=True).",
            )
        self._kif_state = None
        if config.needs_memory and not self._kif_memory.rows:
            return
        self._kif_warn_of_a_fresh_adapter(weights)
        self._kif_state = KIFState.begin(config, weights)  # type: ignore[arg-type]
        if self._kif_checkpoint is not None:
            self._kif_state.read(self._kif_checkpoint, self._kif_memory.sha256)

    def _kif_refuse_spread(self) -> None:
        """Refuse what would give each process a part of the gradients."""
        if is_spread(self, self.model) or self.args.n_gpu > 1:
            how = "sharded weights" if is_sharded(self.model) else kind_of(self)
            raise UnsupportedSettingError(
                "KIF needs the whole adapter and its gradients on each process.",
                where="distributed training",
                expected="one process, or DDP",
                found=f"{how}, {self.args.n_gpu} GPUs in this process",
                fix="Start with torchrun (DDP). An adapter is small: ZeRO-3 and FSDP save little of it.",
            )

    def _kif_refuse_sizes(self) -> None:
        """Refuse rounds that never end, and batches that cannot be shared."""
        config, ranks = self._kif_config, self.accelerator.num_processes
        rounds = config.needs_memory and bool(self._kif_memory.rows)
        steps = f"at most the {self.state.max_steps} steps of the training"
        require(
            not rounds or config.inner_steps <= self.state.max_steps,
            "kif_config.inner_steps",
            f"{steps}: else there is no fusion",
            config.inner_steps,
        )
        parts = f"a multiple of the {ranks} processes"
        require(config.outer_batch % ranks == 0, "kif_config.outer_batch", parts, config.outer_batch)

    def _kif_warn_of_a_fresh_adapter(self, weights: Mapping[str, Tensor]) -> None:
        second = [weight for name, weight in weights.items() if "lora_B" in name]
        earlier = self._kif_memory.rows or self._kif_history
        if earlier and second and self._kif_checkpoint is None and not any(weight.any() for weight in second):
            logger.warning(
                "The adapter is new (lora_B is 0). Earlier tasks are kept in the adapter that they trained."
            )

    def _kif_observe(self) -> None:
        state = self._kif_state
        if state is None:
            return
        if self._kif_config.observe == "before":
            self._kif_unscale()
        state.observe_inner()

    def _kif_unscale(self) -> None:
        """Divide float16's scale out of the gradients; whatever clips them has done so already."""
        if self.accelerator.scaler is not None:
            # A second call is an error of the scaler, which changes nothing.
            with contextlib.suppress(RuntimeError):
                self.accelerator.unscale_gradients()

    def _kif_end_step(self) -> None:
        state, config, step = self._kif_state, self._kif_config, self.state.global_step
        if state is None or not config.needs_memory or step % config.inner_steps:
            return
        mask, middle = state.end_inner()
        # The optimizer below accelerate's wrapper holds the state; the wrapper knows the scaler.
        optimizer: Any = self.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)
        seeds = [self.args.seed, step, self.accelerator.process_index]
        with _as_if_not_been(self, seeds), _for_outer_steps(optimizer, config.outer_learning_rate):
            first = (step // config.inner_steps - 1) * config.outer_steps
            losses = [self._kif_outer_step(state, first + at) for at in range(config.outer_steps)]
        neither = state.fuse(mask, middle)
        if config.optimizer_state == "reset":
            optimizer.state.clear()
        self._kif_logs = {"kif/neither": neither}
        if losses:
            self._kif_logs["kif/outer_loss"] = torch.stack(losses).mean()

    def _kif_outer_step(self, state: KIFState, index: int) -> Tensor:
        """Take one optimizer step on the memory; returns its loss."""
        config, model = self._kif_config, self.model_wrapped
        rows = self._kif_memory.batch(index, config.outer_batch, self.args.seed)
        own = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        batch = _compat.collator_of(self)([dict(row) for row in own])
        # Of Trainer itself, since a subclass may put rows of its own beside the batches of the task.
        samples, items = Trainer.get_batch_samples(self, iter([batch]), 1, self.args.device)  # type: ignore[arg-type]
        loss = self.training_step(model, samples[0], items)
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        if config.observe == "before":
            self._kif_unscale()
            state.observe_outer()
        self.optimizer.step()
        if config.observe == "after":
            state.observe_outer()
        model.zero_grad()
        return loss.detach().float()

    def _kif_finish(self) -> None:
        """Consolidate with the weights before the task."""
        state = self._kif_state
        if state is not None and not self._kif_config.needs_memory:
            self._kif_scores = state.consolidate(self._kif_history)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the parent does, with the last fusion."""
        if self._kif_logs and "loss" in logs:
            values = torch.stack([value.to(self.args.device) for value in self._kif_logs.values()])
            means = self.accelerator.reduce(values, reduction="mean")
            logs = {**logs, **dict(zip(self._kif_logs, means.tolist(), strict=True))}
            self._kif_logs = {}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save as the parent does; a checkpoint has the state of the round, a trained model the scores of TaSL."""
        super().save_model(output_dir, *args, **kwargs)
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        # Before the state of the trainer, which says that a checkpoint is whole.
        if self.is_in_train and self._kif_state is not None:
            self._kif_state.write(folder, self._kif_memory.sha256)
        if self._kif_scores and not self.is_in_train:
            write_history(folder, self._kif_scores)


def _require_earlier(
    config: KIFConfig, memory: TaskMemory, earlier: Sequence[str] | None, history: History | None
) -> None:
    """Refuse a second task without what the method keeps of the first, or with that of others."""
    if not earlier and earlier is not None and not memory.tasks:
        return
    wanted = list(memory.tasks if earlier is None else earlier)
    if not config.needs_memory:
        if wanted and not history:
            raise ConfigError(
                "A task after the first needs the scores of the earlier ones.",
                where="kif_history",
                expected=f"trainer.kif_history of the training on {wanted[-1]}",
                found="none",
                fix="Pass it; for a saved model: gere.kif.read_history(folder).",
            )
        return
    if wanted == list(memory.tasks):
        return
    raise TaskMemoryError(
        "A task after the first needs a memory of the earlier ones, in their order.",
        where="kif_memory",
        expected=", ".join(wanted) or "no task, since this is the first one",
        found=", ".join(memory.tasks) or "no memory",
        fix="Build it in the order of the tasks: memory = memory.add(name, rows, labels) after each.",
    )


@contextmanager
def _as_if_not_been(trainer: Any, seeds: Sequence[int]) -> Iterator[None]:
    """Take outer steps that leave every generator, and the trainer's count of micro-steps, as they were."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    kept = random.getstate(), np.random.get_state(), trainer.current_gradient_accumulation_steps
    random.seed(seed)  # a collator may draw from any of them
    np.random.seed(seed)
    # A batch of the memory is a step of its own.
    trainer.current_gradient_accumulation_steps = 1
    try:
        with own_randomness(trainer.args.device, seed):
            yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        trainer.current_gradient_accumulation_steps = kept[2]


@contextmanager
def _for_outer_steps(optimizer: Any, rate: float | None) -> Iterator[None]:
    """Give the trainer's optimizer a state and a learning rate of the outer steps; `None` leaves both."""
    if rate is None:
        yield
        return
    # One object, so that its kind, its groups and the scaler are those of the user.
    kept, rates = optimizer.state, [group["lr"] for group in optimizer.param_groups]
    optimizer.state = defaultdict(dict)
    for group in optimizer.param_groups:
        group["lr"] = rate
    try:
        yield
    finally:
        optimizer.state = kept
        for group, before in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = before


class _Events(TrainerCallback):
    """Calls functions without arguments at events of the trainer."""

    def __init__(self, events: Mapping[str, Callable[[], None]]) -> None:
        for event, call in events.items():
            # `Trainer` looks events up by name.
            setattr(self, event, lambda *_, _call=call, **__: _call())


class RecurrentKIFTrainer(KIFMixin, Trainer):
    """`transformers.Trainer` that fuses each LoRA task of a sequence with the earlier ones.

    Takes every argument of `Trainer`, positional or by keyword, and those of `KIFMixin`.

    Example:
        >>> trainer = RecurrentKIFTrainer(model, args, train_dataset=train, kif_memory=memory)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> memory = memory.add("sentiment", train, labels)  # doctest: +SKIP
    """


def recurrent_kif_trainer(base: type[Trainer]) -> type[Trainer]:
    """Make a trainer class with Recurrent-KIF from any `Trainer` subclass.

    Args:
        base: The class, such as `Seq2SeqTrainer`, TRL's `SFTTrainer`, `GeReTrainer` or your own.

    Returns:
        A subclass that also takes the arguments of `KIFMixin`; `base` itself if it does already.

    Raises:
        ConfigError: If `base` is no trainer class.
    """
    require(isinstance(base, type) and issubclass(base, Trainer), "recurrent_kif_trainer", "a Trainer class", base)
    if issubclass(base, KIFMixin):
        return base
    return type(f"KIF{base.__name__}", (KIFMixin, base), {"__module__": __name__, "__doc__": KIFMixin.__doc__})
