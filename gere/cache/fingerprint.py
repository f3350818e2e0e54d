"""Digests of all that an anchor depends on, and the key that follows from them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gere._files import canonical_json, sha256
from gere.model.adapters import base_module
from gere.model.sharded import class_name, whole, whole_shape
from gere.ranks import ALONE, Ranks

FORMAT_VERSION = 1
SAMPLED = 8
ADAPTER_WRAPPERS = ("base_layer", "original_module")
# Settings that shape the forward pass beside the weights. All of the others are in a field of their own, since an
# anchor from before 0.2 does not have that.
CONFIG = "config"
FORWARD_CONFIG = (
    *("hidden_act", "activation_function", "num_attention_heads", "num_key_value_heads", "n_head"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "sliding_window", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling", "query_pre_attn_scalar"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "partial_rotary_factor"),
    *("num_experts_per_tok", "norm_topk_prob", "tie_word_embeddings"),
)

# Settings that do not shape what a model says about a row of tokens in evaluation, or that other fields hold.
NOT_FORWARD = re.compile(
    "_.*|rope_(scaling|theta|parameters)|name_or_path|transformers_version|architectures|auto_map|model_type|vocab_size"
    "|(torch_)?dtype|quantization_config|(attn|experts)_implementation|use_cache|use_bfloat16|pretraining_tp"
    "|output_.*|return_dict.*|torchscript|gradient_checkpointing|tokenizer_class|prefix|.*token_ids?"
    "|task_specific_params|id2label|label2id|num_labels|problem_type|finetuning_task"
    "|.*dropout.*|.*pdrop|layerdrop|initializer_.*|init_std|.*loss_coef.*|chunk_size_feed_forward"
    "|(max|min)_length|max_new_tokens|do_sample|num_beams|temperature|top_[kp]|repetition_penalty"
)


def key_of(fields: Mapping[str, str]) -> str:
    """Return the key of an anchor: the first 32 hexadecimal digits of the SHA-256 of its fields."""
    return sha256(canonical_json(dict(fields)))[:32]


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the fields that differ, in the order of `wanted`."""
    names = list(wanted) + [name for name in found if name not in wanted]
    return tuple(name for name in names if wanted.get(name) != found.get(name))


def architecture_digest(model: nn.Module) -> str:
    """Return a digest of the class, the shapes of all weights, and the settings that shape the forward pass."""
    causal: Any = base_module(model)
    config: dict[str, Any] = {}
    if hasattr(causal, "config"):
        config = causal.config.to_dict()
    content = {
        "class": class_name(causal),
        "shapes": {name: list(whole_shape(tensor)) for name, tensor in base_tensors(model).items()},
        "config": {name: config[name] for name in FORWARD_CONFIG if config.get(name) is not None},
        "rope": _rope(config),
    }
    return sha256(json.dumps(content, sort_keys=True, default=repr).encode())


def config_digest(model: nn.Module) -> str:
    """Return a digest of all other settings that are not known to leave the forward pass as it is.

    Settings that have the default of their class are left out: a version of transformers may know more of them.
    """
    config: Any = getattr(base_module(model), "config", None)
    if not hasattr(config, "to_dict"):
        return sha256(b"{}")
    try:
        defaults = type(config)().to_dict()
    except Exception:  # a class that cannot be made without arguments, by whatever it raises
        defaults = {}
    content = _shaping(config.to_dict(), defaults)
    return sha256(json.dumps(content, sort_keys=True, default=repr).encode())


