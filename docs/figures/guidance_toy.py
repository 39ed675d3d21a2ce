"""The first figure of docs/internal-guidance.md: two classes in the plane, without guidance and with each kind of it.

python docs/figures/guidance_toy.py runs/guidance-figures docs/pictures

Two networks of the plane are trained (150 s on one free core; kept in the first folder), with the project's own
path, loss, guidance and sampler. Prints the table of the page.
"""

import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import safetensors.torch
import torch
from torch import Tensor, nn

from ig_dist.diffusion.guidance import GuidanceTerm, guided_velocity
from ig_dist.diffusion.loss import ig_loss
from ig_dist.diffusion.path import Path as NoisePath
from ig_dist.diffusion.path import shift_time
from ig_dist.diffusion.samplers import heun, time_grid
from ig_dist.models.dit import DiTOutput

CLASSES, NULL, LEVELS, PER_BRANCH, SPREAD = 2, 2, 4, 16, 0.02
BATCH, LR, DECAY, LABEL_DROP, SHIFT_OF_TIMES = 2048, 2e-3, 0.998, 0.1, 0.4  # more times near data, for thin branches
SHOWN = 3000  # samples of each class


def tree(label: int) -> Tensor:
    """Centres of a class, (branches, PER_BRANCH, 2): a tree that leans into that of the other class."""
    side = 1.0 if label else -1.0
    tips, branches = [(torch.tensor([0.25 * side, -1.0]), 1.57 - 0.35 * side, 0.62)], []
    for level in range(LEVELS):
        grown = []
        for start, angle, length in tips:
            along = torch.linspace(0, 1, PER_BRANCH)[:, None] * length
            bent = angle + 0.25 * side * (-1) ** level * torch.linspace(0, 1, PER_BRANCH)[:, None]
            branches.append(start + along * torch.cat([bent.cos(), bent.sin()], 1))
            grown += [(branches[-1][-1], angle + turn, length * 0.74) for turn in (-0.55, 0.45)]
        tips = grown
    return torch.stack(branches)


TREES = torch.stack([tree(label) for label in range(CLASSES)])
CENTRES = TREES.flatten(1, 2)  # (classes, components, 2)
SHIFT, SCALE = CENTRES.mean((0, 1)), CENTRES.std()


def draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Data of these classes, (B, 2)."""
    component = torch.randint(CENTRES.shape[1], labels.shape, generator=generator)
    noise = SPREAD * torch.randn(len(labels), 2, generator=generator)
    return (CENTRES[labels, component] + noise - SHIFT) / SCALE


def log_density(x: Tensor, label: int) -> Tensor:
    """Of the class, up to a constant."""
    squares = torch.cdist(x * SCALE + SHIFT, CENTRES[label]).square() / SPREAD**2
    return torch.logsumexp(-0.5 * squares.double(), dim=1)


def branch_shares(x: Tensor, label: int) -> Tensor:
    """Share of the samples that is nearest to each branch."""
    nearest = torch.cdist(x * SCALE + SHIFT, CENTRES[label]).argmin(1) // PER_BRANCH
    return torch.bincount(nearest, minlength=len(TREES[label])) / len(x)


class Plane(nn.Module):
    """A residual network with an auxiliary head after block ``aux``."""

    null_label, has_aux_head = NULL, True

    def __init__(self, width: int, depth: int, aux: int) -> None:
        super().__init__()
        self.aux = aux
        self.register_buffer("frequencies", torch.arange(1, 9) * torch.pi)
        self.embed, self.label = nn.Linear(2 + 16, width), nn.Embedding(CLASSES + 1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2)) for _ in range(2))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> DiTOutput:
        """As a DiT's, for points (B, 2)."""
        angles = t[:, None] * self.frequencies
        x = self.embed(torch.cat([x_t, angles.cos(), angles.sin()], 1)) + self.label(labels)
        weak = None
        for number, block in enumerate(self.blocks, start=1):
            x = x + block(x)
            if number == self.aux:
                weak = self.heads[1](x)
        return DiTOutput(self.heads[0](x), weak)


