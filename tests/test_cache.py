"""The anchor on disk: its bytes, its refusals, and what a kill or a flipped byte does to it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from gere import _files as cache_files
from gere.cache import Anchor, BuildPlan, Distilled, build_anchor, open_named, open_or_build
from gere.cache.fingerprint import key_of
from gere.cache.store import read_manifest
from gere.errors import CacheCorruptError, CacheFolderError, CacheMismatchError, NonFiniteStateError
from gere.losses import mean_std_bands, pack, regions, unpack
from gere.losses.bands import Moments
from gere.losses.strategy import make_strategy
from gere.model.batching import batches_by_length

DIM = 32


def toy_rows(count=12, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 50, int(length)).tolist() for length in rng.integers(2, 30, count)]


class ToyModel:
    """A state that depends on the tokens before it, without a network."""

    def __init__(self, noise=0.0):
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(50, DIM, generator=generator)
        self.noise = noise
        self.calls = 0

    def states(self, row):
        return self.table[torch.tensor(row)].cumsum(0) / torch.arange(1, len(row) + 1).sqrt()[:, None]

    def __call__(self, rows):
        self.calls += 1
        shift = self.noise * (len(rows) > 1)
        kept = [{"state": self.states(row) + shift} for row in rows]
        return Distilled(torch.tensor([float(sum(row)) for row in rows]), kept)


def strategy(name):
    return make_strategy(name, {}, depth=1, live=False, half=False)


def plan_of(rows, **changes):
    settings_ = {
        "fields": {"weights": "w", "texts": "t"},
        "rows": rows,
        "strategy": strategy("tm"),
        "batch_tokens": 64,
    }
    return BuildPlan(**{**settings_, **changes})


@pytest.fixture
def anchor(tmp_path):
    rows = toy_rows()
    build_anchor(tmp_path / "anchor-a", plan_of(rows), ToyModel(), progress=False)
    return Anchor(tmp_path / "anchor-a"), rows


def test_regions_of_every_row_are_those_of_its_states(anchor):
    stored, rows = anchor
    model = ToyModel()
    everything = torch.cat([model.states(row) for row in rows]).double()
    torch.testing.assert_close(
        stored.constants["lower"], (everything.mean(0) - everything.std(0, correction=0)).float()
    )
    torch.testing.assert_close(
        stored.constants["upper"], (everything.mean(0) + everything.std(0, correction=0)).float()
    )
    for index, row in enumerate(rows):
        expected = regions(model.states(row), stored.constants["lower"], stored.constants["upper"])
        assert torch.equal(unpack(stored.targets(index)["codes"], DIM), expected)
        assert stored.tokens(index) == len(row) and stored.base_ce[index] == sum(row)


def test_golden_bytes_of_the_code():
    region = torch.tensor([[-1, 0, 1, 0, 1, 1]], dtype=torch.int8)
    assert pack(region).tolist() == [[0b01_10_01_00, 0b00_00_10_10]]
    with pytest.raises(ValueError, match="-1, 0 or 1"):
        pack(torch.tensor([2], dtype=torch.int8))


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.lists(st.integers(0, 5), max_size=2), dim=st.integers(1, 19))
def test_unpack_undoes_pack(seed, shape, dim):
    generator = torch.Generator().manual_seed(seed)
    region = torch.randint(-1, 2, (*shape, dim), generator=generator, dtype=torch.int8)
    packed = pack(region)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape, -(-dim // 4))
    assert torch.equal(unpack(packed, dim), region)


def test_bytes_on_disk_are_two_bits_an_element(tmp_path):
    dim = 256
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, dim, generator=generator)

    def distil(rows):
        return Distilled(torch.zeros(len(rows)), [{"state": table[torch.tensor(row)]} for row in rows])

    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50, 200).tolist() for _ in range(60)]
    build_anchor(tmp_path / "anchor-a", plan_of(rows, batch_tokens=2000), distil, progress=False)
    size = sum(path.stat().st_size for path in (tmp_path / "anchor-a").iterdir())
    assert size == pytest.approx(60 * 200 * dim / 4, rel=0.02)


def test_ce_strategy_stores_no_regions(tmp_path):
    rows = toy_rows()
    build_anchor(tmp_path / "anchor-a", plan_of(rows, strategy=strategy("ce")), ToyModel(), progress=False)
    stored = Anchor(tmp_path / "anchor-a")
    assert stored.dim == 0 and stored.base_ce.tolist() == [float(sum(row)) for row in rows]
    assert sorted(path.name for path in stored.folder.iterdir()) == ["manifest.json", "rows.safetensors"]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 40), max_size=5), offset=st.sampled_from([0, 1e3, 1e6])
)
def test_moments_of_any_partition(seed, cuts, offset):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(40, 3, generator=generator, dtype=torch.float64) + offset
    edges = [0, *sorted(cuts), 40]
    merged = Moments.empty(3)
    for start, stop in itertools.pairwise(edges):
        merged = merged.merge(Moments.of(values[start:stop]))
    assert merged.number == 40
    np.testing.assert_allclose(merged.mean, values.numpy().mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(merged.std, values.numpy().std(0), rtol=1e-6)


def test_sigma_has_a_floor():
    values = torch.randn(1000, 4, dtype=torch.float64)
    values[:, 0] = 3.3
    bands = mean_std_bands(Moments.of(values), 1.0, 1e-3, torch.zeros(4))
    assert bands.lower[0] < 3.3 < bands.upper[0] and bands.upper[0] - bands.lower[0] < 0.01
    assert regions(values, bands.lower, bands.upper)[:, 0].abs().sum() == 0


@pytest.mark.parametrize("width", [0.5, 1.0, 2.0])
def test_band_width(width):
    values = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4 + 7
    bands = mean_std_bands(Moments.of(values), width, 1e-3, torch.zeros(3))
    mean, std = values.mean(0), values.std(0, correction=0)
    torch.testing.assert_close(bands.lower, (mean - width * std).float())
    torch.testing.assert_close(bands.upper, (mean + width * std).float())


def test_batches_are_of_like_length_and_within_the_budget():
    rows = toy_rows(40)
    batches = list(batches_by_length(rows, 90))
    assert sorted(row for batch in batches for row in batch) == list(range(40))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(rows[row]) for row in batch) <= 90
    firsts = [len(rows[batch[0]]) for batch in batches]
    assert firsts == sorted(firsts, reverse=True)


def test_rounding_noise_is_measured(tmp_path):
    build_anchor(tmp_path / "anchor-a", plan_of(toy_rows()), ToyModel(noise=0.01), progress=False)
    tolerance = Anchor(tmp_path / "anchor-a").constants["tolerance"]
    torch.testing.assert_close(tolerance, torch.full((DIM,), 0.02), rtol=1e-3, atol=0)


def test_nan_in_the_base_model_is_named(tmp_path):
    model = ToyModel()
    model.table[7] = float("nan")
    rows = [[1, 2, 3], [4, 7, 5]]
    with pytest.raises(NonFiniteStateError, match=r"replay rows \[1\]"):
        build_anchor(tmp_path / "anchor-a", plan_of(rows), model, progress=False)


def test_a_flipped_byte_anywhere_is_refused(tmp_path):
    build_anchor(tmp_path / "anchor-a", plan_of(toy_rows(3)), ToyModel(), progress=False)
    stored = Anchor(tmp_path / "anchor-a")
    rng = np.random.default_rng(0)
    tried = 0
    for path in sorted(stored.folder.iterdir()):
        raw = path.read_bytes()
        for place in range(len(raw)):
            broken = bytearray(raw)
            broken[place] ^= 1 << int(rng.integers(0, 8))
            path.write_bytes(broken)
            with pytest.raises((CacheCorruptError, CacheMismatchError), match=path.name):
                Anchor(stored.folder)
            tried += 1
        for cut in (0, len(raw) // 2, len(raw) - 1):
            path.write_bytes(raw[:cut])
            with pytest.raises(CacheCorruptError):
                Anchor(stored.folder)
        path.write_bytes(raw)
    assert tried == sum(path.stat().st_size for path in stored.folder.iterdir())
    Anchor(stored.folder)


def test_missing_swapped_and_foreign_files_are_refused(anchor):
    stored, _ = anchor
    regions_file = stored.folder / "regions-00000.safetensors"
    kept = regions_file.read_bytes()
    regions_file.unlink()
    with pytest.raises(CacheCorruptError, match="FileNotFoundError"):
        Anchor(stored.folder)
    regions_file.write_bytes((stored.folder / "bands.safetensors").read_bytes())
    with pytest.raises(CacheCorruptError, match="SHA-256"):
        Anchor(stored.folder)
    regions_file.write_bytes(kept)
    manifest = json.loads((stored.folder / "manifest.json").read_text())
    manifest["files"] = {"../../etc/passwd": "0" * 64}
    (stored.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheCorruptError):
        Anchor(stored.folder)


def test_another_format_is_refused_by_name(anchor):
    stored, _ = anchor
    path = stored.folder / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(CacheMismatchError, match="format_version 1") as caught:
        Anchor(stored.folder)
    assert caught.value.fields == ("format_version",)


def test_fields_that_differ_are_named(tmp_path):
    built = []

    def build(folder, leads):
        built.append(folder)
        build_anchor(folder, plan_of(toy_rows(), fields=fields), ToyModel(), progress=False)

    fields = {"weights": "a", "texts": "b"}
    open_or_build(tmp_path, fields, build, reuse=True)
    assert open_or_build(tmp_path, fields, build, reuse=True).fields == fields and len(built) == 1
    fields = {"weights": "a", "texts": "c"}
    open_or_build(tmp_path, fields, build, reuse=True)
    assert len(built) == 2 and len(list(tmp_path.glob("anchor-*"))) == 2
    fields = {"weights": "b", "texts": "c"}
    with pytest.raises(CacheMismatchError, match="other weights") as caught:
        open_or_build(tmp_path, fields, build, reuse=True)
    assert caught.value.fields == ("weights",) and "expected: weights b" in str(caught.value)
    open_or_build(tmp_path, fields, build, reuse=False)
    assert len(built) == 3 and len(list(tmp_path.glob("anchor-*"))) == 3


def test_an_anchor_can_be_sent_to_a_worker(anchor):
    stored, _ = anchor
    stored.targets(0)
    copy = pickle.loads(pickle.dumps(stored))
    assert torch.equal(copy.targets(3)["codes"], stored.targets(3)["codes"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs a system that lists the maps of a process")
def test_no_map_of_a_shard_stays(anchor):
    """Pages of a map that stays are counted as memory of the process, up to the whole anchor."""
    stored, rows = anchor
    for row in range(len(rows)):
        stored.targets(row)
    assert "regions-00000" not in Path("/proc/self/maps").read_text()
    with safe_open(stored.folder / "regions-00000.safetensors", framework="pt"):
        assert "regions-00000" in Path("/proc/self/maps").read_text(), "or the test sees nothing"


def test_nothing_is_evaluated_twice_after_a_kill(tmp_path):
    rows = toy_rows(120)

    class Killed(ToyModel):
        def __call__(self, batch):
            if self.calls == 14:
                raise KeyboardInterrupt
            return super().__call__(batch)

    plan = plan_of(rows, batch_tokens=90)
    whole = ToyModel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gere.cache.plan.PART_BYTES", 4 * DIM * 200)
        build_anchor(tmp_path / "anchor-whole", plan, whole, progress=False)
        with pytest.raises(KeyboardInterrupt):
            build_anchor(tmp_path / "anchor-killed", plan, Killed(), progress=False)
        done = len(list((tmp_path / "anchor-killed.partial").glob("part-*")))
        rest = ToyModel()
        build_anchor(tmp_path / "anchor-killed", plan, rest, progress=False)
    assert done >= 2
    assert 0 < rest.calls <= whole.calls - 14 + 2, "only the unfinished part, of at most two batches, is run again"
    assert not (tmp_path / "anchor-killed.partial").exists()
    for path in (tmp_path / "anchor-whole").iterdir():
        assert path.read_bytes() == (tmp_path / "anchor-killed" / path.name).read_bytes()


def test_a_write_torn_at_any_place_is_gone_on_from(tmp_path, monkeypatch):
    plan = plan_of(toy_rows(40))
    monkeypatch.setattr("gere.cache.plan.PART_BYTES", 4 * DIM * 200)
    build_anchor(tmp_path / "anchor-whole", plan, ToyModel(), progress=False)
    opened = Path.open

    def torn_at(number):
        left = itertools.count(number, -1)

        def tear(self, mode="r", *arguments, **keywords):
            stream = opened(self, mode, *arguments, **keywords)
            if mode == "wb" and next(left) == 0:
                stream.write(b"half of it")
                stream.close()
                raise OSError(errno.EIO, "torn")
            return stream

        return tear

    names = sorted(path.name for path in (tmp_path / "anchor-whole").iterdir())
    for number in itertools.count():
        folder = tmp_path / f"anchor-{number}"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", torn_at(number))
            try:
                build_anchor(folder, plan, ToyModel(), progress=False)
                break
            except CacheFolderError:
                assert not folder.exists()
        build_anchor(folder, plan, ToyModel(), progress=False)
        for name in names:
            assert (folder / name).read_bytes() == (tmp_path / "anchor-whole" / name).read_bytes()
    assert number >= 1 + 4 + len(names), "the noise, four parts, and every file of the anchor were torn once"


def test_a_damaged_part_is_refused_and_not_repaired(tmp_path):
    partial = tmp_path / "anchor-a.partial"
    partial.mkdir()
    (partial / "part-00000.safetensors").write_bytes(b"half a file")
    with pytest.raises(CacheCorruptError, match="part-00000"):
        build_anchor(tmp_path / "anchor-a", plan_of(toy_rows()), ToyModel(), progress=False)


def killed(*arguments, **keywords):
    raise KeyboardInterrupt


def test_a_flipped_byte_of_an_unfinished_build_is_refused(tmp_path, monkeypatch):
    plan, folder = plan_of(toy_rows(30)), tmp_path / "anchor-a"
    with monkeypatch.context() as patch:
        patch.setattr("gere.cache.build.encode", killed)
        with pytest.raises(KeyboardInterrupt):
            build_anchor(folder, plan, ToyModel(), progress=False)
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "anchor-a.partial").iterdir()):
        raw = path.read_bytes()
        for place in rng.integers(0, len(raw), 40):
            broken = bytearray(raw)
            broken[place] ^= 1 << int(rng.integers(0, 8))
            path.write_bytes(broken)
            with pytest.raises(CacheCorruptError, match=f"{path.name}[\\s\\S]*Delete this file"):
                build_anchor(folder, plan, ToyModel(), progress=False)
        path.write_bytes(raw)
    build_anchor(folder, plan, ToyModel(), progress=False)


def test_a_kill_before_the_name_is_finished_by_any_opening(tmp_path, monkeypatch):
    fields = {"weights": "w", "texts": "t"}
    folder = tmp_path / f"anchor-{key_of(fields)}"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        build_anchor(folder, plan_of(toy_rows()), ToyModel(), progress=False)
    assert not folder.exists()
    assert open_named(tmp_path, key_of(fields), {"texts": "t"}).rows == 12


def test_a_build_whose_last_bytes_were_lost_is_not_given_its_name(tmp_path, monkeypatch):
    folder, plan = tmp_path / "anchor-a", plan_of(toy_rows())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        build_anchor(folder, plan, ToyModel(), progress=False)
    lost = tmp_path / "anchor-a.partial" / "regions-00000.safetensors"
    whole = lost.read_bytes()
    lost.write_bytes(whole[:-1])
    build_anchor(folder, plan, ToyModel(), progress=False)
    assert (Anchor(folder).folder / lost.name).read_bytes() == whole


def test_an_anchor_under_another_name_is_refused(tmp_path):
    other = {"weights": "w", "texts": "u"}
    build_anchor(tmp_path / f"anchor-{key_of(other)}", plan_of(toy_rows()), ToyModel(), progress=False)
    with pytest.raises(CacheCorruptError, match="name of another"):
        open_named(tmp_path, key_of(other), {"texts": "t"})
    with pytest.raises(CacheCorruptError, match="name of another"):
        open_or_build(tmp_path, other, lambda folder, leads: None, reuse=True)


KILL_SCRIPT = """
import os, random, shutil, signal, sys
from collections import Counter
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_cache import ToyModel, plan_of, toy_rows
from gere import _files
import gere.cache.plan as plan
from gere.cache import Anchor, build, build_anchor
plan.LEAST_PARTS = 4

