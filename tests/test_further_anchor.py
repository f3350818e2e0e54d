"""One cache folder for everything that a base model is trained for: what is built, what is opened, what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import TINY, load_tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gere.errors import CacheMismatchError, CacheMissingError, ConfigError

OTHER_SETTINGS = (
    ({"replay_strategy": "kl"}, "strategy"),
    ({"max_length": 40}, "max_length"),
    ({"band_width": 2.0}, "bands"),
    ({"replay_size": 20}, "texts"),
    ({"replay_heldout": 1}, "texts"),
    ({"add_bos": False}, "max_length"),
)


def lora(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def half():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)


@pytest.fixture
def anchored(measuring_trainer):
    """A trainer that has built an anchor."""
    trainer = measuring_trainer()
    trainer.train()
    return trainer


def anchors(tmp_path):
    return sorted(path.name for path in (tmp_path / "gere_saving").glob("anchor-*"))


@pytest.mark.parametrize(("changes", "name"), OTHER_SETTINGS, ids=lambda value: str(value))
def test_other_settings_build_a_further_anchor_and_say_so(
    measuring_trainer, anchored, tmp_path, caplog, changes, name
):
    caplog.set_level(logging.INFO, "gere")
    other = measuring_trainer(config=changes)
    other.train()
    assert f"builds another anchor in {tmp_path / 'gere_saving'}, since" in caplog.text
    (line,) = [record.message for record in caplog.records if "another anchor" in record.message]
    assert name in line
    assert len(anchors(tmp_path)) == 2
    caplog.clear()
    measuring_trainer(config=changes).train()
    assert "another anchor" not in caplog.text and f"anchor {other.replay.anchor.key} opened" in caplog.text


def test_another_base_builds_a_further_anchor(measuring_trainer, anchored, tmp_path):
    torch.manual_seed(0)
    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    )
    measuring_trainer(model=small).train()
    assert len(anchors(tmp_path)) == 2


def test_the_base_in_another_precision_builds_a_further_anchor(measuring_trainer, anchored, tmp_path, caplog):
    caplog.set_level(logging.INFO, "gere")
    measuring_trainer(model=lora(half())).train()
    assert len(anchors(tmp_path)) == 2
    assert "since anchor-" in caplog.text and "weights, dtype" in caplog.text


def test_a_tuned_model_without_a_name_is_refused(measuring_trainer, anchored, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        anchored.model.to(dtype).save_pretrained(tmp_path / "elsewhere")  # past the trainer, which names the anchor
        tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere", dtype=dtype)
        with pytest.raises(CacheMismatchError, match="weights") as caught:
            measuring_trainer(model=tuned).train()
        assert "weights" in caught.value.fields
    assert len(anchors(tmp_path)) == 1


def test_a_tuned_model_in_memory_remembers_its_anchor(measuring_trainer, anchored, tmp_path):
    key = anchored.replay.anchor.key
    again = measuring_trainer(model=anchored.model)
    again.train()
    assert again.replay.anchor.key == key
    # General change is told from the base, and goes on from what the first training left.
    first, second = [
        [log["general/change"] for log in trainer.state.log_history if "general/change" in log][-1]
        for trainer in (anchored, again)
    ]
    assert first != 0.0 and second != 0.0
    with pytest.raises(CacheMissingError, match=f"anchor-{key}"):
        measuring_trainer(model=anchored.model, gere_hidden_state_saving_dir=tmp_path / "elsewhere").train()
    with pytest.raises(ConfigError, match="reuse_gere_hidden_state"):
        measuring_trainer(model=anchored.model, reuse_gere_hidden_state=False).train()


def test_an_adapter_leaves_the_base_free_for_other_settings(measuring_trainer, tmp_path):
    model = lora(load_tiny())
    measuring_trainer(model=model).train()
    measuring_trainer(model=model, config={"max_length": 40}).train()
    assert len(anchors(tmp_path)) == 2
    merged = model.merge_and_unload().requires_grad_(True)
    again = measuring_trainer(model=merged)
    again.train()
    assert len(anchors(tmp_path)) == 2, "merged weights have moved, and remember the anchor of their base"
    with pytest.raises(CacheMismatchError, match="max_length"):
        measuring_trainer(model=merged, config={"max_length": 32}).train()


def test_an_untouched_model_in_memory_is_still_a_base(measuring_trainer, arguments, tmp_path):
    model = load_tiny()
    measuring_trainer(model=model, args=arguments(learning_rate=0.0)).train()
    measuring_trainer(model=model, config={"max_length": 40}).train()
    assert len(anchors(tmp_path)) == 2
