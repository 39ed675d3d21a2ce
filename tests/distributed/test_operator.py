"""What an operator does to runs: watch them, fork them, begin with other weights, change their config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ig_dist.config.file import load_config
from ig_dist.data.index import read_index
from ig_dist.export import ALONE
from ig_dist.training.trainer import build_order
from tests.conftest import run_command, succeed
from tests.runs import final_tensors, local, metrics

Write = Callable[..., Path]
WATCHED = {"validate_every_steps": 10, "sample_every_steps": 25, "score_every_steps": 25}
SCORED = {"metrics": ["fd_pixel", "label_agreement"], "training_num": 75, "training_steps": 2}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_watching_a_run_does_not_touch_it(tiny_config: Write, tmp_path: Path) -> None:
    held_out = {"validation_shards": 2}
    quiet = tiny_config("quiet", data=held_out)
    watched = tiny_config("watched", data=held_out, log=WATCHED, evaluate=SCORED)
    watched_by_two = tiny_config("watched2", data=held_out, log=WATCHED, evaluate=SCORED)
    for config, processes in ((quiet, 1), (watched, 1), (watched_by_two, 2)):
        succeed(local(config, processes, "guidance=[{kind: ig, scale: 1.5}]"))
    runs = tmp_path / "runs"
    assert equal(final_tensors(runs / "quiet"), final_tensors(runs / "watched"))

    losses = [line for line in metrics(runs / "watched") if "val_loss" in line]
    assert [line["step"] for line in losses] == [10, 20, 30, 40, 50]
    assert losses[-1]["val_loss"] < losses[0]["val_loss"]
    for mine, theirs in zip(losses, [m for m in metrics(runs / "watched2") if "val_loss" in m], strict=True):
        assert theirs["val_loss"] == pytest.approx(mine["val_loss"], rel=1e-5)
    scores = [line for line in metrics(runs / "watched") if "score_fd_pixel" in line]
    assert [line["step"] for line in scores] == [25, 50] and {line["score_num"] for line in scores} == {75}
    assert scores[1]["score_fd_pixel"] < scores[0]["score_fd_pixel"]
    for mine, theirs in zip(scores, [m for m in metrics(runs / "watched2") if "score_fd_pixel" in m], strict=True):
        assert theirs["score_fd_pixel"] == pytest.approx(mine["score_fd_pixel"], rel=1e-4)
        assert theirs["score_label_agreement"] == mine["score_label_agreement"]
    for line in scores:  # never without its protocol
        told = json.loads((runs / f"watched/evaluations/training/step_{line['step']:010d}.json").read_text())
        assert told["scores"]["fd_pixel"] == line["score_fd_pixel"]
        assert told["protocol"].items() >= {"num": 75, "solver": "heun", "steps": 2, "ema": 0.99}.items()
        assert told["protocol"]["guidance"][0]["scale"] == 1.5 and told["protocol"]["reference_sha256"]
    board = EventAccumulator(str(runs / "watched" / "tensorboard"))
    board.Reload()
    assert [picture.step for picture in board.Images("samples")] == [25, 50]
    assert (board.Images("samples")[0].width, board.Images("samples")[0].height) == (80, 16)


def test_held_out_shards_are_never_trained_on(digits_index: Path) -> None:
    index = read_index(str(digits_index))
    config = load_config("configs/digits.yaml", ["data.validation_shards=2", f"data.index={digits_index}"])
    order = build_order(config, index, ALONE)
    assert order.num_samples == sum(index.shard_sizes[:-2])
    assert max(order.batch(k)[0].max() for k in range(20)) < order.num_samples


def test_a_fork_goes_on_as_its_origin_would_have(tiny_config: Write, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    succeed(["ig-dist", "train", tiny_config("origin")])
    fork = tiny_config("fork", run={"dir": str(runs / "fork"), "fork_from": f"{runs / 'origin'}@20"})
    for _ in range(2):  # the second time it is a finished run of its own
        succeed(["ig-dist", "train", fork])
    assert equal(final_tensors(runs / "origin"), final_tensors(runs / "fork"))
    assert metrics(runs / "fork")[0]["step"] == 21
    bad = tiny_config("bad", run={"dir": str(runs / "bad"), "fork_from": f"{runs / 'origin'}@21"})
    done = run_command(["ig-dist", "train", bad])
    assert done.returncode == 2 and "no whole checkpoint of step 21" in done.stderr and "20, 40, 50" in done.stderr
    assert not (runs / "bad").exists()


def test_weights_of_a_model_without_the_head_get_one(tiny_config: Write, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    headless = tiny_config("headless", model={"aux_depth": None})
    succeed(["ig-dist", "train", headless])
    export = run_command(["ig-dist", "export", runs / "headless", "--raw"]).stdout.strip()
    config = tiny_config("headed", train={"init_from": export, "steps": 20})
    succeed(["ig-dist", "train", config])
    first, last = metrics(runs / "headed")[0], metrics(runs / "headless")[-1]
    assert first["loss_final"] == pytest.approx(last["loss_final"], rel=0.25)  # goes on from there
    assert first["loss_aux"] > 1.2 * first["loss_final"]  # the new head knows nothing yet
    back = tiny_config("back", model={"aux_depth": None})
    succeed(["ig-dist", "export", runs / "headed"])
    (folder,) = (runs / "headed" / "export").iterdir()
    done = run_command(["ig-dist", "train", back, f"train.init_from={folder}"])
    assert done.returncode == 2 and "set model.aux_depth" in done.stderr
    other = tiny_config("other", model={"hidden_size": 64}, train={"init_from": export})
    done = run_command(["ig-dist", "train", other])
    assert done.returncode == 2 and "is of another model" in done.stderr and "this model has" in done.stderr


def test_a_changed_config_is_taken_on_when_it_is_forced(tiny_config: Write, tmp_path: Path) -> None:
    config = tiny_config("forced", train={"steps": 20})
    succeed(["ig-dist", "train", config])
    change = ["train.steps=30", "optimizer.lr=0.001"]
    assert run_command(["ig-dist", "train", config, *change]).returncode == 2
    done = run_command(["ig-dist", "train", config, *change, "--force-config"])
    assert done.returncode == 0 and "changed by --force-config: optimizer.lr (0.002 -> 0.001)" in done.stdout
    assert metrics(tmp_path / "runs" / "forced")[-1]["lr"] == 0.001
    assert run_command(["ig-dist", "train", config, *change]).returncode == 0  # it is the run's config now

    # what cannot go on is refused before the run's config is replaced
    for impossible in (["model.hidden_size=64"], ["ema.decays=[0.5]"]):
        done = run_command(["ig-dist", "train", config, *change, *impossible, "--force-config"])
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    succeed(["ig-dist", "train", config, *change])
    # moved checkpoints are another run: starting at 0 would cut the metrics
    done = run_command(["ig-dist", "train", config, *change, f"checkpoint.url={tmp_path / 'elsewhere'}"])
    assert done.returncode == 2 and "checkpoint.url" in done.stderr


def test_damaged_held_out_samples_are_left_out_under_skip(
    tiny_config: Write, tmp_path: Path, digits_index: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(digits_index, copy)
    index = read_index(str(copy))
    shard = copy / index.info.shards[-1].name
    data = bytearray(shard.read_bytes())
    data[int(index.table.offset[-1])] ^= 1
    shard.write_bytes(data)
    settings = {"data": {"index": str(copy), "validation_shards": 1}, "log": {"validate_every_steps": 5}}
    config = tiny_config("skip", train={"steps": 5}, **settings)
    done = run_command(["ig-dist", "train", config])
    assert done.returncode == 4 and "is damaged" in done.stderr
    done = run_command(["ig-dist", "train", config, "data.on_corrupt=skip", "run.dir=" + str(tmp_path / "other")])
    assert done.returncode == 0 and "val_loss" in done.stdout
