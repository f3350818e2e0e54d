"""QLoRA by bitsandbytes: the anchor is the quantized model with its adapter disabled. Nothing here needs a GPU."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM
from watching import train_logs

pytest.importorskip("bitsandbytes")
from transformers import BitsAndBytesConfig

from gere import general_loss
from gere.cache.fingerprint import architecture_digest, precision_of, weights_digest


def quantized(compute=torch.float32, **changes):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute, **changes}
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(TINY, quantization_config=config, dtype=torch.float32)


def with_qlora(prepared=False, **changes):
    model = quantized(**changes)
    if prepared:
        checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        model = prepare_model_for_kbit_training(model, **checkpointing)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


KEYS = {"gere/ce", "gere/tm", "gere/weight", "gere/violations", "gere/forgetting", "gere/task_loss"}
KINDS = [{}, {"bnb_4bit_use_double_quant": True}, {"prepared": True}, {"compute": torch.bfloat16}]


@pytest.mark.parametrize("kind", KINDS, ids=["nf4", "double", "prepared", "bfloat16"])
def test_trains_against_the_quantized_base(make_trainer, arguments, kind):
    model = with_qlora(**kind)
    before = weights_digest(model)
    trainer = make_trainer(model=model, args=arguments(learning_rate=1e-2, max_steps=4))
    trainer.train()
    logs = train_logs(trainer)
    assert all(set(log) >= KEYS for log in logs)
    assert logs[0]["gere/tm"] == 0.0 and logs[-1]["gere/tm"] > 0
    assert abs(logs[0]["gere/forgetting"]) < 1e-5 < abs(logs[-1]["gere/forgetting"])
    assert weights_digest(model) == before


def test_a_trained_adapter_still_means_the_quantized_base(make_trainer):
    model = with_qlora()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    trained, fresh = make_trainer(model=model), make_trainer(model=with_qlora())
    trained.train()
    fresh.train()
    assert train_logs(trained)[0]["gere/tm"] > 0 and train_logs(fresh)[0]["gere/tm"] == 0.0
    assert trained.replay.anchor.key == fresh.replay.anchor.key


def test_digests_see_through_the_adapter_and_a_saved_copy(tmp_path):
    base, wrapped = quantized(), with_qlora()
    base.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert weights_digest(base) == weights_digest(wrapped) == weights_digest(saved)
    assert architecture_digest(base) == architecture_digest(wrapped) == architecture_digest(saved)
    assert precision_of(base) == precision_of(wrapped) == precision_of(saved)


def test_digest_is_the_same_in_another_process():
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_qlora as t;"
        "print(t.weights_digest(t.quantized()), end='')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == weights_digest(quantized())


def test_the_next_run_opens_the_anchor(make_trainer, tmp_path, monkeypatch):
    first = make_trainer(model=with_qlora())
    first.train()
    monkeypatch.setattr("gere.session.anchor.build_anchor", None)
    second = make_trainer(model=with_qlora())
    second.train()
    assert second.replay.anchor.key == first.replay.anchor.key
    assert train_logs(second)[0]["gere/tm"] == 0.0


CHANGES = [
    ({"bnb_4bit_use_double_quant": True}, "architecture, weights"),
    ({"bnb_4bit_quant_type": "fp4"}, "weights"),
    ({"compute": torch.bfloat16}, "dtype"),
    ({"load_in_4bit": False, "load_in_8bit": True}, "architecture, weights"),
]


@pytest.mark.parametrize(("kind", "reason"), CHANGES, ids=["double", "fp4", "bfloat16", "int8"])
def test_another_quantization_has_an_anchor_of_its_own(make_trainer, tmp_path, caplog, kind, reason):
    caplog.set_level(logging.INFO, "gere")
    make_trainer(model=with_qlora()).train()
    make_trainer(model=with_qlora(**kind)).train()
    assert len(list((tmp_path / "gere_saving").glob("anchor-*"))) == 2
    assert re.search(f"was made from other .*{reason}", caplog.text)


def test_resume_is_bit_for_bit(make_trainer, arguments, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
    whole = make_trainer(model=with_qlora(), args=arguments(**settings))
    whole.train()
    resumed = make_trainer(model=with_qlora(), args=arguments(**settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    names = ("step", "loss", "grad_norm", *sorted(KEYS))
    expected = [[log[name] for name in names] for log in train_logs(whole)]
    assert [[log[name] for name in names] for log in train_logs(resumed)] == expected
    assert resumed.replay.anchor.key == whole.replay.anchor.key


def test_8_bits_train_too_but_round_differently_on_a_cpu(make_trainer):
    trainer = make_trainer(model=with_qlora(load_in_4bit=False, load_in_8bit=True))
    trainer.train()
    assert 0 < train_logs(trainer)[0]["gere/tm"] < 0.01  # bitsandbytes quantizes the inputs in eval mode alone


@pytest.mark.parametrize("measure", ["anchor", "loss"])
def test_measuring_leaves_the_weights_as_they_are(make_trainer, tokenizer, general, measure):
    """On some CPUs bitsandbytes packs the weights of a model in eval mode, which rounds them."""
    model = with_qlora()
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    before = [layer.weight.data.clone() for layer in layers]
    if measure == "anchor":
        make_trainer(model=model).train()
    else:
        general_loss(model, tokenizer, general[:4])
    assert layers and not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)
    assert all(torch.equal(layer.weight.data, data) for layer, data in zip(layers, before, strict=True))


def test_the_name_of_a_precision():
    assert precision_of(quantized()) == "torch.float32 weights, nf4 computed in float32"
    assert precision_of(with_qlora(compute=torch.bfloat16)) == "torch.float32 weights, nf4 computed in bfloat16"
    eight = quantized(load_in_4bit=False, load_in_8bit=True)
    assert precision_of(eight) == "torch.float32 weights, llm_int8 computed in float16, outliers from 6"
