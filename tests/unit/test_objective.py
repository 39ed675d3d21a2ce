"""The objective against direct transcriptions of its formulas: times, cosine loss, training acceleration."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ig_dist.checkpoints.store import CheckpointStore
from ig_dist.config import Config
from ig_dist.config.file import load_config
from ig_dist.config.training import LossConfig
from ig_dist.data.index import LatentInfo, read_index
from ig_dist.data.stream import Batch
from ig_dist.diffusion.loss import accelerated_target, head_difference, ig_loss
from ig_dist.diffusion.path import dimension_shift
from ig_dist.errors import ConfigError
from ig_dist.export import ALONE
from ig_dist.models.dit import DiT, DiTOutput, initialize
from ig_dist.optim.fused import move
from ig_dist.parallel.build import build_engine
from ig_dist.rng import Draws, Purpose, normal, uniform
from ig_dist.training import trainer
from ig_dist.training.learner import EMA, Learner, ema_differences, train_step
from ig_dist.training.meter import Meter
from ig_dist.training.objective import TaskMaker, training_loss, training_times
from ig_dist.training.phases import Phases

POSITIONS = torch.arange(20_000)
SHAPE = (32, 16, 16)


def times(positions: Tensor = POSITIONS, seed: int = 3, **loss: Any) -> Tensor:
    words = Draws(seed, {Purpose.TIME: 1}, positions.device)(positions)[Purpose.TIME]
    return training_times(LossConfig(**loss), words, SHAPE)


def test_uniform_times_are_the_draws_themselves() -> None:
    assert torch.equal(times(), uniform(3, Purpose.TIME, POSITIONS))


def test_logit_normal_times_are_the_sigmoid_of_a_normal() -> None:
    t = times(time="logit_normal", time_mean=-0.4, time_std=1.3)
    draws = normal(3, Purpose.TIME, POSITIONS, ()).double()
    expected = [1 / (1 + math.exp(-(-0.4 + 1.3 * n))) for n in draws[:100].tolist()]
    assert t[:100].tolist() == pytest.approx(expected, rel=1e-12)
    logits = torch.logit(t)
    assert logits.mean().item() == pytest.approx(-0.4, abs=0.03) and logits.std().item() == pytest.approx(1.3, rel=0.02)
    assert t.min() > 0 and t.max() < 1


@pytest.mark.parametrize("shift", [1 / 0.3, 0.5])
@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_the_shift_is_the_formula(shift: float, time: str) -> None:
    u, t = times(time=time), times(time=time, time_shift=shift)
    torch.testing.assert_close(t, shift * u / (1 + (shift - 1) * u), rtol=1e-12, atol=0)
    assert (t > u).all() == (shift > 1)


def test_the_published_shift_is_ours_read_from_the_other_end() -> None:
    """LightningDiT: t' = 0.3 u' / (1 + (0.3 - 1) u') for t' = 1 - t."""
    u, t = times(), times(time_shift=1 / 0.3)
    other = 1 - u
    torch.testing.assert_close(1 - t, 0.3 * other / (1 + (0.3 - 1) * other), rtol=0, atol=1e-12)


def test_the_shift_by_latent_dimension() -> None:
    assert dimension_shift((4, 32, 32)) == 1.0
    assert dimension_shift(SHAPE) == math.sqrt(32 * 16 * 16 / 4096) == math.sqrt(2)
    assert torch.equal(times(time_shift="latent_dimension"), times(time_shift=math.sqrt(2)))


@pytest.mark.parametrize("loss", [{"time": "logit_normal", "time_std": 0.7}, {"time_shift": 2.0}])
def test_times_depend_on_seed_and_position_only(loss: dict[str, Any]) -> None:
    some = torch.tensor([7, 19_999, 0])
    assert torch.equal(times(some, **loss), times(**loss)[some])
    assert (times(some, seed=4, **loss) != times(some, **loss)).all()


# --- losses ---


def predictions(seed: int) -> tuple[DiTOutput, Tensor]:
    made = [torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(10 * seed + i)) for i in range(3)]
    return DiTOutput(made[0], made[1]), made[2]


def test_the_cosine_loss_is_the_formula() -> None:
    output, velocity = predictions(0)
    losses = ig_loss(output, velocity, 0.5, cosine_weight=0.7)
    v, target = output.velocity.double().numpy(), velocity.double().numpy()
    cos = (v * target).sum(1) / (np.sqrt((v * v).sum(1)) * np.sqrt((target * target).sum(1)))
    expected = (1 - cos).reshape(5, -1).mean(1)
    assert losses.cosine.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    plain = ig_loss(output, velocity, 0.5)
    torch.testing.assert_close(losses.total, plain.total + 0.7 * losses.cosine)
    assert plain.cosine.tolist() == [0] * 5
    # the auxiliary head has none
    other = ig_loss(DiTOutput(output.velocity, None), velocity, 0.5, cosine_weight=0.7)
    assert torch.equal(other.cosine, losses.cosine)


def test_the_accelerated_target_is_the_formula_and_stops_the_gradient() -> None:
    """L = |v_final - (v + w sg(v_final - v_aux))|^2 + 0.5 |v_aux - v|^2, with a constant target."""
    output, velocity = predictions(1)
    final, aux = (v.clone().requires_grad_() for v in (output.velocity, output.aux_velocity))
    weight = torch.tensor([0.0, 0.3, 0.3, 1.0, 0.0])
    target = accelerated_target(velocity, head_difference(DiTOutput(final, aux)), weight)
    losses = ig_loss(DiTOutput(final, aux), velocity, 0.5, final_target=target)
    losses.total.sum().backward()
    constant = velocity + weight[:, None, None, None] * (output.velocity - output.aux_velocity)
    error = output.velocity - constant
    torch.testing.assert_close(losses.final, error.square().mean((1, 2, 3)))
    torch.testing.assert_close(final.grad, 2 * error / error[0].numel())
    torch.testing.assert_close(aux.grad, 0.5 * 2 * (output.aux_velocity - velocity) / error[0].numel())
    assert torch.equal(target[0], velocity[0]) and torch.equal(target[4], velocity[4])


def test_the_difference_needs_the_head() -> None:
    with pytest.raises(ValueError, match="auxiliary head"):
        head_difference(DiTOutput(torch.zeros(1, 1, 1, 1), None))


# --- in training ---


@pytest.fixture
def parts(tiny_config: Callable[..., Path]) -> Callable[..., tuple[Config, DiT, Batch, Any]]:
    def make(*overrides: str) -> tuple[Config, DiT, Batch, Any]:
        config = load_config(tiny_config(), overrides)
        index = read_index(config.data.index)
        config = config.with_data(index.info.latent.shape, len(index.info.classes))
        model = DiT(config.model.to_dit())
        initialize(model, 0)
        with torch.no_grad():  # heads start at zero and would not differ
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        rows = config.train.global_batch_size
        ids = torch.arange(rows)
        latents = torch.randn(rows, *index.info.latent.shape, generator=torch.Generator().manual_seed(2)).half()
        return config, model, Batch(latents, ids % 10, ids, ids, torch.zeros_like(ids)), index

    return make


WINDOW = "loss.acceleration={weight: 0.4, start_step: 2, interval: [0.25, 0.75], source: SOURCE}"


@pytest.mark.parametrize("source", ["same_forward", "ema"])
def test_acceleration_in_a_step_is_the_formula(parts: Callable[..., Any], source: str) -> None:
    config, model, batch, index = parts(WINDOW.replace("SOURCE", source), "train.accumulation=2")
    engine = build_engine(model, config, None, ALONE)
    ema = EMA(engine.masters(), config.ema.decays, engine.masters_written)
    with torch.no_grad():
        for number, average in enumerate(ema.averages[0.99].values()):
            average.mul_(0.9).add_(0.01 * (number % 3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    averages = {name: a.clone() for name, a in ema.averages[0.99].items()}

    guide = model
    if source == "ema":
        guide = DiT(config.model.to_dit())
        guide.load_state_dict({**model.state_dict(), **averages})
    task = TaskMaker(config, index.info, ALONE.device)(batch)
    with torch.no_grad():
        final, aux = model(task.x_t, task.t, task.labels)
        guided = guide(task.x_t, task.t, task.labels)
        inside = (task.t >= 0.25) & (task.t <= 0.75)
        assert 0 < inside.sum() < len(inside)
        target = torch.where(
            inside[:, None, None, None], task.velocity + 0.4 * (guided.velocity - guided.aux_velocity), task.velocity
        )
        expected = (final - target).square().mean((1, 2, 3)), (aux - task.velocity).square().mean((1, 2, 3))

    meter = Meter(config, model, ALONE, Phases())
    learner = Learner(config, model, engine, ema, TaskMaker(config, index.info, ALONE.device), meter)
    losses, _ = train_step(learner, batch, 3, 1e-9)
    torch.testing.assert_close(losses[1], expected[0])
    torch.testing.assert_close(losses[2], expected[1])
    torch.testing.assert_close(losses[0], expected[0] + 0.5 * expected[1])
    for name, average in averages.items():  # swapped in and back, bitwise, and then moved
        move([average], [model.get_parameter(name).detach()], 1 - 0.99, None)
        assert torch.equal(ema.averages[0.99][name], average), name
        assert (model.get_parameter(name) - before[name]).abs().max() < 1e-7, name


def test_before_its_start_nothing_is_accelerated(parts: Callable[..., Any]) -> None:
    config, model, batch, index = parts(WINDOW.replace("SOURCE", "ema"))
    task = TaskMaker(config, index.info, ALONE.device)(batch)
    ema = EMA({}, config.ema.decays)

    def untouched(*_: Tensor) -> DiTOutput:
        raise AssertionError("the average must not be run")

    assert ema_differences(untouched, ema, [task], config, step=1) == [None]
    plain = config.model_copy(update={"loss": LossConfig()})
    loss = training_loss(model, task, config, step=1)
    assert torch.equal(loss, training_loss(model, task, plain, step=1))
    assert not torch.equal(training_loss(model, task, config, step=2, difference=torch.ones_like(task.x_t)), loss)


def test_a_task_has_weights_inside_the_interval_only(parts: Callable[..., Any]) -> None:
    config, _, batch, index = parts(WINDOW.replace("SOURCE", "same_forward"))
    task = TaskMaker(config, index.info, ALONE.device)(batch)
    inside = (task.t >= 0.25) & (task.t <= 0.75)
    assert torch.equal(task.acceleration, 0.4 * inside.float())


def test_compiled_tasks_are_bitwise_the_eager_ones(parts: Callable[..., Any]) -> None:
    options = ["loss.time=logit_normal", "loss.time_shift=2.5", f"run.seed={2**63 - 2**33 - 7}", "loss.label_drop=0.4"]
    config, _, batch, index = parts(WINDOW.replace("SOURCE", "same_forward"), *options)
    moments = LatentInfo(
        kind="moments", shape=(3, 7, 11), dtype="float16", shift=[0.1, 0.2, 0.3], scale=[0.2, 1.0, 3.0]
    )
    info = index.info.model_copy(update={"latent": moments})
    stored = torch.rand(len(batch.labels), *moments.stored_shape, generator=torch.Generator().manual_seed(0)).half()
    batch = replace(batch, latents=stored, positions=batch.positions + 2**40)
    compile_too = config.model_copy(update={"train": config.train.model_copy(update={"compile": True})})
    eager, compiled = (TaskMaker(chosen, info, ALONE.device) for chosen in (config, compile_too))
    for number, micro in enumerate(batch.split(2)):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            assert all(map(torch.equal, eager(micro), compiled(micro)))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("loss.time=lognormal", "loss.time"),
        ("loss.time_std=0.5", "loss.time_std=0.5 needs loss.time=logit_normal"),
        ("loss.time_shift=0", "loss.time_shift"),
        ("loss.time_shift=dimension", "loss.time_shift"),
        ("loss.acceleration.source=average", "loss.acceleration.source"),
        ("loss.acceleration.interval=[0.7, 0.2]", "write low <= high"),
        ("loss.acceleration.wieght=1", "did you mean 'loss.acceleration.weight'"),
    ],
)
def test_impossible_objectives_are_refused_in_one_line(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("configs/digits.yaml", [override])
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_acceleration_needs_the_head() -> None:
    with pytest.raises(ConfigError, match=r"loss\.acceleration needs the auxiliary head: set model\.aux_depth"):
        load_config("configs/digits.yaml", ["loss.acceleration.weight=0.5", "model.aux_depth=null"])


@pytest.mark.parametrize("source", ["same_forward", "ema"])
def test_a_restart_of_an_accelerated_run_is_exact(
    tiny_config: Callable[..., Path], tmp_path: Path, source: str
) -> None:
    options = [WINDOW.replace("SOURCE", source), "train.steps=12", "checkpoint.every_steps=6", "ema.decays=[0.8]"]
    options.append("train.deterministic=true")  # no operation of a step is without a kernel that repeats itself
    whole, restarted = (str(tmp_path / name) for name in ("whole", "restarted"))
    trainer.train(load_config(tiny_config(), [*options, f"run.dir={whole}"]))
    trainer.train(load_config(tiny_config(), [*options, f"run.dir={restarted}", f"run.fork_from={whole}@6"]))
    first, second = (CheckpointStore(f"{run}/checkpoints").find(ALONE, 12) for run in (whole, restarted))
    for name in first.manifest["tensors"]:
        assert torch.equal(first.read(name), second.read(name)), name
