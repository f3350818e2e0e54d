"""Run the base model over the replay rows: in parts that survive a kill, shared out over the ranks."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm.auto import tqdm

from gere._files import read_regular, require_space, sha256, write_atomic
from gere.cache.multi_node import deal
from gere.cache.plan import LOSSES_ONLY, BuildPlan, Distil, Distilled
from gere.errors import CacheCorruptError, NonFiniteStateError
from gere.losses.strategy import Tensors
from gere.model.batching import shortest_row
from gere.ranks import Ranks

# Rows that are evaluated twice to measure the noise of rounding: at most one in 32, since each costs as much again.
NOISE_ROWS, NOISE_SHARE = 8, 1 / 32

T = TypeVar("T")


class Part:
    """Some batches of rows, given by their indices, and the file that holds what the base model says about them."""

    def __init__(self, partial: Path, number: int, batches: list[list[int]], plan: BuildPlan) -> None:
        self.number = number
        self.batches = batches
        self._plan = plan
        self.tokens = sum(map(self.tokens_of, batches))
        self._kind, name = "replay", "part"
        if plan.strategy is LOSSES_ONLY:
            self._kind, name = "held-out", "heldout-part"
        self.path = partial / f"{name}-{number:05d}.safetensors"
        self.owner = 0  # the rank that has or evaluates it, set by `distil_parts`
        self._ce: list[Tensor] = []
        self._kept: list[Tensors] = []
        # Another batch size, or other texts, group other rows into the part with this number.
        self._tag = sha256(repr(list(map(self.rows_of, batches))).encode())

    def tokens_of(self, batch: list[int]) -> int:
        """Return the tokens of a batch."""
        return sum(map(len, self.rows_of(batch)))

    def rows_of(self, batch: list[int]) -> list[Sequence[int]]:
        """Return the token ids of a batch."""
        return [self._plan.rows[row] for row in batch]

    def is_stored(self) -> bool:
        """Return whether the disk of this process has it."""
        return _load(self.path, self._tag) is not None

    def read(self) -> tuple[Tensor, Tensor, Tensors]:
        """Return its rows and their losses, each [n], and what the strategy keeps of all their tokens."""
        stored = _load(self.path, self._tag)
        if stored is None:
            raise FileNotFoundError(self.path)
        return stored.pop("row"), stored.pop("ce"), stored

    def take(self, batch: list[int], output: Distilled) -> None:
        """Keep what the model said about a batch; with the last one the file is written."""
        ce = output.ce.float().cpu()
        kept: list[Tensors] = []
        if self._plan.strategy.wants_parts:
            kept = [{name: values.cpu() for name, values in row.items()} for row in output.kept]
        _require_finite(ce, kept, f"{self._kind} rows", batch)
        self._ce.append(ce)
        self._kept += kept
        if len(self._ce) < len(self.batches):
            return
        index = torch.tensor([*itertools.chain(*self.batches)], dtype=torch.int64)
        tensors = {"row": index, "ce": torch.cat(self._ce)}
        for name in self._kept[0] if self._kept else ():
            tensors[name] = torch.cat([row[name] for row in self._kept])
        _store(self.path, tensors, self._tag)
        self._ce, self._kept = [], []


def token_size(partial: Path, plan: BuildPlan, distil: Distil, ranks: Ranks) -> int:
    """Return how many numbers a part keeps of a token, after checking that the disk has room for all of them."""
    sample = [plan.rows[shortest_row(plan.rows)]]
    kept = _run(ranks, lambda: distil(sample)).kept[0]
    width = sum(values[0].numel() for values in kept.values())
    size = sum(values[0].numel() * values.element_size() for values in kept.values())
    strategy = plan.strategy
    shard: float = size
    if not strategy.kind:
        shard = 0
    elif strategy.shard_bytes is not None:
        shard = width * strategy.shard_bytes
    # All parts stay until all shards are written beside them: the bands follow from the last part.
    needed = sum(map(len, plan.rows)) * (size + shard)
    ranks.together(lambda: require_space(partial, int(needed)))
    return width


def measure_noise(partial: Path, plan: BuildPlan, distil: Distil, ranks: Ranks) -> Tensor:
    """Return the largest change of each dimension, [d], between rows evaluated alone and in a padded batch.

    The result is kept in `partial` for a resumed build.
    """
    # Kernels round differently for other shapes. An element on the edge of its region would then seem violated on the
    # untouched model, and `w_strategy="dy"` would pull at it as hard as the cross-entropy does.
    longest = max(plan.rows, key=len)
    wanted = min(NOISE_ROWS, int(NOISE_SHARE * len(plan.rows)))
    count = max(1, min(wanted, plan.batch_tokens // len(longest) - 1))
    by_length = sorted(plan.rows, key=len)
    rows = by_length[:: max(1, len(by_length) // count)][:count]
    path = partial / "noise-part.safetensors"
    tag = sha256(repr((plan.strategy.field, rows)).encode())
    # Disks may differ, and all ranks must use the same noise.
    stored = ranks.ask(lambda: _load(path, tag) if ranks.index == 0 else None)[0]
    if stored is not None:
        return stored["noise"]

    def evaluate() -> tuple[list[Tensors], list[Tensors]]:
        padded: list[Tensors] = []
        alone: list[Tensors] = []
        # Two ranks halve the time. Where the weights are spread, every process takes part in every forward pass.
        if ranks.index == 0 or ranks.lockstep:
            padded = [_apart(kept) for kept in distil([*rows, longest]).kept[:-1]]
        if ranks.index == ranks.count - 1 or ranks.lockstep:
            alone = [_apart(distil([row]).kept[0]) for row in rows]
        return padded, alone

    found = ranks.gather(_run(ranks, evaluate))
    change = [plan.strategy.change(*pair) for pair in zip(found[-1][1], found[0][0], strict=True)]
    noise = torch.cat(change).amax(dim=0)
    ranks.only(ranks.index == 0, lambda: _store(path, {"noise": noise}, tag))
    return noise


def _apart(tensors: Mapping[str, Tensor]) -> Tensors:
    # Cloned, since a row that is sent would take the whole batch along, which it is a view of.
    return {name: values.cpu().clone() for name, values in tensors.items()}


def distil_parts(parts: Sequence[Part], plan: BuildPlan, distil: Distil, ranks: Ranks, *, progress: bool) -> None:
    """Make the parts that no disk has yet, and set the owner of each."""
    owners, stored = deal(ranks.ask(lambda: [part.is_stored() for part in parts]))
    queues: list[list[tuple[Part, list[int]]]] = [[] for _ in range(ranks.count)]
    left = 0
    for part, owner, there in zip(parts, owners, stored, strict=True):
        part.owner = owner
        if not there:
            left += part.tokens
            queues[owner] += [(part, batch) for batch in part.batches]
    dummy = [plan.rows[shortest_row(plan.rows)]]

    def one_batch(own: tuple[Part, list[int]] | None) -> None:
        if own is not None:
            part, batch = own
            output = _run(ranks, lambda: distil(part.rows_of(batch)))
            ranks.together(lambda: part.take(batch, output))
            return
        # A rank without rows takes part in the same exchanges: in the forward pass, where the weights are spread.
        if ranks.lockstep:
            distil(dummy)
        else:
            ranks.together(lambda: None)
        ranks.together(lambda: None)

    total = sum(part.tokens for part in parts)
    with tqdm(total=total, initial=total - left, unit="tok", desc="anchor", disable=not progress) as bar:
        # In rounds of one batch on every rank, so that a failure reaches all within a round.
        for turn in itertools.zip_longest(*queues):
            one_batch(turn[ranks.index])
            for part, batch in filter(None, turn):
                bar.update(part.tokens_of(batch))


def _run(ranks: Ranks, forward: Callable[[], T]) -> T:
    """Run forward passes on every process."""
    # Where the weights are spread, a failure cannot be told to the others, which wait inside their forward pass. It
    # ends this process, and the launcher ends the others.
    if ranks.lockstep:
        return forward()
    return ranks.together(forward)


def _require_finite(ce: Tensor, kept: Sequence[Tensors], what: str, batch: list[int]) -> None:
    bad = []
    for place, row in enumerate(batch):
        values = [ce[place]]
        if kept:
            values += kept[place].values()
        if not all(bool(tensor.isfinite().all()) for tensor in values):
            bad.append(row)
    if bad:
        raise NonFiniteStateError(
            "The base model gives NaN or infinite values on general texts.",
            where=f"{what} {bad}",
            expected="finite states and losses",
            fix="Check the weights and the dtype (float16 overflows easily), or drop these texts.",
        )


def _store(path: Path, tensors: Tensors, tag: str) -> None:
    """Write a part, with `tag` for what it was made from and a digest of both."""
    write_atomic(path, save(tensors, {"part": f"{tag} {_digest(tag, tensors)}"}))


def _load(path: Path, tag: str) -> Tensors | None:
    """Read a part that an earlier build left; `None` if there is none, or one that was made from something else."""
    try:
        raw = read_regular(path, 2**40)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        found, digest = header["__metadata__"]["part"].split()
        tensors = load(raw)
        if digest != _digest(found, tensors):
            raise ValueError(f"its SHA-256 is not {digest}")
    except FileNotFoundError:
        return None
    except Exception as error:  # safetensors, JSON and struct raise many kinds
        raise CacheCorruptError(
            "A part of an unfinished anchor cannot be read.",
            where=path,
            expected="a part as it was written",
            found=f"{type(error).__name__}: {error}",
            fix="Delete this file; only its rows are then evaluated again.",
        ) from error
    return tensors if found == tag else None


def _digest(tag: str, tensors: Mapping[str, Tensor]) -> str:
    # Of the tensors and not of the file, which holds this digest itself.
    parts = [tensors[name].contiguous().flatten().view(torch.uint8).numpy().data for name in sorted(tensors)]
    return sha256(tag.encode() + b"".join(hashlib.sha256(part).digest() for part in parts))
