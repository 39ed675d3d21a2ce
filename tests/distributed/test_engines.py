"""DDP, FSDP2 and DeepSpeed: one config line apart, one curve, one checkpoint format.

The model has patches of one pixel: the output layer has one row, so that some ranks hold nothing of it, and the label
table has eleven, which nothing divides.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ig_dist.checkpoints.store import CheckpointStore, checkpoint_store
from ig_dist.config.file import load_config
from ig_dist.data.index import read_index
from ig_dist.errors import ConfigError
from ig_dist.export import ALONE
from ig_dist.models.layers import sincos_pos_embed
from ig_dist.parallel.build import check_engine
from ig_dist.parallel.deepspeed import BUCKET_ELEMENTS
from ig_dist.training.beginning import find_checkpoint
from ig_dist.training.dry_run import count_state, memory_per_gpu
from tests.conftest import ROOT, TINY, succeed
from tests.distributed.kills import carry_out, kills
from tests.forked import Process
from tests.object_store import free_port
from tests.runs import metrics

ENGINES = {
    "ddp": ["engine.kind=ddp"],
    "fsdp2": ["engine.kind=fsdp2"],
    **{f"zero{stage}": ["engine.kind=deepspeed", f"engine.zero_stage={stage}"] for stage in (1, 2, 3)},
    "hsdp": ["engine.kind=fsdp2", "engine.replicate=2"],
}
SHARDED = [name for name in ENGINES if name != "ddp"]
CHAIN = list(zip(ENGINES, [*list(ENGINES)[1:], "ddp"], strict=True))
ON_TWO = [name for name in ENGINES if name != "hsdp"]  # which is of two groups of two
LOSSES = ("loss", "loss_final", "loss_aux")
STEPS, SAVED = 30, 10
Job = dict[str, Any]


def start(jobs: Sequence[Job], processes: int, file: Path) -> list[Process]:
    """Begin to do the jobs on new processes, which write what they say beside ``file``."""
    file.write_text(json.dumps(jobs))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = []
    for rank in range(processes):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = log_of(file, rank)
        ranks.append(Process(["-m", "tests.distributed.engine_worker", file], out=log, err=log, env=environment))
    return ranks


def log_of(file: Path, rank: int) -> Path:
    return file.with_suffix(f".{rank}.log")


def launch(jobs: Sequence[Job], processes: int, folder: Path) -> None:
    """Do the jobs on new processes."""
    file = folder / f"{Path(jobs[0]['overrides'][0]).name}_{processes}.json"  # the first one's run.dir
    ranks = start(jobs, processes, file)
    try:
        failed = [rank for rank, process in enumerate(ranks) if process.wait(500)]
    finally:
        for process in ranks:
            process.kill()
    assert not failed, "\n".join(log_of(file, rank).read_text()[-3000:] for rank in range(processes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits_index: Path) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    tree = {group: dict(values) for group, values in TINY.items()}
    tree["model"] |= {"patch_size": 1, "depth": 2}
    tree["data"] |= {"index": str(digits_index), "validation_shards": 1}
    tree["train"] |= {"steps": STEPS, "global_batch_size": 16}
    tree["checkpoint"] = {"every_steps": SAVED, "keep_last": 9}
    (folder / "engines.yaml").write_text(yaml.safe_dump(tree))
    return folder


def run(folder: Path, name: str, *overrides: str) -> Job:
    return {"config": str(folder / "engines.yaml"), "overrides": [f"run.dir={folder / name}", *overrides]}


BLOWN = ["optimizer.lr=1e30", "optimizer.warmup_steps=0", "train.max_nonfinite_steps=5", "checkpoint.every_steps=1"]

ACCELERATED = ["loss.acceleration={weight: 0.8, source: ema, start_step: 5}", "ema.decays=[0.5]", "train.steps=20"]


WATCHED = ["log.validate_every_steps=5", "log.sample_every_steps=5", "train.activation_checkpointing=true"]
WATCHED += ["log.score_every_steps=5", "evaluate.training_num=75", "evaluate.training_steps=2"]


def runs_of(folder: Path, name: str) -> list[Job]:
    """All that is looked at of an engine."""
    engine, few = ENGINES[name], f"train.steps={SAVED}"
    jobs = [
        run(folder, name, *engine),
        run(folder, f"{name}-bf16", *engine, few, "train.precision=bf16"),
        run(folder, f"{name}-watched", *engine, few, *WATCHED),
        run(folder, f"{name}-ema", *engine, *ACCELERATED, f"train.accumulation={1 + (name != 'ddp')}"),
    ]
    if name != "ddp":
        jobs.append(run(folder, f"{name}-accumulated", *engine, "train.steps=10", "train.accumulation=2"))
        jobs.append(run(folder, f"{name}-restarted", *engine, f"run.fork_from={folder / name}@{2 * SAVED}"))
        jobs.append({**run(folder, f"{name}-blown", *engine, *BLOWN), "blows_up": True})
    return jobs


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """Runs on two processes, all of one launch."""
    launch([job for name in ON_TWO for job in runs_of(folder, name)], 2, folder)
    return folder


@pytest.fixture(scope="module")
def runs(two: Path) -> Path:
    """Runs on four processes, and each engine going on from another."""
    jobs = [*runs_of(two, "hsdp"), *muon_runs(two, "hsdp"), *measurements(two, "hsdp")]
    jobs.append({**run(two, "dealt", *ENGINES["hsdp"]), "dealt_out": True})
    launch([*jobs, *(job for pair in CHAIN for job in reload_and_go_on(two, *pair, 4))], 4, two)
    return two


WIDE = ["model.hidden_size=128", "model.depth=4"]


def measurements(folder: Path, name: str) -> list[Job]:
    """Memory of a model of 1.2 M weights before a step, and between two micro-batches."""
    return [
        {**run(folder, f"{name}-{count}", *ENGINES[name], *WIDE, f"train.accumulation={count}"), "measure": True}
        for count in ((1, 2) if "fsdp2" in ENGINES[name][0] else (1,))
    ]


@pytest.fixture(scope="module")
def measured(folder: Path) -> Path:
    """Memory under engines on two processes."""
    launch([job for name in ON_TWO for job in measurements(folder, name)], 2, folder)
    return folder


@pytest.mark.parametrize("name", ENGINES)
def test_memory_is_as_the_dry_run_tells(measured: Path, runs: Path, name: str) -> None:
    config = load_config(runs / "engines.yaml", [*ENGINES[name], *WIDE])
    index = read_index(config.data.index)
    config = config.with_data(index.info.latent.shape, len(index.info.classes))
    model, gpus = config.model.to_dit(), 4 if name == "hsdp" else 2
    counts = count_state(model, config)
    told = memory_per_gpu(name, model, *counts, config, gpus=gpus, micro=2)
    found = int((runs / f"{name}-1.bytes").read_text()) - 4 * BUCKET_ELEMENTS * (name == "zero3")
    assert found == pytest.approx(told["state_bytes"], rel=0.02)
    if ENGINES[name][0] == "engine.kind=fsdp2":  # only HSDP shares out the gradients of each micro-batch
        config.train.accumulation = 2
        between = int((runs / f"{name}-2.bytes").read_text())
        more = memory_per_gpu(name, model, *counts, config, gpus=gpus, micro=2)["working_bytes"] - told["working_bytes"]
        assert between == pytest.approx(told["state_bytes"] + more, rel=0.02) and (more > 0) == (name == "fsdp2")


LIGHTNING = ["model.norm=rmsnorm", "model.mlp=swiglu", "model.rope=true", "model.qk_norm=true", "train.steps=12"]


@pytest.fixture(scope="module")
def lightning(folder: Path) -> Path:
    """LightningDiT's layers, with and without bf16; the engines that gather blocks compute them again in backward."""
    jobs = []
    for name in ("ddp", "fsdp2", "zero3"):
        checkpointing = f"train.activation_checkpointing={str(name != 'ddp').lower()}"
        layers = [*LIGHTNING, *ENGINES[name], checkpointing]
        jobs.append(run(folder, f"{name}-lightning", *layers))
        jobs.append(run(folder, f"{name}-lightning-bf16", *layers, "train.precision=bf16"))
    launch(jobs, 2, folder)
    return folder


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_layers_of_lightningdit_under_every_kind_of_engine(lightning: Path, engine: str) -> None:
    assert_curve(lightning / f"{engine}-lightning", lightning / "ddp-lightning", rel=1e-5)
    assert_curve(lightning / f"{engine}-lightning-bf16", lightning / "ddp-lightning-bf16", rel=1e-3)
    lines = [metrics(lightning / f"{engine}-lightning{bf16}")[-1]["loss"] for bf16 in ("", "-bf16")]
    assert lines[0] != lines[1]
    names = {name.removeprefix("model/") for name in saved(lightning / f"{engine}-lightning", 12)}
    assert {"feat_rope.freqs_cos", "blocks.0.norm1.weight", "blocks.1.mlp.w12.weight"} <= names


