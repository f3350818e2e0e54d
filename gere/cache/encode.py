"""From the states of the base model to the files of an anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from gere._files import sha256, write_atomic
from gere.cache.distil import Part
from gere.cache.multi_node import spread_files
from gere.cache.plan import BuildPlan
from gere.cache.store import MANIFEST, ROWS, manifest_bytes, shard_name
from gere.losses.strategy import Strategy, Tensors
from gere.ranks import Ranks

T = TypeVar("T")


def encode(
    partial: Path,
    plan: BuildPlan,
    parts: Sequence[Part],
    owners: Sequence[int],
    noise: Tensor | None,
    ranks: Ranks,
    leads: bool,
) -> None:
    """Turn the parts into the files of an anchor, each rank its own; the manifest comes last.

    Args:
        partial: Folder of the unfinished anchor.
        plan: What is built.
        parts: All parts.
        owners: The rank that has each part.
        noise: Largest change of what is kept by rounding, shape [d]; `None` if the strategy has no constants.
        ranks: All processes; each must call this.
        leads: Whether this process writes for its disk.

    Raises:
        CacheFolderError: If a disk is full.
        CacheCorruptError: If a part is damaged.
        RankFailedError: If another process failed.
    """
    mine = [part for part, owner in zip(parts, owners, strict=True) if owner == ranks.index]
    strategy = plan.strategy
    constants = {} if noise is None else _constants(plan, parts, mine, noise, ranks)
    encoded = _in_order(
        ranks.ask(lambda: {part.number: _encode_part(partial, part, strategy, constants) for part in mine})
    )
    held = zip([part.digest for part in encoded], owners, strict=True)
    shards = {shard_name(strategy.kind, number): place for number, place in enumerate(held)} if strategy.kind else {}
    spread_files(partial, shards, ranks, leads=leads)
    digests = {name: digest for name, (digest, _) in shards.items()}
    ranks.together(lambda: _finish(partial, plan, encoded, constants, digests) if leads else None)


def _in_order(answers: Sequence[Mapping[int, T]]) -> list[T]:
    """What the ranks say about their parts, in the order of the parts."""
    found = {number: value for some in answers for number, value in some.items()}
    return [found[number] for number in sorted(found)]


class _Encoded(NamedTuple):
    """What the index of an anchor says about a part; hash and dimension of its shard."""

    row: Tensor
    ce: Tensor
    digest: str
    dim: int


def _constants(plan: BuildPlan, parts: Sequence[Part], mine: Sequence[Part], noise: Tensor, ranks: Ranks) -> Tensors:
    """What holds for all tokens; the summaries of the parts are put together in their order, whoever has them."""
    total = sum(part.tokens for part in parts)
    first = list(accumulate((part.tokens for part in parts), initial=0))
    summarize = lambda: {p.number: plan.strategy.summary(p.kept(), total, first[p.number]) for p in mine}  # noqa: E731
    return plan.strategy.constants(_in_order(ranks.ask(summarize)), noise)


def _encode_part(partial: Path, part: Part, strategy: Strategy, constants: Tensors) -> _Encoded:
    stored = part.read()
    row, ce = stored.pop("row"), stored.pop("ce")
    if not strategy.kind:
        return _Encoded(row, ce, "", 0)
    digest = _write(partial / shard_name(strategy.kind, part.number), save(strategy.encode(stored, constants)))
    return _Encoded(row, ce, digest, max(values.shape[-1] for values in stored.values() if values.ndim > 1))


def _finish(
    partial: Path,
    plan: BuildPlan,
    encoded: Sequence[_Encoded],
    constants: Tensors,
    shards: Mapping[str, str],
) -> None:
    """Write constants, index and manifest to this process's disk."""
    count = len(plan.rows)
    index = {"tokens": torch.tensor([len(row) for row in plan.rows], dtype=torch.int32), "base_ce": torch.zeros(count)}
    files = dict(shards)
    if constants:
        name = plan.strategy.constants_file
        files[name] = _write(partial / name, save(constants))
    if shards:
        index |= {"shard": torch.zeros(count, dtype=torch.int32), "start": torch.zeros(count, dtype=torch.int64)}
    for number, (rows, ce, _, _) in enumerate(encoded):
        index["base_ce"][rows] = ce
        if shards:
            lengths = index["tokens"][rows].long()
            index["shard"][rows] = number
            index["start"][rows] = lengths.cumsum(0) - lengths
    files[ROWS] = _write(partial / ROWS, save(index))
    shape = {"rows": count, "tokens": int(index["tokens"].sum()), "dim": encoded[0].dim}
    write_atomic(partial / MANIFEST, manifest_bytes(plan.fields, files, shape))


def _write(path: Path, content: bytes) -> str:
    write_atomic(path, content)
    return sha256(content)