def trained(file: Path, width: int, depth: int, aux: int, steps: int) -> Plane:
    """The network's average, trained with the loss of Internal Guidance unless it is in the file."""
    torch.manual_seed(0)
    model, average = Plane(width, depth, aux), Plane(width, depth, aux)
    if not file.exists():
        began = time.time()
        average.load_state_dict(model.state_dict())
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            labels = torch.randint(CLASSES, (BATCH,), generator=generator)
            x, noise = draw(labels, generator), torch.randn(BATCH, 2, generator=generator)
            t = shift_time(torch.rand(BATCH, generator=generator), SHIFT_OF_TIMES)
            x_t, velocity = NoisePath().interpolate(x, noise, t)
            dropped = torch.rand(BATCH, generator=generator) < LABEL_DROP
            loss = ig_loss(model(x_t, t, labels.masked_fill(dropped, NULL)), velocity, 0.5).total.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(weight, 1 - DECAY)
        safetensors.torch.save_file(average.state_dict(), file)
        print(f"{file}: {steps} steps in {time.time() - began:.0f} s, last loss {loss.item():.3f}")
    average.load_state_dict(safetensors.torch.load_file(file))
    return average.eval().requires_grad_(False)


def main() -> None:
    """Train or load, sample, print the table, draw."""
    kept, pictures = Path(sys.argv[1]), Path(sys.argv[2])
    kept.mkdir(parents=True, exist_ok=True)
    model = trained(kept / "plane.safetensors", width=64, depth=6, aux=2, steps=4000)
    weak = trained(kept / "plane-weak.safetensors", width=32, depth=2, aux=1, steps=1000)
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(CLASSES).repeat_interleave(SHOWN)
    real, noise = draw(labels, generator), torch.randn(len(labels), 2, generator=generator)
    edges = [log_density(real[labels == label], label).quantile(0.01) for label in range(CLASSES)]
    due = [branch_shares(draw(torch.full((200_000,), label), generator), label) for label in range(CLASSES)]

    def judged(x: Tensor) -> tuple[float, float]:
        mine = [(x[labels == label], label) for label in range(CLASSES)]
        stray = [(log_density(part, label) < edges[label]).float().mean() for part, label in mine]
        kept = [torch.minimum(branch_shares(part, label), due[label]).sum() for part, label in mine]
        return float(sum(stray)) / CLASSES, float(sum(kept)) / CLASSES

    def sampled(kind: str, scale: float) -> Tensor:
        return heun(guided_velocity(model, labels, [GuidanceTerm(kind, scale)], weak), noise, time_grid(32))

    names = {"ig": "Internal Guidance", "cfg": "CFG", "auto": "autoguidance"}
    rows = {("data", 1.0): real, ("unguided", 1.0): sampled("ig", 1.0)}
    for kind in names:
        rows |= {(kind, scale): sampled(kind, scale) for scale in (1.5, 2.0, 3.0, 4.0)}
    print("| | scale | stray | branches kept |\n|---|---|---|---|")
    scores = {row: judged(x) for row, x in rows.items()}
    for (kind, scale), (stray, mass) in scores.items():
        print(f"| {names.get(kind, kind)} | {scale:g} | {stray:.1%} | {mass:.1%} |")
    shown = [("data", 1.0), ("unguided", 1.0), ("cfg", 3.0), ("ig", 3.0), ("auto", 3.0)]
    figure, axes = plt.subplots(1, len(shown), figsize=(3 * len(shown), 2.9), layout="constrained")
    for axis, row in zip(axes, shown, strict=True):
        kind, scale = row
        axis.scatter(*real[labels == 1].T, s=0.3, color="0.85")
        axis.scatter(*rows[row][labels == 0].T, s=0.5, color="tab:blue")
        stray, mass = scores[row]
        axis.set_title(names.get(kind, kind) + (f" {scale:g}" if kind in names else ""), fontsize=10)
        axis.set_xlabel(f"stray {stray:.1%}, branches kept {mass:.1%}", fontsize=9)
        axis.set(xticks=[], yticks=[], xlim=(-3, 3), ylim=(-2.5, 1.5), aspect="equal")
    figure.savefig(pictures / "guidance-toy.png", dpi=110)


if __name__ == "__main__":
    main()
