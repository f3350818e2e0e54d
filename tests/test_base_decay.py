"""Base decay: what training moved fades back to the base weights, by the schedule, by files, bit for bit on resume."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import TINY, load_tiny
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from gere import GeReConfig, GeReTrainer
from gere.blend import pulls
from gere.blend.decay import pull, rounded
from gere.errors import CacheMissingError, ConfigError, UnsupportedModelError

C = 0.7


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


class MoveOnce(TrainerCallback):
    """Moves all trained weights by 1 after the first step; with a learning rate of 0 nothing else moves them."""

    def on_step_end(self, args, state, control, model=None, **keywords):
        if state.global_step == 1:
            with torch.no_grad():
                for tensor in model.parameters():
                    tensor.add_(float(tensor.requires_grad))


# The schedule


@given(st.floats(0.01, 5), st.integers(2, 30_000))
def test_pulls_fade_what_came_first_to_exp_minus_c(decay, steps):
    planned = pulls(decay, steps)
    assert math.prod(1 - part for part in planned.values()) == pytest.approx(math.exp(-decay), rel=1e-9)
    assert len(planned) == min(20, steps - 1) and all(1 <= step < steps for step in planned)
    gaps = [b - a for a, b in zip([0, *planned], [*planned, steps], strict=True)]
    assert max(gaps) - min(gaps) <= 1, "equal stretches"


@pytest.mark.parametrize(("decay", "steps"), [(0.0, 100), (0.7, 1)])
def test_nothing_to_pull(decay, steps):
    assert pulls(decay, steps) == {}


# What a pull does


@pytest.mark.parametrize("strategy", ["tm", "none"])
def test_what_was_moved_first_has_faded_at_the_end(make_trainer, arguments, strategy):
    trainer = make_trainer(
        args=arguments(max_steps=30, learning_rate=0.0),
        config={"base_decay": C, "replay_strategy": strategy},
        callbacks=[MoveOnce()],
    )
    trainer.train()
    base, now = weights(load_tiny()), weights(trainer.model)
    left = math.exp(-C)
    for name, tensor in now.items():
        torch.testing.assert_close(tensor - base[name], torch.full_like(tensor, left), atol=1e-5, rtol=1e-5)


def test_none_is_the_parent_bit_for_bit(make_trainer, arguments):
    plain = make_trainer(Trainer, args=arguments(max_steps=4))
    off = make_trainer(args=arguments(max_steps=4), config={"base_decay": 0.0, "replay_strategy": "none"})
    plain.train()
    off.train()
    theirs = weights(plain.model)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(off.model).items())


def test_a_training_with_pulls_by_hand_is_the_same(make_trainer, arguments):
    """An independent way: plain Trainer, and the base weights in memory."""

    class Pull(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **keywords):
            part = {step: 1 - math.exp(-C / 7) for step in range(1, 8)}.get(state.global_step)
            if part:
                with torch.no_grad():
                    for name, tensor in model.named_parameters():
                        tensor.copy_((1 - part) * tensor + part * base[name])

    base = weights(load_tiny())
    by_hand = make_trainer(Trainer, args=arguments(max_steps=8), callbacks=[Pull()])
    by_hand.train()
    ours = make_trainer(args=arguments(max_steps=8), config={"base_decay": C, "replay_strategy": "none"})
    ours.train()
    theirs = weights(by_hand.model)
    for name, tensor in weights(ours.model).items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5)


def test_lora_fades_as_its_product_and_modules_to_save_go_back(make_trainer, arguments):
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="all", task_type="CAUSAL_LM")
    model = get_peft_model(load_tiny(), lora)
    before = weights(model)
    trainer = make_trainer(
        model=model,
        args=arguments(max_steps=30, learning_rate=0.0),
        config={"base_decay": C, "replay_strategy": "none"},
        callbacks=[MoveOnce()],
    )
    trainer.train()
    left = math.exp(-C)
    moved = set()
    for name, tensor in weights(trainer.model).items():
        change = tensor - before[name]
        expected = 0.0
        if model.get_parameter(name).requires_grad:
            expected = 1.0 if "lora_A" in name else left
            moved.add(name.split(".")[-3])
        torch.testing.assert_close(change, torch.full_like(tensor, expected), atol=1e-5, rtol=1e-5)
    assert moved == {"lora_A", "lora_B", "modules_to_save"}


def test_an_adapter_without_a_base_is_refused(make_trainer):
    model = get_peft_model(load_tiny(), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match="base_decay does not know the base"):
        make_trainer(model=model, config={"base_decay": C, "replay_strategy": "none"}).train()


def test_new_rows_of_an_embedding_stay():
    weight, target = torch.full((4, 2), 3.0), torch.full((3, 2), 1.0)
    pull(weight, target, 0.5, torch.Generator())
    assert weight[:, 0].tolist() == [2.0, 2.0, 2.0, 3.0]


def test_bfloat16_is_rounded_by_chance_and_right_on_average():
    value = 1.0 + 2**-10  # a quarter of a step of bfloat16 above 1
    found = rounded(torch.full((100_000,), value), torch.Generator().manual_seed(0))
    assert set(found.tolist()) == {1.0, 1.0 + 2**-7}
    assert found.float().mean().item() == pytest.approx(value, abs=1e-4)
    exact = torch.tensor([0.5, -3.0, 0.0])
    assert torch.equal(rounded(exact, torch.Generator()).float(), exact)


@pytest.mark.parametrize("decay", [-0.1, math.nan, math.inf, "0.7", True])
def test_other_values_are_refused(decay):
    with pytest.raises(ConfigError, match="base_decay"):
        GeReConfig(base_decay=decay)


# Where the base comes from


def test_files_of_the_model_are_read_and_not_copied(make_trainer, tmp_path):
    make_trainer(config={"base_decay": C}).train()
    (pointer,) = (tmp_path / "gere_saving").glob("base-*")
    assert json.loads(pointer.read_text())["file"] == str(TINY / "model.safetensors")


def test_a_model_that_comes_from_no_file_is_copied_once(make_trainer, arguments, tmp_path):
    def unnamed():
        model = load_tiny()
        model.config._name_or_path = ""
        return model

    args = {"max_steps": 30, "learning_rate": 0.0}
    for _ in range(2):
        trainer = make_trainer(
            model=unnamed(), args=arguments(**args), config={"base_decay": C}, callbacks=[MoveOnce()]
        )
        trainer.train()
        (copied,) = (tmp_path / "gere_saving").glob("base-*")
        assert copied.suffix == ".safetensors"
    name = "model.norm.weight"
    change = trainer.model.get_parameter(name) - load_tiny().get_parameter(name)
    torch.testing.assert_close(change, torch.full_like(change, math.exp(-C)), atol=1e-5, rtol=1e-5)


def test_a_tuned_model_goes_back_to_its_base(make_trainer, arguments, tmp_path):
    first = make_trainer(config={"base_decay": C})
    first.train()
    first.save_model(str(tmp_path / "task-1"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "task-1", dtype=torch.float32)
    start = weights(tuned)
    second = make_trainer(model=tuned, args=arguments(max_steps=5, learning_rate=0.0), config={"base_decay": C})
    second.train()
    base = weights(load_tiny())
    for name, tensor in weights(second.model).items():
        expected = base[name] + math.exp(-C) * (start[name] - base[name])
        torch.testing.assert_close(tensor, expected, atol=1e-6, rtol=1e-5)


def test_a_base_that_is_nowhere_is_refused(make_trainer, tmp_path):
    first = make_trainer()
    first.train()
    first.save_model(str(tmp_path / "task-1"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "task-1", dtype=torch.float32)
    with pytest.raises(CacheMissingError, match="base_decay pulls, are nowhere"):
        make_trainer(model=tuned, config={"base_decay": C}).train()


def test_a_damaged_copy_is_not_the_base(make_trainer, tmp_path):
    model = load_tiny()
    model.config._name_or_path = ""
    make_trainer(model=copy.deepcopy(model), config={"base_decay": C}).train()
    (copied,) = (tmp_path / "gere_saving").glob("base-*")
    raw = bytearray(copied.read_bytes())
    raw[-1] ^= 1
    copied.write_bytes(raw)
    make_trainer(model=copy.deepcopy(model), config={"base_decay": C}).train()
    assert copied.read_bytes() != bytes(raw), "an untouched model writes it again"


# Resume


@pytest.mark.parametrize("strategy", ["tm", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_training_is_bit_for_bit(make_trainer, arguments, tmp_path, strategy, dtype):
    def trained(checkpoint=None):
        trainer = make_trainer(
            model=AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype),
            args=arguments(max_steps=6, save_strategy="steps", save_steps=3),
            config={"base_decay": C, "replay_strategy": strategy},
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(trainer.model)

    whole, resumed = trained(), trained(str(tmp_path / "out" / "checkpoint-3"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_it_is_no_setting_of_the_anchor(make_trainer):
    one, two = make_trainer(), make_trainer(config={"base_decay": C})
    one.train()
    two.train()
    assert one.replay.anchor.key == two.replay.anchor.key
    assert isinstance(two, GeReTrainer)
