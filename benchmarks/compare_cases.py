"""What ``benchmarks/compare.py`` compares, and against which limits."""

from __future__ import annotations

from typing import Literal, NamedTuple

from benchmarks.synthetic import synthetic_info
from ig_dist.config import Config
from ig_dist.config.file import load_config
from ig_dist.data.index import IndexFile
from ig_dist.plans.plan import Plan

SMALL_LIGHTNING = ("preset=null", "depth=12", "hidden_size=384", "num_heads=6", "patch_size=1", "norm=rmsnorm")


class Case(NamedTuple):
    """One comparison."""

    what: Literal["training step", "sampling"]
    model: str
    batch: int
    precision: Literal["fp32", "tf32", "bf16"]
    limit: str = ""
    compiled: str | None = None
    """The limit of the compiled form of ours; None: it is not measured. Without ``limit`` it alone is."""
    steps: int = 0
    """Of the solver."""
    fast: str | None = None
    """The limit of ours compiled in bf16, as ``--preset fast`` samples, against theirs in ``precision``."""

    @property
    def name(self) -> str:
        """As claims name it."""
        recipe = f", {'SiT' if self.is_sit else 'LightningDiT'} recipe" if self.what == "sampling" else ""
        return f"{self.what}{recipe}, {self.model}, batch {self.batch}, {self.precision}"

    @property
    def is_sit(self) -> bool:
        """Or LightningDiT."""
        return self.model.startswith("SiT")

    def config(self, *, compiled: bool) -> Config:
        """The published config of that family, in this size."""
        model = [f"model.preset={self.model}", f"model.aux_depth={8 if 'XL' in self.model else 4}"]
        if self.model == "LightningDiT-S/1":  # no published size: of SiT-S, for CPUs
            extra = (*SMALL_LIGHTNING, "mlp=swiglu", "rope=true", "aux_init=xavier")
            model = [f"model.{given}" for given in (*extra, "aux_depth=4")]
        given = {
            "data.index": "synthetic",
            "data.streams": 1,
            "data.flip": "false",
            "train.global_batch_size": self.batch,
            "train.precision": "fp32" if self.precision == "tf32" else self.precision,
            "train.compile": str(compiled).lower(),
        }
        name = "sit_xl2_ig" if self.is_sit else "lightningdit_xl1_ig"
        return load_config(name, [*model, *(f"{key}={value}" for key, value in given.items())])

    def info(self) -> IndexFile:
        """Of its latents."""
        return synthetic_info(4, 32, 1000) if self.is_sit else synthetic_info(32, 16, 1000, moments=False)


EQUAL, COMPILED = ">= 1.0, low > 0.95", ">= 1.15"
CPU = (
    Case("training step", "SiT-B/2", 4, "fp32", EQUAL, COMPILED),
    Case("training step", "SiT-B/2", 8, "fp32", EQUAL, COMPILED),
    Case("training step", "SiT-B/2", 4, "bf16", EQUAL, COMPILED),
    Case("training step", "SiT-S/2", 8, "fp32", EQUAL, COMPILED),
    Case("training step", "SiT-S/2", 8, "bf16", EQUAL, COMPILED),
    Case("training step", "LightningDiT-S/1", 8, "fp32", ">= 1.0"),
    Case("sampling", "SiT-S/2", 4, "fp32", ">= 1.0", steps=6),
    Case("sampling", "LightningDiT-S/1", 4, "fp32", ">= 1.2", steps=6),
)
GPU = (
    *(Case("training step", "SiT-XL/2", batch, "bf16", compiled=">= 2.0") for batch in (64, 128)),
    *(Case("training step", "LightningDiT-XL/1", batch, "bf16", compiled=">= 2.0") for batch in (64, 128)),
    Case("sampling", "SiT-XL/2", 64, "tf32", ">= 1.0", ">= 1.0", steps=10, fast=">= 3.0"),
    Case("sampling", "LightningDiT-XL/1", 64, "tf32", ">= 1.0", ">= 1.0", steps=10, fast=">= 3.0"),
)


def plan_of(case: Case) -> Plan:
    """The published way of sampling, of fewer steps."""
    config = case.config(compiled=False)
    given = {"num": case.batch, "steps": case.steps, "precision": case.precision, "unit_size": case.batch}
    kept = {name: getattr(config.sample, name) for name in ("labels", "solver", "seed", "time_shift")}
    rest = {
        "num_classes": 1000,
        "guidance": config.guidance,
        "batch_size": case.batch,
        "weights_sha256": "",
        "compile": False,
    }
    return Plan.model_validate({**kept, **given, **rest})
