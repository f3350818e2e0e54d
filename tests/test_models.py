"""Models of many architectures train with replay, or are refused by name: tiny ones with random weights, made here."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import load_tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorWithPadding,
)

from gere.errors import UnsupportedModelError
from gere.model.probe import find_layout
from gere.model.states import StateReader

# Fields of configurations by name; each class gets those that it knows.
SMALL = {
    "vocab_size": 768, "vocab_size_per_layer_input": 768, "hidden_size": 32, "embedding_size": 32, "embed_dim": 32,
    "num_hidden_layers": 2, "num_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "intermediate_size_mlp": 64, "ffn_dim": 64, "d_ff": 64, "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64, "shared_expert_intermediate_size": 32, "dim_head": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "n_group": 1, "topk_group": 1, "zero_expert_num": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "o_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "o_groups": 2, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64,
    "max_position_embeddings": 128, "sliding_window": 16, "attention_chunk_size": 16, "local_attention": 16,
    "state_size": 8, "time_step_rank": 4, "attention_hidden_size": 32, "mamba_d_state": 8, "mamba_dt_rank": 4,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_headdim": 8, "n_groups": 1, "chunk_size": 16,
    "laurel_rank": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "rotary_dim": 4,
    "image_size": 28, "patch_size": 14, "projection_dim": 32, "vision_output_dim": 32, "text_hidden_size": 32,
    "initializer_range": 0.1, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "image_token_id": 767,
    "image_token_index": 767, "image_seq_length": 4, "use_mamba_kernels": False,
}  # fmt: skip
OWN = {
    "bamba": {"attn_layer_indices": [1]},
    "electra": {"is_decoder": True},
    "gemma3n_text": {"activation_sparsity_pattern": None, "intermediate_size": [64, 64]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "longcat_flash": {"num_hidden_layers": 4},
    "llama4_vision_model": {"intermediate_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "mllama_vision_model": {
        "num_global_layers": 1, "attention_heads": 4, "intermediate_layers_indices": [0, 1], "vision_output_dim": 96,
        "supported_aspect_ratios": [[1, 1], [1, 2]],
    },
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "qwen2_5_vl_vision": {"out_hidden_size": 32, "fullatt_block_indexes": [1], "depth": 2, "num_heads": 4},
    "xlnet": {"d_head": 8},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 8,
               "attention_hidden_size": 64, "attention_head_dim": 16},
}  # fmt: skip
# What reads its head elsewhere than `get_decoder()` says, has its layers elsewhere, or several streams of states.
NAMED = [
    "llama4_text", "image:llama4", "image:mllama", "gemma3n_text", "modernbert-decoder", "image:kosmos-2.5",
    "longcat_flash", "electra", "mamba", "rwkv", "deepseek_v4", "openai-gpt",
]  # fmt: skip
OTHERS = [
    "bamba", "bart", "bloom", "codegen", "cohere", "deepseek_v3", "falcon", "falcon_mamba", "gemma2", "gemma3_text",
    "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "jamba", "mamba2", "mistral", "mixtral", "mpt",
    "minicpm3", "olmo2", "opt", "phi3", "qwen2", "qwen3_moe", "smollm3", "stablelm", "starcoder2", "zamba2",
    "image:gemma3", "image:llava", "image:qwen2_5_vl",
]  # fmt: skip
EVERY = [*NAMED, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


def small(default, **changes):
    """A small configuration of a class, and of all parts of it."""
    # Some classes compute a field, such as the head dimension of Falcon.
    fixed = {name for name in SMALL if isinstance(getattr(type(default), name, None), property)}
    fields = ((name, value) for name, value in SMALL.items() if name not in fixed)
    known = {name: value for name, value in fields if isinstance(getattr(default, name, None), int | float)}
    known |= {name: 0.0 for name, value in vars(default).items() if "drop" in name and isinstance(value, float)}
    # Latent attention knows no fewer heads of keys.
    if getattr(default, "num_key_value_heads", None) == getattr(default, "num_attention_heads", 0):
        known["num_key_value_heads"] = SMALL["num_attention_heads"]
    parts = {name: small(part) for name, part in vars(default).items() if hasattr(part, "model_type")}
    return type(default)(**{**known, **parts, **OWN.get(default.model_type, {}), **changes})


def build(name, auto=None, **changes):
    """A model with the same random weights each time; skips a type that this version of transformers lacks."""
    kind, _, model_type = name.rpartition(":")
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {model_type}")
    torch.manual_seed(0)
    classes = {"": AutoModelForCausalLM, "image": AutoModelForImageTextToText}
    return (auto or classes[kind]).from_config(small(CONFIG_MAPPING[model_type](), **changes)).float()


def log_of(trainer, key):
    return [log[key] for log in trainer.state.log_history if key in log]


def judge(trainer, tolerance=0.0):
    trainer.train()
    values = log_of(trainer, "loss")
    assert len(values) == 2 and all(map(math.isfinite, values))
    assert abs(log_of(trainer, "gere/tm")[0]) <= tolerance and math.isfinite(log_of(trainer, "gere/tm")[1])
    assert log_of(trainer, "gere/replay_change")[0] == pytest.approx(0, abs=5e-2)


@pytest.mark.parametrize("name", EVERY)
def test_an_architecture_holds_what_its_head_reads_and_all_layers(make_trainer, arguments, name):
    model = build(name)
    trainer = make_trainer(
        model=model, replay=1, w="auto", config={"layers": "every 1"}, args=arguments(max_steps=2)
    )  # fmt: skip
    judge(trainer)
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17]]
    layout = find_layout(model, rows, torch.device("cpu"))
    numbers = range(1, layout.depth + 1)
    held = f"regions of layers {', '.join(map(str, numbers))} of {layout.depth}"
    assert layout.depth > 1 and trainer.replay.anchor.fields["strategy"] == held
    read = []
    head = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    ids = torch.tensor([rows[0], rows[1] + 3 * [2]])
    mask = (torch.arange(8) < torch.tensor([[8], [5]])).long()
    reader = StateReader(layout, numbers)
    with torch.no_grad():
        for mode in (True, False):
            with reader.reading(ids.shape):
                model.train(mode)(input_ids=ids, attention_mask=mask, use_cache=False)
                both = reader.state
                assert torch.equal(both, read[-1]) and torch.equal(reader.states[-1], both)
                assert all(state.shape[:2] == ids.shape for state in reader.states)
        with reader.reading((1, 5)):
            model(input_ids=ids[1:, :5], attention_mask=mask[1:, :5], use_cache=False)
            torch.testing.assert_close(reader.state[0], both[1, :5], rtol=1e-4, atol=1e-4)
    head.remove()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMED, *OTHERS])
def test_an_architecture_trains_by_lora_in_bf16_with_checkpointing(make_trainer, arguments, name):
    model = build(name)
    # PEFT refuses the last projection of Mamba, and subclasses of a linear layer need not compute what LoRA adds to.
    linear = [path for path, part in model.named_modules() if type(part) is nn.Linear]
    left_out = ("out_proj", "lm_head", "embed_out", "router", "gate", "generator_lm_head", "decoder")
    targets = [path for path in linear if not path.endswith(left_out)] or "all-linear"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    ways = {"gradient_checkpointing": model.supports_gradient_checkpointing}
    if model.supports_gradient_checkpointing:
        ways["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    judge(make_trainer(model=adapted, replay=2, w="auto", args=arguments(max_steps=2, bf16=True, **ways)), 2e-3)


SEES = "sees the tokens that follow"
FUTURE = [
    ("bert", AutoModelForMaskedLM), ("bert", None), ("roberta", None), ("electra", None), ("xlm", None),
    ("xlnet", None), ("cpmant", None), ("image:paligemma", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "auto"), FUTURE)
def test_a_model_that_sees_later_tokens_is_refused_before_an_anchor_is_built(make_trainer, tmp_path, name, auto):
    changes = {"is_decoder": False} if name == "electra" else {}
    model = build(name, auto, **changes)
    for weights in (model, model.bfloat16()):
        with pytest.raises(UnsupportedModelError, match=SEES):
            make_trainer(model=weights).train()
    assert not list((tmp_path / "gere_saving").glob("anchor-*"))


def test_small_weights_do_not_hide_that_a_model_sees_later_tokens(make_trainer):
    model = build("bert", AutoModelForMaskedLM, initializer_range=0.01, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=SEES):
        make_trainer(model=model).train()


@pytest.mark.parametrize("name", ["bert", "mixtral", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_causal_model_is_taken_in_every_precision(name, dtype):
    model = build(name, **({"is_decoder": True} if name == "bert" else {})).to(dtype)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randint(3, 760, (length,), generator=generator).tolist() for length in (2, 3, 17, 100)]
        assert find_layout(model, rows[seed % 3 :], torch.device("cpu")).depth == 2


class Wrapper(nn.Module):
    """A wrapper of one's own around a language model."""

    def __init__(self):
        super().__init__()
        self.lm = load_tiny()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return self.lm(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def classifier(auto=AutoModelForSequenceClassification):
    return build("llama", auto, num_labels=2)


HEADLESS = {
    "sequence classifier": classifier,
    "reward model with LoRA": lambda: get_peft_model(classifier(), LoraConfig(r=4, task_type="SEQ_CLS")),
    "token classifier": lambda: classifier(AutoModelForTokenClassification),
    "encoder classifier": lambda: build("bert", AutoModelForSequenceClassification),
    "no head": lambda: build("llama", AutoModel),
    "embedding model": lambda: nn.Sequential(build("bert", AutoModel), nn.Linear(32, 32)),
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_a_model_without_a_language_head_is_refused_by_the_constructor(make_trainer, tmp_path, kind):
    with pytest.raises(UnsupportedModelError, match=r"no language head[\s\S]*replay_strategy=.none."):
        make_trainer(model=HEADLESS[kind]())
    assert not (tmp_path / "gere_saving").exists()


def test_the_language_model_inside_a_wrapper_is_named(make_trainer):
    with pytest.raises(
        UnsupportedModelError, match=r"Wrapper[\s\S]*LlamaForCausalLM at \.lm[\s\S]*language model inside"
    ):
        make_trainer(model=Wrapper())
    make_trainer(model=Wrapper(), config={"replay_strategy": "none"}).train()


def test_what_the_refusal_of_a_classifier_advises_trains_it(make_trainer, task, tokenizer):
    rows = [{"input_ids": row["input_ids"], "labels": place % 2} for place, row in enumerate(task)]
    model = classifier()
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = make_trainer(
        model=model, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer),
        config={"replay_strategy": "none", "base_decay": 0.7},
    )  # fmt: skip
    trainer.train()
    assert all(map(math.isfinite, log_of(trainer, "loss")))


class Processor:
    """What processors of image-text models are: no tokenizer, but one inside."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def save_pretrained(self, *args, **kwargs):
        return self.tokenizer.save_pretrained(*args, **kwargs)


def test_the_tokenizer_of_a_processor_is_taken(make_trainer, tokenizer):
    by_tokenizer, by_processor = make_trainer(), make_trainer(processing_class=Processor(tokenizer))
    by_tokenizer.train()
    by_processor.train()
    assert by_processor.replay.anchor.key == by_tokenizer.replay.anchor.key
