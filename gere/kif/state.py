"""What one task of a sequence holds while it is trained, and how it survives a kill."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gere._files import canonical_json, write_atomic
from gere._records import read_record
from gere.errors import CacheCorruptError, ConfigError
from gere.kif.config import KIFConfig
from gere.kif.fusion import (
    consolidate,
    fuse,
    fusion_weights,
    lora_pairs,
    matrix_scores,
    min_max,
    next_history,
    rank_scores,
    share_of_present,
    soft_share_of_present,
)
from gere.kif.importance import Importance, no_importance, observe, scores, sensitivity, top_share
from gere.session.checkpoint import damaged

STATE_FILE, HISTORY_FILE = "gere_kif.safetensors", "gere_kif.json"
History = Mapping[str, Sequence[float]]


class _HistoryFile(NamedTuple):
    """Content of `gere_kif.json`: scores of all tasks so far by unit."""

    history: dict[str, list[float]]
    format_version: Literal[1] = 1


@dataclass
class KIFState:
    """State of the trained tensors in one task.

    Attributes:
        config: The settings.
        weights: The trained tensors by name, which are moved in place.
        start: theta_b, their values at the last fusion.
        inner: Importance for the task since then.
        outer: Importance for the memory since the task began.
    """

    config: KIFConfig
    weights: dict[str, Tensor]
    start: dict[str, Tensor]
    inner: Importance
    outer: Importance

    @classmethod
    def begin(cls, config: KIFConfig, weights: dict[str, Tensor]) -> KIFState:
        """Begin a task: nothing has mattered yet."""
        outer = weights if config.needs_memory else {}
        start = copies(weights)
        return cls(config, weights, start, _fresh(config, weights), _fresh(config, outer))

    def observe_inner(self) -> None:
        """Take up the gradients of an optimizer step on the task."""
        observe(self.inner, _Now(self), self.config.inner_smoothing)

    def observe_outer(self) -> None:
        """Take up the gradients of an optimizer step on the memory."""
        observe(self.outer, _Now(self), self.config.outer_smoothing)

    def end_inner(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """End the inner steps: return their mask, and the weights that they reached."""
        mask = top_share(scores(self.inner), self.config.share)
        # Their importance is not needed any more, and the outer steps need its memory.
        self.inner = Importance({}, {})
        return mask, copies(self.weights)

    @torch.no_grad()
    def fuse(self, mask: Mapping[str, Tensor], middle: Mapping[str, Tensor]) -> Tensor:
        """Fuse the updates of the inner and of the outer steps, and begin the next round.

        Returns:
            Share of entries that no mask marks, a scalar.
        """
        outer = top_share(scores(self.outer), self.config.share)
        neither = []
        for name, weight in self.weights.items():
            shares = fusion_weights(mask[name], outer[name], self.config.fusion_weights)  # type: ignore[arg-type]
            fused = fuse(self.start[name], middle[name], weight, *shares)
            weight.copy_(fused)
            self.start[name].copy_(fused)
            neither.append((~(mask[name] | outer[name])).flatten())
        self.inner = _fresh(self.config, self.weights)
        return torch.cat(neither).float().mean()

    @torch.no_grad()
    def consolidate(self, history: History) -> dict[str, list[float]]:
        """Consolidate with the weights before the task, as TaSL does after each task but the first.

        Args:
            history: Scores of the earlier tasks by unit; empty after the first task.

        Returns:
            Scores of all tasks so far.
        """
        config, values = self.config, scores(self.inner)
        pairs = lora_pairs([*values])
        by_rank = config.consolidate == "rank"
        if by_rank:
            units = {a: rank_scores(values[a], values[b]) for a, b in pairs.items()}
        else:
            units = {name: matrix_scores({name: score}) for name, score in values.items()}
        units = {name: units[name].cpu() for name in sorted(units)}
        raw = torch.cat([*units.values()])
        if not history:
            return _by_unit(units, raw)
        require_history(history, units)
        previous = torch.cat([torch.tensor(history[name], dtype=torch.float64) for name in units])
        # The history of a single task is its raw score.
        present, previous = min_max(raw), min_max(previous)
        if by_rank:
            p = soft_share_of_present(present, previous, config.temperature)
        else:
            p = share_of_present(present, previous, config.share)
        for name, share in zip(units, p.split([len(unit) for unit in units.values()]), strict=True):
            self._mix(name, share[:, None] if by_rank else share)
            if by_rank:
                self._mix(pairs[name], share[None])
        return _by_unit(units, next_history(present, previous))

    def _mix(self, name: str, share: Tensor) -> None:
        weight = self.weights[name]
        weight.copy_(consolidate(weight, self.start[name], share.to(weight.device)))

    def write(self, folder: Path, memory: str) -> None:
        """Write the state into a checkpoint, with the hash of the memory."""
        tensors = {}
        for part, values in self._parts().items():
            for name, value in values.items():
                tensors[f"{part}.{name}"] = value.detach().cpu().contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / STATE_FILE, save(tensors, {"format": "1", "memory": memory}))

    def read(self, folder: Path, memory: str) -> None:
        """Restore the state of a checkpoint that was trained with the memory of this hash.

        Raises:
            CacheCorruptError: If the file is missing, damaged, or that of another adapter, score or memory.
        """
        path = folder / STATE_FILE
        try:
            with safe_open(path, "pt") as file:
                known = file.metadata()["memory"]
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            if known != memory:
                raise ValueError(f"a memory with the hash {known}")
            for part, values in self._parts().items():
                for name, value in values.items():
                    value.copy_(stored.pop(f"{part}.{name}"))
            if stored:
                raise ValueError(f"{next(iter(stored))}, which this training does not have")
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise CacheCorruptError(
                "The checkpoint does not hold the state of this training of KIF.",
                where=path,
                expected=f"the state of the same adapter, kif_config and kif_memory (hash {memory})",
                found=f"{type(error).__name__}: {error}",
                fix="Resume with the settings of the checkpoint, or begin the task again.",
            ) from error

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        parts = {"start": self.start}
        for side, importance in (("inner", self.inner), ("outer", self.outer)):
            parts[f"{side}.E"], parts[f"{side}.U"] = importance
        return parts


class _Now(Mapping[str, Tensor]):
    """Importance of the weights by their gradients of now, one tensor at a time: all at once would be a copy more."""

    def __init__(self, state: KIFState) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        weight = self._state.weights[name]
        # A tensor that took no part in the loss has no gradient, and does not matter to it.
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return sensitivity(weight, gradient, self._state.config.rule)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state.weights)

    def __len__(self) -> int:
        return len(self._state.weights)


def copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors by name."""
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _fresh(config: KIFConfig, weights: Mapping[str, Tensor]) -> Importance:
    return no_importance(weights, uncertain=config.score != "sensitivity")


