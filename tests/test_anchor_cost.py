"""What making an anchor costs, by count: tokens, forward passes, logits, bytes; and that it is still the same one."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks.lib.anchor_sides import Setup, build, counted, naive, on_ranks
from gere import GeReConfig
from gere.cache import Anchor, build_anchor, unpack
from gere.cache.base_model import BaseModel
from gere.cache.plan import parts_of
from gere.losses.strategy import make_strategy
from gere.model.probe import find_layout
from gere.ranks import ALONE
from gere.replay import ReplaySet
from gere.session.anchor import ReadyModel, build_plan

BATCH_TOKENS = GeReConfig().anchor_batch_tokens
SETUP = Setup("", None, 64, "float32", "cpu")


@pytest.fixture
def rows(tokenizer, general):
    return [tokenizer(text)["input_ids"][:48] for text in general]


class Spy(BaseModel):
    """Notes the rows of each call."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.calls = []

    def __call__(self, rows):
        self.calls.append([tuple(row) for row in rows])
        return super().__call__(rows)


def plan_of(model, rows, *, name="tm", device="cpu", batch_tokens=BATCH_TOKENS):
    strategy = make_strategy(name, {}, depth=model.config.num_hidden_layers, live=False, half=False)
    ready = ReadyModel(model, torch.device(device), torch.no_grad, "mixed precision no", ALONE)
    return build_plan(batch_tokens, strategy, ready, ReplaySet(rows, [], 0, {}), {"texts": "t"})


def make(folder, model, rows, name="tm"):
    plan = plan_of(model, rows, name=name)
    cpu = torch.device("cpu")
    base = Spy(model, 0, cpu, plan.strategy, find_layout(model, rows, cpu))
    build_anchor(folder, plan, base, progress=False)
    return Anchor(folder), base.calls, plan


def test_every_row_is_evaluated_once_beside_the_sample_for_the_noise(tmp_path, model, rows):
    with counted(model) as work:
        _, calls, _ = make(tmp_path / "anchor-a", model, rows)
    size, noise, parts = calls[0], calls[1:3], calls[3:]
    real, shortest = sum(map(len, rows)), min(map(len, rows))
    assert [len(row) for row in size] == [shortest], "one row tells how much disk is needed"
    assert [len(call) for call in noise] == [2, 1], "one row in 32, padded to the length of another, and alone"
    assert Counter(row for call in parts for row in call) == Counter(map(tuple, rows))
    padded = sum(len(call) * max(map(len, call)) for call in calls)
    look = 3 * min(64, max(map(len, rows)))  # two forward passes that see what the head reads, of a text three times
    assert work["forwards"] == len(calls) + 2 and work["tokens"] == padded + 2 * look
    sampled = sum(len(row) - 1 for call in (size, *noise) for row in call)
    besides = len(calls) + 1  # each forward pass of the model itself gives the logits of one token
    assert work["logits"] <= real - len(rows) + sampled + besides * 9 + 2 * look


def test_a_cpu_gets_batches_with_next_to_no_padding(model):
    """Lengths as in general texts cut at 563 tokens: half of them cut, the others anywhere below."""
    rng = np.random.default_rng(0)
    lengths = [563] * 250 + rng.integers(40, 563, 250).tolist()
    rows = [[3] * length for length in lengths]
    plan, on_gpu = plan_of(model, rows), plan_of(model, rows, device="cuda")

    def padding(plan):
        batches = [batch for part in parts_of(plan, 576) for batch in part]
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches) / sum(lengths)

    assert padding(plan) <= 1.01 and padding(on_gpu) <= 1.05
    small = plan_of(model, rows, batch_tokens=100)
    assert small.worth_tokens == small.batch_tokens == 100 and plan.batch_tokens == 8192