root, rows = Path({root!r}), toy_rows(40)
touching_the_disk = [module.__file__ for module in (_files, build)]

def run(name, kill_at=None):
    seen = Counter()

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in touching_the_disk:
            return None
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            seen[line] += 1
            if (line, seen[line]) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        build_anchor(root / name, plan_of(rows), ToyModel(), progress=False)
    finally:
        sys.settrace(None)
    return seen

lines = run("whole")
random.seed(0)
moments = [(line, time) for line, count in sorted(lines.items()) for time in {{1, random.randint(1, count), count}}]
for kill_at in moments:
    child = os.fork()
    if not child:
        run("anchor", kill_at)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, kill_at
    if (root / "anchor").exists():
        Anchor(root / "anchor")
    run("anchor")
    assert sorted(path.name for path in root.iterdir()) == ["anchor", "whole"]
    assert sorted(os.listdir(root / "anchor")) == sorted(os.listdir(root / "whole"))
    for path in (root / "whole").iterdir():
        assert path.read_bytes() == (root / "anchor" / path.name).read_bytes(), path
    shutil.rmtree(root / "anchor")
print("killed", len(moments))
"""


@pytest.mark.slow
def test_sigkill_at_every_line_that_touches_the_disk(tmp_path):
    """At its first, its last and a random run; no half anchor is there then, and the next build makes the same one."""
    script = KILL_SCRIPT.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 100


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("step", ["fsync", "open"])
def test_errors_of_the_disk_have_a_name_and_leave_nothing_behind(tmp_path, monkeypatch, code, step):
    def fail(*arguments, **keywords):
        raise OSError(code, os.strerror(code))

    target = (cache_files.os, "fsync") if step == "fsync" else (Path, "open")
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(CacheFolderError, match="full" if code == errno.ENOSPC else "cannot be written"):
            cache_files.write_atomic(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_the_work(tmp_path, monkeypatch):
    usage = cache_files.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_files.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    model = ToyModel()
    with pytest.raises(CacheFolderError, match="too full"):
        build_anchor(tmp_path / "anchor-a", plan_of(toy_rows(60)), model, progress=False)
    assert not list(tmp_path.rglob("part-*"))


@pytest.mark.parametrize("value", ["NaN", "-Infinity", '"\\ud800"', "[" * 500 + "]" * 500])
def test_a_manifest_that_json_reads_and_nobody_writes(anchor, value):
    stored, _ = anchor
    path = stored.folder / "manifest.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"weights": "w"', f'"weights": {value}'), encoding="utf-8"
    )
    with pytest.raises(CacheCorruptError, match=r"manifest\.json[\s\S]*next:"):
        read_manifest(stored.folder)


def test_manifest_names_what_it_is_anchored_to(anchor):
    stored, rows = anchor
    manifest = read_manifest(stored.folder)
    assert manifest.fields == {"weights": "w", "texts": "t"}
    assert manifest.shape._asdict() == {"heldout": 0, "rows": len(rows), "tokens": sum(map(len, rows)), "dim": DIM}
    assert set(load_file(stored.folder / "bands.safetensors")) == {"lower", "upper", "tolerance"}