def _by_unit(units: Mapping[str, Tensor], values: Tensor) -> dict[str, list[float]]:
    parts = values.split([len(unit) for unit in units.values()])
    return {name: part.tolist() for name, part in zip(units, parts, strict=True)}


def require_history(history: History, units: Mapping[str, Sequence[float] | Tensor]) -> None:
    """Refuse scores of other units than those of the adapter.

    Raises:
        ConfigError: If names or numbers of units differ.
    """
    known = {name: len(unit) for name, unit in units.items()}
    given = {name: len(scores) for name, scores in history.items()}
    if known != given:
        strange = sorted({*known.items()} ^ {*given.items()})
        raise ConfigError(
            "The scores of the earlier tasks are those of another adapter.",
            where="kif_history",
            expected=f"{len(known)} tensors of this adapter, with their units",
            found=f"{len(given)} tensors; one that differs: {strange[0][0]}",
            fix="Pass the kif_history of the trainer of the task before, with the same LoraConfig.",
        )


def write_history(folder: Path, history: History) -> None:
    """Write the scores of all tasks so far beside a saved model."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: list(unit) for name, unit in history.items()}
    write_atomic(folder / HISTORY_FILE, canonical_json(_HistoryFile(content)._asdict()))


def read_history(folder: Path) -> dict[str, list[float]]:
    """Read the scores beside a saved model; empty if it has none.

    Raises:
        CacheCorruptError: If the file is damaged.
    """
    path = folder / HISTORY_FILE
    if not path.is_file():
        return {}
    fix = "Restore the file, or train the task before again."
    return read_record(path, _HistoryFile, partial(damaged, fix=fix)).history
