"""From the states of the base model to the files of an anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from gere.cache.bands import Bands, Moments, mean_std_bands
from gere.cache.codec import pack, regions
from gere.cache.distil import Part
from gere.cache.files import sha256, write_atomic
from gere.cache.plan import BuildPlan
from gere.cache.shares import spread_files
from gere.cache.store import BANDS, MANIFEST, ROWS, manifest_bytes, shard_name
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
        noise: Rounding noise of each dimension, shape [d]; `None` for an anchor without regions.
        ranks: All processes; each must call this.
        leads: Whether this process writes for its disk.

    Raises:
        CacheFolderError: If a disk is full.
        CacheCorruptError: If a part is damaged.
        RankFailedError: If another process failed.
    """
    mine = [part for part, owner in zip(parts, owners, strict=True) if owner == ranks.index]
    bands = None if noise is None else _bands(plan, mine, noise, ranks)
    encoded = _in_order(ranks.ask(lambda: {part.number: _encode_part(partial, part, bands) for part in mine}))
    held = zip([part.digest for part in encoded], owners, strict=True)
    shards = {shard_name(number): place for number, place in enumerate(held)} if bands is not None else {}
    spread_files(partial, shards, ranks, leads=leads)
    digests = {name: digest for name, (digest, _) in shards.items()}
    ranks.together(lambda: _finish(partial, plan, encoded, bands, digests) if leads else None)


def _in_order(answers: Sequence[Mapping[int, T]]) -> list[T]:
    """What the ranks say about their parts, in the order of the parts."""
    found = {number: value for some in answers for number, value in some.items()}
    return [found[number] for number in sorted(found)]


class _Encoded(NamedTuple):
    """What the index of an anchor says about a part, and the hash of its shard."""

    row: Tensor
    ce: Tensor
    digest: str


def _bands(plan: BuildPlan, mine: Sequence[Part], noise: Tensor, ranks: Ranks) -> Bands:
    """Bands of all states; the moments of the parts are merged in their order, whoever has them."""
    moments = Moments.empty(len(noise))
    for own in _in_order(ranks.ask(lambda: {part.number: Moments.of(part.read()["state"]) for part in mine})):
        moments = moments.merge(own)
    return mean_std_bands(moments, plan.band_width, plan.std_floor, noise)


def _encode_part(partial: Path, part: Part, bands: Bands | None) -> _Encoded:
    stored = part.read()
    digest = ""
    if bands is not None:
        codes = pack(regions(stored["state"], bands.lower, bands.upper))
        digest = _write(partial / shard_name(part.number), save({"codes": codes}))
    return _Encoded(stored["row"], stored["ce"], digest)


def _finish(
    partial: Path,
    plan: BuildPlan,
    encoded: Sequence[_Encoded],
    bands: Bands | None,
    shards: Mapping[str, str],
) -> None:
    """Write bands, index and manifest to this process's disk."""
    count = len(plan.rows)
    index = {"tokens": torch.tensor([len(row) for row in plan.rows], dtype=torch.int32), "base_ce": torch.zeros(count)}
    files = dict(shards)
    if bands is not None:
        files[BANDS] = _write(partial / BANDS, save(bands._asdict()))
        index |= {"shard": torch.zeros(count, dtype=torch.int32), "start": torch.zeros(count, dtype=torch.int64)}
    for number, (rows, ce, _) in enumerate(encoded):
        index["base_ce"][rows] = ce
        if bands is not None:
            lengths = index["tokens"][rows].long()
            index["shard"][rows] = number
            index["start"][rows] = lengths.cumsum(0) - lengths
    files[ROWS] = _write(partial / ROWS, save(index))
    dim = 0 if bands is None else len(bands.lower)
    shape = {"rows": count, "tokens": int(index["tokens"].sum()), "dim": dim}
    write_atomic(partial / MANIFEST, manifest_bytes(plan.fields, files, shape))


def _write(path: Path, content: bytes) -> str:
    write_atomic(path, content)
    return sha256(content)