def test_on_one_process_bf16_of_fsdp2_is_ddps_to_the_bit(folder: Path) -> None:
    """Also the weights of norms, which FSDP2 gathers in bf16 and autocast would leave in fp32."""
    norms = ("rmsnorm", "layernorm")
    pairs = [(f"{name}-{norm}", name, norm) for name in ("ddp", "fsdp2") for norm in norms]
    layers = [*LIGHTNING, "train.precision=bf16"]
    launch([run(folder, one, *layers, *ENGINES[name], f"model.norm={norm}") for one, name, norm in pairs], 1, folder)
    for norm in norms:
        assert_equal(saved(folder / f"fsdp2-{norm}", 12), saved(folder / f"ddp-{norm}", 12))


MUON_STEPS = 30
MUON = ["optimizer.kind=muon", "optimizer.lr=0.02", "optimizer.decay_pos_embed=true", f"train.steps={MUON_STEPS}"]


def muon_runs(folder: Path, name: str) -> list[Job]:
    engine = [*MUON, *ENGINES[name]]
    return [
        run(folder, f"{name}-muon", *engine),
        run(folder, f"{name}-muon-restarted", *engine, f"run.fork_from={folder / name}-muon@{2 * SAVED}"),
    ]


@pytest.fixture(scope="module")
def muon(folder: Path) -> Path:
    """Muon on one process and on two, gone on with from the middle, and blown up."""
    launch([run(folder, "muon-one", *MUON)], 1, folder)
    jobs = []
    for name in ("ddp", "fsdp2"):
        jobs += muon_runs(folder, name)
        jobs.append({**run(folder, f"{name}-muon-blown", *MUON, *ENGINES[name], *BLOWN), "blows_up": True})
    for source, target in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
        whole = [*MUON, *ENGINES[target], f"run.fork_from={folder / source}-muon@{2 * SAVED}"]
        store = {
            "source": str(folder / f"{source}-muon/checkpoints"),
            "dest": str(folder / f"{source}-{target}-muon/checkpoints"),
        }
        jobs.append({**run(folder, f"{source}-{target}-muon", *whole), **store, "step": 2 * SAVED})
    launch(jobs, 2, folder)
    return folder


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "hsdp"])
def test_muon_of_several_processes_follows_muon_of_one(muon: Path, runs: Path, engine: str) -> None:
    assert_curve(muon / f"{engine}-muon", muon / "muon-one", rel=1e-5)
    lines = metrics(muon / "muon-one")
    assert len(lines) == MUON_STEPS and lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    held = saved(muon / f"{engine}-muon", MUON_STEPS)
    groups = [name.split("/")[0] for name in held]
    assert 0 < groups.count("exp_avg_sq") < groups.count("exp_avg")  # matrices have one moment
    table = average = sincos_pos_embed(held["model/pos_embed"].shape[2], 8)
    for line in lines:  # weight decay is all that reaches the table of positions
        table = table * (1 - 0.01 * line["lr"])
        average = average.lerp(table, 1 - 0.99)
    assert table.abs().max() < 0.996
    torch.testing.assert_close(held["model/pos_embed"], table, rtol=1e-5, atol=0)
    torch.testing.assert_close(held["ema/0.99/pos_embed"], average, rtol=1e-5, atol=0)
    exported = load_file(muon / f"{engine}-muon" / "export" / f"step_{MUON_STEPS:010d}_ema_0.99" / "model.safetensors")
    assert torch.equal(exported["pos_embed"], held["ema/0.99/pos_embed"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "hsdp"])
