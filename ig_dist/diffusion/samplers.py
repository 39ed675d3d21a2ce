"""Samplers: flat functions that carry a state from noise (t = 1) to data (t = 0).

Each takes a velocity function (x, t) -> velocity, the state x (B, C, H, W) at t = 1, and the times to visit as Python
floats, from 1 to 0 (`dopri5`, which chooses its own, takes tolerances); it returns the state at 0. The state keeps the
dtype of `x` (float64 is the published choice); noise is given from outside. `SOLVERS`, at the end, is the table of
those that a plan can name.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ig_dist.diffusion.path import Path, shift_time

VelocityFn = Callable[[Tensor, float], Tensor]
NoiseFn = Callable[[int, Tensor], Tensor]  # (step index, x) -> standard normal noise of x's shape


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """Return steps + 1 times from 1 to 0, evenly spaced and then shifted (see `path.shift_time`).

    Each unshifted time is the float nearest to its fraction, so an interval end such as 0.7 is met exactly.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; a sampler needs at least 1")
    return [shift_time((steps - i) / steps, shift) for i in range(steps + 1)]


def sde_grid(steps: int, last: float = 0.04) -> list[float]:
    """Return steps + 1 times: `steps` evenly spaced ones from 1 to `last`, then 0.

    The score blows up at t = 0, so the last step is one long mean step (SiT, arXiv 2401.08740).
    """
    if steps < 1 or not 0.0 < last < 1.0:
        raise ValueError(f"steps is {steps}, which must be at least 1, and last {last}, between 0 and 1")
    times = [1.0 - (1.0 - last) * i / (steps - 1) for i in range(1, steps - 1)]
    return [1.0, *times, last, 0.0] if steps > 1 else [1.0, 0.0]


@torch.no_grad()
def euler(velocity_fn: VelocityFn, x: Tensor, timesteps: Sequence[float]) -> Tensor:
    """Integrate dx = v dt by Euler's method, order 1; one evaluation a step."""
    for t, t_next in pairwise(timesteps):
        x = (x + (t_next - t) * velocity_fn(x, t)).to(x.dtype)
    return x


@torch.no_grad()
def heun(velocity_fn: VelocityFn, x: Tensor, timesteps: Sequence[float], *, correct_last_step: bool = True) -> Tensor:
    """Integrate dx = v dt by Heun's method, order 2 (Karras et al., arXiv 2206.00364, algorithm 1).

    Two evaluations a step. `correct_last_step=False` makes the last step an Euler step, as the published
    SiT sampler does.
    """
    last = len(timesteps) - 2
    for i, (t, t_next) in enumerate(pairwise(timesteps)):
        velocity = velocity_fn(x, t)
        predicted = (x + (t_next - t) * velocity).to(x.dtype)
        if i < last or correct_last_step:
            velocity = 0.5 * (velocity + velocity_fn(predicted, t_next))
            predicted = (x + (t_next - t) * velocity).to(x.dtype)
        x = predicted
    return x


@torch.no_grad()
def euler_maruyama(
    velocity_fn: VelocityFn, x: Tensor, timesteps: Sequence[float], path: Path, noise_fn: NoiseFn
) -> Tensor:
    """Integrate the reverse SDE dx = (v - t s) dt + sqrt(2 t) dw (SiT, arXiv 2401.08740, section 2).

    One evaluation a step; no noise in the last step. s is the score that `path`, which the model was trained on, gives
    for the velocity. The times are those of `sde_grid`; only the last may be 0.
    """
    last = len(timesteps) - 2
    for i, (t, t_next) in enumerate(pairwise(timesteps)):
        velocity = velocity_fn(x, t)
        drift = velocity - t * path.score(velocity, x, t)
        x_next = x + (t_next - t) * drift
        if i < last:
            x_next = x_next + (2.0 * t * (t - t_next)) ** 0.5 * noise_fn(i, x)
        x = x_next.to(x.dtype)
    return x


@torch.no_grad()
def dopri5(velocity_fn: VelocityFn, x: Tensor, *, rtol: float = 1e-3, atol: float = 1e-6) -> Tensor:
    """Integrate dx = v dt from t = 1 to 0 by Dormand and Prince's method, order 5, with torchdiffeq's step control.

    The error is controlled over the whole batch, as in the published SiT sampler, whose tolerances the defaults are: a
    sample depends, within the tolerance, on the batch that it is in, and the evaluations can only be counted while it
    runs. The last step ends at t = 0; torchdiffeq alone would step beyond it, where there is no model, and interpolate.
    """
    from torchdiffeq import odeint  # it imports scipy's solvers

    ends = torch.tensor([1.0, 0.0], dtype=torch.float64, device=x.device)
    solution: Tensor = odeint(
        lambda t, x: velocity_fn(x, float(t)).to(x.dtype),
        x,
        ends,
        rtol=rtol,
        atol=atol,
        method="dopri5",
        options={"dtype": torch.float64, "step_t": ends[1:]},
    )
    return solution[-1]


SolverName = Literal["euler", "heun", "euler_maruyama", "dopri5"]


class Solver(NamedTuple):
    """A solver as a plan asks for it."""

    settings: tuple[str, ...]  # fields of the plan that it takes, by these names; a score's protocol tells them
    solve: Callable[..., Tensor]  # (velocity_fn, x, path, noise_fn, **settings) -> the state at t = 0
    evaluations: Callable[..., int]  # (**settings) -> evaluations of the velocity for an image


SOLVERS: dict[SolverName, Solver] = {
    "euler": Solver(
        ("steps", "time_shift"),
        lambda velocity_fn, x, path, noise_fn, steps, time_shift: euler(velocity_fn, x, time_grid(steps, time_shift)),
        lambda steps, time_shift: steps,
    ),
    "heun": Solver(
        ("steps", "time_shift", "correct_last_step"),
        lambda velocity_fn, x, path, noise_fn, steps, time_shift, correct_last_step: heun(
            velocity_fn, x, time_grid(steps, time_shift), correct_last_step=correct_last_step
        ),
        lambda steps, time_shift, correct_last_step: 2 * steps - (not correct_last_step),
    ),
    "euler_maruyama": Solver(
        ("steps",),
        lambda velocity_fn, x, path, noise_fn, steps: euler_maruyama(velocity_fn, x, sde_grid(steps), path, noise_fn),
        lambda steps: steps,
    ),
    "dopri5": Solver(
        ("rtol", "atol"),
        lambda velocity_fn, x, path, noise_fn, rtol, atol: dopri5(velocity_fn, x, rtol=rtol, atol=atol),
        lambda rtol, atol: 100,  # about: it chooses its steps
    ),
}
