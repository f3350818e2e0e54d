"""Match the tensors of tuned weights with those of their base, by name and shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch

from gere.blend.files import Stored
from gere.blend.pairs import Line, Pair
from gere.blend.trained import LORA_A, LORA_B
from gere.cache.fingerprint import own_name
from gere.errors import BlendError

PEFT_PREFIX = "base_model.model."
HEADS = ("lm_head", "embed_out", "output_layer")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
# Buffers that older versions saved, and that follow from the configuration.
DERIVED = (
    ".rotary_emb.inv_freq",
    *(f".{part}.{name}" for part in ("attn", "attention") for name in ("bias", "masked_bias")),
)
SHOWN = 5


def find_line(tuned: Stored, find_base: Callable[[], Stored]) -> Line:
    """Match the tensors of tuned weights with those of the base.

    Args:
        tuned: The tuned weights.
        find_base: Finds the base weights. It is called if a tensor needs them: LoRA alone does not.

    Raises:
        BlendError: If the two are not of one architecture.
    """
    if tuned.is_adapter:
        lora = [_lora_pair(name) for name in tuned.places]
        whole = [name for name, pair in zip(tuned.places, lora, strict=True) if pair is None]
        base = find_base() if whole else None
        matched = dict(_matched(tuned, base, whole)) if base is not None else {}
        pairs = [pair or Pair(name, matched[name], True) for name, pair in zip(tuned.places, lora, strict=True)]
    else:
        base = find_base()
        matched = dict(_matched(tuned, base, tuned.places))
        _refuse_rest(tuned, base, {*matched.values()})
        # A buffer that the base files leave out follows from the configuration, and does not move.
        pairs = [Pair(name, matched.get(name, ""), name in matched) for name in tuned.places]
    return Line(tuned, base, tuple(pairs))


def _lora_pair(name: str) -> Pair | None:
    """Return the pair of a tensor of LoRA; `None` for a module that was trained whole."""
    parts = {*name.split(".")}
    if parts & {*LORA_B}:
        return Pair(name, "", moves=True)
    if parts & {*LORA_A}:
        return Pair(name, "", moves=False)
    strange = [part for part in parts if part.startswith(("lora_", "token_adapter", "trainable_tokens"))]
    if strange:
        raise BlendError(
            "An adapter has a tensor that is not known.",
            where=name,
            expected="LoRA's A and B, or modules that were trained whole",
            found=strange[0],
            fix="Merge the adapter into the base model, save that, and give it as TUNED with --base.",
        )
    return None


def _matched(tuned: Stored, base: Stored, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of the base tensor of each tuned tensor."""
    lacking, differing = [], []
    firsts = {name.split(".")[0] for name in base.shapes}
    for name in names:
        candidates = [other for other in names_elsewhere(name, firsts) if other in base.shapes]
        if not candidates and _clean_module(name) in HEADS:
            # Tied to the embeddings, a head is not saved.
            candidates = [other for other in base.shapes if _module(other) in EMBEDDINGS and other.endswith(".weight")]
        if not candidates and not name.endswith(DERIVED):
            lacking.append(name)
        if not candidates:
            continue
        if not _fits(name, tuned.shapes[name], base.shapes[candidates[0]]):
            shapes = f"{list(tuned.shapes[name])}, in the base {list(base.shapes[candidates[0]])}"
            differing.append(f"{name} {shapes}")
        yield name, candidates[0]
    if lacking or differing:
        found = [f"{name}, which the base lacks" for name in lacking] + differing
        raise _another_architecture(tuned, base, found)


def names_elsewhere(name: str, firsts: Collection[str]) -> Iterator[str]:
    """Yield the names that a tensor may have elsewhere: some files leave the name of the outer module out."""
    name = own_name(name.removeprefix(PEFT_PREFIX))
    name = ".".join(part for part in name.split(".") if part != "modules_to_save")
    yield name
    yield name.partition(".")[2]
    for first in firsts:
        yield f"{first}.{name}"


def _module(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else ""


def _fits(name: str, tuned: tuple[int, ...], base: tuple[int, ...]) -> bool:
    if tuned == base:
        return True
    # Embeddings grow when tokens are added.
    grown = _clean_module(name) in {*HEADS, *EMBEDDINGS} and len(tuned) == len(base) > 0
    return grown and tuned[0] > base[0] and tuned[1:] == base[1:]


def _clean_module(name: str) -> str:
    return _module(next(names_elsewhere(name, ())))


def _refuse_rest(tuned: Stored, base: Stored, used: set[str]) -> None:
    """Refuse a base with tensors that the tuned model lacks, but for a tied head that was saved."""
    rest = [name for name in base.shapes if name not in used and not name.endswith(DERIVED)]
    left = []
    for name in rest:
        tied = [other for other in used if _module(other) in EMBEDDINGS and base.shapes[other] == base.shapes[name]]
        if _module(name) in HEADS and tied and torch.equal(base.read(name), base.read(tied[0])):
            continue
        left.append(f"{name} of the base, which TUNED lacks")
    if left:
        raise _another_architecture(tuned, base, left)


def _another_architecture(tuned: Stored, base: Stored, found: list[str]) -> BlendError:
    shown = "; ".join(found[:SHOWN])
    if len(found) > SHOWN:
        shown += f"; and {len(found) - SHOWN} more"
    return BlendError(
        "The base is not the model that TUNED was tuned from: tensors differ.",
        where=f"TUNED {tuned.name}, --base {base.name}",
        expected="tensors of the same names and shapes",
        found=shown,
        fix="Give the right --base.",
    )
