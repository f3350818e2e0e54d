"""Real processes over gloo follow the one-process curve of the same global batch, and none of them hangs."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections import Counter

import pytest
import transformers
from processes import finish, run, start

# transformers 4 to 5.6 loads the optimizer of several processes onto a device "cpu:0", which torch does not know.
RESUMING = (2, 1) if tuple(map(int, transformers.__version__.split(".")[:2])) > (5, 6) else (1,)
SLOW = pytest.mark.slow
ANCHOR = {"config": {"anchor_batch_tokens": 80}, "steps": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Curves of one process by settings, each trained once."""
    known = {}

    def curve(**job):
        name = json.dumps(job, sort_keys=True)
        if name not in known:
            known[name] = run(tmp_path_factory.mktemp("alone"), 1, **job)
        return known[name]

    return curve


def assert_same_curve(ours, theirs, steps=20, rel=1e-4):
    """The same values; after ten steps the distances are small, and with them `dy` makes more of rounding."""
    assert len(ours.logs) == len(theirs.logs) == steps
    for step, (a, b) in enumerate(zip(ours.logs, theirs.logs, strict=True)):
        assert {key for key in a if key.startswith("gere/")} == {key for key in b if key.startswith("gere/")}
        for key in ("loss", "grad_norm", *(key for key in b if key.startswith("gere/"))):
            loose = 50 if key in ("grad_norm", "gere/weight") and step >= 10 else 1
            assert a[key] == pytest.approx(b[key], rel=loose * rel, abs=1e-5), (key, a, b)


@pytest.mark.parametrize("rate", [1e-3, pytest.param(0.0, marks=SLOW)])
def test_held_out_texts_are_shared_by_two_processes(tmp_path, alone, rate):
    job = {"replay": 3, "steps": 2, "texts": 24, "config": {"replay_heldout": 64}, "args": {"learning_rate": rate}}
    ours, theirs = run(tmp_path, 2, **job), alone(**job)
    (one,), (other,) = (done.results[0]["ability"] for done in (ours, theirs))
    assert all(result["ability"] == [one] for result in ours.results), "the same on every process"
    assert ours.results[0]["hashes"] == theirs.results[0]["hashes"], "the anchor has the same bytes"
    for key in ("general/loss", "general/change", "general/change_interval"):
        assert one[key] == pytest.approx(other[key], abs=1e-5)
    assert (one["general/change"] == 0.0) == (rate == 0.0)


def rows_by_step(done, kind):
    """The task rows (kind 0) or replay rows (kind 1) of each optimizer step over all ranks, with their numbers."""
    steps = zip(*(result["rows"] for result in done.results), strict=True)
    return [Counter(tuple(row) for rank in step for row in rank[kind]) for step in steps]


def assert_same_rows(ours, theirs, first=0):
    """Every step has the rows of the one process, and beyond them dummy rows alone: one row again and again."""
    for kind in (0, 1):
        found, wanted = rows_by_step(ours, kind), rows_by_step(theirs, kind)[first:]
        assert len(found) == len(wanted)
        assert not any(two - one for one, two in zip(found, wanted, strict=True))
        extra = [one - two for one, two in zip(found, wanted, strict=True)]
        assert len(set().union(*extra)) <= 1 and all(rows.total() <= 1 for rows in extra)


# 16 rows in a step and 4 in a micro-step, 2 of them on each of the two ranks: whole micro-steps of replay rows, one
# row, a rest that leaves a rank without task rows, and the replay set shuffled into the epoch.
@pytest.mark.parametrize(
    "replay", [pytest.param(4, marks=SLOW), pytest.param(1, marks=SLOW), 7, pytest.param(None, marks=SLOW)]
)
def test_two_processes_follow_the_curve_of_one(tmp_path, alone, replay):
    ours, theirs = run(tmp_path, 2, replay=replay), alone(replay=replay)
    assert_same_curve(ours, theirs)
    assert_same_rows(ours, theirs)
    if replay:
        assert all(rows.total() == replay for rows in rows_by_step(theirs, 1))
        assert all(rows.total() == 16 - replay for rows in rows_by_step(theirs, 0))
    # One call of the wrapper in each of 4 micro-steps, and no dummy replay row on a rank that has none.
    calls = [result["calls"] for result in ours.results]
    assert [call["wrapper"] for call in calls] == [20 * 4] * 2
    if replay == 4:
        assert [call["decoder"] for call in calls] == [20 * 4] * 2
    if replay == 1:
        assert [call["decoder"] for call in calls] == [20 * 5, 20 * 4]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["tm", "kl", "l2"])
