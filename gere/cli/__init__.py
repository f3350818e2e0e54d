"""The command `gere`: replay files and anchors without a training, and trainings over sequences of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gere.cli import replay, sequence
from gere.cli.cache import add_cache

COMMANDS: tuple[Callable[[Any], None], ...] = (add_cache, replay.add_parser, sequence.add_parser)
