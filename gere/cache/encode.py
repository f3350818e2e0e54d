"""Turn the parts of a build into the files of an anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from gere._files import sha256, write_atomic
from gere.cache.distil import Part
from gere.cache.multi_node import spread_files
from gere.cache.plan import BuildPlan
from gere.cache.store import HELDOUT, MANIFEST, ROWS, SAMPLE, manifest_bytes, shard_name
from gere.losses.strategy import Strategy, Tensors
from gere.ranks import Ranks

T = TypeVar("T")


def encode(
    partial: Path,
    plan: BuildPlan,
    parts: Sequence[Part],
    heldout: Sequence[Part],
    noise: Tensor | None,
    ranks: Ranks,
    *,
    leads: bool,
) -> None:
    """Write shards, constants, index and manifest of an anchor; each rank encodes the parts that it owns.

    `parts` are those of the replay rows, `heldout` those of the held-out rows. `noise` is the largest change of what
    is kept by rounding, [d]; `None` if the strategy has no constants.
    """
    mine = [part for part in parts if part.owner == ranks.index]
    strategy = plan.strategy
    constants: Tensors = {}
    if noise is not None:
        constants = _constants(strategy, parts, mine, noise, ranks)
    encoded = _in_order(
        ranks.ask(lambda: {part.number: _encode_part(partial, part, strategy, constants) for part in mine})
    )
    losses = _in_order(
        ranks.ask(lambda: {part.number: part.read()[:2] for part in heldout if part.owner == ranks.index})
    )
    shards: dict[str, tuple[str, int]] = {}
    if strategy.kind:
        for part, made in zip(parts, encoded, strict=True):
            shards[shard_name(strategy.kind, part.number)] = made.digest, part.owner
    # All shards are on every disk before its manifest says so.
    spread_files(partial, shards, ranks, leads=leads)
    digests = {name: digest for name, (digest, _) in shards.items()}
    files = {ROWS: _index(plan, encoded, located=bool(shards)), **_heldout(plan, losses)}
    if plan.sample:
        files[SAMPLE] = {"weights": torch.tensor(plan.sample)}
    if constants:
        files[strategy.constants_file] = constants
    shape = {"rows": len(plan.rows), "heldout": len(plan.heldout), "dim": encoded[0].dim}
    shape["tokens"] = sum(map(len, plan.rows))
    ranks.only(leads, lambda: _finish(partial, plan, files, digests, shape))


def _in_order(answers: Sequence[Mapping[int, T]]) -> list[T]:
    """Return what the ranks say about their parts, in the order of the parts."""
    found: dict[int, T] = {}
    for answer in answers:
        found.update(answer)
    return [found[number] for number in sorted(found)]


class _Encoded(NamedTuple):
    """What the index of an anchor says about a part; hash and dimension of its shard."""

    row: Tensor
    ce: Tensor
    digest: str
    dim: int


def _constants(
    strategy: Strategy, parts: Sequence[Part], mine: Sequence[Part], noise: Tensor, ranks: Ranks
) -> Tensors:
    tokens = list(accumulate((part.tokens for part in parts), initial=0))

    def summarize() -> dict[int, list[Any]]:
        return {part.number: strategy.summary(part.read()[2], tokens[-1], tokens[part.number]) for part in mine}

    # In the order of the parts, whoever has them: merged in another order, the moments would round differently.
    return strategy.constants(_in_order(ranks.ask(summarize)), noise)


def _encode_part(partial: Path, part: Part, strategy: Strategy, constants: Tensors) -> _Encoded:
    row, ce, kept = part.read()
    if not strategy.kind:
        return _Encoded(row, ce, "", 0)
    digest = _write(partial / shard_name(strategy.kind, part.number), save(strategy.encode(kept, constants)))
    return _Encoded(row, ce, digest, max(values.shape[-1] for values in kept.values() if values.ndim > 1))


def _index(plan: BuildPlan, encoded: Sequence[_Encoded], *, located: bool) -> Tensors:
    """Join what the parts say about the replay rows; with their place in the shards if they are `located` there."""
    count = len(plan.rows)
    index = {"tokens": _lengths(plan.rows), "base_ce": torch.zeros(count)}
    if located:
        index |= {"shard": torch.zeros(count, dtype=torch.int32), "start": torch.zeros(count, dtype=torch.int64)}
    for number, (rows, ce, _, _) in enumerate(encoded):
        index["base_ce"][rows] = ce
        if located:
            lengths = index["tokens"][rows].long()
            index["shard"][rows] = number
            index["start"][rows] = lengths.cumsum(0) - lengths
    return index


def _heldout(plan: BuildPlan, losses: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensors]:
    """Make the file of the held-out rows; none if there are none."""
    if not plan.heldout:
        return {}
    ce = torch.zeros(len(plan.heldout))
    for rows, values in losses:
        ce[rows] = values
    return {HELDOUT: {"tokens": _lengths(plan.heldout), "base_ce": ce}}


def _lengths(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int32)


def _finish(
    partial: Path,
    plan: BuildPlan,
    files: Mapping[str, Tensors],
    shards: Mapping[str, str],
    shape: Mapping[str, int],
) -> None:
    """Write the files beside the shards, and the manifest, to this process's disk."""
    digests = {**shards, **{name: _write(partial / name, save(tensors)) for name, tensors in files.items()}}
    # Last, since a folder with a manifest counts as complete.
    write_atomic(partial / MANIFEST, manifest_bytes(plan.fields, digests, shape))


def _write(path: Path, content: bytes) -> str:
    write_atomic(path, content)
    return sha256(content)
