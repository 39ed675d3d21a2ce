"""Our training step and samplers against the published code of Internal Guidance, in turn in one process.

    python benchmarks/compare.py --reference DIR                    # all cases of this device
    python benchmarks/compare.py --reference DIR --only B/2 --profile

DIR holds the published code (``SiT`` and ``LightningDiT``). Shapes, weights, inputs and precision are the same. Before
anything is timed the outputs are: velocities, losses and sampled latents are equal to 1e-4. Theirs runs as published:
SiT without the compiler, LightningDiT with its ``@torch.compile`` where ours is compiled too, and without where not.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from benchmarks.compare_cases import CPU, GPU, Case, plan_of
from benchmarks.reference import Published
from benchmarks.side_by_side import Claim, Record, Result, Rounds, interleaved, profiled, show
from benchmarks.synthetic import build_model, build_step, export_info
from ig_dist.arithmetic import arithmetic
from ig_dist.convert.formats import to_published
from ig_dist.diffusion.loss import ig_loss
from ig_dist.models.dit import DiT
from ig_dist.models.presets import forward_flops
from ig_dist.parallel.dist import Dist
from ig_dist.plans.plan import Plan
from ig_dist.rng import Purpose, normal
from ig_dist.sampling.solving import Models, Sampler
from ig_dist.terminal import console, run_app
from ig_dist.training.metrics import model_flops_utilisation

BOUND = 1e-4
"""How far outputs in fp32 may be apart, relative to their norm."""


def our_model(case: Case, device: torch.device) -> DiT:
    """With weights that are nowhere zero: the velocity of a model as it begins is."""
    model = build_model(case.config(compiled=False), case.info(), device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
    return model


def their_model(case: Case, published: Published, ours: DiT) -> nn.Module:
    """The same model in the published code, with the same weights."""
    config = ours.config
    shape: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    }
    shape["encoder_depth"] = config.aux_depth
    with ours.pos_embed.device:
        if case.is_sit:
            model = published.sit.SiT(**shape, decoder_hidden_size=config.hidden_size, fused_attn=True, qk_norm=False)
        else:
            model = published.lightningdit.LightningDiT(**shape, use_swiglu=True, use_rope=True, use_rmsnorm=True)
    weights = to_published(ours.state_dict(), "ig-sit" if case.is_sit else "ig-lightningdit")
    model.load_state_dict(weights)
    built: nn.Module = model
    return built


def their_losses(case: Case, published: Published, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """(latents, labels) -> loss, with their own draws."""
    if case.is_sit:
        loss_fn = published.loss.IGLoss()

        def sit(latents: Tensor, labels: Tensor) -> Tensor:
            final, aux = loss_fn(model, latents, labels)
            total: Tensor = final.mean() + aux.mean() * 0.5
            return total

        return sit
    transport = published.transport.create_transport("Linear", "velocity", use_cosine_loss=True, use_lognorm=False)

    def lightning(latents: Tensor, labels: Tensor) -> Tensor:
        terms = transport.training_losses(model, latents, {"y": labels})
        total: Tensor = terms["cos_loss"].mean() + terms["loss"].mean()
        return total

    return lightning


@torch.no_grad()
def check(case: Case, published: Published, ours: DiT, theirs: nn.Module) -> None:
    """Assert that velocities and loss are the same, in fp32 on this device."""
    device, sign = ours.pos_embed.device, 1 if case.is_sit else -1
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.batch, *case.info().latent.shape, generator=generator).to(device)
    labels = torch.arange(case.batch, device=device)
    t = torch.rand(case.batch, generator=generator).to(device)
    theirs.eval()
    with arithmetic("fp32", device):
        found, expected = ours(x, t, labels), theirs(x, t if case.is_sit else 1 - t, labels)
        for name, mine, published_one in zip(("velocity", "aux_velocity"), found, expected, strict=False):
            assert_close(f"{case.name}: {name}", mine, sign * published_one)
        torch.manual_seed(2)
        loss = their_losses(case, published, theirs)(x, labels)
        torch.manual_seed(2)
        if case.is_sit:
            t, noise = torch.rand(case.batch, 1, 1, 1).to(device).flatten(), torch.randn_like(x)
        else:
            noise, t = torch.randn_like(x), 1 - torch.rand(case.batch).to(device)
        times = t.view(-1, 1, 1, 1)
        mine = ours((1 - times) * x + times * noise, t, labels)
        cosine = 0.0 if case.is_sit else 1.0
        assert_close(f"{case.name}: loss", ig_loss(mine, noise - x, 0.5, cosine_weight=cosine).total.mean(), loss)
    theirs.train()


def assert_close(name: str, ours: Tensor, theirs: Tensor, bound: float = BOUND) -> None:
    """Within the bound, relative to the norm."""
    off = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    assert off <= bound, f"{name}: {off:.1e} apart, more than {bound:g}: not the same work"
    console.print(f"{name}: {off:.1e} apart")


def their_step(case: Case, published: Published, model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Their training step as their train.py makes it, on a batch from pinned memory."""
    update_ema = published.train.update_ema
    average = copy.deepcopy(model).requires_grad_(False)
    losses = their_losses(case, published, model)
    optimizer: torch.optim.Optimizer
    if case.is_sit:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
    else:
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        adam = {"params": others, "use_muon": False, "betas": (0.9, 0.95), "weight_decay": 0, "eps": 1e-8}
        muon = {"params": matrices, "use_muon": True, "weight_decay": 0.01}
        optimizer = published.muon.MuonWithAuxAdam([{**muon, "lr": 2e-4}, {**adam, "lr": 2e-4}])
    stored = torch.rand(case.batch, *case.info().latent.stored_shape)
    labels = torch.arange(case.batch)
    if device.type == "cuda":
        stored, labels = stored.pin_memory(), labels.pin_memory()
    if case.precision == "bf16":  # as accelerate prepares a model
        forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
        model.forward = lambda *args, **kwargs: _to_fp32(forward(*args, **kwargs))
    scale, bias = torch.full((1, 4, 1, 1), 0.18215, device=device), torch.zeros(1, 4, 1, 1, device=device)

    def step() -> None:
        latents, classes = stored.to(device), labels.to(device)
        if case.is_sit:
            latents = published.train.sample_posterior(latents, latents_scale=scale, latents_bias=bias)
        loss = losses(latents, classes)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(average, model)
        loss.detach().item()  # for the progress bar

    return step


