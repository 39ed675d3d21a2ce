"""Who is slow, and who is only last."""

from __future__ import annotations

import pytest

from ig_dist.training.meter import Slowest, Watch, slowest
from ig_dist.training.preflight import Findings, minority, slow_ranks, summary


def test_the_slowest_is_held_against_the_median_rank() -> None:
    found = slowest([1.0, 1.1, 3.0, 1.0], elapsed=4.0)
    assert found == Slowest(2, 3.0, 0.5)
    assert slowest([1.0, 2.0], 4.0) == Slowest(1, 2.0, 0.25)  # of two, the other one
    assert slowest([0.0, 0.0], 1.0).ratio == 1.0


def test_it_is_said_once_when_it_lasts_and_costs() -> None:
    watch, slow = Watch(), Slowest(3, 2.0, 0.3)
    assert [watch.sees(slow) for _ in range(4)] == [False, True, False, False]
    assert not watch.sees(Slowest(3, 1.2, 0.3))  # it has recovered
    assert [watch.sees(slow) for _ in range(2)] == [False, True]
    assert [watch.sees(one) for one in (Slowest(4, 2.0, 0.3), slow, slow)] == [False, False, True]
    watch = Watch()
    assert not any(watch.sees(Slowest(3, 9.0, 0.05)) for _ in range(5))  # of work that takes no time
    assert not any(watch.sees(Slowest(rank, 2.0, 0.3)) for rank in (1, 2, 1, 2))  # the machine is busy, not broken


def findings(rank: int, *, matmul: float = 1.0, link: float = 1.0, read: float = 1.0) -> Findings:
    return Findings(f"rank {rank} on n{rank // 2}", matmul, link, read, "", "", "")


def test_slow_ranks_and_what_they_are_slow_in() -> None:
    ranks = [findings(rank, matmul=2.1 if rank == 2 else 1.0, read=4.0 if rank == 3 else 1.0) for rank in range(6)]
    assert slow_ranks(ranks, 0.5) == {
        2: "matmul at 0.48 of the median rank's speed",
        3: "read at 0.25 of the median rank's speed",
    }
    assert list(slow_ranks(ranks, 0.3)) == [3]
    assert slow_ranks([findings(rank, link=1e-5 * (rank + 1), read=0.1 * (rank + 1)) for rank in range(4)], 0.5) == {}
    assert summary(ranks[:3]) == (
        "pre-flight of 3 ranks: matmul 1000.00 ms (slowest 2100.00, rank 2 on n1),"
        " link 1000.00 ms (slowest 1000.00, rank 0 on n0), read 1000.00 ms (slowest 1000.00, rank 0 on n0)"
    )


@pytest.mark.parametrize(
    ("bad", "named"), [([], []), ([1], [1]), ([0, 3], [0, 3]), ([0, 1, 2], []), ([0, 1, 2, 3], [])]
)
def test_what_most_cannot_do_is_no_machines_fault(bad: list[int], named: list[int]) -> None:
    assert list(minority(["cannot read" if rank in bad else "" for rank in range(4)])) == named
