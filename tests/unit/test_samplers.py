"""Path, guidance and samplers against a Gaussian target, where everything has a closed form."""

import math
from typing import get_args

import pytest
import torch

from ig_dist import rng
from ig_dist.diffusion.guidance import GuidanceTerm, guided_velocity
from ig_dist.diffusion.loss import ig_loss
from ig_dist.diffusion.path import Path, shift_time
from ig_dist.diffusion.samplers import (
    SOLVERS,
    SolverName,
    dopri5,
    euler,
    euler_maruyama,
    heun,
    sde_grid,
    time_grid,
)
from ig_dist.models.dit import DiTOutput
from tests.conftest import ROOT

MEAN, STD = 1.5, 0.4  # of the data
PATHS = [Path("linear"), Path("cosine")]


def marginal(path, t):
    """Mean and variance of x_t, and their derivatives by t, for data N(MEAN, STD^2)."""
    alpha, sigma, alpha_dot, sigma_dot = path.coefficients(t)
    variance = (alpha * STD) ** 2 + sigma**2
    variance_dot = 2 * (alpha * alpha_dot * STD**2 + sigma * sigma_dot)
    return alpha * MEAN, variance, alpha_dot * MEAN, variance_dot


class GaussianFlow:
    """The exact velocity field of the Gaussian target, and a count of its evaluations."""

    def __init__(self, path):
        self.path = path
        self.times = []

    def __call__(self, x, t):
        self.times.append(t)
        mean, variance, mean_dot, variance_dot = marginal(self.path, t)
        return mean_dot + variance_dot / (2 * variance) * (x - mean)


class ToyModel:
    """Predicts constants that tell label, null label and head apart; records what it was asked."""

    null_label = 9

    def __init__(self, has_aux_head=True):
        self.has_aux_head = has_aux_head
        self.calls, self.heads_run = [], []

    def __call__(self, x_t, t, labels, *, with_aux=True):
        self.calls.append((x_t, t, labels))
        self.heads_run.append(with_aux)
        shape = (-1, 1, 1, 1)
        final = torch.where(labels == self.null_label, 0.3, 1.0).reshape(shape) + 0.1 * x_t
        aux = torch.where(labels == self.null_label, 0.2, 0.7).reshape(shape) + 0.05 * x_t
        return DiTOutput(final, aux if self.has_aux_head and with_aux else None)


def start(n=3):
    return rng.normal(0, rng.Purpose.SAMPLE_NOISE, torch.arange(n), (1, 2, 2)).double()


# --- path ---


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_path_ends_derivatives_and_tensor_times(path):
    assert path.coefficients(0.0)[:2] == pytest.approx((1.0, 0.0))
    assert path.coefficients(1.0)[:2] == pytest.approx((0.0, 1.0), abs=1e-15)
    times, h = torch.linspace(0.05, 0.95, 7, dtype=torch.float64), 1e-6
    at, plus, minus = (path.coefficients(times + d) for d in (0.0, h, -h))
    for value in (0, 1):
        torch.testing.assert_close(at[value + 2], (plus[value] - minus[value]) / (2 * h))
    for i, t in enumerate(times.tolist()):
        assert path.coefficients(t) == pytest.approx(tuple(c[i].item() for c in at))


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_interpolate_uses_each_samples_own_time(path):
    latents, noise = start(4).float(), -2 * start(4).float() + 1
    t = torch.tensor([0.0, 0.3, 0.8, 1.0])
    x_t, velocity = path.interpolate(latents, noise, t)
    for i, time in enumerate(t.tolist()):
        alpha, sigma, alpha_dot, sigma_dot = path.coefficients(time)
        torch.testing.assert_close(x_t[i], alpha * latents[i] + sigma * noise[i])
        torch.testing.assert_close(velocity[i], alpha_dot * latents[i] + sigma_dot * noise[i])
    if path.kind == "linear":
        torch.testing.assert_close(velocity, noise - latents)
    assert path.interpolate(latents, noise, t.double())[0].dtype == torch.float32


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
@pytest.mark.parametrize("t", [0.04, 0.5, 1.0])
def test_score_of_a_gaussian(path, t):
    x = start()
    mean, variance, *_ = marginal(path, t)
    velocity = GaussianFlow(path)(x, t)
    torch.testing.assert_close(path.score(velocity, x, t), -(x - mean) / variance)
    times = torch.full((len(x),), t, dtype=torch.float64)
    torch.testing.assert_close(path.score(velocity, x, times), -(x - mean) / variance)