def _to_fp32(output: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part.float() if isinstance(part, Tensor) and part.is_floating_point() else part for part in output)


def their_samples(
    case: Case, published: Published, model: nn.Module, x: Tensor, labels: Tensor, noise: Callable[[int], Tensor] | None
) -> Tensor:
    """Latents as their generate.py or inference.py makes them; ``noise`` in place of their own draws."""
    numbers = iter(range(case.steps))
    drawn: AbstractContextManager[object] = nullcontext()
    if noise is not None:
        drawn = mock.patch.object(torch, "randn_like", lambda like: noise(next(numbers)).to(like))
    with torch.no_grad(), arithmetic(case.precision, x.device), drawn:
        if case.is_sit:
            scales = {"cfg_scale": 1.35, "sg_scale": 1.4, "guidance_high": 0.7}
            sampler = published.samplers.euler_maruyama_ig_sampler
            found: Tensor = sampler(model, x, labels, num_steps=case.steps, **scales).to(torch.float32)
            return found
        transport = published.transport.create_transport("Linear", "velocity")
        sample = published.transport.Sampler(transport).sample_ode(
            sampling_method="heun2", num_steps=case.steps + 1, timestep_shift=0.3
        )
        both = torch.cat([labels, torch.full_like(labels, 1000)])
        guidance = {"cfg_scale": 1.45, "ig_scale": 1.4, "cfg_interval": True, "cfg_interval_start": 0.19}
        states = sample(torch.cat([x, x]), model.forward_with_cfg, y=both, **guidance)
        half: Tensor = states[-1].chunk(2)[0]
        return half


class Ways(NamedTuple):
    """What is timed of a case, and the FLOPs of an image."""

    calls: dict[str, Callable[[], object]]
    flops: float


def training_ways(case: Case, published: Published, device: torch.device) -> Ways:
    """Training steps, theirs and ours."""
    ours = our_model(case, device)
    theirs = their_model(case, published, ours)
    check(case, published, ours, theirs)
    dist = Dist(0, 1, 0, 1, device)
    calls: dict[str, Callable[[], object]] = {"published": their_step(case, published, theirs, device)}
    if case.compiled is not None:
        calls["ours, compiled"] = build_step(case.config(compiled=True), case.info(), dist, copy.deepcopy(ours))
    if case.limit:
        calls["ours"] = build_step(case.config(compiled=False), case.info(), dist, ours)
    return Ways(calls, 3 * forward_flops(ours.config))


