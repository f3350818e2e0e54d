"""Real processes over gloo follow the one-process curve of the same global batch, and none of them hangs."""

from __future__ import annotations

import pytest
from processes import run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Curves of one process by number of replay rows, each trained once."""
    known = {}

    def curve(**job):
        name = repr(sorted(job.items()))
        if name not in known:
            known[name] = run(tmp_path_factory.mktemp("alone"), 1, **job)
        return known[name]

    return curve


def assert_same_curve(ours, theirs):
    assert len(ours.logs) == len(theirs.logs) == 20
    for a, b in zip(ours.logs, theirs.logs, strict=True):
        assert {key for key in a if key.startswith("gere/")} == {key for key in b if key.startswith("gere/")}
        for key in ("loss", "grad_norm", *(key for key in b if key.startswith("gere/"))):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (key, a, b)


# 16 rows in a step and 4 in a micro-step, 2 of them on each of the two ranks: whole micro-steps of replay rows, one
# row, fewer than ranks, a rest that leaves a rank without task rows, and the replay set shuffled into the epoch.
@pytest.mark.parametrize("replay", [4, 1, 3, 7, None])
def test_two_processes_follow_the_curve_of_one(tmp_path, alone, replay):
    assert_same_curve(run(tmp_path, 2, replay=replay), alone(replay=replay))


@pytest.mark.parametrize("replay", [1, 3])
def test_ranks_of_one_row_each(tmp_path, alone, replay):
    """In the mixed micro-step each rank has either a task row or a replay row."""
    job = {"replay": replay, "global_micro": 2, "accumulation": 8}
    assert_same_curve(run(tmp_path, 2, **job), alone(**job))
