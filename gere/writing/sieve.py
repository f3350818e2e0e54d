"""Which texts of a language model are worth replaying: long enough, no loop, each once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

LEAST_TOKENS = 8
# 64 samples of a story model with 15M weights had shares of 0.90 to 1.00; a loop of p tokens in n has about p / n.
LOOP_GRAM, LOOP_SHARE = 4, 0.5


class Sample(NamedTuple):
    """A text as the model gave it.

    Attributes:
        text: The text.
        parts: The tokens that were sampled for it, without those that end a text: one part, or the user's message
            and the answer.
    """

    text: str
    parts: Sequence[Sequence[int]]


def is_loop(tokens: Sequence[Any]) -> bool:
    """Whether a text repeats itself more than it goes on: under half of its runs of four tokens are different ones.

    Args:
        tokens: Tokens, or words. Fewer than four are no loop.

    Example:
        >>> is_loop("the cat sat on the mat and then the dog sat down".split()), is_loop(["a", "b"] * 20)
        (False, True)
    """
    grams = [tuple(tokens[start : start + LOOP_GRAM]) for start in range(len(tokens) - LOOP_GRAM + 1)]
    return len(set(grams)) < LOOP_SHARE * len(grams)


def normalised(text: str) -> str:
    """A text without regard to case and spaces, for the search of duplicates."""
    return " ".join(text.lower().split())


class Sieve:
    """Keeps the first usable samples, in the order in which they come.

    Args:
        wanted: Texts to keep.

    Attributes:
        texts: What was kept.
        counts: Samples that were `drawn`, and those that were dropped: `too_short` (without text, under 8 tokens, or
            with an empty part), `loops` (see `is_loop`), `duplicates` (of a kept text, but for case and spaces).
    """

    def __init__(self, wanted: int) -> None:
        self.texts: list[str] = []
        self.counts = {"asked": wanted, "drawn": 0, "too_short": 0, "duplicates": 0, "loops": 0}
        self._seen: set[str] = set()

    @property
    def full(self) -> bool:
        """Whether enough was kept."""
        return len(self.texts) >= self.counts["asked"]

    def add(self, samples: Iterable[Sample]) -> None:
        """Look at samples until enough is kept."""
        for sample in samples:
            if self.full:
                return
            self.counts["drawn"] += 1
            text = sample.text.strip()
            fault = self._fault(text, sample.parts)
            if fault is None:
                self.texts.append(text)
                self._seen.add(normalised(text))
            else:
                self.counts[fault] += 1

    def _fault(self, text: str, parts: Sequence[Sequence[int]]) -> str | None:
        if not text or not all(parts) or sum(map(len, parts)) < LEAST_TOKENS:
            return "too_short"
        if any(map(is_loop, parts)):
            return "loops"
        return "duplicates" if normalised(text) in self._seen else None

    def __str__(self) -> str:
        """What was kept and dropped, for a log or an error."""
        dropped = "{too_short} too short, {duplicates} duplicates, {loops} loops".format(**self.counts)
        return f"{len(self.texts)} kept of {self.counts['drawn']} drawn; dropped: {dropped}"
