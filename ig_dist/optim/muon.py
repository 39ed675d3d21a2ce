"""Muon as the published LightningDiT + IG run used it: orthogonalised momentum on matrices, Adam on the rest.

For every weight of two or more dimensions (kernels flattened to out x rest; embeddings and heads included):

    M <- 0.95 M + 0.05 G,  U = NewtonSchulz5(0.05 G + 0.95 M),
    W <- (1 - lr 0.01) W - lr 0.2 sqrt(max(A, B)) sqrt(max(1, rows / cols)) U,

with A, B the first two entries of the unflattened shape. Jordan et al. 2024 (Muon), Liu et al. 2025 (the scale by
shape), in the form that the published weights of IG (arXiv 2512.24176) were trained with. Neither mode of
``torch.optim.Muon`` equals it: its steps are 1.0 to 6.4 times as long.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ig_dist.optim.fused import FusedAdamW, move, subtract

MOMENTUM = 0.95
WEIGHT_DECAY = 0.01
SCALE = 0.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: the quintic that lifts small singular values fastest
NEWTON_SCHULZ_STEPS = 5
AT_ONCE = 2**25  # elements of the matrices that are iterated on together on a GPU: a workspace of about 400 MB
IN_CACHE = 2**18
"""The same on a CPU, which gains nothing by fewer operations: as many as stay in a core's cache between them."""


def orthogonalise_each(matrices: Sequence[Tensor]) -> None:
    """Replace each matrix, or kernel as the matrix out x rest, by ``orthogonalised`` of it; equal shapes together."""
    alike: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        alike.setdefault(matrix.shape, []).append(matrix)
    for shape, same in alike.items():
        count = max(1, (AT_ONCE if same[0].is_cuda else IN_CACHE) // shape.numel())
        for first in range(0, len(same), count):
            batch = same[first : first + count]
            results = orthogonalised(torch.stack(batch).flatten(2))
            torch._foreach_copy_(batch, list(results.view(-1, *shape).unbind()))


class Muon(Optimizer):
    """Muon on matrices and kernels, Adam (fused) on vectors, which have no weight decay.

    Like the fused optimizers of torch, it takes ``found_inf`` and ``grad_scale`` on the device: where the first is 1, a
    step changes nothing; by the second the gradient is divided. A step turns the gradients of matrices into the update.

    ``betas`` and ``eps`` are Adam's, ``weight_decay`` is that of matrices. Where ``parameters`` are this rank's parts
    of the model's, ``shapes`` are those of the whole. ``orthogonalise`` replaces the directions of all matrices by
    orthogonal ones; engines share its work out. ``decayed`` are tensors that no gradient moves and that decay as
    matrices do: the published run has its table of positions among them, where only the decay reaches it.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

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
        self._adam = FusedAdamW(vectors, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True) if vectors else None
        if self._adam:  # one place for the state and the learning rate of every parameter
            self._adam.param_groups[0] = self.param_groups[1] | self._adam.param_groups[0]
            self.param_groups[1] = self._adam.param_groups[0]
            self._adam.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. COLLECTIVE where ``orthogonalise`` is."""
        void, lr = self.found_inf, self.param_groups[0]["lr"]
        matrices = [weight for weight in self.param_groups[0]["params"] if weight.grad is not None]
        grads, states = [weight.grad for weight in matrices], [self._state_of(weight) for weight in matrices]
        momenta = [state["exp_avg"] for state in states]
        move(momenta, grads, 1 - MOMENTUM, void, self.grad_scale)
        torch._foreach_lerp_(grads, momenta, MOMENTUM)
        self._orthogonalise(grads)
        finite = torch.ones_like(states[0]["step"]) if void is None else 1.0 - void
        torch._foreach_mul_([*matrices, *self._decayed], 1 - finite * (lr * self._weight_decay))
        for factor in {self._scales[weight] for weight in matrices}:
            alike = [weight for weight in matrices if self._scales[weight] == factor]
            subtract(alike, [weight.grad for weight in alike], lr * factor, void)
        torch._foreach_add_([state["step"] for state in states], finite, alpha=1)  # without alpha it would be read
        if self._adam:
            self._adam.found_inf, self._adam.grad_scale = void, self.grad_scale  # type: ignore[attr-defined]
            self._adam.step()

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state |= {"step": torch.zeros((), device=weight.device), "exp_avg": torch.zeros_like(weight)}
        return state


def scale(shape: Sequence[int]) -> float:
    """How long the step of a matrix or kernel of this shape is, times the learning rate."""
    if len(shape) < 2:
        return 1.0
    return SCALE * math.sqrt(max(shape[:2])) * math.sqrt(max(1.0, shape[0] / math.prod(shape[1:])))


def orthogonalised(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """About U V^T of a matrix U S V^T, by five steps of the quintic Newton-Schulz iteration.

    Args:
        matrix: (..., rows, columns), one or several, of any dtype, which the result has too.
        dtype: of the iteration; None: bf16 on a GPU, as published, fp32 on a CPU. In bf16 the order of the products
            shows: with (c A) A in place of c (A A), 20 steps end 0.12 of their way from where the published ones do.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(dtype or (torch.bfloat16 if matrix.is_cuda else torch.float32))
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):  # a tall one is multiplied from the right: sums of transposed ones are slow
        gram = x.mT @ x if tall else x @ x.mT
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if tall else polynomial @ x)
    result: Tensor = x.to(matrix.dtype)
    return result