def test_a_restart_of_muon_is_exact(muon: Path, runs: Path, engine: str) -> None:
    assert_equal(saved(muon / f"{engine}-muon-restarted", MUON_STEPS), saved(muon / f"{engine}-muon", MUON_STEPS))


@pytest.mark.parametrize(("source", "target"), [("ddp", "fsdp2"), ("fsdp2", "ddp")])
def test_a_checkpoint_of_muon_is_loaded_under_the_other_engine(muon: Path, source: str, target: str) -> None:
    assert_equal(saved(muon / f"{source}-{target}-muon", 2 * SAVED), saved(muon / f"{source}-muon", 2 * SAVED))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_muon_skips_a_non_finite_step(muon: Path, engine: str) -> None:
    steps = CheckpointStore(str(muon / f"{engine}-muon-blown" / "checkpoints")).steps()
    first = next(line["step"] for line in metrics(muon / f"{engine}-muon-blown") if line["nonfinite_steps"])
    assert steps[-1] > first
    assert_equal(saved(muon / f"{engine}-muon-blown", steps[-1]), saved(muon / f"{engine}-muon-blown", first - 1))


def test_the_state_of_another_optimizer_is_refused(muon: Path) -> None:
    for options, message in (
        ([], r"has the state of optimizer\.kind=muon, this config has adamw: use that"),
        (["optimizer.kind=muon"], r"whose table of positions decays: set optimizer\.decay_pos_embed=true, or begin"),
    ):
        job = run(muon, "other", f"run.fork_from={muon / 'muon-one'}@{2 * SAVED}", *options)
        config = load_config(job["config"], job["overrides"])
        index = read_index(config.data.index)
        config = config.with_data(index.info.latent.shape, len(index.info.classes))
        with pytest.raises(ConfigError, match=message):
            find_checkpoint(checkpoint_store(config), config, index, ALONE, lambda: None, force=False)


