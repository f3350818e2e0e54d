"""The logger of the library, and lines that a user is to see without asking for them."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("gere")


def say(text: str) -> None:
    """Log a line at level INFO; where nobody has configured logging, write it to standard error.

    Python shows warnings alone there. A training must say what was kept and what was forgotten to everybody.
    """
    if logger.hasHandlers():
        logger.info(text)
        return
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)  # above a progress bar, not behind it
