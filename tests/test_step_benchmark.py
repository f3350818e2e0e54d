"""The benchmark of a step compares what it says: the same rows, in turns, parts that add up to the step."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks.lib.pair import SIDES, Pair
from benchmarks.lib.turns import DATA, FORWARD, LOSS, OTHER, Clock, Turns, together
from benchmarks.step import memory_of_both, one_side, parse_arguments, time_both


@pytest.fixture
def options(tmp_path):
    words = ["--random", "tiny", "--length", "16", "--steps", "3", "--warm-up", "1", "--w-strategy", "dy", "--cpu"]
    options = parse_arguments(words)
    options.folder = tmp_path
    return options


@pytest.mark.parametrize("micro", [4, 16])
def test_both_sides_see_the_same_rows_in_every_step(options, micro):
    options.micro_batch_size, seen = micro, {}
    pair = Pair(options, 3)
    for side in SIDES:
        trainer, turns = pair.trainer(side), Turns([side])
        clock = Clock(side, turns, cuda=False, parts_from=0)
        trainer.watch(clock)
        steps = seen[side] = [[], [], []]

        def called(module, args, steps=steps, clock=clock):
            if module.training:
                assert args[0].shape[1] == 16, "no row is padded"
                steps[len(clock.tokens) - 1] += map(tuple, args[0].tolist())

        trainer.model.get_input_embeddings().register_forward_pre_hook(called)
        trainer.train()
        assert clock.tokens == [16 * 16] * 3
        assert clock.calls == [16 // micro] * 3
    plain, ours = ([sorted(rows) for rows in seen[side]] for side in SIDES)
    assert plain == ours and all(len(rows) == 16 for rows in plain)


def test_turns_alternate_until_one_has_left():
    turns, seen = Turns(["a", "b"]), []

    def job(name, steps):
        def run():
            for _ in range(steps):
                seen.append(name)
                turns.hand_on(name)
                turns.take(name)

        return run

    together({"a": job("a", 2), "b": job("b", 4)}, turns)
    assert "".join(seen) == "ababbb"
    with pytest.raises(ZeroDivisionError):
        together({"a": lambda: 1 / 0, "b": lambda: None}, Turns(["a", "b"]))


def test_parts_exclude_those_inside_and_add_up(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("benchmarks.lib.turns.time.process_time", lambda: next(now))
    clock = Clock("a", Turns(["a"]), cuda=False, parts_from=0)
    clock.enter(DATA)
    clock.leave()  # before the first step nothing is counted
    clock.step()
    with clock.part(LOSS), clock.part(FORWARD):
        clock.count(7)
    clock.close()
    assert dict(clock.parts[0]) == {OTHER: 2, LOSS: 2, FORWARD: 1} and clock.work == [5]
    assert clock.tokens == [7] and clock.calls == [1] and len(clock.seconds) == 1


def test_it_prints_ratios_and_parts(options, monkeypatch):
    lines = "\n".join(time_both(options))
    assert "step time, GeReTrainer / Trainer: " in lines and "median of 3 pairs" in lines
    assert lines.count("| 256 | 4 |") == 2
    for part in ("data", "forward", "loss", "backward", "optimizer", "logging and other"):
        assert f"| {part} |" in lines
    options.side = "GeReTrainer"
    assert one_side(options) > 1e8
    peaks = iter([5, 200, 303, 210, 301])
    monkeypatch.setattr("benchmarks.step.measure_alone", lambda *_: next(peaks) * 10**6)
    assert "peak memory, GeReTrainer / Trainer: 1.505" in "\n".join(memory_of_both(options, []))