def test_grids():
    assert time_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert 0.7 in time_grid(10) and 0.3 in time_grid(10)  # interval ends are met exactly
    shifted = time_grid(4, shift=1 / 0.3)
    u, s = 0.75, 1 / 0.3
    assert shifted[0] == 1.0 and shifted[-1] == 0.0
    assert shifted[1] == pytest.approx(s * u / (1 + (s - 1) * u)) and shifted[1] > 0.75
    torch.testing.assert_close(shift_time(torch.tensor([0.75, 0.5]).double(), s), torch.tensor(shifted[1:3]).double())
    expected = [*torch.linspace(1, 0.04, 250, dtype=torch.float64).tolist(), 0.0]
    assert sde_grid(250) == pytest.approx(expected, abs=1e-15)
    assert sde_grid(250)[-2:] == [0.04, 0.0]
    assert sde_grid(1) == [1.0, 0.0] and sde_grid(2) == [1.0, 0.04, 0.0]
    for bad in (lambda: time_grid(0), lambda: sde_grid(0), lambda: sde_grid(5, 0.0), lambda: time_grid(5, 0.0)):
        with pytest.raises(ValueError):
            bad()


# --- solvers ---


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)], ids=["euler", "heun"])
def test_order_of_convergence(path, solver, order):
    # the linear path is kind to some methods: the midpoint method has order 3 on this flow, 2 on the cosine path's
    x = start()
    exact = MEAN + STD * x
    errors = [(solver(GaussianFlow(path), x, time_grid(n)) - exact).abs().max().item() for n in (40, 80, 160)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_euler_maruyama_converges_in_mean_and_variance(path):
    # 30,000 values: below torch's threshold for threads, which crawl when another process has the cores.
    ids = torch.arange(7_500)

    def noise(step, x):
        return rng.normal(0, rng.Purpose.SAMPLE_STEP, ids, (4,), step=step).to(x.dtype)

    x = rng.normal(0, rng.Purpose.SAMPLE_NOISE, ids, (4,)).double()
    out = euler_maruyama(GaussianFlow(path), x, sde_grid(160, last=0.005), path, noise)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert out.std().item() == pytest.approx(STD, rel=0.02)
    # The noise really decides: the ODE through the same start keeps the order of the samples, the SDE does not.
    assert abs(torch.corrcoef(torch.stack([x.flatten(), out.flatten()]))[0, 1]) < 0.7


def test_euler_maruyama_steps():
    """Noise sqrt(2 t |dt|) in every step but the last; noise_fn sees the state before the step."""
    seen = []

    def noise(step, x):
        seen.append((step, x.clone()))
        return torch.ones_like(x)

    x = start()
    out = euler_maruyama(GaussianFlow(Path()), x, [1.0, 0.5, 0.0], Path(), noise)
    flow = GaussianFlow(Path())
    drift = flow(x, 1.0) - 1.0 * Path().score(flow(x, 1.0), x, 1.0)
    middle = x - 0.5 * drift + 1.0  # sqrt(2 * 1 * 0.5) = 1
    drift = flow(middle, 0.5) - 0.5 * Path().score(flow(middle, 0.5), middle, 0.5)
    torch.testing.assert_close(out, middle - 0.5 * drift)
    assert [step for step, _ in seen] == [0] and torch.equal(seen[0][1], x)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("correct_last_step", [True, False])
def test_evaluations_are_counted_exactly(steps, correct_last_step):
    settings = {"steps": steps, "time_shift": 2.0, "correct_last_step": correct_last_step, "rtol": 1e-3, "atol": 1e-6}
    for name, solver in SOLVERS.items():
        flow, given = GaussianFlow(Path()), {key: settings[key] for key in solver.settings}
        out = solver.solve(flow, start(), Path(), lambda i, x: x, **given)
        assert out.shape == start().shape and out.isfinite().all()
        assert name == "dopri5" or len(flow.times) == solver.evaluations(**given), name
        assert name != "heun" or len(flow.times) == 2 * steps - (not correct_last_step)


def test_each_solver_is_named_where_users_look():
    assert get_args(SolverName) == tuple(SOLVERS)
    *names, last = SOLVERS
    for file in ("commands/sample.py", "pipeline.py"):
        assert f"{', '.join(names)} or {last}" in (ROOT / "ig_dist" / file).read_text(), file


def forwards(guidance, sample):
    """Evaluations and half-batch forwards of a solver under guidance."""
    model, labels, times = ToyModel(), torch.tensor([1, 2, 3]), []
    guided = guided_velocity(model, labels, guidance)

    def velocity(x, t):
        times.append(t)
        return guided(x, t)

    sample(velocity)
    return len(times), sum(len(asked) for _, _, asked in model.calls) / 3


def test_published_counts_of_sit():
    """Euler-Maruyama 250, IG 1.4 everywhere and CFG 1.35 for t <= 0.7: 422 half-batch forwards of 500."""
    guidance = [GuidanceTerm("ig", 1.4), GuidanceTerm("cfg", 1.35, (0.0, 0.7))]
    counts = forwards(guidance, lambda v: euler_maruyama(v, start(), sde_grid(250), Path(), lambda i, x: x))
    assert counts == (250, 422)


def test_published_counts_of_lightningdit():
    """Heun on 125 grid points shifted by 1 / 0.3, CFG 1.45 for t <= 0.81: 387 half-batch forwards of 496."""
    guidance = [GuidanceTerm("ig", 1.4), GuidanceTerm("cfg", 1.45, (0.0, 0.81))]
    assert forwards(guidance, lambda v: heun(v, start(), time_grid(124, shift=1 / 0.3))) == (248, 387)
    # the published grid, in its own time: t' = 0.3 u / (1 + (0.3 - 1) u) for u of linspace(0, 1, 125)
    u = torch.linspace(0, 1, 125, dtype=torch.float64)
    theirs = 1 - 0.3 * u / (1 + (0.3 - 1) * u)
    assert time_grid(124, shift=1 / 0.3) == pytest.approx(theirs.tolist(), abs=1e-15)
    assert forwards([], lambda v: heun(v, start(), time_grid(8), correct_last_step=False)) == (15, 15)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.kind)
