"""Steps of several processes, threads in their place: they fail on all or none, and no two runs wait in a ring."""

from __future__ import annotations

import threading
import time

import pytest

from gere.cache.resolve import _locked
from gere.errors import GeReError, RankFailedError
from gere.ranks import ALONE, Ranks


def thread_ranks(count):
    """As many ranks as threads; each hangs for 30 seconds at most."""
    items, barrier = [None] * count, threading.Barrier(count, timeout=30)

    def gather_of(index):
        def gather(item):
            items[index] = item
            barrier.wait()
            found = list(items)
            barrier.wait()
            return found

        return gather

    return [Ranks(index, count, first_here=index == 0, gather=gather_of(index)) for index in range(count)]


def on_all(actions, seconds=30):
    found = ["still waiting"] * len(actions)

    def run(place, action):
        try:
            found[place] = action()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(actions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
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
    """Each run can hold one disk and want the other; both must come through, one after the other."""
    monkeypatch.setattr("gere.cache.resolve.LOCK_SECONDS", 0.1)

    def late(root, ranks):
        time.sleep(0.5 * ranks.index)  # each run has taken its first disk by then
        return True

    monkeypatch.setattr("gere.cache.resolve.leads_disk", late)
    disks = [tmp_path / "disk-0", tmp_path / "disk-1"]
    for disk in disks:
        disk.mkdir()
    inside, most = [], []

    def member(run, rank):
        with _locked(disks[rank.index if run == 0 else 1 - rank.index], rank):
            inside.append(run)
            most.append(len(set(inside)))
            rank.gather(None)
            inside.remove(run)
            rank.gather(None)
        return "through"

    runs = [thread_ranks(2), thread_ranks(2)]
    members = [lambda n=n, r=r: member(n, r) for n, ranks in enumerate(runs) for r in ranks]
    assert on_all(members, 15) == ["through"] * 4
    assert max(most) == 1, "two runs were inside at once"
