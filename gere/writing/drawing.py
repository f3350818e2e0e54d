"""Sampling until enough texts are kept, by all processes together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from gere.errors import ReplaySetError
from gere.ranks import ALONE, Ranks
from gere.writing.sieve import Sample, Sieve

MOST_DRAWS = 4  # samples that are drawn at most for each text that is asked for


def draw(
    batch: Callable[[int], Sequence[Sample]], wanted: int, ranks: Ranks = ALONE, *, progress: bool = False
) -> Sieve:
    """Sample until enough is kept; the batches are dealt over the processes, and their order is that of their numbers.

    Args:
        batch: Gives the samples of a batch by its number.
        wanted: Texts to keep.
        ranks: All processes; each must call this.
        progress: Show a progress bar.

    Raises:
        ReplaySetError: If four times as many samples did not give enough.
        RankFailedError: If another process failed.
    """
    sieve, number = Sieve(wanted), 0
    with tqdm(total=wanted, desc="replay texts of the base model", disable=not progress) as bar:
        while not sieve.full:
            mine = number + ranks.index
            for samples in ranks.ask(lambda mine=mine: batch(mine)):  # type: ignore[misc]
                sieve.add(samples)
                if not sieve.full and sieve.counts["drawn"] >= MOST_DRAWS * wanted:
                    raise _too_few(sieve)  # on all ranks at the same batch, whatever their number
            number += ranks.count
            bar.update(len(sieve.texts) - bar.n)
    return sieve


def _too_few(sieve: Sieve) -> ReplaySetError:
    counts: Mapping[str, int] = sieve.counts
    return ReplaySetError(
        "The base model gives too few usable texts.",
        where='gere_config.replay_dataset="self"',
        expected=f"{counts['asked']} texts (gere_config.replay_size) of at most {MOST_DRAWS} times as many samples",
        found=str(sieve),
        fix="Too short: set gere_config.max_length higher, or self_prompt to the other one. Duplicates or loops: set "
        "self_temperature or self_top_p higher. Or set replay_size lower, or replay_dataset to other texts.",
    )
