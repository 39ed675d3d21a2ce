"""Muon: 20 steps equal to a direct transcription of the published formulae, and a void step changes nothing."""

import numpy as np
import pytest
import torch
from torch import nn

from ig_dist.optim.muon import Muon, orthogonalise_each, orthogonalised
from tests.counting import Operations

SHAPES = [(6, 10), (10, 6), (5, 5), (8, 3, 2, 2), (12, 1), (7,), (1,)]


def transcription(
    weights: list[np.ndarray], grads: list[list[np.ndarray]], lr: float, betas: tuple[float, float], eps: float
) -> list[np.ndarray]:
    """The formulae, in numpy's float64."""
    weights = [w.astype(np.float64) for w in weights]
    m = [np.zeros_like(w) for w in weights]
    v = [np.zeros_like(w) for w in weights]
    for t, step in enumerate(grads, start=1):
        for i, g in enumerate(g.astype(np.float64) for g in step):
            if g.ndim >= 2:
                m[i] = 0.95 * m[i] + 0.05 * g
                x = (0.05 * g + 0.95 * m[i]).reshape(len(g), -1)
                rows, cols = x.shape
                transposed = rows > cols
                x = x.T if transposed else x
                x = x / (np.sqrt((x**2).sum()) + 1e-7)
                for _ in range(5):
                    s = x @ x.T
                    x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
                u = (x.T if transposed else x).reshape(g.shape)
                scale = 0.2 * np.sqrt(max(g.shape[0], g.shape[1])) * np.sqrt(max(1, rows / cols))
                weights[i] = (1 - lr * 0.01) * weights[i] - lr * scale * u
            else:
                m[i] = betas[0] * m[i] + (1 - betas[0]) * g
                v[i] = betas[1] * v[i] + (1 - betas[1]) * g**2
                weights[i] -= lr * (m[i] / (1 - betas[0] ** t)) / (np.sqrt(v[i] / (1 - betas[1] ** t)) + eps)
    return weights


def make() -> tuple[list[nn.Parameter], list[list[np.ndarray]]]:
    random = np.random.default_rng(0)
    parameters = [nn.Parameter(torch.from_numpy(random.standard_normal(s, dtype=np.float32))) for s in SHAPES]
    return parameters, [[random.standard_normal(s, dtype=np.float32) for s in SHAPES] for _ in range(20)]


def test_twenty_steps_equal_the_transcription() -> None:
    parameters, grads = make()
    expected = transcription([p.detach().numpy().copy() for p in parameters], grads, 2e-2, (0.9, 0.95), 1e-8)
    optimizer = Muon(parameters, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    for step in grads:
        for parameter, grad in zip(parameters, step, strict=True):
            parameter.grad = torch.from_numpy(grad)
        for group in optimizer.param_groups:
            group["lr"] = 2e-2
        optimizer.step()
    for parameter, truth in zip(parameters, expected, strict=True):
        assert np.abs(parameter.detach().numpy() - truth).max() < 2e-5 * max(1, np.abs(truth).max()), parameter.shape


def test_a_void_step_changes_nothing() -> None:
    parameters, grads = make()
    optimizer = Muon(parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)

    def step(number: int, found_inf: float) -> None:
        for parameter, grad in zip(parameters, grads[number], strict=True):
            parameter.grad = torch.from_numpy(grad.copy())
            if found_inf:
                parameter.grad.view(-1)[0] = float("nan")
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()

    step(0, 0.0)
    kept = [p.detach().clone() for p in parameters]
    states = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in parameters]
    step(1, 1.0)
    for parameter, weight, state in zip(parameters, kept, states, strict=True):
        assert torch.equal(parameter, weight)
        assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in state.items())
    step(1, 0.0)
    assert all(not torch.equal(p, weight) for p, weight in zip(parameters, kept, strict=True))


@pytest.mark.parametrize("gated", [False, True])
def test_the_position_table_decays_to_the_published_number(gated: bool) -> None:
    """Recorded from the published optimizer: a parameter of ones without a gradient, after 20 steps at 2e-3."""
    weight, table = nn.Parameter(torch.randn(3, 4)), torch.ones(1, 4, 6)
    optimizer = Muon([weight], lr=2e-3, betas=(0.9, 0.95), eps=1e-8, decayed=[table])
    for _ in range(20):
        weight.grad = torch.randn(3, 4)
        optimizer.found_inf = torch.tensor(0.0) if gated else None
        optimizer.step()
    assert (table == torch.tensor(0.99959946)).all()  # 0.99960008 in exact arithmetic
    optimizer.found_inf = torch.tensor(1.0)
    weight.grad = torch.full((3, 4), torch.nan)
    optimizer.step()
    assert (table == torch.tensor(0.99959946)).all()


def in_bf16(matrix: torch.Tensor) -> torch.Tensor:
    """One line of the paper at a time, each product and sum rounded to bf16; rows <= columns."""
    x = matrix.to(torch.bfloat16)
    x = torch.div(x, torch.linalg.matrix_norm(x).add(1e-7))
    for _ in range(5):
        gram = torch.mm(x, x.T)
        squared = torch.mm(gram, gram)
        polynomial = torch.mul(gram, -4.7750) + torch.mul(squared, 2.0315)
        x = torch.mul(x, 3.4445) + torch.mm(polynomial, x)
    return x.to(matrix.dtype)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (96, 96)])
def test_the_bf16_iteration_of_gpus_rounds_in_the_published_order(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = in_bf16(matrix.T).T if shape[0] > shape[1] else in_bf16(matrix)
    found = orthogonalised(matrix, torch.bfloat16)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert not torch.equal(found, orthogonalised(matrix))  # fp32 on a CPU


def test_matrices_of_one_shape_are_done_together_and_come_out_the_same() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(20, 50), (50, 20), (20, 50), (8, 3, 2, 2), (20, 50), (50, 20), (8, 3, 2, 2)]
    matrices = [torch.randn(shape, generator=draw) for shape in shapes]
    alone = [orthogonalised(matrix.flatten(1)).view_as(matrix) for matrix in matrices]
    with Operations() as operations:
        orthogonalise_each(matrices)
    assert operations.launched["bmm"] == 3 * 5 * 3  # shapes, steps, products
    for found, expected in zip(matrices, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)
    pair = torch.stack([matrices[0], matrices[2]])
    together = orthogonalised(pair, torch.bfloat16)
    for found, matrix in zip(together, pair, strict=True):
        torch.testing.assert_close(found, orthogonalised(matrix, torch.bfloat16), rtol=0, atol=2e-2)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.min() > 0.6 and values.max() < 1.25
