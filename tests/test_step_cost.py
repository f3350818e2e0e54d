"""What a step with replay costs beyond a plain one, by counts: calls of the model, tokens, reads of the device."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from gere.model import forward as passes
from gere.replay.batch import REPLAY, TASK
from gere.model.states import decoder_of

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
        trainer.model.register_forward_pre_hook(lambda *_: setattr(reads, "active", False))
        trainer.model.register_forward_hook(lambda *_: setattr(reads, "active", reads.counting))
        plain, watched = trainer.training_step, reads.inside(trainer.training_step)
        later = lambda *args: (watched if trainer.state.global_step else plain)(*args)  # noqa: E731
        trainer.training_step = later
        if hasattr(trainer, "_gere"):
            trainer._gere.end_step = reads.inside(trainer._gere.end_step)
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
    replay_part = trainer._gere.replay_part

    def reading(*args):
        loss = replay_part(*args)
        assert loss.item() > 0 and loss[None][loss[None] > 0].tolist()
        return loss

    trainer._gere.replay_part = reading
    found = counted(trainer, monkeypatch)
    assert found["_local_scalar_dense"] == found["index"] == found["tolist"] == STEPS - 1


def calls_of(trainer):
    """Padded tokens of each call of the decoder in each optimizer step, and the micro-batches."""
    steps, samples = [], trainer.get_batch_samples

    def get_batch_samples(*args, **kwargs):
        found = samples(*args, **kwargs)
        steps.append(([], found[0]))
        return found

    def called(module, args, output):
        if module.training:
            steps[-1][0].append(output.last_hidden_state.shape[:2].numel())

    trainer.get_batch_samples = get_batch_samples
    decoder_of(trainer.model).register_forward_hook(called)
    trainer.train()
    return steps


@pytest.mark.parametrize(("most_padding", "mixed"), [(1e9, 1), (-1.0, 2)])
@pytest.mark.parametrize("replay", [4, 3, 1, 7])
def test_the_model_is_called_once_in_a_micro_step(make_trainer, replay, most_padding, mixed, monkeypatch):
    """Two micro-steps of 4 rows: 4 replay rows fill one, others share one with task rows, or are called apart."""
    monkeypatch.setattr(passes, "MOST_PADDING", most_padding)
    for tokens, samples in calls_of(make_trainer(replay=replay)):
        both = sum(TASK in sample and REPLAY in sample for sample in samples)
        assert both == (replay != 4) and len(samples) == 2
        assert len(tokens) == 2 - both + mixed * both


def test_live_targets_cost_one_call_without_gradient(make_trainer):
    from test_lora import with_lora

    trainer = make_trainer(model=with_lora(), config={"anchor": "live"})
    for tokens, _ in calls_of(trainer):
        assert len(tokens) == 2


@pytest.mark.parametrize("replay", [4, 3, 0])
def test_a_step_computes_no_token_twice(make_trainer, replay):
    """The tokens of the calls are those of the batches, of which nine in ten are real, and little padding more."""
    real = padded = 0
    for tokens, samples in calls_of(make_trainer(replay=replay)):
        masks = [sample[part]["attention_mask"] for sample in samples for part in (TASK, REPLAY) if part in sample]
        own = sum(mask.numel() for mask in masks)
        assert own <= sum(tokens) <= (1 + passes.MOST_PADDING) * own
        real, padded = real + sum(int(mask.sum()) for mask in masks), padded + sum(tokens)
    assert real / padded >= 0.9


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