def test_the_weight_auto_and_every_strategy_on_two_processes(tmp_path, alone, strategy):
    """The first rows of all ranks together fix the weight; no rank knows another one's rows before.

    The weight of KL is 1e5 on the tiny model, whose next-token distributions are all alike, and so is what it makes of
    rounding.
    """
    job = {"replay": 3, "w": "auto", "steps": 8, "config": {"replay_strategy": strategy}}
    ours, theirs = run(tmp_path, 2, **job), alone(**job)
    assert_same_curve(ours, theirs, steps=8, rel=1e-3 if strategy == "kl" else 1e-4)
    assert ours.logs[0]["gere/weight"] == 0 < ours.logs[-1]["gere/weight"]


@pytest.mark.slow
def test_ranks_of_one_row_each(tmp_path, alone):
    """In the mixed micro-step each rank has either a task row or a replay row, which the model inside is called on."""
    job = {"replay": 1, "global_micro": 2, "accumulation": 8}
    ours = run(tmp_path, 2, **job)
    assert_same_curve(ours, alone(**job))
    assert [result["calls"] for result in ours.results] == [
        {"wrapper": 20 * 8, "decoder": 20 * 9},
        {"wrapper": 20 * 8, "decoder": 20 * 8},
    ]


@pytest.mark.slow
def test_tokens_counted_by_each_rank_alone(tmp_path):
    """Each rank's mean counts by its rows, as the parent's gradients do: no rank weighs more for having fewer."""
    done = run(tmp_path, 2, replay=7, steps=3, args={"average_tokens_across_devices": False})
    for log in done.logs:
        replay = log["gere/ce"] + log["gere/weight"] * log["gere/tm"]
        if not log["gere/tm"]:
            assert log["loss"] == pytest.approx((9 * log["gere/task_loss"] + 7 * replay) / 16, rel=1e-3)


@pytest.mark.slow
def test_a_rank_without_any_task_row(tmp_path):
    """Its spare row has no tokens to divide by; nothing may become infinite."""
    job = {"replay": 1, "global_micro": 2, "accumulation": 1, "steps": 4}
    done = run(tmp_path, 2, **job, args={"average_tokens_across_devices": False})
    for log in done.logs:
        assert all(math.isfinite(value) for value in log.values()) and log["grad_norm"] > 0


@pytest.mark.slow
def test_added_rows_on_two_processes(tmp_path, alone):
    job = {"replay": 3, "stream": True}
    ours, theirs = run(tmp_path, 2, **job), alone(**job)
    assert_same_curve(ours, theirs)
    assert all(rows.total() == 3 for rows in rows_by_step(ours, 1))
    assert all(rows.total() == 16 for rows in rows_by_step(ours, 0))


@pytest.mark.slow
def test_fsdp2_follows_the_curve_of_one(tmp_path, alone):
    """One rank has no replay row, and calls the model as often as the other."""
    ours = run(tmp_path, 2, strategy="fsdp2", replay=1)
    assert_same_curve(ours, alone(replay=1))
    assert [result["calls"]["decoder"] for result in ours.results] == [20 * 5] * 2


@pytest.fixture(scope="module")
def deepspeed_extensions(tmp_path_factory):
    """A folder of its own for the operation that DeepSpeed compiles: the lock of a killed build would block others."""
    pytest.importorskip("deepspeed")
    if not all(map(shutil.which, ("g++", "ninja"))):
        pytest.skip("DeepSpeed compiles an operation, which needs g++ and ninja")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_zero_follows_the_curve_of_one(tmp_path, alone, deepspeed_extensions):
    """Both stages in one test, since the first compiles for both."""
    for stage in (2, 3):
        done = run(tmp_path / f"{stage}", 2, limit=280, strategy=f"zero{stage}", replay=3)
        assert done.results[0]["kind"] == "DEEPSPEED"
        assert_same_curve(done, alone(replay=3))


@pytest.mark.slow
def test_base_decay_on_two_processes(tmp_path, alone):
    job = {"replay": 3, "config": {"base_decay": 1.0}}
    ours, theirs = run(tmp_path, 2, **job), alone(**job)
    assert_same_curve(ours, theirs)
    assert ours.logs[-1]["gere/tm"] < 0.9 * alone(replay=3).logs[-1]["gere/tm"], "it pulls"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_base_decay_is_refused_where_weights_are_spread(tmp_path, strategy, deepspeed_extensions):
    done = run(tmp_path, 2, succeed=False, limit=280, strategy=strategy, config={"base_decay": 1.0})
    assert all(done.codes) and "Base decay needs the whole weights on each process" in done.output