def test_a_byte_is_written_once(tmp_path, model, rows, monkeypatch):
    """States at 4 bytes an element while the bands are unknown, then 2 bits; nothing else of their size."""
    written = Counter()
    named = Path.replace

    def noted(self, target):
        written[Path(target).name, "times"] += 1
        written[Path(target).name.split("-")[0], "bytes"] += self.stat().st_size
        return named(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    _, _, plan = make(tmp_path / "anchor-a", model, rows * 20)
    elements = 20 * sum(map(len, rows)) * model.config.hidden_size
    parts = len(list(parts_of(plan, model.config.hidden_size)))
    header = 600 * parts
    assert set(count for (_, kind), count in written.items() if kind == "times") == {1}
    assert written["part", "bytes"] == pytest.approx(4 * elements, abs=header + 12 * len(rows) * 20)
    assert written["regions", "bytes"] == pytest.approx(elements / 4, abs=header)
    others = {
        name: size for (name, kind), size in written.items() if kind == "bytes" and name not in ("part", "regions")
    }
    assert sum(others.values()) < 40_000, others


@pytest.mark.parametrize("strategy", ["tm", "kl", "ce"])
@pytest.mark.parametrize("chunk", [7, 128])
def test_the_anchor_is_what_the_model_says_of_each_text_alone(tmp_path, model, rows, strategy, chunk, monkeypatch):
    """Cross-entropy in float64 by NumPy, regions by the model's own hidden states, whatever the chunk of the head."""
    monkeypatch.setattr("gere.cache.base_model.HEAD_TOKENS", {"cpu": chunk})
    anchor, _, _ = make(tmp_path / "anchor-a", model, rows, strategy)
    for index, row in enumerate(rows):
        with torch.no_grad():
            outputs = model.eval()(input_ids=torch.tensor([row]), output_hidden_states=True)
        logits = outputs.logits[0].double().numpy()
        top = logits.max(axis=1, keepdims=True)
        log_probs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        expected = -log_probs[np.arange(len(row) - 1), row[1:]].mean()
        assert float(anchor.base_ce[index]) == pytest.approx(expected, rel=1e-5)
        if strategy == "tm":
            state, bands = outputs.hidden_states[-1][0], anchor.constants
            code = unpack(anchor.targets(index)["codes"], len(bands["lower"]))
            expected = (state >= bands["upper"]).int() - (state <= bands["lower"]).int()
            edge = torch.minimum((state - bands["upper"]).abs(), (state - bands["lower"]).abs()) <= bands["tolerance"]
            assert torch.equal(code[~edge].int(), expected[~edge]) and edge.float().mean() < 1e-3
        if strategy == "kl":
            scaled = logits / 2.0
            norm = np.log(np.exp(scaled - scaled.max(axis=1, keepdims=True)).sum(axis=1)) + scaled.max(axis=1)
            kept = anchor.targets(index)
            found = np.take_along_axis(scaled, kept["ids"].numpy().astype(np.int64), axis=1) - norm[:, None]
            np.testing.assert_allclose(kept["log_probs"].numpy(), found, atol=1e-5)


@pytest.mark.slow
def test_two_processes_share_the_work_that_the_plain_way_does_twice(tmp_path):
    texts = 40
    rows = SETUP.rows(texts)
    real = sum(map(len, rows))
    one = build(SETUP.load(), rows, tmp_path / "alone", "wall")
    shares = on_ranks(SETUP, texts, 2, tmp_path, 2)
    both = [share.ours.work["tokens"] for share in shares]
    checks = 2 * 2 * SETUP.max_length  # each process checks its model once
    assert one.work["tokens"] <= sum(both) <= one.work["tokens"] + checks
    noise = 9 * SETUP.max_length  # the batch on the one, the rows alone on the other
    assert max(both) <= real / 2 * 1.1 + noise + checks / 2 + 2 * SETUP.max_length
    assert [share.plain.work["tokens"] for share in shares] == [real, real]
    assert sum(share.ours.size for share in shares[:1]) == one.size


def test_the_plain_way_is_plain(tmp_path):
    rows = SETUP.rows(6)
    made = naive(SETUP.load(), rows, tmp_path / "plain", "wall")
    real = sum(map(len, rows))
    assert made.work == {"forwards": 6, "tokens": real, "logits": real} and made.size > 4 * 128 * real


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.anchor", "--count", "8", "--max-length", "32", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--only", "speed", "growth"], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "| gere, noise apart |" in done.stdout and "| vocabulary | 32768 |" in done.stdout