def test_dopri5_keeps_its_tolerance_and_the_interval_of_times(path):
    x, spent = start(), []
    for rtol in (1e-3, 1e-6, 1e-9):
        flow = GaussianFlow(path)
        out = dopri5(flow, x, rtol=rtol, atol=rtol)
        assert (out - (MEAN + STD * x)).abs().max() < 100 * rtol and out.dtype == torch.float64
        assert 0.0 <= min(flow.times) < 1e-300 and max(flow.times) == 1.0
        spent.append(len(flow.times))
    assert spent[0] < spent[1] < spent[2]
    assert dopri5(GaussianFlow(path), x.float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_keeps_its_dtype(dtype):
    x = start().to(dtype)
    fn = guided_velocity(ToyModel(), torch.tensor([1, 2, 3]), [])
    assert euler(fn, x, time_grid(3)).dtype == dtype
    assert heun(fn, x, time_grid(3)).dtype == dtype
    noise = torch.ones(x.shape, dtype=torch.float64)
    assert euler_maruyama(fn, x, sde_grid(3), Path(), lambda i, x: noise).dtype == dtype


# --- guidance ---

LABELS = torch.tensor([1, 2, 3])
IG, CFG = GuidanceTerm("ig", 1.4), GuidanceTerm("cfg", 1.35, (0.3, 0.7))


def test_ig_and_cfg_compose_as_written():
    x = start()
    model = ToyModel()
    guided = guided_velocity(model, LABELS, [CFG, IG])(x, 0.5)
    x32 = x.float().double()
    conditional, aux_c = 1.0 + 0.1 * x32, 0.7 + 0.05 * x32
    unconditional, aux_u = 0.3 + 0.1 * x32, 0.2 + 0.05 * x32
    strong_c = conditional + 0.4 * (conditional - aux_c)
    strong_u = unconditional + 0.4 * (unconditional - aux_u)
    torch.testing.assert_close(guided, strong_c + 0.35 * (strong_c - strong_u), rtol=1e-6, atol=1e-6)
    ((x_t, t, labels),) = model.calls
    assert x_t.dtype == t.dtype == torch.float32 and t.tolist() == [0.5] * 6
    assert labels.tolist() == [1, 2, 3, 9, 9, 9] and guided.dtype == torch.float64


@pytest.mark.parametrize(
    ("t", "active"),
    [(0.3, True), (0.7, True), (math.nextafter(0.3, 0), False), (math.nextafter(0.7, 1), False)],
)
def test_interval_ends_are_inclusive_in_float64_and_the_null_half_stays_out(t, active):
    x = start()
    model = ToyModel()
    guided = guided_velocity(model, LABELS, [CFG])(x, t)
    assert len(model.calls[0][2]) == (6 if active else 3)
    assert torch.equal(guided, guided_velocity(ToyModel(), LABELS, [])(x, t)) != active

    ig = guided_velocity(ToyModel(), LABELS, [GuidanceTerm("ig", 1.4, (0.3, 0.7))])(x, t)
    assert torch.equal(ig, guided_velocity(ToyModel(), LABELS, [])(x, t)) != active


def test_the_auxiliary_head_is_run_inside_the_ig_interval_only():
    for branches, t, run in (("both", 0.5, True), ("both", 0.2, False), ("null", 0.5, True), ("null", 0.8, False)):
        model = ToyModel()  # CFG ends at 0.7, and with it the null branch
        guided_velocity(model, LABELS, [GuidanceTerm("ig", 1.4, (0.3, 1.0), branches), CFG])(start(), t)
        assert model.heads_run == [run], (branches, t)


def test_scale_one_is_bitwise_unguided_and_costs_nothing():
    x = start().float()
    model = ToyModel()
    guided = guided_velocity(model, LABELS, [GuidanceTerm("ig", 1.0), GuidanceTerm("cfg", 1.0)])(x, 0.5)
    assert torch.equal(guided, ToyModel()(x, torch.full((3,), 0.5), LABELS).velocity)
    assert len(model.calls) == 1 and len(model.calls[0][2]) == 3


def test_combination_is_made_in_float32_for_half_precision_models():
    class HalfModel(ToyModel):
        def __call__(self, x_t, t, labels, *, with_aux=True):
            found = super().__call__(x_t, t, labels, with_aux=with_aux)
            return DiTOutput(*(None if v is None else v.bfloat16() for v in found))

    x = start().float()
    strong, weak = (v.float() for v in HalfModel()(x, x, LABELS))
    guided = guided_velocity(HalfModel(), LABELS, [IG])(x, 0.5)
    assert guided.dtype == torch.float32
    torch.testing.assert_close(guided, strong + 0.4 * (strong - weak), rtol=1e-6, atol=1e-6)
    null = HalfModel()(x, x, torch.full_like(LABELS, 9)).velocity.float()
    guided = guided_velocity(HalfModel(), LABELS, [CFG])(x, 0.5)
    assert guided.dtype == torch.float32
    torch.testing.assert_close(guided, strong + 0.35 * (strong - null), rtol=1e-6, atol=1e-6)


def test_terms_of_one_kind_need_disjoint_intervals():
    low, high = GuidanceTerm("ig", 1.2, (0.0, 0.3)), GuidanceTerm("ig", 1.7, (0.4, 1.0))
    fn, x = guided_velocity(ToyModel(), LABELS, [low, high]), start()
    for t, scale in ((0.2, 1.2), (0.35, 1.0), (0.9, 1.7)):
        alone = guided_velocity(ToyModel(), LABELS, [GuidanceTerm("ig", scale)])
        assert torch.equal(fn(x, t), alone(x, t))
    touching = GuidanceTerm("ig", 1.7, (0.3, 1.0))  # both include 0.3
    with pytest.raises(ValueError, match=r"two 'ig' guidance terms are both active on \[0.3, 0.3\]"):
        guided_velocity(ToyModel(), LABELS, [low, touching])
    guided_velocity(ToyModel(), LABELS, [GuidanceTerm("cfg", 1.5), touching])  # different kinds may overlap
    guided_velocity(ToyModel(), LABELS, [GuidanceTerm("ig", 1.0), touching])  # scale 1 is no guidance


def test_ig_needs_a_head():
    with pytest.raises(ValueError, match="no auxiliary head"):
        guided_velocity(ToyModel(has_aux_head=False), LABELS, [IG])
    guided_velocity(ToyModel(has_aux_head=False), LABELS, [GuidanceTerm("ig", 1.0), CFG])


class WeakModel(ToyModel):
    """Another model, other constants; it has no head."""

    def __init__(self):
        super().__init__(has_aux_head=False)

    def __call__(self, x_t, t, labels, *, with_aux=True):
        assert not with_aux
        velocity = super().__call__(x_t, t, labels).velocity
        return DiTOutput(0.5 * velocity, None)


def expected_terms(x, ig, auto, cfg):
    """v + (w_ig - 1)(v - aux) + (w_auto - 1)(v - weak) in each branch, then v_c + (w_cfg - 1)(v_c - v_n)."""
    x = x.float().double()
    branches = []
    for (strong, aux), ig_scale, auto_scale in zip(((1.0, 0.7), (0.3, 0.2)), ig, auto, strict=True):
        v, weak_head = strong + 0.1 * x, aux + 0.05 * x
        branches.append(v + (ig_scale - 1) * (v - weak_head) + (auto_scale - 1) * (v - 0.5 * v))
    return branches[0] + (cfg - 1) * (branches[0] - branches[1])


@pytest.mark.parametrize(
    ("branches", "scales", "asked"),
    [("both", (1.6, 1.6), 6), ("conditional", (1.6, 1.0), 3), ("null", (1.0, 1.6), 3)],
)
def test_autoguidance_asks_the_second_model_where_it_acts(branches, scales, asked):
    x, model, weak = start(), ToyModel(), WeakModel()
    terms = [GuidanceTerm("auto", 1.6, (0.2, 0.8), branches), GuidanceTerm("ig", 1.4), GuidanceTerm("cfg", 1.35)]
    fn = guided_velocity(model, LABELS, terms, weak)
    torch.testing.assert_close(fn(x, 0.5), expected_terms(x, (1.4, 1.4), scales, 1.35), rtol=1e-6, atol=1e-6)
    labels = {"both": [1, 2, 3, 9, 9, 9], "conditional": [1, 2, 3], "null": [9, 9, 9]}[branches]
    ((x_t, t, given),) = weak.calls
    assert given.tolist() == labels and len(x_t) == len(t) == asked and t.tolist() == [0.5] * asked
    assert torch.equal(fn(x, 0.1), guided_velocity(ToyModel(), LABELS, terms[1:])(x, 0.1))
    assert len(weak.calls) == 1  # not asked outside its interval


def test_autoguidance_alone_asks_for_the_label_only():
    x, weak = start(), WeakModel()
    guided = guided_velocity(ToyModel(), LABELS, [GuidanceTerm("auto", 1.6)], weak)(x, 0.5)
    torch.testing.assert_close(guided, expected_terms(x, (1, 1), (1.6, 1), 1.0), rtol=1e-6, atol=1e-6)
    assert [given.tolist() for *_, given in weak.calls] == [[1, 2, 3]]
    null_only = guided_velocity(ToyModel(), LABELS, [GuidanceTerm("auto", 1.6, branches="null")], weak)(x, 0.5)
    assert torch.equal(null_only, guided_velocity(ToyModel(), LABELS, [])(x, 0.5)) and len(weak.calls) == 1
    with pytest.raises(ValueError, match="no second model"):
        guided_velocity(ToyModel(), LABELS, [GuidanceTerm("auto", 1.6)])
    guided_velocity(ToyModel(), LABELS, [GuidanceTerm("auto", 1.0)])


def test_a_scale_for_each_branch():
    x = start()
    terms = [GuidanceTerm("ig", 1.4, branches="conditional"), GuidanceTerm("ig", 2.0, branches="null"), CFG]
    guided = guided_velocity(ToyModel(), LABELS, terms)(x, 0.5)
    torch.testing.assert_close(guided, expected_terms(x, (1.4, 2.0), (1, 1), 1.35), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="two 'ig'"):
        guided_velocity(ToyModel(), LABELS, [*terms, GuidanceTerm("ig", 1.1)])


def test_each_kind_of_term_guides_its_leading_channels_only():
    x = torch.cat([start(), 2 * start(), 3 * start()], dim=1)
    for kinds in (("ig",), ("cfg",), ("auto",), ("ig", "auto", "cfg")):
        some, all_of_them, none = (
            guided_velocity(ToyModel(), LABELS, terms, WeakModel())(x, 0.5)
            for terms in (
                [GuidanceTerm(kind, 1.4, channels=2) for kind in kinds],
                [GuidanceTerm(kind, 1.4) for kind in kinds],
                [],
            )
        )
        assert torch.equal(some[:, :2], all_of_them[:, :2]) and torch.equal(some[:, 2:], none[:, 2:])
        assert not torch.equal(all_of_them[:, 2:], none[:, 2:])
    whole = guided_velocity(ToyModel(), LABELS, [GuidanceTerm("ig", 1.4, channels=3)])(x, 0.5)
    assert torch.equal(whole, guided_velocity(ToyModel(), LABELS, [GuidanceTerm("ig", 1.4)])(x, 0.5))


@pytest.mark.parametrize(
    "arguments",
    [
        ("IG", 1.4),
        ("ig", math.nan),
        ("cfg", 1.5, (0.7, 0.3)),
        ("cfg", 1.5, (0.0, 1.1)),
        ("ig", 1.5, (0.0, 1.0), "left"),
        ("cfg", 1.5, (0.0, 1.0), "null"),
        ("cfg", 1.5, (0.0, 1.0), "both", 0),
    ],
)
def test_impossible_terms_are_refused(arguments):
    with pytest.raises(ValueError):
        GuidanceTerm(*arguments)


# --- loss ---


def test_loss_is_per_sample_in_float32_and_zero_aux_without_head():
    velocity = torch.arange(8.0).reshape(2, 1, 2, 2)
    strong, weak = velocity + torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1), velocity + 3
    losses = ig_loss(DiTOutput(strong.bfloat16(), weak.bfloat16()), velocity, 0.5)
    assert losses.final.tolist() == [1.0, 4.0] and losses.aux.tolist() == [9.0, 9.0]
    assert losses.total.tolist() == [5.5, 8.5] and losses.total.dtype == torch.float32
    alone = ig_loss(DiTOutput(strong, None), velocity, 0.5)
    assert alone.total.tolist() == [1.0, 4.0] and alone.aux.tolist() == [0.0, 0.0]
