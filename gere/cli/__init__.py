"""The command `gere`: replay files and anchors without a training, sequences of tasks, and the report of trainings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gere.cli import replay, sequence
from gere.cli.cache import add_cache
from gere.cli.report import add_report

COMMANDS: tuple[Callable[[Any], None], ...] = (add_cache, replay.add_parser, sequence.add_parser, add_report)
