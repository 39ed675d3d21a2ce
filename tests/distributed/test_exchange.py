"""What ranks send each other when they go on from a checkpoint: to each what it wants, and no more."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.forked import Process
from tests.object_store import free_port

RANKS = 4


def test_each_rank_is_sent_what_it_wants_and_no_more(tmp_path: Path) -> None:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": f"{RANKS}", "LOCAL_WORLD_SIZE": f"{RANKS}"}
    ranks = [
        Process(
            ["-m", "tests.distributed.exchange_worker", tmp_path],
            out=tmp_path / f"{rank}.log",
            err=tmp_path / f"{rank}.log",
            env={**os.environ, **shared, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
        )
        for rank in range(RANKS)
    ]
    try:
        assert [rank.wait(100) for rank in ranks] == [0] * RANKS, (tmp_path / "0.log").read_text()
    finally:
        for rank in ranks:
            rank.kill()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    for pair in found[0]:
        right, sent, wanted = zip(*(one[pair] for one in found), strict=True)
        saved, as_what = pair.split()
        assert all(right), pair
        assert sum(sent) <= (0 if as_what == "whole" else sum(wanted)), pair  # what all want whole goes another way
        if saved == as_what != "one_each":  # each has read what it wants: shares follow the files
            assert sum(sent) == 0, pair
