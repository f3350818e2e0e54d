"""Run the base model over the replay rows: parts that survive a kill, shared out over the ranks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gere._files import require_space, sha256
from gere.cache.multi_node import deal
from gere.cache.parts import load_part, read_part, store_part
from gere.cache.plan import BuildPlan, Distil, Distilled
from gere.errors import NonFiniteStateError
from gere.model.batching import shortest_row
from gere.ranks import Ranks

NOISE_ROWS = 8

Kept = dict[str, Tensor]


def token_size(partial: Path, plan: BuildPlan, distil: Distil, ranks: Ranks) -> int:
    """How many numbers are kept of a token, after making sure that the disk has room for all of them.

    Args:
        partial: Folder of the unfinished anchor.
        plan: What is built.
        distil: Runs the base model.
        ranks: All processes; each must call this.

    Raises:
        CacheFolderError: If the disk has no room for what is kept.
        RankFailedError: If another process failed.
    """
    row = plan.rows[shortest_row(plan.rows)]
    kept = _call(ranks, distil, [row], needed=True)
    shapes = [(values[0].numel(), values.element_size()) for values in (kept.kept[0] if kept else {}).values()]
    width = sum(count for count, _ in shapes)
    size = sum(count * bytes_each for count, bytes_each in shapes)
    need = sum(map(len, plan.rows)) * _bytes_needed(plan, width, size)
    ranks.together(lambda: require_space(partial, int(need)))
    return width


def _bytes_needed(plan: BuildPlan, width: int, size: int) -> float:
    """Bytes of a token on the disk while it is built: what waits in a part, and beside it what comes of it."""
    strategy = plan.strategy
    shard = size if strategy.shard_bytes is None else width * strategy.shard_bytes
    return (size if strategy.wants_parts else 0) + (shard if strategy.kind else 0)


def measure_noise(partial: Path, plan: BuildPlan, distil: Distil, ranks: Ranks) -> Tensor:
    """Largest change of each dimension, [d], when rows are evaluated alone and in a padded batch.

    The kernels round differently for other shapes. An element on the edge of its region would then seem violated on
    the untouched model, and `w_strategy="dy"` would pull at it as hard as the cross-entropy does. The first process
    evaluates the batch and the last one the rows alone, for all.

    Args:
        partial: Folder of the unfinished anchor, where the result is kept.
        plan: What is built.
        distil: Runs the base model.
        ranks: All processes; each must call this.

    Raises:
        RankFailedError: If another process failed.
    """
    longest = max(plan.rows, key=len)
    count = max(1, min(NOISE_ROWS, plan.batch_tokens // len(longest) - 1))
    by_length = sorted(plan.rows, key=len)
    rows = by_length[:: max(1, len(by_length) // count)][:count]
    path = partial / "noise-part.safetensors"
    tag = sha256(repr((plan.strategy.field, rows)).encode())
    stored = ranks.ask(lambda: load_part(path, tag) if ranks.index == 0 else None)[0]
    if stored is not None:
        return stored["noise"]

    def evaluate() -> tuple[list[Kept], list[Kept]]:
        padded: list[Kept] = []
        alone: list[Kept] = []
        # Where the weights are spread, every process must take part in every forward pass.
        if ranks.index == 0 or ranks.lockstep:
            padded = [_apart(kept) for kept in distil([*rows, longest]).kept[:-1]]
        if ranks.index == ranks.count - 1 or ranks.lockstep:
            alone = [_apart(distil([row]).kept[0]) for row in rows]
        return padded, alone

    found = ranks.gather(evaluate()) if ranks.lockstep else ranks.ask(evaluate)
    change = [plan.strategy.change(*pair) for pair in zip(found[-1][1], found[0][0], strict=True)]
    noise = torch.cat(change).amax(dim=0)
    ranks.together(lambda: store_part(path, {"noise": noise}, tag) if ranks.index == 0 else None)
    return noise


def _on_cpu(tensors: Mapping[str, Tensor]) -> Kept:
    return {name: values.cpu() for name, values in tensors.items()}


def _apart(tensors: Mapping[str, Tensor]) -> Kept:
    """Copies in main memory: a row that is sent would take the whole batch, which it is a view of, along."""
    return {name: values.cpu().clone() for name, values in tensors.items()}


class Part:
    """Some batches of rows, and the file that holds their states and losses.

    Args:
        partial: Folder of the unfinished anchor.
        number: Its place among the parts.
        batches: Indices of the rows of each forward pass.
        plan: What is built.
    """

    def __init__(self, partial: Path, number: int, batches: list[list[int]], plan: BuildPlan) -> None:
        self.number = number
        self.batches = batches
        self.tokens = sum(len(plan.rows[row]) for batch in batches for row in batch)
        self.path = partial / f"part-{number:05d}.safetensors"
        self._ce: list[Tensor] = []
        self._kept: list[Kept] = []
        self.tag = sha256(repr([[plan.rows[row] for row in batch] for batch in batches]).encode())

    def is_stored(self) -> bool:
        """Whether the disk of this process has it."""
        return load_part(self.path, self.tag) is not None

    def read(self) -> dict[str, Tensor]:
        """Its `row`, `ce` and what the strategy keeps; errors as in `load_part`."""
        return read_part(self.path, self.tag)

    def kept(self) -> dict[str, Tensor]:
        """What the strategy keeps of its tokens."""
        return {name: values for name, values in self.read().items() if name not in ("row", "ce")}

    def take(self, batch: list[int], output: Distilled, plan: BuildPlan) -> None:
        """Keep what the model said about a batch; with the last one the file is written."""
        ce, kept = output.ce.float().cpu(), [_on_cpu(row) for row in output.kept] if plan.strategy.wants_parts else []
        _require_finite(ce, kept, batch)
        self._ce.append(ce)
        self._kept += kept
        if len(self._ce) == len(self.batches):
            index = torch.tensor([row for batch in self.batches for row in batch], dtype=torch.int64)
            names = self._kept[0] if self._kept else ()
            tensors = {name: torch.cat([row[name] for row in self._kept]) for name in names}
            store_part(self.path, {"row": index, "ce": torch.cat(self._ce), **tensors}, self.tag)
            self._ce, self._kept = [], []


def distil_parts(parts: Sequence[Part], plan: BuildPlan, distil: Distil, ranks: Ranks, *, progress: bool) -> list[int]:
    """Make the parts that no disk has yet, each rank its own, in rounds of one batch on every rank.

    Args:
        parts: All parts.
        plan: What is built.
        distil: Runs the base model.
        ranks: All processes; each must call this.
        progress: Show a progress bar.

    Returns:
        The rank that has each part.

    Raises:
        NonFiniteStateError: If the model gives NaN or infinite values.
        RankFailedError: If another process failed.
    """
    owners, stored = deal(ranks.ask(lambda: [part.is_stored() for part in parts]))
    missing = [(part, owner) for part, owner, there in zip(parts, owners, stored, strict=True) if not there]
    queues = [
        [(part, batch) for part, owner in missing if owner == rank for batch in part.batches]
        for rank in range(ranks.count)
    ]
    spare = [shortest_row(plan.rows)]

    def one_batch(part: Part | None, batch: list[int]) -> None:
        output = _call(ranks, distil, [plan.rows[row] for row in batch], needed=part is not None)
        ranks.together(lambda: part.take(batch, output, plan) if part and output else None)

    total, left = (sum(part.tokens for part in some) for some in (parts, [part for part, _ in missing]))
    with tqdm(total=total, initial=total - left, unit="tok", desc="anchor", disable=not progress) as bar:
        for turn in itertools.zip_longest(*queues):
            one_batch(*(turn[ranks.index] or (None, spare)))
            bar.update(sum(len(plan.rows[row]) for step in turn if step for row in step[1]))
    return owners


def _call(ranks: Ranks, distil: Distil, rows: Sequence[Sequence[int]], *, needed: bool) -> Distilled | None:
    """Run the model; where its weights are spread, a rank without rows of its own runs it for the others.

    There, a failure cannot be told to the others, which wait inside their forward pass: it ends this process.
    """
    if ranks.lockstep:
        return distil(rows)
    return ranks.together(lambda: distil(rows) if needed else None)


def _require_finite(ce: Tensor, kept: Sequence[Mapping[str, Tensor]], batch: list[int]) -> None:
    finite = [all(bool(values.isfinite().all()) for values in row.values()) for row in kept] or [True] * len(batch)
    bad = [row for row, good, loss in zip(batch, finite, ce.isfinite().tolist(), strict=True) if not (good and loss)]
    if bad:
        raise NonFiniteStateError(
            "The base model gives NaN or infinite values on the replay set.",
            where=f"replay rows {bad}",
            expected="finite states and losses",
            fix="Check the weights and the dtype (float16 overflows easily), or drop these texts.",
        )
