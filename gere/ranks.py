"""The processes of a run, and steps that succeed on all of them or fail on all of them.

Every process must call each method that exchanges something: `gather`, `together`, `only`, `ask`, `first_here_first`.
If such a step fails on one process, that one raises its own error and all others raise `RankFailedError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from gere.errors import RankFailedError

T = TypeVar("T")


def _alone(item: Any) -> list[Any]:
    return [item]


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        index: Rank of this process.
        count: Number of processes.
        first_here: Whether this is the first process of its machine.
        lockstep: Whether all processes must call the model equally often, since each holds a part of its weights.
        gather: Exchange a small object. Returns the objects of all processes in the order of their ranks.
    """

    index: int = 0
    count: int = 1
    first_here: bool = True
    lockstep: bool = False
    gather: Callable[[Any], list[Any]] = _alone

    def together(self, action: Callable[[], T]) -> T:
        """Run an action on every process, and return what it gives here.

        The action must not exchange anything itself: a process that fails before would leave the others waiting.
        """
        if self.count == 1:
            return action()
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        # A process that fails must still take part, or the others wait here until they time out.
        reports = self.gather(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        failed = [rank for rank, report in enumerate(reports) if report]
        if failed:
            where = f"rank {failed[0]}"
            if len(failed) > 1:
                where += f" of the ranks {failed} that failed"
            raise RankFailedError(
                "Another process failed, so that this one cannot continue.",
                where=where,
                found=reports[failed[0]],
                fix="Fix what that rank reports, and start all processes again.",
            )
        return result

    def only(self, here: bool, action: Callable[[], T]) -> T | None:
        """Run an action as in `together`, but only on the processes where `here` holds; the others get `None`."""
        if here:
            return self.together(action)
        self.together(lambda: None)
        return None

    def ask(self, question: Callable[[], T]) -> list[T]:
        """Run a question as in `together`, and return the answers of all processes in the order of their ranks."""
        return self.gather(self.together(question))

    def share(self, items: Sequence[T]) -> list[T]:
        """Return the items that this process works on; `items` must be the same on every process.

        Every process gets equally many, since each may have to call the model as often as the others. For that, the
        last item may be given to several.
        """
        own = list(items[self.index :: self.count])
        return own + [items[-1]] * (math.ceil(len(items) / self.count) - len(own))

    def first_here_first(self, action: Callable[[], T]) -> T:
        """Run an action on the first process of each machine, then on the others, which find what it left."""
        early = self.only(self.first_here, action)
        late = self.only(not self.first_here, action)
        return early if self.first_here else late  # type: ignore[return-value]


ALONE = Ranks()