def test_ranks_that_were_dealt_out_over_machines_in_turn_are_refused_on_all_alike(runs: Path) -> None:
    for rank in range(4):
        assert "srun --distribution=block" in (runs / f"dealt.{rank}.refusal").read_text()


def test_groups_share_the_writing_of_what_they_all_hold(runs: Path) -> None:
    manifest = CheckpointStore(str(runs / "hsdp" / "checkpoints")).find(ALONE, SAVED).manifest
    for name, entry in manifest["tensors"].items():
        assert sum(stop - start for _, start, stop, *_ in entry["pieces"]) == math.prod(entry["shape"]), name
    sizes = [file["bytes"] for file in manifest["files"]]
    assert len(sizes) == 4 and max(sizes) < 1.2 * sum(sizes) / 4


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, averages and moments of a checkpoint."""
    checkpoint = CheckpointStore(str(run / "checkpoints")).find(ALONE, step)
    return {name: checkpoint.read(name) for name in checkpoint.manifest["tensors"]}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_curve(found: Path, expected: Path, rel: float) -> None:
    """The lines of ``found`` are those of ``expected`` of the same steps, to ``rel``."""
    theirs = {line["step"]: line for line in metrics(expected)}
    lines = metrics(found)
    assert len(lines) >= 10
    for line in lines:
        assert line["batch_fingerprint"] == theirs[line["step"]]["batch_fingerprint"]
        for key in LOSSES:
            assert line[key] == pytest.approx(theirs[line["step"]][key], rel=rel), (found, line["step"], key)
        norm = theirs[line["step"]]["grad_norm"]  # it shows a difference of the weights tenfold
        assert line["grad_norm"] == pytest.approx(norm, rel=10 * rel), (found, line["step"])


@pytest.mark.parametrize("engine", SHARDED)
def test_every_engine_follows_ddp(runs: Path, engine: str) -> None:
    assert_curve(runs / engine, runs / "ddp", rel=1e-5)
    assert len(metrics(runs / engine)) == STEPS
    assert metrics(runs / engine)[-1]["loss"] < 0.9 * metrics(runs / engine)[0]["loss"]


@pytest.mark.parametrize("engine", SHARDED)
def test_bf16_follows_bf16_of_ddp(runs: Path, engine: str) -> None:
    """Autocast rounds the same numbers under every engine; sums in another order make some of them round otherwise."""
    assert_curve(runs / f"{engine}-bf16", runs / "ddp-bf16", rel=1e-3)
    assert metrics(runs / f"{engine}-bf16")[-1]["loss"] != metrics(runs / engine)[SAVED - 1]["loss"]


@pytest.mark.parametrize("engine", SHARDED)
def test_accumulation_changes_nothing(runs: Path, engine: str) -> None:
    assert_curve(runs / f"{engine}-accumulated", runs / engine, rel=1e-5)


@pytest.mark.parametrize("engine", SHARDED)
def test_acceleration_by_the_ema_is_that_of_ddp(runs: Path, engine: str) -> None:
    """Every step runs the average's weights between forward passes of the trained ones, here with accumulation."""
    assert_curve(runs / f"{engine}-ema", runs / "ddp-ema", rel=1e-5)
    plain, accelerated = ([line["loss"] for line in metrics(runs / name)[:20]] for name in ("ddp", "ddp-ema"))
    assert plain[:5] == accelerated[:5] and accelerated[19] != pytest.approx(plain[19], rel=1e-3)


