"""The base weights on disk: in the files that the model was loaded from, or in a copy; read one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from gere._files import canonical_json, folder_errors, make_folder, require_space, sync_folder, write_atomic
from gere.cache.fingerprint import base_tensors, digest_of, weights_digest
from gere.errors import CacheMissingError
from gere.model.adapters import base_module
from gere.ranks import Ranks


class BaseWeights:
    """Reads base tensors by their names in the model.

    Args:
        places: For each name the file, and the name in it.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self._places = dict(places)

    def read(self, name: str) -> Tensor:
        """Read a tensor into main memory."""
        path, key = self._places[name]
        # The file is mapped for this tensor alone, and the clone lets go of the map: pages of a map count as memory.
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key).clone()
        return tensor


def find_base(model: nn.Module, folder: Path, digest: str, ranks: Ranks) -> BaseWeights:
    """Find the base weights of a model on disk, and check that they are those with a digest.

    They are in the files that the model was loaded from, in those that an earlier training found, or in a copy, which
    is made if the model comes from no file and has not moved yet.

    Args:
        model: The model without its distributed wrapper.
        folder: Cache folder, for the copy and for the place of the files.
        digest: Digest of the base weights, as an anchor has it.
        ranks: All processes; each must call this.

    Raises:
        CacheMissingError: If they are nowhere, and the model has moved.
        CacheFolderError: If the cache folder cannot be written.
    """
    name = f"base-{digest[:32]}"
    copy, pointer = folder / f"{name}.safetensors", folder / f"{name}.json"

    def look() -> BaseWeights | None:
        for file in (_loaded_from(model), _pointed_to(pointer), copy):
            try:
                places = _places(model, file, digest)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError):
                continue  # what cannot be read is not the base
            if file is not None and places:
                if file != copy and ranks.first_here:
                    # A model that was tuned from this base comes from other files, and must find these.
                    make_folder(folder)
                    write_atomic(pointer, canonical_json({"format_version": 1, "file": str(file.absolute())}))
                return BaseWeights(places)
        return None

    found = ranks.ask(look)
    if all(found):
        return found[ranks.index]  # type: ignore[return-value]
    if weights_digest(model, ranks) != digest:
        raise CacheMissingError(
            "The weights of the base model, to which base_decay pulls, are nowhere.",
            where=folder,
            expected=f"{copy.name}, or the files that the base model was loaded from",
            found="a model that has been tuned since, and whose files are others",
            fix="Set gere_hidden_state_saving_dir to the folder of the first run, or start from the base model.",
        )
    ranks.only(ranks.first_here, lambda: _write(model, copy))
    return BaseWeights({name: (copy, name) for name in base_tensors(model)})


def _loaded_from(model: nn.Module) -> Path | None:
    """Return the file of a model's weights, or of their index; `None` for a model that comes from no such file."""
    name = getattr(getattr(base_module(model), "config", None), "_name_or_path", "")
    if not name:
        return None
    for file in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME):
        # Without a network: what was loaded is in a folder, or in the cache of the hub.
        try:
            found = cached_file(name, file, local_files_only=True)
        except OSError:
            continue
        if found is not None:
            return Path(found)
    return None


def _pointed_to(pointer: Path) -> Path | None:
    try:
        return Path(json.loads(pointer.read_text(encoding="utf-8"))["file"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the files are then looked for as if there had been no pointer


def _places(model: nn.Module, file: Path | None, digest: str) -> dict[str, tuple[Path, str]]:
    """Return the place of each base tensor, if a file (or those of an index) has them all with this digest."""
    if file is None or not file.is_file():
        return {}
    if file.suffix == ".json":
        index = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        stored = {name: file.parent / part for name, part in index.items()}
    else:
        with safe_open(file, framework="pt") as content:
            stored = dict.fromkeys(content.keys(), file)
    tensors = base_tensors(model)
    places = {}
    for name, names in _names(model, tensors).items():
        for key in names:
            if key in stored:
                places[name] = stored[key], key
    if set(places) != set(tensors):
        return {}
    weights = BaseWeights(places)
    # A model may have been loaded in another precision than that of its files.
    read = ((name, weights.read(name).to(tensors[name].dtype)) for name in sorted(tensors))
    return places if digest_of(read) == digest else {}


def _names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return all names of each tensor: a file holds tied weights once, by any of their names."""
    by_address: dict[int, list[str]] = {}
    for name, tensor in base_module(model).state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            by_address.setdefault(tensor.data_ptr(), []).append(name)
    return {name: [name, *by_address.get(tensor.data_ptr(), [])] for name, tensor in tensors.items()}


def _write(model: nn.Module, copy: Path) -> None:
    """Copy the base weights of an untouched model."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in base_tensors(model).items()}
    make_folder(copy.parent)
    require_space(copy.parent, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    temporary = copy.with_name(f".{copy.name}.tmp")
    with folder_errors(copy.parent):
        save_file(tensors, temporary)
        with temporary.open("rb") as stream:
            # Without this, a loss of power after the rename can leave the final name on an empty file.
            os.fsync(stream.fileno())
        temporary.replace(copy)
        sync_folder(copy.parent)
