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
from gere.cache.fingerprint import base_tensors, digest_of, own_name, weights_digest
from gere.errors import CacheMissingError
from gere.model.adapters import base_module
from gere.ranks import Ranks

ROWS = "gere_rows_with_base"


class BaseWeights:
    """Reads base tensors by their names in the model.

    Args:
        places: For each name the file, and the name in it.
        rows: Number of rows that have a base, for each tensor that got more before the training, as the embeddings of
            added tokens did.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]], rows: Mapping[str, int] | None = None) -> None:
        self._places = dict(places)
        self.rows = dict(rows or {})

    def read(self, name: str) -> Tensor:
        """Read a tensor into main memory; without the rows that have no base."""
        path, key = self._places[name]
        # The file is mapped for this tensor alone, and the clone lets go of the map: pages of a map count as memory.
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_slice(key)[: self.rows[name]] if name in self.rows else file.get_tensor(key)
            return tensor.clone()


def rows_with_base(model: nn.Module) -> dict[str, int]:
    """Return the number of rows that the files of a model have, for each weight that has more in memory.

    Args:
        model: The model without its distributed wrapper; its weights may be wrapped by PEFT.

    Returns:
        The numbers, by the names of `base_tensors`; nothing for a model that comes from no file.
    """
    file = _loaded_from(model)
    if file is None:
        return {}
    found = {}
    try:
        shapes = _shapes(file)
        tensors = base_tensors(model)
        for name, names in _names(model, tensors).items():
            stored = next((shapes[key] for key in names if shapes.get(key)), None)
            shape = list(tensors[name].shape)
            if stored and shape and stored[0] < shape[0] and stored[1:] == shape[1:]:
                found[name] = stored[0]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return {}  # what cannot be read is not the base
    return found


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
                return BaseWeights(places, _rows_of(file))
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
    return BaseWeights({name: (copy, name) for name in base_tensors(model)}, _rows_of(copy))


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
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # the files are then looked for as if there had been no pointer


def _places(model: nn.Module, file: Path | None, digest: str) -> dict[str, tuple[Path, str]]:
    """Return the place of each base tensor, if a file (or those of an index) has them all with this digest."""
    if file is None or not file.is_file():
        return {}
    stored = _stored(file)
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


def _stored(file: Path) -> dict[str, Path]:
    """Return the file of each tensor that a file has, or those of an index."""
    if file.suffix == ".json":
        index = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        return {name: file.parent / part for name, part in index.items()}
    with safe_open(file, framework="pt") as content:
        return dict.fromkeys(content.keys(), file)


def _shapes(file: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor that a file has, or those of an index."""
    shapes: dict[str, list[int]] = {}
    for part in {*_stored(file).values()}:
        with safe_open(part, framework="pt") as content:
            shapes |= {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    return shapes


def _rows_of(file: Path) -> dict[str, int]:
    """Return what a copy says about rows without a base; nothing for other files."""
    if file.suffix == ".json":
        return {}
    with safe_open(file, framework="pt") as content:
        rows: dict[str, int] = json.loads((content.metadata() or {}).get(ROWS, "{}"))
    return rows


def _names(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return all names of each tensor: a file holds tied weights once, by any of their names."""
    by_address: dict[int, list[str]] = {}
    for name, tensor in base_module(model).state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            by_address.setdefault(tensor.data_ptr(), []).append(own_name(name))
    return {name: [name, *by_address.get(tensor.data_ptr(), [])] for name, tensor in tensors.items()}


def _write(model: nn.Module, copy: Path) -> None:
    """Copy the base weights of an untouched model."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in base_tensors(model).items()}
    make_folder(copy.parent)
    require_space(copy.parent, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    temporary = copy.with_name(f".{copy.name}.tmp")
    with folder_errors(copy.parent):
        try:
            save_file(tensors, temporary, metadata={ROWS: json.dumps(rows_with_base(model))})
            with temporary.open("rb") as stream:
                # Without this, a loss of power after the rename can leave the final name on an empty file.
                os.fsync(stream.fileno())
            temporary.replace(copy)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(copy.parent)
