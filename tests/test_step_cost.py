"""What a step with replay costs beyond a plain one, by counts: calls of the model, tokens, reads of the device."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer
from watching import Watch

from gere.cache import Anchor
from gere.session.callbacks import ReplayCallback

# Operations whose result, or its shape, the host has to wait for on a GPU.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero", "bincount")
STEPS = 4


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU; here all of it is on the CPU, where nothing waits.

    What the model reads is not counted: it looks whether a mask has padding, once or twice in each call.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.active, self.counting = Counter(), False, False
        for name in ("tolist", "numpy", "cpu"):  # on a CPU no operation
            monkeypatch.setattr(torch.Tensor, name, self.watched(name, getattr(torch.Tensor, name)))

    def watched(self, name, method):
        def read(tensor, *args, **kwargs):
            self.found[name] += self.active
            return method(tensor, *args, **kwargs)

        return read

    def outside(self, method):
        def uncounted(*args, **kwargs):
            active, self.active = self.active, False
            try:
                return method(*args, **kwargs)
            finally:
                self.active = active

        return uncounted

    def inside(self, method):
        def counted(*args, **kwargs):
            self.active = self.counting = True
            try:
                with self:
                    return method(*args, **kwargs)
            finally:
                self.active = self.counting = False

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            place is not None and place.dtype in (torch.bool, torch.uint8) for place in args[1]
        )
        if masks or name.startswith(WAITING):
            self.found[name] += self.active
        return func(*args, **(kwargs or {}))


def counted(trainer, monkeypatch):
    """Train; reads from the second step on, without those of the log."""
    with monkeypatch.context() as patch:
        reads = Reads(patch)
        patch.setattr(Anchor, "targets", reads.outside(Anchor.targets))  # reads a file in main memory
        trainer.model.register_forward_pre_hook(lambda *_: setattr(reads, "active", False))
        trainer.model.register_forward_hook(lambda *_: setattr(reads, "active", reads.counting))
        plain, watched = trainer.training_step, reads.inside(trainer.training_step)
        later = lambda *args: (watched if trainer.state.global_step else plain)(*args)  # noqa: E731
        trainer.training_step = later
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ReplayCallback):
                callback.on_step_end = reads.inside(callback.on_step_end)
        trainer.train()
    return +reads.found


@pytest.mark.parametrize(
    ("strategy", "w"), [("tm", "auto"), ("tm", "dy"), ("tm", 10.0), ("kl", "auto"), ("l1", "auto"), ("ce", "auto")]
)
def test_a_step_reads_nothing_from_the_device_that_a_plain_one_does_not(
    make_trainer, arguments, strategy, w, monkeypatch
):
    args = {"max_steps": STEPS, "logging_steps": 100}
    ours = counted(make_trainer(args=arguments(**args), w=w, config={"replay_strategy": strategy}), monkeypatch)
    plain = counted(make_trainer(Trainer, args=arguments(**args)), monkeypatch)
    assert ours == plain


def test_the_weight_is_read_back_once_when_it_is_found(make_trainer, arguments, monkeypatch):
    """64 replay rows in 16 steps, of which the last one reads their sum."""
    args = {"max_steps": 18, "logging_steps": 100}
    ours = counted(make_trainer(args=arguments(**args), w="auto"), monkeypatch)
    plain = counted(make_trainer(Trainer, args=arguments(**args)), monkeypatch)
    assert ours - plain == Counter({"_local_scalar_dense": 1})


def test_the_counter_sees_a_read(make_trainer, arguments, monkeypatch):
    trainer = make_trainer(args=arguments(max_steps=STEPS, logging_steps=100))
    compute_loss = trainer.compute_loss

    def reading(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        assert loss.item() > 0 and loss[None][loss[None] > 0].tolist()
        return loss

    trainer.compute_loss = reading
    found = counted(trainer, monkeypatch)
    assert found["_local_scalar_dense"] == found["index"] == found["tolist"] == 2 * (STEPS - 1)


@pytest.mark.parametrize("replay", [4, 3, 1, 7])
def test_calls_of_the_model_in_a_step(make_trainer, general, replay):
    """Two micro-steps of 4 rows: 4 replay rows fill one; others leave one with both kinds, which takes two calls."""
    trainer = make_trainer(replay=replay)
    watch = Watch(trainer, general)
    trainer.train()
    for calls in watch.steps:
        assert len(calls) == (2 if replay == 4 else 3)
        kinds = [{row in watch.replay_set for row in call.rows} for call in calls]
        assert all(len(kind) == 1 for kind in kinds), "a call has rows of one kind"
        if replay != 4:
            assert kinds[:2] == [{True}, {False}], "the backward pass comes last to the call with fewer rows"


def test_live_targets_cost_one_call_without_gradient(make_trainer):
    from test_lora import with_lora

    trainer, calls = make_trainer(model=with_lora(), config={"anchor": "live"}), []
    decoder = trainer.model.get_base_model().get_decoder()
    decoder.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    first = calls.index(True)  # what comes before builds the anchor
    assert calls[first:].count(True) == 6 and calls[first:].count(False) in (3, 4)


@pytest.mark.parametrize("replay", [4, 3, 0])
def test_a_step_computes_no_token_twice(make_trainer, general, replay):
    """Nine in ten tokens of the calls are real ones of the step's rows, each once."""
    trainer = make_trainer(replay=replay)
    watch = Watch(trainer, general)
    trainer.train()
    for step in range(len(watch.steps)):
        assert len(watch.rows(step)) == 8
    real = sum(len(row) for step in range(len(watch.steps)) for row in watch.rows(step))
    assert real / sum(call.padded for calls in watch.steps for call in calls) >= 0.85


@pytest.mark.parametrize("replay", [4, 3])
def test_logits_and_states_are_gone_when_the_micro_step_is_over(make_trainer, replay):
    trainer = make_trainer(replay=replay)
    alive, left = [], []
    trainer.model.register_forward_hook(lambda module, args, out: alive.append(weakref.ref(out.logits)))
    trainer.model.model.register_forward_hook(
        lambda module, args, out: alive.append(weakref.ref(out.last_hidden_state))
    )
    step = trainer.training_step

    def training_step(*args):
        alive.clear()
        loss = step(*args)
        left.append((len(alive), sum(ref() is not None for ref in alive)))
        return loss

    trainer.training_step = training_step
    trainer.train()
    assert len(left) == 6 and all(made >= 2 and not kept for made, kept in left)