def sampling_ways(case: Case, published: Published, device: torch.device) -> Ways:
    """Whole batches, theirs and ours, without a decoder."""
    ours = our_model(case, device).eval().requires_grad_(False)
    theirs = their_model(case, published, ours)
    check(case, published, ours, theirs)
    theirs.eval()
    plan, numbers, shape = plan_of(case), torch.arange(case.batch), case.info().latent.shape
    labels, ids = plan.image_labels(numbers).to(device), numbers.to(device)
    models = Models(ours, export_info(ours.config), None)  # type: ignore[arg-type]
    x = normal(plan.seed, Purpose.SAMPLE_NOISE, ids, shape)
    same = their_samples(case, published, theirs, x, labels, partial(_step_noise, plan, ids, shape))
    samplers = {"ours": Sampler(models, plan)}
    if case.compiled is not None:
        samplers["ours, compiled"] = Sampler(models, plan.model_copy(update={"compile": True}))
    if case.fast is not None:
        samplers["ours, fast"] = Sampler(models, plan.model_copy(update={"compile": True, "precision": "bf16"}))
    bounds = {"ours, fast": 5e-2}
    for name, sampler in samplers.items():
        latents, work = sampler.solve(numbers)
        bound = bounds.get(name, BOUND if case.precision == "fp32" else 1e-2)
        assert_close(f"{case.name}: latents, {name}", latents, same, bound)

    def published_way() -> Tensor:
        return their_samples(case, published, theirs, torch.randn_like(x), labels, None)

    calls: dict[str, Callable[[], object]] = {"published": published_way}
    calls |= {name: partial(sampler.solve, numbers) for name, sampler in samplers.items()}
    return Ways(calls, work[1] * forward_flops(ours.config))


def _step_noise(plan: Plan, numbers: Tensor, shape: tuple[int, ...], step: int) -> Tensor:
    return normal(plan.seed, Purpose.SAMPLE_STEP, numbers, shape, step=step)


def measure(case: Case, published: Published, device: torch.device, rounds: int, *, record: bool) -> list[Result]:
    """Time a case and print its claims."""
    with fitting_memory(case):
        ways = (training_ways if case.what == "training step" else sampling_ways)(case, published, device)
        times = interleaved(ways.calls, rounds)
        claims = [Claim(f"{case.name}: published / ours", "published", "ours", case.limit)] if case.limit else []
        if case.compiled is not None:
            claims.append(
                Claim(f"{case.name}: published / ours compiled", "published", "ours, compiled", case.compiled)
            )
        if case.fast is not None:
            claims.append(Claim(f"{case.name}: published / ours fast, bf16", "published", "ours, fast", case.fast))
        results = show(times, claims, title=case.name, record=record)
        for name, seconds in times.items():
            rate = case.batch / sorted(seconds)[len(seconds) // 2]
            mfu = model_flops_utilisation(ways.flops, rate, 1, device, None)
            console.print(f"{name}: {rate:.4g} images/s" + (f", MFU {100 * mfu:.1f}%" if mfu else ""))
        return results
    return []


@contextmanager
def fitting_memory(case: Case) -> Iterator[None]:
    """Without the case where a GPU has not enough for it."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        console.print(f"{case.name}: not measured: {error}")
    finally:
        torch.cuda.empty_cache()


def profile(case: Case, published: Published, device: torch.device, top: int = 30) -> None:
    """Where a step or a batch spends its time, operation by operation, on both sides."""
    ways = (training_ways if case.what == "training step" else sampling_ways)(case, published, device)
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for name, call in ways.calls.items():
        call()
        call()
        found[name] = profiled(call)
    names = list(found)
    table = Table("operation", *(f"{name}, ms (calls)" for name in names), f"{names[-1]} - published", title=case.name)
    rows = sorted(
        {key for one in found.values() for key in one},
        key=lambda key: -max(one.get(key, (0.0, 0))[0] for one in found.values()),
    )
    for key in rows[:top]:
        spent = {name: found[name].get(key, (0.0, 0)) for name in names}
        cells = (f"{ms:.1f} ({calls})" for ms, calls in spent.values())
        table.add_row(key[:60], *cells, f"{spent[names[-1]][0] - spent['published'][0]:+.1f}")
    table.add_row("all", *(f"{sum(ms for ms, _ in found[name].values()):.1f}" for name in names), "")
    console.print(table)


def main(
    reference: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder with SiT and LightningDiT.")],
    rounds: Rounds = 7,
    only: Annotated[list[str] | None, typer.Option(help="Only cases with this in their names.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Time the compiled form of ours too.")
    ] = True,
    where: Annotated[bool, typer.Option("--profile", help="Print where the time goes, and time nothing.")] = False,
    record: Record = False,
) -> None:
    """Compare with the published code."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    cases = [
        case if compiled else case._replace(compiled=None)
        for case in (GPU if device.type == "cuda" else CPU)
        if not only or any(part in case.name for part in only)
    ]
    published = Published(reference, compiled=device.type == "cuda")
    console.print(f"stood in for: {', '.join(published.stood_in) or 'nothing'}")
    for case in cases:
        if where:
            profile(case, published, device)
        else:
            measure(case, published, device, rounds, record=record)


if __name__ == "__main__":
    run_app(main)
