"""Samples of the base model that are usable as replay texts, drawn until there are enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from tqdm import tqdm

from gere.errors import ReplaySetError
from gere.ranks import ALONE, Ranks

LEAST_TOKENS = 8
# 64 samples of a story model with 15M weights had shares of 0.90 to 1.00. A loop of p tokens in n has about p / n.
LOOP_GRAM, LOOP_SHARE = 4, 0.5
MOST_DRAWS = 4  # samples for each text that is asked for


class Sample(NamedTuple):
    """A sampled text, and its token ids without those that end a text: one part, or a message and an answer."""

    text: str
    parts: Sequence[Sequence[int]]


class Sieve:
    """Keep the first usable samples in `texts`: long enough, no loop, each once.

    `counts` has the samples that were `drawn`, and those that were dropped: `too_short` (without text, under 8 tokens,
    or with an empty part), `loops` (see `is_loop`), `duplicates` (of a kept text, by `caseless`).
    """

    def __init__(self, wanted: int) -> None:
        self.texts: list[str] = []
        self.counts = {"asked": wanted, "drawn": 0, "too_short": 0, "duplicates": 0, "loops": 0}
        self._seen: set[str] = set()

    @property
    def full(self) -> bool:
        """Whether enough texts are kept."""
        return len(self.texts) >= self.counts["asked"]

    def add(self, samples: Iterable[Sample]) -> None:
        """Look at samples until enough are kept."""
        for sample in samples:
            if self.full:
                return
            self.counts["drawn"] += 1
            text = sample.text.strip()
            fault = self._fault(text, sample.parts)
            if fault is None:
                self.texts.append(text)
                self._seen.add(caseless(text))
            else:
                self.counts[fault] += 1

    def _fault(self, text: str, parts: Sequence[Sequence[int]]) -> str | None:
        if not text or not all(parts) or sum(map(len, parts)) < LEAST_TOKENS:
            return "too_short"
        # Each part alone: a long message would hide an answer that loops.
        if any(map(is_loop, parts)):
            return "loops"
        if caseless(text) in self._seen:
            return "duplicates"
        return None

    def __str__(self) -> str:
        """Count what was kept and dropped, for a log or an error."""
        dropped = "{too_short} too short, {duplicates} duplicates, {loops} loops".format(**self.counts)
        return f"{len(self.texts)} kept of {self.counts['drawn']} drawn; dropped: {dropped}"


def is_loop(tokens: Sequence[Any]) -> bool:
    """Return whether under half of the runs of four tokens are different ones. Fewer than four tokens are no loop.

    Example:
        >>> is_loop("the cat sat on the mat and then the dog sat down".split()), is_loop(["a", "b"] * 20)
        (False, True)
    """
    grams = [tuple(tokens[start : start + LOOP_GRAM]) for start in range(len(tokens) - LOOP_GRAM + 1)]
    return len(set(grams)) < LOOP_SHARE * len(grams)


def caseless(text: str) -> str:
    """Drop case and runs of spaces from a text, to find duplicates."""
    return " ".join(text.lower().split())


def draw(
    batch: Callable[[int], Sequence[Sample]], wanted: int, ranks: Ranks = ALONE, *, progress: bool = False
) -> Sieve:
    """Sample batches by their numbers, shared by the ranks, until enough texts are kept.

    Raises:
        ReplaySetError: If four samples for each text did not give enough.
    """
    sieve, number = Sieve(wanted), 0
    with tqdm(total=wanted, desc="replay texts of the base model", disable=not progress) as bar:
        while not sieve.full:
            # Every rank looks at all samples in the order of the batch numbers. Any number of ranks then keeps the
            # same texts, and gives up after the same batch.
            for samples in ranks.ask(partial(batch, number + ranks.index)):
                sieve.add(samples)
                if not sieve.full and sieve.counts["drawn"] >= MOST_DRAWS * wanted:
                    raise ReplaySetError(
                        "The base model gives too few usable texts.",
                        where='gere_config.replay_dataset="self"',
                        expected=f"{wanted} texts (gere_config.replay_size) of at most {MOST_DRAWS * wanted} samples",
                        found=str(sieve),
                        fix="Too short: set gere_config.max_length higher, or self_prompt to the other one. "
                        "Duplicates or loops: set self_temperature or self_top_p higher. Or set replay_size lower.",
                    )
            number += ranks.count
            bar.update(len(sieve.texts) - bar.n)
    return sieve
