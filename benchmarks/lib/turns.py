"""Two trainings that take turns, a step each, so that other work of the machine falls on both; where the time goes."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

PARTS = ("data", "forward", "loss", "backward", "optimizer", "logging and other")
DATA, FORWARD, LOSS, BACKWARD, OPTIMIZER, OTHER = PARTS


class Turns:
    """Lets one of several threads run at a time, in their order, until each has left."""

    def __init__(self, names: Sequence[str]) -> None:
        self._order = deque(names)
        self._changed = threading.Condition()

    def take(self, name: str) -> None:
        """Wait for the turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == name)

    def hand_on(self, name: str) -> None:
        """Let the next one run."""
        with self._changed:
            self._order.rotate(-1)
            self._changed.notify_all()

    def leave(self, name: str) -> None:
        """Take no more turns."""
        with self._changed:
            self._order.remove(name)
            self._changed.notify_all()


def together(jobs: dict[str, Callable[[], Any]], turns: Turns) -> None:
    """Run jobs that take turns, each in a thread; the first error is raised."""
    errors: list[BaseException] = []

    def work(name: str, job: Callable[[], Any]) -> None:
        turns.take(name)
        try:
            job()
        except BaseException as error:
            errors.append(error)
        finally:
            turns.leave(name)

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Clock:
    """Seconds of each step and of its parts, and the tokens that the model was given.

    The parts on a CPU, and `work`, are seconds of CPU time, to which other processes of the machine do not add.

    Args:
        name: Whose turn it is.
        turns: Who else runs.
        cuda: Whether a GPU does the work.
        parts_from: First step in which the GPU is waited for at every mark, which parts need and speed does not.
    """

    def __init__(self, name: str, turns: Turns, cuda: bool, parts_from: int) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.work: list[float] = []
        self.parts: list[Counter[str]] = []
        self.tokens: list[int] = []
        self.calls: list[int] = []
        self._turns = turns
        self._cuda = cuda
        self._parts_from = parts_from
        self._timer = time.perf_counter if cuda else time.process_time
        self._stack: list[str] = []
        self._mark = self._begun = 0.0

    def step(self) -> None:
        """Close the step at hand, let the other one run, and begin a step."""
        self.close()
        self._turns.hand_on(self.name)
        self._turns.take(self.name)
        for of_steps, empty in ((self.parts, Counter()), (self.tokens, 0), (self.calls, 0)):
            of_steps.append(empty)  # type: ignore[attr-defined]
        self._stack = [OTHER]
        self._mark, self._begun = self._timer(), time.perf_counter()

    def close(self) -> None:
        """Close the step at hand, if one is."""
        if self._stack:
            self._note(always=True)
            self.seconds.append(time.perf_counter() - self._begun)
            self.work.append(sum(self.parts[-1].values()))
            self._stack = []

    def enter(self, part: str) -> None:
        """Begin a part; the part around it waits."""
        if self._stack:
            self._note()
            self._stack.append(part)

    def leave(self) -> None:
        """End the innermost part."""
        if self._stack:
            self._note()
            self._stack.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part as a block."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def count(self, tokens: int) -> None:
        """Note a call of the model."""
        if self._stack:
            self.tokens[-1] += tokens
            self.calls[-1] += 1

    def _note(self, always: bool = False) -> None:
        if self._cuda and (always or len(self.parts) > self._parts_from):
            torch.cuda.synchronize()
        now = self._timer()
        self.parts[-1][self._stack[-1]] += now - self._mark
        self._mark = now


class Timed(Trainer):
    """Tells a clock where it is; stands before a trainer class in the bases."""

    clock: Clock

    def watch(self, clock: Clock) -> None:
        """Use this clock."""
        self.clock = clock
        model: Any = self.model
        decoder = model.get_decoder()
        decoder.register_forward_hook(self._count)
        for module in (decoder, model.get_output_embeddings()):
            module.register_forward_pre_hook(lambda *_: clock.enter(FORWARD))
            module.register_forward_hook(lambda *_: clock.leave())
        self.add_callback(_OptimizerClock(clock))
        backward, clip = self.accelerator.backward, self.accelerator.clip_grad_norm_
        self.accelerator.backward = _in_part(clock, BACKWARD, backward)
        self.accelerator.clip_grad_norm_ = _in_part(clock, OPTIMIZER, clip)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """A step begins."""
        self.clock.step()
        with self.clock.part(DATA):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Count as loss what is neither data, model nor backward pass."""
        with self.clock.part(LOSS):
            return super().training_step(*args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.part(DATA):
            return super()._prepare_inputs(*args, **kwargs)

    def _count(self, decoder: Any, args: Any, output: Any) -> None:
        self.clock.count(output.last_hidden_state.shape[:2].numel())


class _OptimizerClock(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._clock.enter(OPTIMIZER)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._clock.leave()


def _in_part(clock: Clock, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.part(part):
            return function(*args, **kwargs)

    return timed
