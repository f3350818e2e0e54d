"""Weights of a saved model or adapter on disk: which files they are in, and their tensors, one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from gere._records import MisfitError, typed
from gere.blend.base import BaseWeights
from gere.errors import BlendError
from gere.model.adapters import SHIFTING_INITS

CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "config.json", "adapter_config.json", "adapter_model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


class Stored(NamedTuple):
    """The weights of a saved model or adapter.

    Attributes:
        name: Folder or hub name, as it was given.
        places: File of each tensor.
        shapes: Shape of each tensor.
        config: `adapter_config.json` of an adapter, else `config.json`; empty if it is not there.
        is_adapter: Whether this is a PEFT adapter.
    """

    name: str
    places: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    config: Mapping[str, Any]
    is_adapter: bool

    @property
    def files(self) -> list[Path]:
        """The files with weights, each once."""
        return list(dict.fromkeys(self.places.values()))

    def read(self, name: str) -> Tensor:
        """Read a tensor into main memory."""
        return BaseWeights({name: (self.places[name], name)}).read(name)


def read_tuned(folder: Path) -> Stored:
    """Find the weights of a tuned model or of a LoRA adapter in its folder.

    Raises:
        BlendError: If there are none, if they are pickled or quantized, or if the adapter is of another kind.
    """
    if not folder.is_dir():
        raise BlendError(
            "The tuned model is no folder.",
            where=f"TUNED, {folder}",
            expected="a folder that save_pretrained or Trainer.save_model wrote",
            found="a file" if folder.exists() else "nothing",
            fix="Correct the path.",
        )
    if not (folder / ADAPTER_CONFIG).is_file():
        stored = _stored(str(folder), "TUNED", None)
        _refuse_quantized(stored, "TUNED")
        return stored
    config = _read_json(folder / ADAPTER_CONFIG)
    _refuse_other_adapters(folder / ADAPTER_CONFIG, config)
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise _no_weights(f"TUNED, {folder}", ADAPTER_WEIGHTS, _pickled(folder))
    shapes = _shapes(file)
    return Stored(str(folder), dict.fromkeys(shapes, file), shapes, config, is_adapter=True)


def read_base(name: str, revision: str | None, *, quantized: bool) -> Stored:
    """Find the weights of a base model.

    Args:
        name: Folder or hub name.
        revision: Revision on the hub.
        quantized: Whether it may be quantized. Beside an adapter it may.

    Raises:
        BlendError: If there are none, or if they are pickled or quantized.
    """
    stored = _stored(name, "--base", revision)
    if not quantized:
        _refuse_quantized(stored, "--base")
    return stored


def base_name(tuned: Stored, given: str | None) -> str:
    """Return the name of the base: the one that was given, or the one that the tuned model names itself.

    Raises:
        BlendError: If there is none, or if it is the tuned model.
    """
    named = given
    if named is None and tuned.is_adapter:
        named = tuned.config.get("base_model_name_or_path")
    elif named is None:
        # Many tools write the name of a folder that is gone, or that of the tuned model itself.
        path = tuned.config.get("_name_or_path")
        named = path if path and Path(path).is_dir() and not _same(path, tuned.name) else None
    if not named or _same(named, tuned.name):
        raise BlendError(
            "The base model is not known.",
            where="--base",
            expected="folder or hub name of the model that TUNED was tuned from",
            found=f"{named!r}, the tuned model itself" if named else "nothing, and TUNED names none that is there",
            fix="Give --base.",
        )
    return named


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _stored(name: str, option: str, revision: str | None) -> Stored:
    """Find the weights of a full model, in the order in which `from_pretrained` looks for them."""
    where = f"{option}, {name}"
    file = _file(name, SAFE_WEIGHTS_NAME, revision)
    if file is not None:
        files = {file}
    else:
        index = _file(name, SAFE_WEIGHTS_INDEX_NAME, revision)
        if index is None:
            pickled = [file for file in PICKLED if _file(name, file, revision) is not None]
            raise _no_weights(where, f"{SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}", pickled)
        try:
            parts = sorted({*typed(_read_json(index).get("weight_map"), dict[str, str], "weight_map").values()})
        except MisfitError as error:
            raise _unreadable(index, "a file of weights for each name", error) from error
        found = [_file(name, part, revision) for part in parts]
        lacking = [part for part, path in zip(parts, found, strict=True) if path is None]
        if lacking:
            raise _no_weights(where, f"all files of {SAFE_WEIGHTS_INDEX_NAME}", [], f"no {', '.join(lacking[:3])}")
        files = {path for path in found if path is not None}
    places: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(files):
        own = _shapes(path)
        shapes |= own
        places |= dict.fromkeys(own, path)
    config = _file(name, CONFIG, revision)
    return Stored(name, places, shapes, _read_json(config) if config else {}, is_adapter=False)


def _file(name: str, file: str, revision: str | None) -> Path | None:
    """Return a file of a folder, or of the hub, where it is fetched if it is not here."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        found = cached_file(name, file, revision=revision)
    except (OSError, ValueError):
        return None
    return Path(found) if found else None


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, "a safetensors file", error) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a JSON {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, "a JSON object", error) from error
    return content


def _unreadable(path: Path, expected: str, error: Exception) -> BlendError:
    return BlendError(
        "A file of a model cannot be read.",
        where=path,
        expected=expected,
        found=f"{type(error).__name__}: {error}",
        fix="Save or fetch the model again.",
    )


def _pickled(folder: Path) -> list[str]:
    return [name for name in PICKLED if (folder / name).is_file()]


def _no_weights(where: str, expected: str, pickled: list[str], found: str = "no such file") -> BlendError:
    fix = "Give the folder of a saved model, or a hub name with safetensors."
    if pickled:
        # Loading a pickle runs the code in it.
        found = f"{pickled[0]}, which is pickled and is not read"
        fix = "Save the model with save_pretrained(folder, safe_serialization=True)."
    return BlendError("There are no weights that can be read.", where=where, expected=expected, found=found, fix=fix)


def _refuse_quantized(stored: Stored, option: str) -> None:
    quantized = stored.config.get("quantization_config")
    if quantized:
        raise BlendError(
            "Quantized weights have no line to other weights.",
            where=f"{option}, {stored.name}",
            expected="weights of float32, float16 or bfloat16, or a LoRA adapter as TUNED",
            found=quantized.get("quant_method", "a quantization_config in config.json"),
            fix="Give the folder of the adapter, or of weights that are not quantized.",
        )


def _refuse_other_adapters(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse adapters whose weights are not base + B A, linear in B."""
    found = None
    init = config.get("init_lora_weights", True)
    if config.get("peft_type") != "LORA":
        found = f"peft_type {config.get('peft_type')!r}"
    elif config.get("use_dora"):
        found = "use_dora, which also trains the length of each column"
    elif config.get("trainable_token_indices"):
        found = "trainable_token_indices"
    elif isinstance(init, str) and init.lower().startswith(SHIFTING_INITS):
        found = f"init_lora_weights {init!r}, which moved a part of the base weights into the adapter"
    if found is not None:
        raise BlendError(
            "This kind of adapter has no line to its base model here.",
            where=path,
            expected="LoRA, with modules_to_save or without",
            found=found,
            fix="Merge it into the base model (merge_and_unload), save that, and give it as TUNED with --base.",
        )
