"""Muon as the published LightningDiT + IG run used it: orthogonalised momentum on matrices, Adam on the rest.

For every weight of two or more dimensions (kernels flattened to out x rest; embeddings and heads included):

    M <- 0.95 M + 0.05 G,  U = NewtonSchulz5(0.05 G + 0.95 M),
    W <- (1 - lr 0.01) W - lr 0.2 sqrt(max(A, B)) sqrt(max(1, rows / cols)) U,

with A, B the first two entries of the unflattened shape. Jordan et al. 2024 (Muon), Liu et al. 2025 (the scale by
shape), in the form that the published weights of IG (arXiv 2512.24176) were trained with. Neither mode of
``torch.optim.Muon`` equals it: its steps are 1.0 to 6.4 times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

MOMENTUM = 0.95
WEIGHT_DECAY = 0.01
SCALE = 0.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: the quintic that lifts small singular values fastest
NEWTON_SCHULZ_STEPS = 5


def orthogonalise_each(matrices: Sequence[Tensor]) -> None:
    """Replace each matrix, or kernel as the matrix out x rest, by ``orthogonalised`` of it."""
    for matrix in matrices:
        matrix.copy_(orthogonalised(matrix.flatten(1)).view_as(matrix))


class Muon(Optimizer):
    """Muon on matrices and kernels, Adam (fused) on vectors.

    Like the fused optimizers of torch, it takes ``found_inf`` on the device: where that is 1, a step changes nothing.
    A step uses the gradients of matrices as its workspace: it needs no memory of its own.

    Args:
        parameters: all of the model's, or this rank's parts of them.
        lr: learning rate of both.
        betas: of Adam.
        eps: of Adam.
        weight_decay: of matrices; vectors have none.
        shapes: of the whole parameters, where these are parts; None: they are whole.
        orthogonalise: replaces the directions of all matrices by orthogonal ones; engines share its work out.
        decayed: tensors that no gradient moves and that decay as matrices do: the published run has its table of
            positions among the optimizer's matrices, where only the decay reaches it.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = WEIGHT_DECAY,
        shapes: Sequence[Sequence[int]] | None = None,
        orthogonalise: Callable[[Sequence[Tensor]], None] = orthogonalise_each,
        decayed: Sequence[Tensor] = (),
    ) -> None:
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
        vectors = [parameter for parameter in parameters if parameter.ndim < 2]
        super().__init__([{"params": matrices}, {"params": vectors}], {"lr": lr})
        self._weight_decay, self._orthogonalise, self._decayed = weight_decay, orthogonalise, decayed
        whole = shapes or [parameter.shape for parameter in parameters]
        self._scales = {parameter: scale(shape) for parameter, shape in zip(parameters, whole, strict=True)}
        self._adam = AdamW(vectors, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True) if vectors else None
        if self._adam:  # one place for the state and the learning rate of every parameter
            self._adam.param_groups[0] = self.param_groups[1] | self._adam.param_groups[0]
            self.param_groups[1] = self._adam.param_groups[0]
            self._adam.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. COLLECTIVE where ``orthogonalise`` is."""
        finite = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        lr = self.param_groups[0]["lr"]
        matrices = [weight for weight in self.param_groups[0]["params"] if weight.grad is not None]
        for weight in matrices:
            self._to_direction(weight, finite)
        self._orthogonalise([weight.grad for weight in matrices])
        for tensor in (*matrices, *self._decayed):
            tensor.mul_(1 - finite * (lr * self._weight_decay))
        for weight in matrices:
            weight.sub_(weight.grad * (finite * (lr * self._scales[weight])))
            self.state[weight]["step"] += finite
        if self._adam:
            self._adam.found_inf = self.found_inf  # type: ignore[attr-defined]
            self._adam.step()

    def _to_direction(self, weight: Tensor, finite: Tensor | float) -> None:
        """Take the gradient into the momentum, and replace it by the direction that is to be orthogonalised."""
        grad = weight.grad
        assert grad is not None
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
        if isinstance(finite, Tensor):
            grad.copy_(torch.where(finite > 0, grad, 0.0))  # 0 times infinity would still be NaN
        momentum = state["exp_avg"]
        momentum.lerp_(grad, (1 - MOMENTUM) * torch.as_tensor(finite, device=weight.device))
        grad.lerp_(momentum, MOMENTUM)


def scale(shape: Sequence[int]) -> float:
    """How long the step of a matrix or kernel of this shape is, times the learning rate."""
    if len(shape) < 2:
        return 1.0
    return SCALE * math.sqrt(max(shape[:2])) * math.sqrt(max(1.0, shape[0] / math.prod(shape[1:])))


def orthogonalised(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """About U V^T of a matrix (rows, columns) = U S V^T, by five steps of the quintic Newton-Schulz iteration.

    Args:
        matrix: of any dtype, which the result has too.
        dtype: of the iteration; None: bf16 on a GPU, as published, fp32 on a CPU. In bf16 the order of the products
            shows: with (c A) A in place of c (A A), 20 steps end 0.12 of their way from where the published ones do.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(dtype or (torch.bfloat16 if matrix.is_cuda else torch.float32))
    if wide := matrix.shape[0] > matrix.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = (x.T if wide else x).to(matrix.dtype)
    return result