@pytest.mark.parametrize("engine", SHARDED)
def test_a_restart_is_exact(runs: Path, engine: str) -> None:
    assert_equal(saved(runs / f"{engine}-restarted", STEPS), saved(runs / engine, STEPS))


@pytest.mark.parametrize("engine", ENGINES)
def test_neither_watching_nor_activation_checkpointing_changes_a_bit(runs: Path, engine: str) -> None:
    losses, expected = (
        [line["val_loss"] for line in metrics(runs / f"{name}-watched") if "val_loss" in line]
        for name in (engine, "ddp")
    )
    assert losses == pytest.approx(expected, rel=1e-5) and losses[1] < losses[0]
    scores, expected = (
        [line["score_fd_pixel"] for line in metrics(runs / f"{name}-watched") if "score_fd_pixel" in line]
        for name in (engine, "ddp")
    )
    assert scores == pytest.approx(expected, rel=1e-4) and len(scores) == 2 and len(set(scores)) == len(scores)
    assert_equal(saved(runs / f"{engine}-watched", SAVED), saved(runs / engine, SAVED))


@pytest.mark.parametrize("engine", SHARDED)
def test_a_non_finite_step_is_skipped_on_all_ranks_alike(runs: Path, engine: str) -> None:
    steps = CheckpointStore(str(runs / f"{engine}-blown" / "checkpoints")).steps()
    first = next(line["step"] for line in metrics(runs / f"{engine}-blown") if line["nonfinite_steps"])
    assert steps[-1] > first
    assert_equal(saved(runs / f"{engine}-blown", steps[-1]), saved(runs / f"{engine}-blown", first - 1))


def test_engines_say_nothing_of_their_own(two: Path) -> None:
    lines = [line for rank in range(2) for line in log_of(two / "ddp_2.json", rank).read_text().splitlines()]
    assert [line for line in lines if "DeepSpeed" in line or "arning" in line] == []


@pytest.mark.parametrize("count", [6, pytest.param(30, marks=[pytest.mark.full, pytest.mark.timeout(1800)])])
def test_sigkill_at_any_moment_leaves_no_trace_in_the_weights(runs: Path, count: int) -> None:
    """Killed and started again with the same job list, in which what is finished is left alone."""
    names = {f"{engine}-killed{count}": engine for engine in ENGINES}
    jobs = [run(runs, name, *ENGINES[engine], "checkpoint.every_steps=7") for name, engine in names.items()]
    launches = {name: (jobs[: place + 1], 2) for place, name in enumerate(names)}
    launches[f"hsdp-killed{count}"] = jobs[-1:], 4
    resumed, torn = dict.fromkeys(names, 0), 0
    for number, kill in enumerate(kills(list(names), count, STEPS - 10, 2)):
        file = runs / f"killed{count}_{number}.json"
        ranks = start(*launches[kill.run], file)
        try:
            left = carry_out(kill, ranks, log_of(file, 0), runs / kill.run)
        finally:
            for rank in ranks:
                rank.kill()
        store = CheckpointStore(str(runs / kill.run / "checkpoints"))
        checkpoint = store.find(ALONE)
        step = checkpoint.step if checkpoint else 0
        assert not store.damaged and step >= resumed[kill.run], kill  # nothing that was whole is lost
        assert step >= kill.step - 2 * 7, kill  # nor more than the save that was under way and what followed it
        resumed[kill.run] = step
        torn += left and kill.kind == "save"
    assert torn  # the moments are in saves indeed
    launch(jobs[:-1], 2, runs)
    launch(jobs[-1:], 4, runs)
    for name, engine in names.items():
        assert_equal(saved(runs / name, STEPS), saved(runs / engine, STEPS))
        for mine, theirs in zip(metrics(runs / name), metrics(runs / engine), strict=True):
            assert all(mine[key] == theirs[key] for key in ("step", "batch_fingerprint", *LOSSES)), (name, mine)


