"""Load a model, a tokenizer or a configuration by its name, and say which setting is wrong if there is none."""

from __future__ import annotations

from typing import Any

from gere.errors import ConfigError


def load_pretrained(cls: Any, what: str, where: str, name: str, **settings: Any) -> Any:
    """Call `from_pretrained` of a class.

    Args:
        cls: Class with `from_pretrained`, such as `AutoTokenizer`.
        what: What is loaded, for the message.
        where: Setting or option that has the name.
        name: Folder or hub name.
        **settings: Further arguments of `from_pretrained`.

    Raises:
        ConfigError: If it cannot be loaded.
    """
    try:
        return cls.from_pretrained(name, **settings)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"The {what} cannot be loaded.",
            where=where,
            expected="a folder or hub name for from_pretrained",
            found=f"{name!r}: {type(error).__name__}: {error}",
            fix="Correct the name; without a network, give the folder.",
        ) from error
