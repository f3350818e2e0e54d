"""Each tuned tensor with its base tensor, and the point between the two."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gere.blend.decay import LORA_A, LORA_B
from gere.blend.files import Stored
from gere.cache.fingerprint import ADAPTER_WRAPPERS
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


class Pair(NamedTuple):
    """A tuned tensor, and what it goes back to.

    Attributes:
        name: Its name in the tuned files.
        base: Name of its base tensor; empty if there is none.
        moves: Whether it moves with the share: A of LoRA does not, and B without a base tensor goes to zeros.
    """

    name: str
    base: str
    moves: bool


class Line(NamedTuple):
    """The straight line from base to tuned weights.

    Attributes:
        tuned: The tuned weights, share 1.
        base: The base weights, share 0; `None` if no tensor needs them.
        pairs: A pair for each tuned tensor.
        notes: What the user should know, one sentence each.
    """

    tuned: Stored
    base: Stored | None
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    def at(self, pair: Pair, share: float) -> Tensor:
        """Form a tensor at a share of the line, in the dtype of the tuned tensor.

        Raises:
            BlendError: If it is not finite, or is of whole numbers that differ.
        """
        tuned = self.tuned.read(pair.name)
        if not pair.moves:
            return tuned
        base = None
        if pair.base and self.base is not None:
            base = self.base.read(pair.base)
        if not tuned.is_floating_point() or (base is not None and not base.is_floating_point()):
            return _whole_numbers(tuned, base, pair.name)
        point = between(tuned, base, share)
        if not point.isfinite().all():
            raise BlendError(
                "A tensor is not finite.",
                where=f"{pair.name}, share {share:g}, {self.tuned.places[pair.name].name}",
                expected="finite numbers",
                found=f"{int((~point.isfinite()).sum())} of {point.numel()} that are not",
                fix="Take another checkpoint: this training has diverged, or the base weights overflow its dtype.",
            )
        return point


def between(tuned: Tensor, base: Tensor | None, share: float) -> Tensor:
    """Compute base + share (tuned - base) in float32 (float64 for float64), in the dtype of `tuned`.

    Args:
        tuned: The tensor at share 1, which is returned bit for bit.
        base: The tensor at share 0, with as many rows or fewer; rows that it lacks stay as tuned. `None` for zeros.
        share: From 0 to 1.

    Example:
        >>> between(torch.tensor([3.0, 5.0]), torch.tensor([1.0]), 0.5)
        tensor([2., 5.])
    """
    if share == 1:
        return tuned
    wide = torch.promote_types(tuned.dtype, torch.float32)
    start = torch.zeros_like(tuned, dtype=wide) if base is None else base.to(wide)
    point = tuned.clone()
    rows = point[: len(start)] if point.ndim else point
    if share == 0:
        rows.copy_(start)
    else:
        rows.copy_(start + share * (rows.to(wide) - start))
    return point


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
    return Line(tuned, base, tuple(pairs), tuple(_notes(tuned, base, pairs)))


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
        if not candidates and _module(name) in HEADS:
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
    name = name.removeprefix(PEFT_PREFIX)
    name = ".".join(part for part in name.split(".") if part not in {*ADAPTER_WRAPPERS, "modules_to_save"})
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


def _notes(tuned: Stored, base: Stored | None, pairs: list[Pair]) -> Iterator[str]:
    for name, other, _ in pairs:
        if base is not None and other and tuned.shapes[name] != base.shapes[other]:
            new = tuned.shapes[name][0] - base.shapes[other][0]
            yield f"{name} has {new} rows that the base lacks; they stay as tuned."


def _whole_numbers(tuned: Tensor, base: Tensor | None, name: str) -> Tensor:
    if base is not None and tuned.dtype == base.dtype and torch.equal(tuned, base):
        return tuned
    raise BlendError(
        "A tensor of whole numbers differs, and has no point in between.",
        where=name,
        expected="the same in TUNED and in the base, as buffers are",
        found=f"{tuned.dtype}, in the base {None if base is None else base.dtype}",
        fix="Give weights of both that are not quantized.",
    )
