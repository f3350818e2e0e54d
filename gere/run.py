"""What a run with replay holds between the trainer's events: settings, replay set, anchor, sums for the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gere.base_model import BaseModel
from gere.cache import Anchor, BuildPlan, build_anchor, open_named, open_or_build
from gere.cache.files import canonical_json, write_atomic
from gere.cache.fingerprint import architecture_digest, precision_of, weights_digest
from gere.collator import MixedCollator, RowCounts
from gere.config import GeReConfig, parse_replay_per_batch, parse_weight, require
from gere.errors import CacheCorruptError, CacheMissingError, ConfigError, ReplaySetError
from gere.meters import Meters
from gere.objective import ReplayObjective, StepShare
from gere.ranks import ALONE, Ranks
from gere.replay import ReplaySet, load_replay_set
from gere.sampler import added_rows
from gere.sharded import whole_shape
from gere.states import StateReader

ANCHOR_FILE = "gere_anchor.json"
logger = logging.getLogger("gere")


class ReadyModel(NamedTuple):
    """The model as the trainer prepared it.

    Attributes:
        inner: The model without its distributed wrapper, which one process can call alone.
        device: Where it is.
        autocast: Makes the context in which training computes.
        precision: Precision of training, such as `"mixed precision bf16"`.
        fresh: Whether the trainer made the model anew for this training.
        ranks: The processes of the run.
    """

    inner: nn.Module
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    precision: str
    fresh: bool
    ranks: Ranks


class ReplayRun:
    """Replay of one trainer.

    Args:
        saving_dir: Cache folder.
        reuse: Open an anchor that is there.
        replay_per_batch: Replay rows in each optimizer step, 0 or `None` for no batch insertion.
        w_strategy: Weight of the distance.
        config: All other settings.

    Attributes:
        active: Whether there is replay at all.
        adding: Whether replay rows are added to the user's batches, and do not replace rows in them.
        anchor: The anchor, from the first training step on.
        checkpoint: The checkpoint that training resumes from.
        share: Rows of the optimizer step at hand.
        meters: Sums for the log.
    """

    def __init__(
        self,
        saving_dir: str | Path,
        reuse: bool,
        replay_per_batch: int | None,
        w_strategy: float | str,
        config: GeReConfig | None,
    ) -> None:
        require(isinstance(saving_dir, (str, Path)), "gere_hidden_state_saving_dir", "a path", saving_dir)
        require(isinstance(reuse, bool), "reuse_gere_hidden_state", "True or False", reuse)
        require(isinstance(config, GeReConfig | None), "gere_config", "GeReConfig(...)", config)
        self.folder = Path(saving_dir)
        self.reuse = reuse
        self.replay_per_batch = parse_replay_per_batch(replay_per_batch)
        self.w_strategy = parse_weight(w_strategy)
        self.config = config or GeReConfig()
        self.active = self.config.replay_strategy != "none"
        self.adding = False
        self.anchor: Anchor | None = None
        self.checkpoint: Path | None = None
        self.share = StepShare(1, 0, 1, None)
        self.meters = Meters()
        self._replay_set: ReplaySet | None = None
        self._collator: MixedCollator | None = None
        self._objective: ReplayObjective | None = None
        self._reader: StateReader | None = None

    def replay_set(self, tokenizer: Any, ranks: Ranks = ALONE) -> ReplaySet:
        """The replay set, read once, the same on every rank."""
        if self._replay_set is None:
            load = lambda: load_replay_set(self.config, tokenizer, self.folder)  # noqa: E731
            self._replay_set = ranks.first_here_first(load)
            fields = ranks.gather(self._replay_set.fields)
            ranks.together(lambda: _require_same_texts(fields))
        return self._replay_set

    def collator(self, task_collator: Any, tokenizer: Any, spare: Callable[[], Any] | None = None) -> MixedCollator:
        """Collator of mixed batches; it knows the anchor as soon as that is open."""
        replay = self.replay_set(tokenizer)
        self._collator = MixedCollator(task_collator, replay.rows, replay.pad_id, spare)
        self._collator.anchor = self.anchor
        return self._collator

    def add_from_now_on(self, why: str, *, tell: bool) -> None:
        """Add replay rows to the user's batches.

        Args:
            why: The reason.
            tell: Say so in the log of this process, once.
        """
        if tell and not self.adding:
            what = "Each optimizer step gets %d replay rows beside its task rows, and none is replaced, since %s."
            logger.warning(what, self.replay_per_batch, why)
        self.adding = True

    def add_rows(
        self, samples: Sequence[Any], *, step: int, seed: int, rows: int, rank: int, ranks: int
    ) -> list[dict[str, Any]]:
        """Add the replay rows of an optimizer step to its micro-batches.

        Args:
            samples: Micro-batches of this rank.
            step: Optimizer steps before this one.
            seed: Seed of the order of replay rows.
            rows: Task rows of a micro-batch, as the trainer was told.
            rank: This rank.
            ranks: Number of ranks.
        """
        if self._collator is None or not samples:
            return list(samples)
        plan = added_rows(
            len(self._collator.rows),
            self.replay_per_batch,
            seed=seed,
            step=step,
            micro_steps=len(samples),
            micro_batch_size=rows,
            world_size=ranks,
        )
        counts = [RowCounts(rows, len(shares[rank]), rows * ranks, sum(map(len, shares))) for shares in plan]
        parts = zip(samples, counts, plan, strict=True)
        return [self._collator.add(dict(sample), count, shares[rank]) for sample, count, shares in parts]

    def prepare(self, model: ReadyModel, tokenizer: Any, *, resumed: bool, progress: bool) -> None:
        """Open or build the anchor.

        A second `train()` of the same model keeps the anchor of the first, since the weights have moved.

        Args:
            model: The model that is about to be trained.
            tokenizer: The user's tokenizer.
            resumed: Whether the weights come from a checkpoint.
            progress: Show a progress bar.

        Raises:
            CacheError: If the anchor is missing, damaged, or belongs to something else.
        """
        replay = self.replay_set(tokenizer)
        _require_fit(model.inner, replay)
        if self.anchor is None or resumed or model.fresh:
            self.anchor = self._resolve(model, replay, resumed, progress)
        self.meters = Meters()
        self._objective = ReplayObjective(self.w_strategy, self.config.normalization, self.anchor)
        self._reader = StateReader(model.inner)
        if self._collator is not None:
            self._collator.anchor = self.anchor

    def begin_step(self, rows: Sequence[RowCounts], ranks: int, divisor: int | None, own_mean: bool) -> None:
        """Note the rows of the optimizer step that follows.

        Args:
            rows: Rows of each micro-step.
            ranks: Number of ranks.
            divisor: As in `StepShare`.
            own_mean: Whether the parent's losses add up to a mean over the rows of this rank alone.
        """
        own, _, task_rows, replay_rows = (sum(counts) for counts in zip(*rows, strict=True))
        own_share = own * ranks / task_rows if own_mean and task_rows else 1.0
        self.share = StepShare(task_rows, replay_rows, ranks, divisor, own_share)
        if task_rows:
            self.meters.step()

    def task_part(self, loss: Tensor, rows: int) -> Tensor:
        """Weigh the parent's loss of a micro-batch."""
        self.meters.add({"task_loss": loss * self.share.logged_factor(rows)})
        return loss * self.share.task_factor(rows)

    def replay_part(self, model: nn.Module, batch: Mapping[str, Tensor], rows: int) -> Tensor:
        """Weighed sum of the replay losses of a micro-batch; a spare row (`rows` is 0) counts nothing."""
        if self._objective is None or self._reader is None:
            raise RuntimeError("a replay batch came before on_train_begin")
        loss, sums = self._objective(model, self._reader, batch)
        if not rows:
            return loss * 0.0
        self.meters.add(sums)
        return loss * self.share.replay_factor

    def name_anchor(self, folder: Path, model: Any) -> None:
        """Write the key of the anchor beside a saved model; training without replay hands on what it was given."""
        key = self.anchor.key if self.anchor is not None else _read_key(self.checkpoint) or _loaded_key(model)
        if key is not None:
            write_atomic(folder / ANCHOR_FILE, canonical_json({"format_version": 1, "anchor": key}))

    def _resolve(self, model: ReadyModel, replay: ReplaySet, resumed: bool, progress: bool) -> Anchor:
        key = model.ranks.gather(model.ranks.together(lambda: self._named_key(model, resumed)))[0]
        fields = self._fields(model, replay, weights_moved=key is not None)
        if key is not None:
            return open_named(self.folder, key, fields, model.ranks)
        if resumed:
            raise CacheMissingError(
                "Training resumes from a checkpoint that names no anchor, and its model cannot be anchored any more.",
                where=self.checkpoint,
                expected=f"{ANCHOR_FILE}, which GeReTrainer writes into every checkpoint",
                found="a checkpoint of another trainer, or of GeReTrainer without replay",
                fix="Start from the base model, or set gere_config.anchor to the key of its anchor.",
            )

        def build(folder: Path) -> None:
            base = BaseModel(model.inner, replay.pad_id, model.device, model.autocast, whole=model.ranks.lockstep)
            build_anchor(folder, self._plan(fields, replay), base, ranks=model.ranks, progress=progress)

        return open_or_build(self.folder, fields, build, reuse=self.reuse, ranks=model.ranks)

    def _plan(self, fields: Mapping[str, str], replay: ReplaySet) -> BuildPlan:
        return BuildPlan(
            fields=fields,
            rows=replay.rows,
            keep_regions=self.config.replay_strategy == "tm",
            band_width=self.config.band_width,
            std_floor=self.config.std_floor,
            batch_tokens=self.config.anchor_batch_tokens,
        )

    def _named_key(self, model: ReadyModel, resumed: bool) -> str | None:
        """Key that the user, the checkpoint or the folder of the loaded model names."""
        if self.config.anchor != "auto":
            return self.config.anchor.removeprefix("anchor-")
        if resumed:
            return _read_key(self.checkpoint)
        key = _loaded_key(model.inner)
        if key is not None and not self.reuse:
            raise ConfigError(
                "This model was tuned from another one, whose anchor its folder names; it would become a base itself.",
                where="reuse_gere_hidden_state",
                expected=f"True, to use the anchor {key}",
                found="False",
                fix=f"Leave it out; or, to make this model a base of its own, delete {ANCHOR_FILE} from its folder.",
            )
        return key

    def _fields(self, model: ReadyModel, replay: ReplaySet, *, weights_moved: bool) -> dict[str, str]:
        """What the anchor depends on, in the order in which a difference is reported."""
        bands = f"mean +- {self.config.band_width:g} std, floor {self.config.std_floor:g}"
        weights = {} if weights_moved else {"weights": weights_digest(model.inner, model.ranks)}
        kept = {"tm": "regions of the last layer", "ce": "losses only"}[self.config.replay_strategy]
        return {
            "strategy": kept,
            "architecture": architecture_digest(model.inner),
            **weights,
            **replay.fields,
            **({"bands": bands} if self.config.replay_strategy == "tm" else {}),
            "dtype": f"{precision_of(model.inner)}, {model.precision}",
        }


