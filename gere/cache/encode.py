"""From the states of the base model to the files of an anchor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
    encoded = ranks.together(lambda: {part.number: _encode_part(partial, part, bands) for part in mine})
    merged: dict[int, _Encoded] = {}
    for some in ranks.gather(encoded):
        merged |= some
    files: dict[str, str] = {}
    if bands is not None:
        files = {shard_name(number): merged[number].digest for number in range(len(parts))}
        spread_files(
            partial,
            {shard_name(number): (merged[number].digest, owners[number]) for number in range(len(parts))},
            ranks,
            leads=leads,
        )
    ranks.together(lambda: _finish(partial, plan, [merged[part.number] for part in parts], bands, files, leads))


class _Encoded(NamedTuple):
    """What the index of an anchor says about a part, and the hash of its shard."""

    row: Tensor
    ce: Tensor
    digest: str


def _bands(plan: BuildPlan, mine: Sequence[Part], noise: Tensor, ranks: Ranks) -> Bands:
    """Bands of all states; the moments of the parts are merged in their order, whoever has them."""
    own = ranks.together(lambda: {part.number: Moments.of(part.read()["state"]) for part in mine})
    found: dict[int, Moments] = {}
    for some in ranks.gather(own):
        found |= some
    moments = Moments.empty(len(noise))
    for number in sorted(found):
        moments = moments.merge(found[number])
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
    shards: dict[str, str],
    leads: bool,
) -> None:
    """Write bands, index and manifest to this process's disk."""
    if not leads:
        return
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
