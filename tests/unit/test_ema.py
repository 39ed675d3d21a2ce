"""The average: its formula, a step that does not count, and weights that are lent and come back."""

import pytest
import torch

from ig_dist.training.learner import EMA


def test_the_average_follows_the_formula_and_leaves_out_void_steps() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(7, 5, generator=draw), "b": torch.randn(3, generator=draw)}
    ema = EMA(weights, [0.9, 0.999])
    expected = {decay: {name: w.double() for name, w in weights.items()} for decay in (0.9, 0.999)}
    for step in range(20):
        for weight in weights.values():
            weight.add_(torch.randn(weight.shape, generator=draw))
        void = step % 4 == 3
        ema.update(torch.tensor(0.0 if void else 1.0))
        for decay, average in expected.items():
            for name, weight in weights.items():
                average[name] += (0.0 if void else 1 - decay) * (weight.double() - average[name])
                assert torch.allclose(ema.averages[decay][name].double(), average[name], atol=1e-5), (step, decay)
    before = {name: weight.clone() for name, weight in weights.items()}
    with pytest.raises(KeyError), ema.swapped_in(0.9):
        assert torch.allclose(weights["a"].double(), expected[0.9]["a"], atol=1e-5)
        raise KeyError
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_a_part_of_a_weight_has_the_bits_of_the_whole() -> None:
    whole = torch.randn(1003, generator=torch.Generator().manual_seed(0))
    moved = whole + torch.randn(1003, generator=torch.Generator().manual_seed(1))
    averages = []
    for cut in (1003, 501, 7, 1):
        parts = {str(i): part.clone() for i, part in enumerate(whole.split(cut))}
        ema = EMA(parts, [0.99])
        for name, part in zip(parts, moved.split(cut), strict=True):
            parts[name].copy_(part)
        ema.update(torch.ones(()))
        averages.append(torch.cat(list(ema.averages[0.99].values())))
    assert all(torch.equal(average, averages[0]) for average in averages)