def reload_and_go_on(folder: Path, source: str, target: str, processes: int) -> list[Job]:
    """Load what ``source`` saved and save it again; then go on with it."""
    name = f"{source}-{target}{processes}"
    go_on = run(folder, name, *ENGINES[target], f"run.fork_from={folder / source}@{SAVED}", f"train.steps={2 * SAVED}")
    store = {"source": str(folder / source / "checkpoints"), "dest": str(folder / f"{name}-reload" / "checkpoints")}
    return [{**go_on, **store, "step": SAVED}, go_on]


def assert_went_on(folder: Path, source: str, target: str, processes: int) -> None:
    name = f"{source}-{target}{processes}"
    assert_equal(saved(folder / f"{name}-reload", SAVED), saved(folder / source, SAVED))
    checkpoints = [CheckpointStore(str(folder / n / "checkpoints")) for n in (f"{name}-reload", source)]
    metas = [{**store.find(ALONE, SAVED).meta, "config": None, "run": None} for store in checkpoints]
    assert metas[0] == metas[1] and metas[0]["optimizer_steps"] == SAVED
    assert_curve(folder / name, folder / source, rel=1e-4)


@pytest.mark.parametrize("pair", CHAIN)
def test_each_engine_goes_on_from_another_on_four_processes(runs: Path, pair: tuple[str, str]) -> None:
    assert_went_on(runs, *pair, 4)


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_checkpoint_under_any_engine(runs: Path, tmp_path: Path, processes: int) -> None:
    pairs = [(source, target) for source in ENGINES for target in (ENGINES if processes > 1 else ON_TWO)]
    folder = tmp_path
    (folder / "engines.yaml").write_bytes((runs / "engines.yaml").read_bytes())
    for name in ENGINES:
        (folder / name).symlink_to(runs / name)
    launch([job for pair in pairs for job in reload_and_go_on(folder, *pair, processes)], processes, folder)
    for pair in pairs:
        assert_went_on(folder, *pair, processes)


@pytest.mark.full
def test_every_engine_follows_ddp_on_four_processes(folder: Path) -> None:
    launch([run(folder, f"{name}-four", *engine) for name, engine in ENGINES.items()], 4, folder)
    for engine in SHARDED:
        assert_curve(folder / f"{engine}-four", folder / "ddp-four", rel=1e-5)


def test_the_engine_is_changed_in_the_middle_of_a_run(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """The launcher's and torchrun's processes start as a user's do: in other tests they are forked."""
    config, programs = tiny_config("changed"), Path(sys.executable).parent
    fsdp2 = ["engine.kind=fsdp2", "engine.reshard_after_forward=false", "train.steps=10"]
    torchrun = ["torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())]
    for command in (
        ["ig-dist", "launch", "--processes", "2", config, *fsdp2],
        [*torchrun, "-m", "ig_dist.cli", "train", config, "engine.kind=deepspeed", "train.steps=20"],
    ):
        typed = [programs / command[0], *command[1:]]
        done = subprocess.run(typed, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert not done.stderr and "DeepSpeed" not in done.stdout
    done = succeed(["ig-dist", "train", config, "engine.kind=ddp"])
    assert "resume at step 20 of 50" in done.stdout
    assert [line["step"] for line in metrics(tmp_path / "runs" / "changed")] == list(range(1, 51))


def test_without_deepspeed_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_engine(load_config("configs/digits.yaml", ["engine.kind=fsdp2"]))
    with pytest.raises(ConfigError, match="pip install 'deepspeed"):
        check_engine(load_config("configs/digits.yaml", ["engine.kind=deepspeed"]))
