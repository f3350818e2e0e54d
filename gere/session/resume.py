"""Which checkpoint a training resumes from: a whole one, all tensors of which arrive in the model."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from gere import _compat
from gere._log import logger
from gere.errors import CheckpointError
from gere.ranks import Ranks
from gere.session.checkpoint import STATE_FILE

# What a resumed training reads. Other files of a checkpoint, such as logs of a callback, may look as they like.
JSON_FILES = re.compile(r"trainer_state\.json|(adapter_)?config\.json|.*\.index\.json|gere_.*\.json")
TORCH_FILES = re.compile(r".*\.(pt|pth)|(pytorch_model|adapter_model|optimizer).*\.bin")
WEIGHTS = ("model*.safetensors", "pytorch_model*", "adapter_model.*", "*/adapter_model.*", "global_step*")
# Trainer writes all of them or none, if it saves the model alone. DeepSpeed keeps its optimizer with the weights.
TRAINING_STATE = (("*optimizer*", "global_step*"), ("scheduler.pt",), ("rng_state*",))
SHOWN = 3


def checkpoint_of(trainer: Any, resume_from_checkpoint: str | bool | None) -> Path | None:
    """Return the checkpoint that a trainer resumes from: for `True` the last whole one; `None` for none.

    Raises:
        CheckpointError: If it is not whole, or none is.
    """
    if resume_from_checkpoint is True:
        return last_whole(Path(str(trainer.args.output_dir)), _compat.ranks_of(trainer))
    if not resume_from_checkpoint:
        return None
    require_whole(Path(str(resume_from_checkpoint)))
    return Path(str(resume_from_checkpoint))


def last_whole(folder: Path, ranks: Ranks) -> Path | None:
    """Find the last whole checkpoint of a run, the same on all processes; `None` if there is no checkpoint at all.

    A kill while a checkpoint is written, or while an old one is removed, leaves one that lacks files or has a part of
    them.

    Raises:
        CheckpointError: If there are checkpoints and none of them is whole.
    """
    faults: dict[str, str] = {}
    # A process sees its own disk, and all must resume from the same checkpoint.
    for found in ranks.ask(lambda: {path.name: torn(path) for path in checkpoints_in(folder)}):
        for name, fault in found.items():
            faults[name] = faults.get(name) or fault
    for name in sorted(faults, key=_step_of, reverse=True):
        if not faults[name]:
            return folder / name
        if ranks.index == 0:
            logger.warning("%s is left out, since it is not whole: %s", folder / name, faults[name])
    if faults:
        raise CheckpointError(
            "Training cannot resume, since no checkpoint is whole.",
            where=folder,
            expected="a checkpoint with all of its files",
            found="; ".join(f"{name}: {fault}" for name, fault in faults.items()),
            fix="Restore one of them, or start again without resume_from_checkpoint.",
        )
    return None


def require_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not whole; a folder that is not there is left to the trainer.

    Raises:
        CheckpointError: If it lacks a file, or one of its files is cut off.
    """
    fault = torn(checkpoint) if checkpoint.is_dir() else ""
    if fault:
        raise CheckpointError(
            "Training cannot resume, since the checkpoint is not whole.",
            where=checkpoint,
            expected="all files that a training resumes from, whole",
            found=fault,
            fix="Set resume_from_checkpoint to an earlier one, or to True for the last whole one of output_dir.",
        )


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of an output folder, the first step first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step_of(path.name) >= 0 and path.is_dir()]
    return sorted(found, key=lambda path: _step_of(path.name))


def _step_of(name: str) -> int:
    number = name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1


def torn(checkpoint: Path) -> str:
    """Return what a checkpoint lacks to resume from it, by its files and their content; empty for a whole one."""
    # `Trainer` writes it last.
    if not (checkpoint / STATE_FILE).is_file():
        return f"{STATE_FILE} is missing"
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        fault = _fault(path)
        if fault:
            return f"{path.relative_to(checkpoint)} {fault}"
    if not _has(checkpoint, WEIGHTS):
        return "the weights are missing"
    there = [_has(checkpoint, patterns) for patterns in TRAINING_STATE]
    lacking = [patterns[0].strip("*") for patterns, has in zip(TRAINING_STATE, there, strict=True) if not has]
    if any(there) and lacking:
        return f"{' and '.join(lacking)} missing"
    return ""


