"""gere's settings in the configuration that a tracker shows: W&B, Trackio, TensorBoard, MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gere.config import CONFIG_FIELDS
from gere.session.plan import ReplaySettings

MLFLOW_LONGEST = 250  # characters of a parameter


def _wandb(callback: Any, shown: Mapping[str, Any]) -> None:
    if callback._wandb.run is not None:
        callback._wandb.config.update({"gere": dict(shown)}, allow_val_change=True)


def _trackio(callback: Any, shown: Mapping[str, Any]) -> None:
    callback._trackio.config.update({"gere": dict(shown)}, allow_val_change=True)


def _tensorboard(callback: Any, shown: Mapping[str, Any]) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_text("gere", json.dumps(shown, indent=2))


def _mlflow(callback: Any, shown: Mapping[str, Any]) -> None:
    if callback._initialized:
        callback._ml_flow.log_params({f"gere/{name}": str(value)[:MLFLOW_LONGEST] for name, value in shown.items()})


# By the class of the reporter, which keeps its connection to itself.
TRACKERS: Mapping[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "WandbCallback": _wandb,
    "TrackioCallback": _trackio,
    "TensorBoardCallback": _tensorboard,
    "MLflowCallback": _mlflow,
}


def tell_trackers(callbacks: Iterable[Any], settings: ReplaySettings, anchor: str) -> None:
    """Add the settings of replay, and the key of the anchor, to the configuration of a run in each tracker."""
    shown = {
        "anchor": anchor,
        "num_interpolate_per_batch": settings.rows_per_step,
        "w_strategy": settings.w_strategy,
        **{name: _shown(getattr(settings.config, name)) for name in CONFIG_FIELDS if name != "anchor"},
    }
    for callback in callbacks:
        tell = TRACKERS.get(type(callback).__name__)
        if tell is not None:
            tell(callback, shown)


def _shown(value: Any) -> Any:
    """Write a setting for a person: of texts their number."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "__len__") and not isinstance(value, tuple):
        return f"{type(value).__name__} of {len(value)}"
    return str(value)
