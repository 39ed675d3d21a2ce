"""What processes find out about each other before they form a group."""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from ig_dist.errors import IgDistError, LostPeerError
from ig_dist.parallel import joining
from ig_dist.parallel.joining import _Card, compare, open_files
from ig_dist.this_process import this_process
from tests.networks import enter, machines
from tests.object_store import free_port

CARD = _Card("gpu01", {"ig_dist": "1", "PyTorch": "2.11.0+cu128", "CUDA": "12.8", "NCCL": "2.28.9"}, "cuda", "", "", 2)


def joined(ranks: list[dict[str, Any]], **shared: object) -> list[dict[str, Any]]:
    """What each rank of a job found: its error, or what its groups are.

    Args:
        ranks: of each, what differs from a rank on this machine: its environment, and of the rest see ``_join``.
        shared: environment of all.
    """
    context = multiprocessing.get_context("forkserver")
    common = {"WORLD_SIZE": len(ranks), "LOCAL_WORLD_SIZE": len(ranks), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": free_port(), **shared}
    pipes, processes = [], []
    for number, one in enumerate(ranks):
        environment = common | {"RANK": number, "LOCAL_RANK": number} | one.get("environment", {})
        here, there = context.Pipe(duplex=False)
        told = {name: str(value) for name, value in environment.items()}
        process = context.Process(target=_join, args=(there, {**one, "environment": told}), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        return [pipe.recv() for pipe in pipes if pipe.poll(60)]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def _join(pipe: Any, how: dict[str, Any]) -> None:
    """Be one rank.

    Args:
        pipe: to what it finds.
        how: ``environment``; ``machine`` to be on; ``version`` of PyTorch to have; ``blind``:
            chooses no network interface; ``files``: the limit of open files.
    """
    import torch

    from ig_dist.parallel import dist

    if "machine" in how:
        enter(how["machine"])
    os.environ |= how["environment"]
    torch.__version__ = how.get("version", torch.__version__)
    if how.get("blind"):
        joining.choose_interface = lambda peer: None
    if "files" in how:
        resource.setrlimit(resource.RLIMIT_NOFILE, how["files"])
    try:
        me = dist.init_distributed(float(os.environ.get("JOIN_S", "30")), float(os.environ.get("COLLECTIVE_S", "10")))
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        found = {"total": total.item(), "nodes": me.nodes, "interface": os.environ.get("GLOO_SOCKET_IFNAME")}
        pipe.send(
            found
            | {
                "files": len(list(Path("/proc/self/fd").iterdir())),
                "limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            }
        )
        torch.distributed.barrier()
    except IgDistError as error:
        pipe.send({"error": str(error), "code": error.exit_code})


@pytest.fixture
def two_machines(tmp_path: Path) -> Iterator[list[int]]:
    with ExitStack() as stack:
        try:
            held = stack.enter_context(machines(tmp_path))
        except OSError as error:
            pytest.skip(f"no network namespaces on this machine ({str(error).strip()})")
        yield held


def test_machines_whose_own_name_is_the_loopback_reach_each_other(two_machines: list[int]) -> None:
    """Two ranks on the first, one on the second, as SLURM fills nodes."""
    ranks: list[dict[str, Any]] = [
        {"machine": two_machines[node], "environment": {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": size}}
        for node, local, size in ((0, 0, 2), (0, 1, 2), (1, 0, 1))
    ]
    found = joined(ranks, MASTER_ADDR="node1")
    assert [one.get("interface") for one in found] == ["cable1", "cable1", "cable2"], found
    assert all(one["total"] == 3 and one["nodes"] == 2 for one in found), found
    found = joined([rank | {"blind": True} for rank in ranks[::2]], MASTER_ADDR="node1", COLLECTIVE_S=1)
    assert any("set GLOO_SOCKET_IFNAME to the network interface" in one.get("error", "") for one in found), found


def test_versions_that_differ_are_named() -> None:
    found = joined([{}, {"version": "2.10.0"}, {}])
    said = "the ranks have different versions of PyTorch: "
    assert all(one["code"] == 2 and one["error"].startswith(said) for one in found), found
    assert f"2.10.0 on rank 1 ({socket.gethostname()}). Install the same" in found[0]["error"]


def test_files_are_enough_for_all_ranks_or_the_job_does_not_begin() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    two, four = (joined([{"files": (64, hard)}] * world_size) for world_size in (2, 4))
    assert {one["limit"] for one in two + four} == {min(hard, 1 << 16)}
    # a rank has a connection to each other one, and the first rank has the store's too
    assert [four[rank]["files"] - two[rank]["files"] for rank in range(2)] == [4, 2]
    assert open_files(512, 0) > 1024 > open_files(64, 0)  # the usual soft limit

    found = joined([{}, {"files": (64, 100)}, {}], JOIN_S=1)
    assert (
        found[1]["code"] == 2
        and "3 ranks need up to 528 open files each, and this machine allows 100" in found[1]["error"]
    )
    assert (
        found[0]["code"] == 5 and "came to 127.0.0.1:" in found[0]["error"] and "(without rank 1)" in found[0]["error"]
    )


@pytest.mark.parametrize(
    ("cards", "error", "guilty"),
    [
        ([CARD] * 4, "", []),
        ([CARD._replace(gpu="GPU-a"), CARD._replace(gpu="GPU-b")], "", []),
        (
            [CARD, CARD, CARD._replace(host="gpu02", versions=CARD.versions | {"NCCL": "2.27.3"}), CARD],
            "the ranks have different versions of NCCL: 2.28.9 on ranks 0-1, 3 (gpu01), 2.27.3 on rank 2 (gpu02)",
            [],
        ),
        (
            [CARD, CARD._replace(host="gpu02", device="cpu"), CARD],
            "rank 1 (gpu02) found no GPU, the others did: mend that machine",
            [1],
        ),
        ([CARD, *[CARD._replace(device="cpu")] * 3], "ranks 1-3 (gpu01) found no GPU", []),
        (
            [CARD._replace(gpu="GPU-a"), CARD._replace(gpu="GPU-b"), CARD._replace(gpu="GPU-a")],
            "ranks 0, 2 (gpu01) have one GPU between them (GPU-a): start one process for each GPU",
            [],
        ),
    ],
)
def test_ranks_that_do_not_fit_together(cards: list[_Card], error: str, guilty: list[int]) -> None:
    found = compare(cards)
    assert found.error.startswith(error) and bool(found.error) == bool(error)
    assert found.guilty == guilty


def test_the_address_that_others_reach_is_not_the_loopback() -> None:
    addresses = ["127.0.0.1", "127.0.0.1", "", "10.0.0.2", "10.0.0.3"]
    assert compare([CARD._replace(address=one) for one in addresses]).address == "10.0.0.2"
    assert compare([CARD._replace(address="::1")]).address == ""
    assert compare([CARD, CARD._replace(local_world_size=1)]).local_world_size == 2


def _come_and_go(port: int) -> None:
    """Be a rank 0 that ends when the other has come."""
    store = TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    store.wait(["ig_dist/1"])
    os._exit(1)


def test_a_first_rank_that_ends_meanwhile_is_lost_and_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    first = multiprocessing.get_context("forkserver").Process(target=_come_and_go, args=(port,), daemon=True)
    first.start()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    me = this_process(environment=environment)
    with pytest.raises(LostPeerError, match="rank 0, ended; its message says why"):
        joining.meet_all(me, torch.device("cpu"), 60.0)
    first.join(10)
