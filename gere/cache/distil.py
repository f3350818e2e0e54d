"""Run the base model over the replay rows: parts that survive a kill, shared out over the ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gere.cache.codec import PER_BYTE
from gere.cache.files import require_space, sha256
from gere.cache.parts import load_part, read_part, store_part
from gere.cache.plan import BuildPlan, Distil, Distilled, shortest_row
from gere.cache.shares import deal
from gere.errors import NonFiniteStateError
from gere.ranks import Ranks

NOISE_ROWS = 8


def measure_noise(partial: Path, plan: BuildPlan, distil: Distil, ranks: Ranks) -> Tensor:
    """Largest change of each dimension when rows are evaluated alone and in a padded batch, shape [d].

    The kernels round differently for other shapes; an element on the edge of its region would then seem violated on
    the untouched model. The first process decides for all.

    Args:
        partial: Folder of the unfinished anchor, where the result is kept.
        plan: What is built.
        distil: Runs the base model.
        ranks: All processes; each must call this.

    Raises:
        CacheFolderError: If the disk has no room for the states.
        RankFailedError: If another process failed.
    """
    longest = max(plan.rows, key=len)
    count = max(1, min(NOISE_ROWS, plan.batch_tokens // len(longest) - 1))
    by_length = sorted(plan.rows, key=len)
    rows = by_length[:: max(1, len(by_length) // count)][:count]
    path = partial / "noise.safetensors"
    tag = sha256(repr(rows).encode())
    stored = ranks.ask(lambda: load_part(path, tag) if ranks.index == 0 else None)[0]
    if stored is not None:
        return stored["noise"]

    def measure() -> tuple[Tensor, int]:
        padded = distil([*rows, longest]).state
        alone = [distil([row]).state[0, : len(row)].float().cpu() for row in rows]
        change = [(padded[i, : len(row)].float().cpu() - alone[i]).abs() for i, row in enumerate(rows)]
        return torch.cat(change).amax(dim=0), padded.element_size()

    noise, size = ranks.gather(measure() if ranks.lockstep else ranks.together(measure))[0]
    need = sum(map(len, plan.rows)) * len(noise) * (size + 1 / PER_BYTE)
    ranks.together(lambda: require_space(partial, int(need)))
    ranks.together(lambda: store_part(path, {"noise": noise}, tag) if ranks.index == 0 else None)
    return noise


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
        self._state: list[Tensor] = []
        self.tag = sha256(repr([[plan.rows[row] for row in batch] for batch in batches]).encode())

    def is_stored(self) -> bool:
        """Whether the disk of this process has it."""
        return load_part(self.path, self.tag) is not None

    def read(self) -> dict[str, Tensor]:
        """Its `row`, `ce` and, for regions, `state`; errors as in `load_part`."""
        return read_part(self.path, self.tag)

    def take(self, batch: list[int], output: Distilled, plan: BuildPlan) -> None:
        """Keep what the model said about a batch; with the last one the file is written."""
        state, ce = output
        _require_finite(state, ce, batch)
        self._ce.append(ce.float().cpu())
        if plan.keep_regions:
            self._state += [state[i, : len(plan.rows[row])].cpu() for i, row in enumerate(batch)]
        if len(self._ce) == len(self.batches):
            index = torch.tensor([row for batch in self.batches for row in batch], dtype=torch.int64)
            tensors = {"row": index, "ce": torch.cat(self._ce)}
            store_part(self.path, {**tensors, "state": torch.cat(self._state)} if self._state else tensors, self.tag)
            self._ce, self._state = [], []


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


def _require_finite(state: Tensor, ce: Tensor, batch: list[int]) -> None:
    bad = ~(state.isfinite().flatten(1).all(dim=1) & ce.isfinite())
    if bool(bad.any()):
        raise NonFiniteStateError(
            "The base model gives NaN or infinite values on the replay set.",
            where=f"replay rows {[batch[i] for i in bad.nonzero().flatten().tolist()]}",
            expected="finite states and losses",
            fix="Check the weights and the dtype (float16 overflows easily), or drop these texts.",
        )