@pytest.mark.slow
def test_each_rank_distils_its_share_of_the_anchor_once(tmp_path, alone):
    """The same bytes for any number of processes; a second start and another world size build nothing."""
    one, two = alone(**ANCHOR), run(tmp_path, 2, **ANCHOR)
    assert (
        one.results[0]["hashes"] == two.results[0]["hashes"] and one.results[0]["anchor"] == two.results[0]["anchor"]
    )
    shares = [result["distilled"] for result in two.results]
    assert max(shares) <= 0.6 * sum(shares)
    for ranks in (2, 1):
        again = run(tmp_path, ranks, **ANCHOR)
        assert [result["distilled"] for result in again.results] == [0] * ranks
        assert again.results[0]["files"] == two.results[0]["files"]


@pytest.mark.slow
def test_machines_without_a_shared_disk(tmp_path, alone):
    done = run(tmp_path, 2, folders="own", **ANCHOR)
    assert done.results[0]["hashes"] == done.results[1]["hashes"] == alone(**ANCHOR).results[0]["hashes"]
    folders = {result["folder"] for result in done.results}
    assert len(folders) == 2
    for path in (tmp_path / "saving-1").glob("anchor-*/*"):
        path.unlink()
    next((tmp_path / "saving-1").glob("anchor-*")).rmdir()
    again = run(tmp_path, 2, folders="own", **ANCHOR)
    assert [result["distilled"] for result in again.results] == [0, 0]
    assert again.results[0]["hashes"] == again.results[1]["hashes"]


@pytest.mark.slow
def test_a_damaged_anchor_is_not_handed_on(tmp_path):
    """One disk lost its anchor and the other one's is damaged: an error, and nothing is overwritten."""
    run(tmp_path, 2, folders="own", **ANCHOR)
    shutil.rmtree(next((tmp_path / "saving-1").glob("anchor-*")))
    shard = next((tmp_path / "saving-0").glob("anchor-*/regions-00000*"))
    damaged = shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1])
    shard.write_bytes(damaged)
    done = run(tmp_path, 2, folders="own", succeed=False, **ANCHOR)
    assert all(done.codes) and "CacheCorruptError" in done.output and shard.name in done.output
    assert shard.read_bytes() == damaged and not list((tmp_path / "saving-1").glob("anchor-*/manifest.json"))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=SLOW)])
def test_one_rank_fails_and_all_end(tmp_path, strategy):
    done = run(tmp_path, 2, succeed=False, strategy=strategy, fail_rank=1, **ANCHOR)
    assert all(done.codes) and "Timeout (" not in done.output, "a rank waited until the limit of the job"
    assert "RankFailedError" in done.output and "the disk of this rank is gone" in done.output
    assert "rank 1" in done.output


@pytest.mark.slow
def test_a_killed_build_of_two_goes_on_with_one(tmp_path, alone):
    """Parts that were finished before the kill are not computed again."""
    job = {"slow": 0.25, **ANCHOR}
    processes = start(tmp_path, 2, job, 120)
    parts = tmp_path / "saving"
    for _ in range(1600):
        if len(list(parts.glob("*.partial/part-*"))) >= 2:
            break
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes, 30)
    left = len(list(parts.glob("*.partial/part-*")))
    assert left >= 2
    done = run(tmp_path, 1, **ANCHOR)
    whole = alone(**ANCHOR).results[0]
    assert done.results[0]["hashes"] == whole["hashes"]
    assert done.results[0]["distilled"] < whole["distilled"]


@pytest.mark.slow
def test_resume_with_as_many_and_with_fewer_processes(tmp_path, alone):
    """A resumed run sees the rows that the uninterrupted one sees, and the same anchor."""
    job = {"steps": 8, "replay": 3, "args": {"lr_scheduler_type": "constant"}}
    whole = alone(**job)
    first = run(tmp_path, 2, **job, save_steps=5, stop_at=5)
    checkpoint = str(tmp_path / "out" / "checkpoint-5")
    for ranks in RESUMING:
        # The rows of a forward pass stay: transformers 4 takes them from the checkpoint whatever the arguments say.
        shape = {"global_micro": 2 * ranks, "accumulation": 8 // ranks}
        done = run(tmp_path, ranks, **job, **shape, resume=checkpoint)
        assert done.results[0]["anchor"] == first.results[0]["anchor"] == whole.results[0]["anchor"]
        assert [result["distilled"] for result in done.results] == [0] * ranks
        assert_same_rows(done, whole, first=5)
        for ours, theirs in zip(done.logs[-3:], whole.logs[-3:], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
