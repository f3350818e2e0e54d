"""LoRA by PEFT: the anchor is the model with its adapter disabled."""

from __future__ import annotations

import pytest
import torch
from conftest import load_tiny
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_trainer import KEYS, train_logs

from gere.cache.fingerprint import architecture_digest, weights_digest
from gere.errors import UnsupportedModelError


def with_lora(**changes):
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    return get_peft_model(load_tiny(), LoraConfig(**settings))


def test_lora_trains_against_the_base(make_trainer, arguments):
    trainer = make_trainer(model=with_lora(), args=arguments(learning_rate=1e-2, max_steps=4))
    trainer.train()
    logs = train_logs(trainer)
    assert all(set(log) >= KEYS for log in logs)
    assert logs[0]["gere/tm"] == 0.0 and logs[-1]["gere/tm"] > 0


def test_lora_and_full_training_share_one_anchor(make_trainer):
    full, lora = make_trainer(), make_trainer(model=with_lora(modules_to_save=["lm_head"]))
    full.train()
    lora.train()
    assert full.replay.anchor.key == lora.replay.anchor.key


def test_a_trained_adapter_still_means_the_base(make_trainer, arguments):
    model = with_lora()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    trainer = make_trainer(model=model)
    trainer.train()
    assert trainer.replay.anchor.key and train_logs(trainer)[0]["gere/tm"] > 0
    again = make_trainer()
    again.train()
    assert again.replay.anchor.key == trainer.replay.anchor.key
    assert train_logs(again)[0]["gere/tm"] == 0.0


def test_an_adapter_that_takes_base_weights_is_refused(make_trainer):
    with pytest.raises(UnsupportedModelError, match=r"init_lora_weights[\s\S]*'pissa'"):
        make_trainer(model=with_lora(init_lora_weights="pissa"))


def with_own_adapter(std=0.5):
    """Adapters that transformers adds by itself, without a `PeftModel` around the model."""
    torch.manual_seed(0)
    model = load_tiny()
    try:
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    except ValueError as error:  # this version of transformers wants a newer PEFT for it
        pytest.skip(str(error))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return model


@pytest.mark.parametrize("way", ["trainer.model", "in place", "add_adapter"])
def test_such_an_adapter_is_refused_when_it_comes_after_the_trainer(make_trainer, tmp_path, way):
    trainer = make_trainer()
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    if way == "add_adapter":
        trainer.model.add_adapter(config)
    else:
        adapted = get_peft_model(trainer.model, config)
        trainer.model = adapted if way == "trainer.model" else trainer.model
    with pytest.raises(UnsupportedModelError, match="init_lora_weights"):
        trainer.train()
    assert not list((tmp_path / "gere_saving").glob("anchor-*"))


def test_adapters_of_the_model_itself_are_disabled_for_the_anchor(make_trainer):
    model = with_own_adapter()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trainer = make_trainer(model=model)
    trainer.train()
    assert train_logs(trainer)[0]["gere/tm"] > 0
    assert trainable == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    untouched = make_trainer()
    untouched.train()
    assert untouched.replay.anchor.key == trainer.replay.anchor.key
    assert train_logs(untouched)[0]["gere/tm"] == 0.0


def test_lora_on_a_tuned_model_finds_the_first_anchor(make_trainer, tmp_path):
    from transformers import AutoModelForCausalLM

    first = make_trainer()
    first.train()
    first.save_model(str(tmp_path / "task-1"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "task-1", dtype=torch.float32)
    later = make_trainer(model=get_peft_model(tuned, LoraConfig(r=4, target_modules=["q_proj"])))
    later.train()
    assert later.replay.anchor.key == first.replay.anchor.key and train_logs(later)[0]["gere/tm"] > 0


def test_prompt_tuning_is_refused(make_trainer):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UnsupportedModelError, match="PromptTuningConfig"):
        make_trainer(model=get_peft_model(load_tiny(), config))


def test_architecture_has_one_digest_in_all_versions():
    assert architecture_digest(load_tiny()).startswith("17ad4c9d049924cf")


@pytest.mark.parametrize("changes", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": "all-linear"}])
def test_digests_see_through_the_adapter(changes):
    base = load_tiny()
    wrapped = with_lora(**changes)
    assert weights_digest(wrapped) == weights_digest(base)
    assert architecture_digest(wrapped) == architecture_digest(base)
    with torch.no_grad():
        next(base.parameters()).view(-1)[3] += 1e-3
    assert weights_digest(base) != weights_digest(wrapped)
