"""A step in which two calls of the model meet in a backward pass needs hardly more memory than a plain one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from gere import GeReTrainer

TOKENS = 6


class Peak(TrainerCallback):
    """Most bytes that a training allocates in its second step, beyond those that it has when that step begins."""

    def __init__(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.profile.start()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.profile.stop()

    @property
    def bytes(self) -> int:
        events = self.profile.profiler.kineto_results.events()
        found = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        return max(itertools.accumulate(size for _, size in found))


def large() -> LlamaForCausalLM:
    """A model whose gradients are much larger than its activations on a few tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1024))


@pytest.mark.parametrize(("mode", "replay"), [("replace", 4), ("replace", 3), ("replace", 1), ("add", 3)])
def test_no_second_copy_of_the_gradients(make_trainer, arguments, task, mode, replay):
    """Three micro-steps: the gradients of one call wait for the other's only where no gradients are there yet."""
    rows = [{name: values[-TOKENS:] for name, values in row.items()} for row in task]
    found = []
    for cls, extra in ((Trainer, {}), (GeReTrainer, {"config": {"replay_mode": mode, "max_length": TOKENS}})):
        if extra:
            extra |= {"replay": replay}
        args = arguments(max_steps=2, gradient_accumulation_steps=3)
        trainer = make_trainer(cls, model=large(), args=args, train_dataset=rows, **extra)
        peak = Peak()
        trainer.add_callback(peak)
        trainer.train()
        found.append(peak.bytes)
    plain, ours = found
    gradients = sum(4 * parameter.numel() for parameter in large().parameters())
    assert plain > gradients
    assert ours < 1.1 * plain
