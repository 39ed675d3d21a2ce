"""What still differs from the published code is said in each config, and is as docs/internal-guidance.md says."""

from __future__ import annotations

import re

import pytest
import torch

from ig_dist.config.file import load_config
from ig_dist.diffusion.guidance import GuidanceTerm, guided_velocity
from ig_dist.diffusion.path import Path, logit_normal
from ig_dist.diffusion.samplers import heun
from ig_dist.errors import ConfigError
from ig_dist.models.dit import DiTOutput
from tests.conftest import ROOT

SECTION = "What still differs from the published code"
PUBLISHED = sorted(file.stem for file in (ROOT / "configs").glob("*.yaml") if "imagenet" in file.read_text())
IMAGES, BATCH = 1_281_167, 256


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_config_says_what_differs(name: str) -> None:
    text = (ROOT / f"configs/{name}.yaml").read_text()
    header = " ".join(text.split("\nmodel:")[0].replace("\n#", "").split())
    told = header.partition(f'Differs from the published code (docs/internal-guidance.md, "{SECTION}"):')[2]
    assert all(word in told for word in ("TF32", "bf16", "fp16")), told
    for millions, epochs in re.findall(r"ends after ([\d.]+)M steps, (\d+) epochs", told):
        assert round(float(millions) * 1e6 * BATCH / IMAGES) == int(epochs)
    config = load_config(ROOT / f"configs/{name}.yaml")
    assert config.optimizer.decay_pos_embed == name.startswith("lightningdit") == (config.optimizer.kind == "muon")
    assert config.sample.precision == "tf32"
    assert f"## {SECTION}\n" in (ROOT / "docs/internal-guidance.md").read_text()


def test_the_table_of_positions_decays_under_muon_only() -> None:
    with pytest.raises(ConfigError, match=r"decay_pos_embed=true needs optimizer\.kind=muon, it is adamw: set"):
        load_config(ROOT / "configs/digits.yaml", ["optimizer.decay_pos_embed=true"])
    assert not load_config(ROOT / "configs/digits.yaml", ["optimizer.kind=muon"]).optimizer.decay_pos_embed
    left = (1 - 2e-4 * 0.01) ** (680 * IMAGES / BATCH)
    assert left == pytest.approx(0.0011, abs=5e-5)  # what the config's header says


class Heads:
    """A model whose heads predict 3 and 1; it counts what it is asked."""

    null_label, has_aux_head = 9, True

    def __init__(self) -> None:
        self.rows: list[tuple[float, int]] = []

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, *, with_aux: bool = True) -> DiTOutput:
        self.rows.append((float(t[0]), len(labels)))
        return DiTOutput(torch.full_like(x_t, 3.0), torch.ones_like(x_t) if with_aux else None)


def test_a_scale_below_one_leads_back_to_the_weak_prediction() -> None:
    x, labels = torch.zeros(1, 1, 2, 2), torch.tensor([1])
    for scale, expected in ((0.0, 1.0), (0.5, 2.0), (1.0, 3.0)):
        assert (guided_velocity(Heads(), labels, [GuidanceTerm("ig", scale)])(x, 0.5) == expected).all()


def test_heun_tests_the_interval_at_each_evaluation() -> None:
    model = Heads()
    velocity = guided_velocity(model, torch.tensor([1]), [GuidanceTerm("cfg", 2.0, (0.0, 0.6))])
    heun(velocity, torch.zeros(1, 1, 2, 2), [1.0, 0.5, 0.0])
    assert model.rows == [(1.0, 1), (0.5, 2), (0.5, 2), (0.0, 2)]  # SiT's takes the first step without CFG


def test_logit_normal_is_the_published_log_normal_on_the_linear_path_only() -> None:
    normal = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    t, noise_over_data = logit_normal(normal, 0.0, 1.0), normal.double().exp()
    for kind, same in (("linear", True), ("cosine", False)):
        alpha, sigma, *_ = Path(kind).coefficients(t)
        assert torch.allclose(torch.as_tensor(sigma) / torch.as_tensor(alpha), noise_over_data) == same