def _has(folder: Path, patterns: Iterable[str]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _fault(path: Path) -> str:
    """Return what is wrong with a file of a checkpoint; of large ones only the structure is read."""
    try:
        if JSON_FILES.fullmatch(path.name):
            return _json_fault(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif TORCH_FILES.fullmatch(path.name):
            with path.open("rb") as stream:
                head = stream.read(2)
            # `torch.save` writes a zip, whose table of contents comes last; before version 1.6 a pickle.
            if not (head[:1] == b"\x80" or (head == b"PK" and zipfile.is_zipfile(path))):
                return "is cut off"
    # A file of JSON may hold anything, also brackets that are nested too deep.
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        return f"cannot be read ({type(error).__name__}: {error})"
    return ""


def _json_fault(path: Path) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return "is no JSON object"
    if path.name == STATE_FILE and not isinstance(content.get("global_step"), int):
        return "has no global_step"
    for shard in sorted({*content.get("weight_map", {}).values()}):
        if not (path.parent / shard).is_file():
            return f"names {shard}, which is missing"
    return ""


def require_arrived(model: nn.Module, missing: Iterable[str], unexpected: Iterable[str], checkpoint: Path) -> None:
    """Refuse a checkpoint whose tensors did not all arrive in the model, or that lacks one that is trained.

    Transformers writes the tensors of many mixtures of experts and models that read images by other names than the
    model has, and drops them when a training resumes.

    Args:
        model: The model, after the checkpoint was loaded into it by names.
        missing: Names of the model that the checkpoint does not have.
        unexpected: Names of the checkpoint that the model does not have.
        checkpoint: The checkpoint.

    Raises:
        CheckpointError: If the model would go on with other weights than those of the checkpoint.
    """
    tensors: Mapping[str, Any] = model.state_dict(keep_vars=True)
    absent = {name for name in missing if name in tensors}
    # A tied tensor arrives by its other name.
    arrived = {id(tensor) for name, tensor in tensors.items() if name not in absent}
    absent = {name for name in absent if tensors[name].requires_grad and id(tensors[name]) not in arrived}
    ignored = [re.compile(rule) for rule in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    lost = [name for name in unexpected if not any(rule.search(name) for rule in ignored)]
    if not (lost or absent) or (lost and _is_there_already(model, lost, checkpoint)):
        return
    found = [f"{len(lost)} that the model does not have ({_listed(lost)})"] if lost else []
    if absent:
        found.append(f"{len(absent)} trained ones that the checkpoint does not have ({_listed(sorted(absent))})")
    raise CheckpointError(
        "Tensors of a checkpoint did not arrive in the model, which would go on with wrong weights.",
        where=checkpoint,
        expected="tensors of the same names in the checkpoint and in the model",
        found=" and ".join(found),
        fix="Make the model by from_pretrained of this folder, which knows the names, give it to the trainer, and "
        "resume from the same checkpoint. If another model wrote the checkpoint, use that one.",
    )


@contextmanager
def adapters_arriving(model: Any, checkpoint: Path) -> Iterator[None]:
    """Look at what PEFT says of the adapters that are loaded inside the `with` block; errors as `require_arrived`."""
    if not hasattr(model, "peft_config") or not hasattr(model, "load_adapter"):
        yield
        return
    load: Callable[..., Any] = model.load_adapter

    def load_adapter(*args: Any, **kwargs: Any) -> Any:
        # Trainer drops this answer.
        result = load(*args, **kwargs)
        require_arrived(model, result.missing_keys, result.unexpected_keys, checkpoint)
        return result

    # On the instance, for a moment: the class is shared.
    model.load_adapter = load_adapter
    try:
        yield
    finally:
        del model.load_adapter


def _listed(names: list[str]) -> str:
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join([*names[:SHOWN], *more])


def _is_there_already(model: nn.Module, names: list[str], checkpoint: Path) -> bool:
    """Return whether a model has the tensors of a checkpoint all the same, since it was made from its folder."""
    written = _compat.as_saved(model)
    known = set()
    for name, stored in _stored(checkpoint):
        if name in written:
            known.add(written[name].data_ptr())
            # All others were loaded just now.
            if name not in names or torch.equal(stored.to(written[name]), written[name]):
                continue
        return False
    return all(tensor.data_ptr() in known for tensor in written.values())


def _stored(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the safetensors files of a checkpoint by their names."""
    for path in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
