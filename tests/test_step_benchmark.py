"""The benchmark of a step compares what it says: the same rows, in turns, parts that add up to the step."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import step
from benchmarks.lib.pair import OURS, SIDES, Pair
from benchmarks.lib.turns import DATA, FORWARD, LOSS, OTHER, Clock, Turns, together


@pytest.fixture
def options(tmp_path):
    words = ["--random", "tiny", "--length", "16", "--steps", "3", "--warm-up", "1", "--w-strategy", "dy", "--cpu"]
    options = step.parse_arguments(words)
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
        mixed = side == OURS and micro == 16  # a micro-step with both kinds of rows takes two calls
        assert clock.calls == [16 // micro + mixed] * 3
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
    lines = step.show_time(step.measure_time(options))
    assert "step time, GeReTrainer / Trainer: " in lines and "median of 3 pairs" in lines
    assert lines.count("| 256 | 4 |") == 2
    for part in ("data", "forward", "loss", "backward", "optimizer", "logging and other"):
        assert f"| {part} |" in lines
    options.side = "GeReTrainer"
    assert step.one_side(options) > 1e8
    peaks = iter([5, 200, 303, 210, 301])
    monkeypatch.setattr("benchmarks.step.measure_alone", lambda *_: next(peaks) * 10**6)
    assert "peak memory, GeReTrainer / Trainer: 1.505" in step.show_memory(step.measure_memory(options, []))


def test_a_run_that_is_cut_off_has_shown_and_written_its_first_part(tmp_path, monkeypatch, capsys):
    """Time comes first; the memory is never measured."""
    file = tmp_path / "step.json"
    words = ["--random", "tiny", "--length", "8", "--steps", "2", "--warm-up", "1", "--cpu", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["step", *words])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.step.measure_alone", killed)
    with pytest.raises(KeyboardInterrupt):
        step.main()
    found = json.loads(file.read_text())
    ratio = found["time"]["ratios"]["step time"]
    assert found["options"]["steps"] == ratio["pairs"] == 2 and "memory" not in found
    assert f"step time, GeReTrainer / Trainer: {ratio['median']:.3f} (" in capsys.readouterr().out


@pytest.mark.slow
def test_without_the_package_datasets():
    """A machine with a GPU may have little more than torch and transformers."""
    code = "import sys; sys.modules['datasets'] = None; from benchmarks.step import main; main()"
    words = ["--random", "tiny", "--length", "8", "--steps", "1", "--warm-up", "1", "--cpu", "--no-memory"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "step time, GeReTrainer / Trainer: " in done.stdout
