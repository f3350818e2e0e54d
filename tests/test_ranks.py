"""Steps of several processes, threads in their place: they fail on all or none, and no two runs wait in a ring."""

from __future__ import annotations

import threading

import pytest
import torch
from filelock import FileLock

from gere.cache import BuildPlan, Distilled, build_anchor, open_or_build
from gere.errors import GeReError, RankFailedError
from gere.losses.strategy import make_strategy
from gere.ranks import ALONE, Ranks


def thread_ranks(count):
    """As many ranks as threads."""
    items, barrier = [None] * count, threading.Barrier(count)

    def gather_of(index):
        def gather(item):
            items[index] = item
            barrier.wait()
            found = list(items)
            barrier.wait()
            return found

        return gather

    return [Ranks(index, count, first_here=index == 0, gather=gather_of(index)) for index in range(count)]


def on_all(actions):
    found = [None] * len(actions)

    def run(place, action):
        try:
            found[place] = action()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_a_step_gives_each_rank_its_own_result():
    ranks = thread_ranks(3)
    assert on_all([lambda r=r: r.together(lambda: 10 * r.index) for r in ranks]) == [0, 10, 20]
    assert on_all([lambda r=r: r.ask(lambda: r.index) for r in ranks]) == [[0, 1, 2]] * 3
    assert ALONE.together(lambda: 5) == 5 and ALONE.ask(lambda: 5) == [5] and ALONE.first_here_first(lambda: 5) == 5


def test_a_failure_reaches_all():
    def action(rank):
        if rank:
            raise KeyError("no such text")
        return "fine"

    found = on_all([lambda r=r: r.together(lambda: action(r.index)) for r in thread_ranks(3)])
    assert isinstance(found[0], RankFailedError) and isinstance(found[0], GeReError)
    assert (
        "rank 1 of the ranks [1, 2]" in str(found[0]) and "no such text" in str(found[0]) and "next:" in str(found[0])
    )
    assert isinstance(found[1], KeyError) and isinstance(found[2], KeyError)
    with pytest.raises(KeyError):
        ALONE.together(lambda: action(1))


def test_the_first_of_a_machine_goes_first():
    order = []
    ranks = thread_ranks(3)
    assert on_all([lambda r=r: r.first_here_first(lambda: order.append(r.index) or r.index) for r in ranks]) == [
        0,
        1,
        2,
    ]
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_two_runs_over_two_disks_do_not_wait_in_a_ring(tmp_path, monkeypatch):
    """Each run holds one disk and wants the other; both must come through, one after the other."""
    here, each_holds_one = threading.local(), threading.Barrier(4)

    def leads(root, ranks):
        here.rank, here.tried = ranks.index, False
        return True

    class Lock(FileLock):
        def acquire(self, *arguments, **keywords):
            first, here.tried = not here.tried, True
            if first and here.rank == 1:
                each_holds_one.wait()
            lock = super().acquire(*arguments, **keywords)
            if first and here.rank == 0:
                each_holds_one.wait()
            return lock

    monkeypatch.setattr("gere.cache.resolve.LOCK_SECONDS", 0.1)
    monkeypatch.setattr("gere.cache.resolve.leads_disk", leads)
    monkeypatch.setattr("gere.cache.resolve.FileLock", Lock)
    strategy = make_strategy("ce", {}, depth=1, live=False, half=False)
    plan = BuildPlan({"texts": "t"}, [[1, 2], [3, 4, 5]], strategy, batch_tokens=8)
    disks, inside, most = [tmp_path / "disk-0", tmp_path / "disk-1"], [], []

    def distil(rows):
        return Distilled(torch.tensor([float(sum(row)) for row in rows]), [{} for _ in rows])

    def member(run, ranks):
        def build(folder, leads):
            inside.append(run)
            most.append(len(set(inside)))
            build_anchor(folder, plan, distil, ranks=ranks, leads=leads, progress=False)
            inside.remove(run)

        disk = disks[ranks.index if run == 0 else 1 - ranks.index]
        return open_or_build(disk, plan.fields, build, reuse=False, ranks=ranks).base_ce.tolist()

    runs = [thread_ranks(2), thread_ranks(2)]
    members = [lambda n=n, r=r: member(n, r) for n, ranks in enumerate(runs) for r in ranks]
    assert on_all(members) == [[3.0, 12.0]] * 4
    assert most == [1] * 4, "two runs were inside at once"
