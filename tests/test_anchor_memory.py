"""Too little memory while the anchor is built, and rows of an embedding that are new in each process."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from conftest import TINY, load_tiny
from transformers import AutoTokenizer

from gere.errors import AnchorMemoryError, CacheMismatchError


def with_memory(tokens: int, *, training: int | None = None):
    """Make a model with memory for so many padded tokens of a forward pass, and for so many rows in training."""
    model = load_tiny()

    def check(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if ids.numel() > tokens or (training is not None and torch.is_grad_enabled() and len(ids) > training):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return model


def test_a_build_that_does_not_fit_takes_half_once_and_says_so(measuring_trainer, caplog):
    trainer = measuring_trainer(model=with_memory(300), config={"anchor_batch_tokens": 512})
    with caplog.at_level(logging.WARNING, "gere"):
        trainer.train()
    assert "anchor_batch_tokens=256" in caplog.text
    assert math.isfinite(trainer.state.log_history[-1]["general/change"])  # held-out texts take half, too


def test_a_cpu_takes_half_of_what_it_takes(make_trainer, caplog):
    with caplog.at_level(logging.WARNING, "gere"):
        make_trainer(model=with_memory(300)).train()
    assert "anchor_batch_tokens=256" in caplog.text


@pytest.mark.parametrize("auto", [False, True])
def test_a_build_that_does_not_fit_twice_names_the_setting(make_trainer, arguments, auto):
    trainer = make_trainer(model=with_memory(200), args=arguments(auto_find_batch_size=auto))
    with pytest.raises(AnchorMemoryError, match=r"anchor_batch_tokens[\s\S]*256 tokens[\s\S]*to 128 or less"):
        trainer.train()


def test_another_error_of_the_model_stays_as_it_is(make_trainer):
    model = load_tiny()

    def fail(module, args, kwargs):
        if "logits_to_keep" not in kwargs and kwargs["input_ids"].shape[0] > 3:  # more than looks at the model
            raise RuntimeError("an index is wrong")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="an index is wrong"):
        make_trainer(model=model).train()


def test_the_batch_size_is_found_after_the_anchor_was(measuring_trainer, arguments, caplog):
    args = arguments(auto_find_batch_size=True, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    trainer = measuring_trainer(model=with_memory(300, training=5), args=args, replay=2)
    with caplog.at_level(logging.WARNING, "gere"):
        trainer.train()
    assert trainer.state.global_step == 3 and trainer._train_batch_size < 8
    assert caplog.text.count("anchor_batch_tokens=256") == 1


def resized(seed: int):
    tokenizer, model = AutoTokenizer.from_pretrained(TINY), load_tiny()
    tokenizer.add_tokens(["<call>", "</call>"], special_tokens=True)
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(tokenizer))
    return {"processing_class": tokenizer, "model": model}


def test_new_rows_of_another_seed_are_named_with_a_way_on(make_trainer, tmp_path):
    make_trainer(**resized(0)).train()
    make_trainer(**resized(0)).train()
    with pytest.raises(CacheMismatchError) as caught:
        make_trainer(**resized(1)).train()
    message = str(caught.value)
    assert "in lm_head.weight alone" in message and "new tokens" in message and "set_seed" in message
    (anchor,) = (tmp_path / "gere_saving").glob("anchor-*")
    key = anchor.name.removeprefix("anchor-")
    assert f"anchor to {key}" in message
    trainer = make_trainer(**resized(1), config={"anchor": key})
    trainer.train()
    assert trainer.state.global_step == 3
    # Replay rows see nothing of the new rows but their share of the probability.
    first = next(log for log in trainer.state.log_history if "gere/tm" in log)
    assert first["gere/violations"] == 0 and abs(first["gere/replay_change"]) < 1e-3


def test_a_tuned_model_is_not_taken_for_one_with_new_rows(make_trainer):
    make_trainer().train()
    tuned = load_tiny()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01)
    with pytest.raises(CacheMismatchError, match=r"next:\s+Start from the base model"):
        make_trainer(model=tuned).train()
