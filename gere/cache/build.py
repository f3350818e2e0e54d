"""Build an anchor: run the base model once over the replay set, in parts that survive a kill.

Each part holds the states and losses of some rows and is written as soon as it is done. When all parts are there, the
bands follow from the merged moments, the states are encoded and dropped, and the folder gets its final name.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from gere.cache.bands import Moments, mean_std_bands
from gere.cache.codec import PER_BYTE, pack, regions
from gere.cache.files import make_folder, require_space, sha256, sync_folder, write_atomic
from gere.cache.parts import load_part, read_part, store_part
from gere.cache.store import BANDS, MANIFEST, ROWS, manifest_bytes, read_manifest, shard_name, verify_files
from gere.errors import CacheCorruptError, CacheError, NonFiniteStateError

NOISE_ROWS = 8
PART_BYTES = 64 << 20


class Distilled(NamedTuple):
    """What the base model says about a padded batch.

    Attributes:
        state: Last-layer states, shape [b, t, d].
        ce: Cross-entropy of each row, shape [b].
    """

    state: Tensor
    ce: Tensor


class BuildPlan(NamedTuple):
    """Everything that decides the bytes of an anchor, beside the model.

    Attributes:
        fields: What the anchor depends on.
        rows: Token ids of the replay rows.
        keep_regions: Whether the strategy needs regions.
        band_width: k of the bands.
        std_floor: Smallest sigma as a share of the root mean square sigma.
        batch_tokens: Padded tokens of one forward pass.
    """

    fields: Mapping[str, str]
    rows: Sequence[Sequence[int]]
    keep_regions: bool
    band_width: float
    std_floor: float
    batch_tokens: int


Distil = Callable[[Sequence[Sequence[int]]], Distilled]


def build_anchor(folder: Path, plan: BuildPlan, distil: Distil, *, progress: bool = True) -> None:
    """Build an anchor at `folder`, going on from the parts that an earlier, killed build left.

    Args:
        folder: Folder of the finished anchor; replaced if it exists.
        plan: What to build.
        distil: Runs the base model on rows of token ids, padded on the right.
        progress: Show a progress bar over the tokens.

    Raises:
        CacheFolderError: If the folder cannot be written or the disk is full.
        NonFiniteStateError: If the model gives NaN or infinite values.
    """
    partial = partial_folder(folder)
    make_folder(partial)
    if not _is_complete(partial):
        noise = _noise(partial, plan, distil) if plan.keep_regions else None
        with tqdm(total=sum(map(len, plan.rows)), unit="tok", desc="anchor", disable=not progress) as bar:
            parts = [
                _part(partial, number, rows, plan, distil, bar) for number, rows in enumerate(_split(plan, noise))
            ]
        _encode(partial, plan, parts, noise)
    _publish(partial, folder)


def finish_build(folder: Path) -> None:
    """Give an anchor its name if a kill came between its last byte and that."""
    partial = partial_folder(folder)
    if not folder.exists() and _is_complete(partial):
        _publish(partial, folder)


def partial_folder(folder: Path) -> Path:
    """Where the anchor at `folder` is built."""
    return folder.with_name(folder.name + ".partial")


def batches_by_length(rows: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Split rows into batches of like length, longest first, each within a budget of padded tokens."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * len(rows[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _split(plan: BuildPlan, noise: Tensor | None) -> Iterator[list[list[int]]]:
    """Group batches into parts of at most `PART_BYTES` of float32 states."""
    budget = PART_BYTES // (4 * (len(noise) if noise is not None else 1))
    part: list[list[int]] = []
    tokens = 0
    for batch in batches_by_length(plan.rows, plan.batch_tokens):
        size = sum(len(plan.rows[row]) for row in batch)
        if part and tokens + size > budget:
            yield part
            part, tokens = [], 0
        part.append(batch)
        tokens += size
    if part:
        yield part


def _noise(partial: Path, plan: BuildPlan, distil: Distil) -> Tensor:
    """Largest change of each dimension when rows are evaluated alone and in a padded batch, shape [d].

    The kernels round differently for other shapes; an element on the edge of its region would then seem violated on
    the untouched model.
    """
    longest = max(plan.rows, key=len)
    count = max(1, min(NOISE_ROWS, plan.batch_tokens // len(longest) - 1))
    by_length = sorted(plan.rows, key=len)
    rows = by_length[:: max(1, len(by_length) // count)][:count]
    path = partial / "noise.safetensors"
    tag = sha256(repr(rows).encode())
    stored = load_part(path, tag)
    if stored is None:
        padded = distil([*rows, longest]).state
        alone = [distil([row]).state[0, : len(row)].float().cpu() for row in rows]
        change = [(padded[i, : len(row)].float().cpu() - alone[i]).abs() for i, row in enumerate(rows)]
        stored = {"noise": torch.cat(change).amax(dim=0)}
        need = sum(map(len, plan.rows)) * stored["noise"].numel() * (padded.element_size() + 1 / PER_BYTE)
        require_space(partial, int(need))
        store_part(path, stored, tag)
    return stored["noise"]


def _part(
    partial: Path, number: int, batches: list[list[int]], plan: BuildPlan, distil: Distil, bar: tqdm
) -> tuple[Path, str]:
    """Make part `number`, unless a build with the same plan left it whole; return its path and the tag of its rows."""
    path = partial / f"part-{number:05d}.safetensors"
    tag = sha256(repr([[plan.rows[row] for row in batch] for batch in batches]).encode())
    if load_part(path, tag) is None:
        states, losses = [], []
        for batch in batches:
            rows = [plan.rows[row] for row in batch]
            state, ce = distil(rows)
            _require_finite(state, ce, batch)
            losses.append(ce.float().cpu())
            if plan.keep_regions:
                states += [state[i, : len(row)].cpu() for i, row in enumerate(rows)]
            bar.update(sum(map(len, rows)))
        index = torch.tensor([row for batch in batches for row in batch], dtype=torch.int64)
        tensors = {"row": index, "ce": torch.cat(losses)}
        if states:
            tensors["state"] = torch.cat(states)
        store_part(path, tensors, tag)
    else:
        bar.update(sum(len(plan.rows[row]) for batch in batches for row in batch))
    return path, tag


def _require_finite(state: Tensor, ce: Tensor, batch: list[int]) -> None:
    bad = ~(state.isfinite().flatten(1).all(dim=1) & ce.isfinite())
    if bool(bad.any()):
        raise NonFiniteStateError(
            "The base model gives NaN or infinite values on the replay set.",
            where=f"replay rows {[batch[i] for i in bad.nonzero().flatten().tolist()]}",
            expected="finite states and losses",
            fix="Check the weights and the dtype (float16 overflows easily), or drop these texts.",
        )


def _encode(partial: Path, plan: BuildPlan, parts: Sequence[tuple[Path, str]], noise: Tensor | None) -> None:
    """Turn the parts into the files of an anchor; the manifest comes last."""
    count = len(plan.rows)
    index = {"tokens": torch.tensor([len(row) for row in plan.rows], dtype=torch.int32), "base_ce": torch.zeros(count)}
    files: dict[str, str] = {}
    if noise is not None:
        moments = Moments.empty(len(noise))
        for part in parts:
            moments = moments.merge(Moments.of(read_part(*part)["state"]))
        bands = mean_std_bands(moments, plan.band_width, plan.std_floor, noise)
        files[BANDS] = _write(partial / BANDS, save(bands._asdict()))
        index |= {"shard": torch.zeros(count, dtype=torch.int32), "start": torch.zeros(count, dtype=torch.int64)}
    for number, part in enumerate(parts):
        stored = read_part(*part)
        rows = stored["row"]
        index["base_ce"][rows] = stored["ce"]
        if noise is not None:
            codes = pack(regions(stored["state"], bands.lower, bands.upper))
            files[shard_name(number)] = _write(partial / shard_name(number), save({"codes": codes}))
            lengths = index["tokens"][rows].long()
            index["shard"][rows] = number
            index["start"][rows] = lengths.cumsum(0) - lengths
    files[ROWS] = _write(partial / ROWS, save(index))
    shape = {"rows": count, "tokens": int(index["tokens"].sum()), "dim": 0 if noise is None else len(noise)}
    write_atomic(partial / MANIFEST, manifest_bytes(plan.fields, files, shape))


def _write(path: Path, content: bytes) -> str:
    write_atomic(path, content)
    return sha256(content)


def _is_complete(partial: Path) -> bool:
    """Whether a build was killed between its manifest and its final name."""
    if not (partial / MANIFEST).exists():
        return False
    try:
        files = read_manifest(partial)["files"]
    except CacheError as error:
        raise CacheCorruptError(
            "The manifest of an unfinished anchor cannot be used.",
            where=partial / MANIFEST,
            expected="a manifest as this version writes it",
            found=str(error).splitlines()[0],
            fix="Delete this .partial folder; the anchor is then built again from the base model.",
        ) from error
    try:
        verify_files(partial, files)
    except CacheCorruptError:
        return False
    return True


def _publish(partial: Path, folder: Path) -> None:
    """Drop what was needed for building alone, and give the folder its name."""
    names = {MANIFEST, *read_manifest(partial)["files"]}
    for path in partial.iterdir():
        if path.name not in names:
            path.unlink()
    retired = folder.with_name(folder.name + ".retired")
    shutil.rmtree(retired, ignore_errors=True)
    if folder.exists():
        folder.rename(retired)
    partial.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)
