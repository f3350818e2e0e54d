"""The logger of the library, and lines that a user is to see without asking for them."""

from __future__ import annotations

import logging

logger = logging.getLogger("gere")


def say(text: str) -> None:
    """Log a line at level INFO; where nobody has configured logging, show it on standard error.

    Python shows warnings alone there. A training must say what was kept and what was forgotten to everybody.
    """
    if logger.hasHandlers():
        logger.info(text)
    elif logging.lastResort is not None:
        logging.lastResort.handle(logger.makeRecord("gere", logging.INFO, __name__, 0, text, (), None))
