"""The command `gere`: replay files and anchors without a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gere.cli import replay

COMMANDS: tuple[Callable[[Any], None], ...] = (replay.add_parser,)
