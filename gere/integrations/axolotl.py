"""Axolotl with replay: a plugin that wraps its trainer, set by the section `gere` of its config."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gere._log import logger
from gere.config import kwargs_of_section
from gere.errors import ConfigError, GeReError, UnsupportedSettingError

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

try:
    from axolotl.integrations.base import BasePlugin, PluginManager
    from pydantic import BaseModel
except ImportError as error:
    BasePlugin = BaseModel = object
    _missing: ImportError | None = error
else:
    _missing = None

SECTION = "gere"
# Axolotl counts the steps of a run by the task rows alone, and packs them by its own batch sampler. No task row can
# make room for a replay row.
DEFAULTS = {"replay_mode": "add"}
# Kinds of training whose batches are no rows of tokens and labels.
REFUSED = ("rl", "reward_model", "process_reward_model")


class _AsAxolotl(logging.Handler):
    """Hands what Axolotl would drop, records below a warning, to a logger of Axolotl's."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            logging.getLogger(f"axolotl.{record.name}").log(record.levelno, record.getMessage())


def _show_lines() -> None:
    """Let the line at the start of a training and the answer at its end be seen."""
    if not any(isinstance(handler, _AsAxolotl) for handler in logger.handlers):
        logger.addHandler(_AsAxolotl())
    logger.setLevel(logging.INFO)


class GeReArgs(BaseModel):
    """Schema of the section `gere`, which Axolotl adds to that of its config.

    Attributes:
        gere: The arguments of `GeReTrainer` and the fields of `GeReConfig`.
    """

    gere: dict[str, Any] | None = None


class GeRePlugin(BasePlugin):
    """Replay of general texts for Axolotl's supervised fine-tuning.

    Named in `plugins:` as `gere.integrations.axolotl.GeRePlugin`. It wraps the trainer class that Axolotl would take
    without it: of another plugin, of `trainer_cls`, or its own.

    Raises:
        GeReError: If Axolotl is not installed.
    """

    def __init__(self) -> None:
        if _missing is not None:
            raise GeReError(
                "Axolotl cannot be imported.",
                where="gere.integrations.axolotl.GeRePlugin",
                expected="axolotl.integrations.base and pydantic",
                found=str(_missing),
                fix="Install Axolotl into this environment; without it, use gere.GeReTrainer.",
            ) from _missing
        super().__init__()

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the section before anything is loaded.

        Args:
            cfg: The config as it was written.

        Raises:
            ConfigError: If there is no section `gere`, a name in it is unknown, or a value cannot be used.
            UnsupportedSettingError: If the config asks for a kind of training without replay.
        """
        if self._named_in(cfg):
            self._replay_kwargs(cfg)

    def get_input_args(self) -> str:
        """Name of the class that extends the schema of the config."""
        return f"{GeReArgs.__module__}.{GeReArgs.__qualname__}"

    def get_trainer_cls(self, cfg: Mapping[str, Any]) -> type[Trainer] | None:
        """Return the trainer class with replay, its settings bound; `None` for a config without this plugin."""
        if not self._named_in(cfg):
            return None
        _show_lines()
        return _bound(self._parent(cfg), self._replay_kwargs(cfg))

    def add_callbacks_post_trainer(self, cfg: Mapping[str, Any], trainer: Trainer) -> list[TrainerCallback]:
        """Add no callbacks, but refuse a trainer without replay from another plugin."""
        from gere.trainer import GeReMixin

        # Axolotl takes the trainer of the first plugin that has one. This is the first time that we see which.
        if self._named_in(cfg) and not isinstance(trainer, GeReMixin):
            raise UnsupportedSettingError(
                "Another plugin chose the trainer class, so that there would be no replay.",
                where="plugins",
                expected=f"{self._name} before every plugin that brings a trainer",
                found=type(trainer).__name__,
                fix="Put it first: it wraps the trainer of the others.",
            )
        return []

    @property
    def _name(self) -> str:
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def _named_in(self, cfg: Mapping[str, Any]) -> bool:
        # Axolotl keeps plugins of earlier configs of the same process, and asks them, too.
        return self._name in (cfg.get("plugins") or ())

    def _replay_kwargs(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        section = cfg.get(SECTION)
        if section is None:
            raise ConfigError(
                "The config names the plugin of replay and has no section for it.",
                where="the Axolotl config",
                expected=f"{SECTION}: with settings such as num_interpolate_per_batch: 4, replay_dataset: texts.jsonl",
                found=f"no key {SECTION}",
                fix=f"Add the section; `{SECTION}: {{}}` takes every default. Without replay, take out the plugin.",
            )
        refused = {name: cfg.get(name) for name in REFUSED}
        if cfg.get("model_config_type") == "mamba":
            refused["model_config_type"] = "mamba"
        for name, value in refused.items():
            if value:
                raise UnsupportedSettingError(
                    "Axolotl would train with a class that cannot replay.",
                    where=name,
                    expected="supervised fine-tuning or pretraining of a causal language model",
                    found=repr(value),
                    fix="Take the setting out; or take out the plugin for training without replay.",
                )
        # Anything but settings by name is refused by `kwargs_of_section`.
        if isinstance(section, Mapping):
            section = {**DEFAULTS, **section}
        return kwargs_of_section(section, f"section {SECTION} of the Axolotl config")

    def _parent(self, cfg: Mapping[str, Any]) -> type[Trainer]:
        """Return the trainer class that Axolotl would take without this plugin."""
        for plugin in PluginManager.get_instance().plugins.values():
            # Asking ourselves would never end.
            if not isinstance(plugin, GeRePlugin):
                chosen = plugin.get_trainer_cls(cfg)
                if chosen is not None:
                    return chosen
        # Heavy, and Axolotl loads plugins before it.
        from axolotl.core.trainers.base import AxolotlTrainer
        from axolotl.utils.import_helper import get_cls_from_module_str

        if cfg.get("trainer_cls"):
            return get_cls_from_module_str(cfg.get("trainer_cls"))
        return AxolotlTrainer


def _bound(parent: type[Trainer], kwargs: Mapping[str, Any]) -> type[Trainer]:
    """Make a trainer class with replay whose arguments are set."""
    from gere.trainer import gere_trainer

    replaying: Any = gere_trainer(parent)

    # A class and no `functools.partial`, since Axolotl asks for its bases.
    class Replaying(replaying):
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **{**kwargs, **given})

    Replaying.__name__ = Replaying.__qualname__ = replaying.__name__
    return Replaying