def _require_same_texts(fields: Sequence[Mapping[str, str]]) -> None:
    """Refuse a replay set that differs between machines, whose files need not be the same."""
    for rank, other in enumerate(fields):
        names = [name for name in other if other[name] != fields[0].get(name)]
        if names:
            raise ReplaySetError(
                "The processes do not have the same replay set.",
                where=f"{', '.join(names)} of gere_config.replay_dataset",
                expected="the same texts and the same tokenizer on every machine",
                found=f"others on rank {rank} than on rank 0",
                fix="Copy the file of rank 0 to the other machines.",
            )


def _require_fit(model: Any, replay: ReplaySet) -> None:
    """Refuse tokens or lengths that the model has no embedding for, before it fails on the device."""
    vocabulary = whole_shape(model.get_input_embeddings().weight)[0]
    largest, longest = max(map(max, replay.rows)), max(map(len, replay.rows))
    positions = getattr(model.config, "max_position_embeddings", None) or longest
    checks = (
        ("token ids", largest, vocabulary - 1, "Resize the embeddings, or pass the model's own tokenizer."),
        ("tokens in a row", longest, positions, f"Set gere_config.max_length to {positions} or less."),
    )
    for what, found, most, fix in checks:
        if found > most:
            raise ReplaySetError(
                "The replay rows do not fit the model.",
                where=f"{what} of gere_config.replay_dataset",
                expected=f"at most {most}",
                found=found,
                fix=fix,
            )


def _loaded_key(model: Any) -> str | None:
    """Key in the folder that a model was loaded from."""
    loaded_from = getattr(getattr(model, "config", None), "_name_or_path", "")
    return _read_key(Path(loaded_from)) if loaded_from else None


def _read_key(folder: Path | None) -> str | None:
    """Key in the anchor file of a checkpoint or model folder; `None` if there is no such file."""
    path = folder / ANCHOR_FILE if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["anchor"])
    except (ValueError, KeyError, TypeError) as error:
        raise CacheCorruptError(
            "The file that names the anchor cannot be read.",
            where=path,
            expected='a JSON object with the key "anchor"',
            found=f"{type(error).__name__}: {error}",
            fix="Restore the file, or set gere_config.anchor to the key of the anchor.",
        ) from error
