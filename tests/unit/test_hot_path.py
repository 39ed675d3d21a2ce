"""A training step: how many operations it has besides the model, and that it never waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ig_dist.config import Config
from ig_dist.config.file import load_config
from ig_dist.data.index import IndexFile, LatentInfo, read_index
from ig_dist.data.latents import model_latents
from ig_dist.data.stream import Batch
from ig_dist.export import ALONE
from ig_dist.models.dit import DiT, initialize
from ig_dist.parallel.build import build_engine
from ig_dist.parallel.dist import Dist, shut_down
from ig_dist.parallel.engine import StepResult, total_norm
from ig_dist.training.learner import EMA, Learner, train_step
from ig_dist.training.meter import Meter
from ig_dist.training.objective import TaskMaker, training_loss
from ig_dist.training.phases import Phases
from tests.counting import Operations, count

torch.library.impl("aten::_fused_sgd_", "Meta")(lambda *_, **__: None)  # torch has none
AWAY = Dist(0, 1, 0, 1, torch.device("meta"))
"""A device that is not the host's: nothing can be read back from it."""


@pytest.fixture
def parts(tiny_config: Callable[..., Path]) -> Callable[..., tuple[Config, IndexFile, Batch]]:
    def make(*overrides: str) -> tuple[Config, IndexFile, Batch]:
        config = load_config(tiny_config(), overrides)
        index = read_index(config.data.index)
        config = config.with_data(index.info.latent.shape, len(index.info.classes))
        shape = index.info.latent.shape
        moments = LatentInfo(kind="moments", shape=shape, dtype="float16", shift=[0.1], scale=[0.2])
        info = index.info.model_copy(update={"latent": moments})
        ids = torch.arange(config.train.global_batch_size)
        stored = torch.rand(len(ids), *moments.stored_shape).half()
        return config, info, Batch(stored, ids % 10, ids, ids, torch.zeros_like(ids))

    return make


@pytest.mark.parametrize(("engine_kind", "kind"), [("ddp", "adamw"), ("ddp", "muon"), ("fsdp2", "adamw")])
def test_a_step(parts: Callable[..., Any], engine_kind: str, kind: str, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(shut_down)
    options = [f"engine.kind={engine_kind}", f"optimizer.kind={kind}", "train.accumulation=2"]
    config, info, batch = parts(*options, "loss.time=logit_normal")
    model = DiT(config.model.to_dit())
    initialize(model, 0)
    engine = build_engine(model, config, None, ALONE)
    ema = EMA(engine.masters(), config.ema.decays, engine.masters_written)
    to_task, meter = TaskMaker(config, info, ALONE.device), Meter(config, model, ALONE, Phases())
    learner = Learner(config, model, engine, ema, to_task, meter)

    def step() -> None:
        train_step(learner, batch, 3, 1e-3)

    step()
    with Operations() as whole:
        step()
    assert whole.waits == [], whole.waits
    micro = batch.split(2)[0]
    draws = count(lambda: to_task(micro), ALONE.device).launches
    assert draws <= 220  # one pass of Philox, three normals, the interpolation
    with Operations() as network:
        for _ in range(2):
            training_loss(engine.module, to_task(micro), config, step=2)[0].mean().backward()
    beside = whole.launches - network.launches
    assert beside <= (40 if kind == "adamw" else 800)  # Muon's grow with the number of shapes, Adam's do not


@pytest.mark.parametrize("engine_kind", ["ddp", "fsdp2"])
def test_norm_optimizer_and_average_are_a_pass_each(
    parts: Callable[..., Any], engine_kind: str, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(shut_down)
    config = parts(f"engine.kind={engine_kind}", "model.hidden_size=128", "ema.decays=[0.9,0.99]")[0]
    model = DiT(config.model.to_dit())
    initialize(model, 0)
    engine = build_engine(model, config, None, ALONE)
    ema = EMA(engine.masters(), config.ema.decays)
    state = sum(weight.nbytes for weight in engine.masters().values())
    for first in (True, False):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with Operations() as operations:
            ema.update(engine.step(1e-3).finite)
        if not first:  # which makes the moments
            # the norm reads; Adam reads four and writes them, the gradient because it clips; an average takes three
            assert operations.bytes == pytest.approx((1 + 8 + 2 * 3) * state, rel=0.01)
            assert operations.launches <= 30


def test_nothing_waits_for_another_device(parts: Callable[..., Any]) -> None:
    config, info, batch = parts()
    with torch.device("meta"):
        model = DiT(config.model.to_dit())
    parameters = dict(model.named_parameters())
    ema, meter = EMA(parameters, config.ema.decays), Meter(config, model, AWAY, Phases())
    to_task = TaskMaker(config, info, AWAY.device)
    with Operations() as operations:
        losses = training_loss(model, to_task(batch), config, step=0)
        losses[0].mean().backward()
        norm = total_norm([p.grad for p in model.parameters() if p.grad is not None])
        result = StepResult(norm, norm.isfinite().float())
        before = operations.launches
        ema.update(result.finite)
        meter.count(result, batch, losses.detach(), 1)
    assert operations.waits == [], operations.waits
    assert operations.launched["_to_copy"] > 0
    assert operations.launches - before <= len(config.ema.decays) + 5  # whatever the depth


def test_what_waits_is_seen(parts: Callable[..., Any]) -> None:
    _, info, batch = parts()
    x, away = torch.ones(3), AWAY.device
    mask = x > 0
    cases: dict[str, Callable[[], object]] = {
        "_local_scalar_dense": lambda: float(x[0]),
        "index": lambda: x[mask],
        "index_put_": lambda: x.__setitem__(mask, 0),
        "nonzero": lambda: x.nonzero(),
        "equal": lambda: torch.equal(x, x),
        "_to_copy from cpu to meta": lambda: x.to(away),
        "copy_ from cpu to meta": lambda: torch.empty(3, device=away).copy_(x),
        "tensor on meta": lambda: torch.tensor([1.0], device=away),
    }
    for name, wait in cases.items():
        with Operations() as operations:
            wait()
        assert operations.waits == [name]
    with Operations() as operations:
        x.to(away, non_blocking=True)
        torch.empty(3, device=away).copy_(x, non_blocking=True)
        x.view(1, 3)[0, 1:].clone()
    assert operations.waits == [] and operations.launched == {"_to_copy": 1, "copy_": 1, "clone": 1}

    stored, positions = batch.latents.to(away), batch.positions.to(away)
    with Operations() as operations:  # shift and scale, made anew
        model_latents(stored, info.latent, posterior="draw", seed=0, positions=positions)
    assert operations.waits == ["tensor on meta"] * 2
