"""The processes of a run as the library needs them: who they are, and steps that succeed or fail on all of them."""

from __future__ import annotations

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
        gather: Exchanges a small object: gives the objects of all processes in the order of their ranks. Every
            process must call it.
    """

    index: int = 0
    count: int = 1
    first_here: bool = True
    lockstep: bool = False
    gather: Callable[[Any], list[Any]] = _alone

    def together(self, action: Callable[[], T]) -> T:
        """Run an action on every process; if it fails on one, it fails on all, and none waits for ever.

        Args:
            action: What to do. It must not call `gather` or `together` itself.

        Returns:
            What the action gave here.

        Raises:
            RankFailedError: If the action failed on another process; here, its own error.
        """
        if self.count == 1:
            return action()
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        reports = self.gather(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        failed = [rank for rank, report in enumerate(reports) if report]
        if failed:
            raise RankFailedError(
                "Another process failed, so that this one cannot go on.",
                where=f"rank {failed[0]}" + (f" of the ranks {failed} that failed" if failed[1:] else ""),
                found=reports[failed[0]],
                fix="Mend what that rank reports, and start all processes again.",
            )
        return result

    def ask(self, question: Callable[[], T]) -> list[T]:
        """Ask every process; answers in the order of their ranks. If one cannot answer, all fail as in `together`."""
        return self.gather(self.together(question))

    def share(self, items: Sequence[T]) -> list[T]:
        """Items that this process works on.

        Every process gets equally many, since each may have to call the model as often as the others; for that, the
        last item may be given to several.

        Args:
            items: The items of all processes, the same on each.
        """
        own = list(items[self.index :: self.count])
        return own + [items[-1]] * (-(-len(items) // self.count) - len(own))

    def first_here_first(self, action: Callable[[], T]) -> T:
        """Run an action on the first process of each machine, then on the others, which find what it left."""
        early = self.together(lambda: action() if self.first_here else None)
        late = self.together(lambda: None if self.first_here else action())
        return early if self.first_here else late  # type: ignore[return-value]


ALONE = Ranks()
