"""The command `gere`: replay files and anchors without a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gere.cli import replay
from gere.cli.cache import add_cache

COMMANDS: tuple[Callable[[Any], None], ...] = (add_cache, replay.add_parser)
