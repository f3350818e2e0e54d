"""What an anchor depends on, and the key that follows from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gere._files import canonical_json, sha256
from gere.model.adapters import base_module
from gere.model.sharded import class_name, whole, whole_shape
from gere.ranks import ALONE, Ranks

FORMAT_VERSION = 1
ADAPTER_WRAPPERS = ("base_layer", "original_module")
# What shapes the forward pass beside the weights. An explicit list, because the rest of a configuration differs
# between versions of transformers and is changed by the trainer.
FORWARD_CONFIG = (
    *("hidden_act", "activation_function", "num_attention_heads", "num_key_value_heads", "n_head"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "sliding_window", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling", "query_pre_attn_scalar"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "partial_rotary_factor"),
    *("num_experts_per_tok", "norm_topk_prob", "tie_word_embeddings"),
)


def key_of(fields: Mapping[str, str]) -> str:
    """Key of an anchor: the first 32 hexadecimal digits of the SHA-256 of its fields."""
    return sha256(canonical_json(dict(fields)))[:32]


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the fields that differ, in the order of `wanted`."""
    names = list(wanted) + [name for name in found if name not in wanted]
    return tuple(name for name in names if wanted.get(name) != found.get(name))


def architecture_digest(model: nn.Module) -> str:
    """Digest of the class, the shapes of all weights, and the settings that shape the forward pass."""
    causal = base_module(model)
    config = causal.config.to_dict() if hasattr(causal, "config") else {}  # type: ignore[operator, union-attr]
    content = {
        "class": class_name(causal),
        "shapes": {name: list(whole_shape(tensor)) for name, tensor in base_tensors(model).items()},
        "config": {name: config[name] for name in FORWARD_CONFIG if config.get(name) is not None},
        "rope": _rope(config),
    }
    return sha256(json.dumps(content, sort_keys=True, default=repr).encode())


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of rotary positions, which transformers 4 and 5 write in different places."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope.setdefault("rope_theta", config.get("rope_theta"))
    kind = rope.pop("type", "default")
    return {"rope_type": kind, **{name: value for name, value in rope.items() if value is not None}}


def precision_of(model: nn.Module) -> str:
    """Precision of the weights, and what quantized layers of bitsandbytes compute in, which no weight tells.

    Example:
        `"torch.bfloat16 weights, nf4 computed in bfloat16"`
    """
    causal = base_module(model)
    weights = f"{getattr(causal, 'dtype', None)} weights"
    quantization = getattr(getattr(causal, "config", None), "quantization_config", None) or {}
    settings = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
    if settings.get("load_in_4bit"):
        return f"{weights}, {settings['bnb_4bit_quant_type']} computed in {settings['bnb_4bit_compute_dtype']}"
    if settings.get("load_in_8bit"):
        return f"{weights}, llm_int8 computed in float16, outliers from {settings['llm_int8_threshold']:g}"
    return weights


def weights_digest(model: nn.Module, ranks: Ranks = ALONE) -> str:
    """Digest of every weight and persistent buffer of the base model.

    Args:
        model: The model without its distributed wrapper. Weights of PEFT adapters are left out and the wrapper's names
            undone, so that a model has one digest with an adapter and without, sharded and whole.
        ranks: All processes; each must call this. The first one computes for all, so that weights that only rounding
            tells apart have one digest.
    """
    tensors = sorted(base_tensors(model).items())
    digests: list[str] = []
    if ranks.lockstep:
        for name, tensor in tensors:
            content = whole(tensor)  # every process takes part in it
            digests += [_tensor_digest(name, content)] if ranks.index == 0 else []
    else:
        digests = ranks.together(lambda: _tensor_digests(tensors) if ranks.index == 0 else [])
    return ranks.gather(sha256("".join(digests).encode()))[0]


def _tensor_digests(tensors: Sequence[tuple[str, Tensor]]) -> list[str]:
    with ThreadPoolExecutor(max_workers=4) as pool:  # each holds a copy of one tensor in main memory
        return list(pool.map(lambda item: _tensor_digest(*item), tensors))


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and persistent buffers of the base model by their own names; tied weights come once."""
    causal = base_module(model)
    adapters = {"modules_to_save"}
    for module in causal.modules():
        adapters.update(getattr(module, "adapter_layer_names", ()))
    found: dict[tuple[int, ...], tuple[str, Tensor]] = {}
    for full_name, tensor in causal.state_dict(keep_vars=True).items():
        parts = full_name.split(".")
        if not isinstance(tensor, Tensor) or adapters & set(parts):
            continue
        name = ".".join(part for part in parts if part not in ADAPTER_WRAPPERS)
        split = isinstance(tensor, DTensor) or not tensor.numel()
        address = (id(tensor),) if split else (tensor.data_ptr(), *tensor.shape)
        found[address] = min(found.get(address, (name, tensor)), (name, tensor), key=lambda item: item[0])
    return dict(found.values())


def _tensor_digest(name: str, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_digest(items: Iterable[Any]) -> str:
    """Digest of a sequence of texts or of token lists, in order."""
    digest = hashlib.sha256()
    for item in items:
        content = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else repr(list(item)).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