def _shaping(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        default = defaults.get(name)
        if name in FORWARD_CONFIG or NOT_FORWARD.fullmatch(str(name)) or value == default:
            continue
        # The parts of a model of several have settings of their own.
        if isinstance(value, Mapping):
            value = _shaping(value, default if isinstance(default, Mapping) else {})
        found[str(name)] = value
    return found


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 4 writes the settings of rotary positions into `rope_scaling` and `rope_theta`, 5 into
    # `rope_parameters`. Older models name the kind `type`.
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope.setdefault("rope_theta", config.get("rope_theta"))
    kind = rope.pop("type", "default")
    return {"rope_type": kind, **{name: value for name, value in rope.items() if value is not None}}


def precision_of(model: nn.Module) -> str:
    """Return the precision of a model, such as `"torch.bfloat16 weights, nf4 computed in bfloat16"`."""
    causal = base_module(model)
    weights = f"{getattr(causal, 'dtype', None)} weights"
    # The weights of layers of bitsandbytes do not show in what precision they are computed.
    settings = getattr(getattr(causal, "config", None), "quantization_config", None) or {}
    if not isinstance(settings, Mapping):
        settings = settings.to_dict()
    if settings.get("load_in_4bit"):
        return f"{weights}, {settings['bnb_4bit_quant_type']} computed in {settings['bnb_4bit_compute_dtype']}"
    if settings.get("load_in_8bit"):
        return f"{weights}, llm_int8 computed in float16, outliers from {settings['llm_int8_threshold']:g}"
    return weights


class Weights(NamedTuple):
    """What tells the weights of one base model from those of another.

    Attributes:
        digest: Of all weights and persistent buffers, to the last bit.
        sample: A few elements of each tensor, which stay nearly the same when a model is loaded in another precision.
        names: Name of the tensor of each of these elements.
    """

    digest: str
    sample: Sequence[float] = ()
    names: Sequence[str] = ()


def weights_of(model: nn.Module, ranks: Ranks = ALONE) -> Weights:
    """Return what tells the weights of a base model from others.

    It is the same with a PEFT adapter and without, sharded and whole. `model` has no distributed wrapper.
    """
    tensors = sorted(base_tensors(model).items())
    found: list[Weights] = []
    if ranks.lockstep:
        for name, tensor in tensors:
            content = whole(tensor)  # every process takes part in it
            if ranks.index == 0:
                found.append(_of_tensor(name, content))
    else:
        found = ranks.only(ranks.index == 0, lambda: _of_tensors(tensors)) or []
    digest = _joined(found)
    # The first process computes it for all, so that weights that differ by rounding still have one digest.
    sample = [value for one in found for value in one.sample]
    names = [name for (name, _), one in zip(tensors, found, strict=False) for _ in one.sample]
    return ranks.gather(Weights(digest, sample, names))[0]


def weights_digest(model: nn.Module, ranks: Ranks = ALONE) -> str:
    """Return the digest of all weights and persistent buffers of the base model, as in `weights_of`."""
    return weights_of(model, ranks).digest


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the digest that `weights_digest` gives for a model with these tensors, sorted by name."""
    return _joined([_of_tensor(name, tensor) for name, tensor in tensors])


def _joined(weights: Sequence[Weights]) -> str:
    return sha256("".join(one.digest for one in weights).encode())


def same_but_for_rounding(sample: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two samples are those of one model in two precisions."""
    if not sample or len(sample) != len(other):
        return False
    pairs = torch.tensor([list(sample), list(other)])
    # bfloat16 keeps 8 bits of a number. float16 keeps nothing of one below 2^-24.
    room = 2**-8 * pairs.abs().amax(dim=0) + 2**-23
    return bool(((pairs[0] - pairs[1]).abs() <= room).all())


def _of_tensors(tensors: Sequence[tuple[str, Tensor]]) -> list[Weights]:
    with ThreadPoolExecutor(max_workers=4) as pool:  # each holds a copy of one tensor in main memory
        return list(pool.map(lambda item: _of_tensor(*item), tensors))


def own_name(name: str) -> str:
    """Return a name without the parts that PEFT puts into it where it wraps a module.

    Example:
        >>> own_name("model.embed_tokens.original_module.weight")
        'model.embed_tokens.weight'
    """
    return ".".join(part for part in name.split(".") if part not in ADAPTER_WRAPPERS)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return weights and persistent buffers of the base model by their own names; tied weights come once."""
    causal = base_module(model)
    adapters = {"modules_to_save"}  # PEFT's copies of modules that are trained whole
    for module in causal.modules():
        adapters.update(getattr(module, "adapter_layer_names", ()))
    found: dict[tuple[int, ...], tuple[str, Tensor]] = {}
    for full_name, tensor in causal.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or adapters & set(full_name.split(".")):
            continue
        name = own_name(full_name)
        # Sharded weights have no address of their own: those of ZeRO-3 are empty between forward passes.
        if isinstance(tensor, DTensor) or not tensor.numel():
            address: tuple[int, ...] = (id(tensor),)
        else:
            address = (tensor.data_ptr(), *tensor.shape)
        # Of tied weights the name that comes first counts, whatever the order of the modules.
        if address not in found or name < found[address][0]:
            found[address] = (name, tensor)
    return dict(found.values())


def _of_tensor(name: str, tensor: Tensor) -> Weights:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    values = tensor.detach().cpu().contiguous().flatten()
    digest.update(values.view(torch.uint8).numpy().data)
    places = torch.linspace(0, max(0, len(values) - 1), SAMPLED, dtype=torch.float64).long()
    return Weights(digest.hexdigest(), values[places[: len(values)]].float().tolist())


def text_digest(items: Iterable[Any]) -> str:
    """Return a digest of a sequence of texts or of token lists, in order."""
    digest = hashlib.sha256()
    for item in items:
        # Cut web texts can hold half a surrogate pair.
        content = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else repr(list(item)).encode()
        # With their lengths, or texts that are cut at another place would have the same digest.
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
