"""Make `base_llms/llama-tiny-random`: a Llama of 0.14 million random weights, with a tokenizer of its own.

    python base_llms/make_llama_tiny_random.py

The tokenizer is a byte-level BPE trained on the demo's texts; it puts BOS before every text, as Llama's does.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
FOLDER = HERE / "llama-tiny-random"
TEXTS = HERE.parent / "examples" / "data"
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def texts() -> list[str]:
    records = [json.loads(line) for path in sorted(TEXTS.glob("*.jsonl")) for line in path.open(encoding="utf-8")]
    return [record.get("text") or "".join(record.values()) for record in records]


def make_tokenizer() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=list(SPECIALS.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    settings = {**SPECIALS, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024}
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def make_model() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=768,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(FOLDER)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    make_tokenizer()
    make_model()
