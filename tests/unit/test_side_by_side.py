"""What the benchmarks share, and how they import a published code that is not installed whole."""

import csv
import itertools
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import plots
from benchmarks.reference import Published
from benchmarks.side_by_side import COLUMNS, Claim, Result, append, interleaved, ratio, show


def test_ways_take_turns_and_ratios_are_of_one_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[str] = []
    drift = itertools.count(1)  # a machine that becomes slower and slower

    def way(name: str, cost: float) -> float:
        called.append(name)
        return cost * (next(drift) // 2 + 1)

    times = interleaved({"a": lambda: way("a", 1.0), "b": lambda: way("b", 2.0)}, 5)
    assert called[:6] == ["b", "a", "a", "b", "b", "a"] and len(times["a"]) == len(times["b"]) == 5
    found = show(times, [Claim("b / a", "b", "a", ">= 1.5, low > 1.2")])[0]
    assert found.ratio == pytest.approx(2.0, rel=0.2) and found.holds is True
    median, low, high = ratio([2.0, 2.0, 2.0, 2.0, 9.0], [1.0] * 5)
    assert (median, low) == (2.0, 2.0) and high == 9.0
    assert Result("c", 1.2, 0.9, 1.4, ">= 1.0, low > 0.95").holds is False and Result("c", 1.2).holds is None

    file = tmp_path / "results.csv"
    monkeypatch.setattr(sys, "argv", ["x/benchmarks/compare.py", "--reference", "/somewhere/else", "--record"])
    append([Result("a, quoted", 1.0, limit=">= 1"), Result("b", 2.0, 1.5, 2.5)], file)
    append([found], file)
    rows = list(csv.DictReader(file.open()))
    assert tuple(rows[0]) == COLUMNS and [row["claim"] for row in rows] == ["a, quoted", "b", "b / a"]
    assert rows[0]["command"] == "python benchmarks/compare.py --reference DIR" and rows[0]["low"] == ""

    append([Result("b / a", 1.4, 1.3, 1.6, ">= 1.5, low > 1.2"), Result("what has no limit, s", 3.0)], file)
    plots.main(file, tmp_path)
    written = (tmp_path / "RESULTS.md").read_text()
    table = [line for line in written.splitlines() if line.startswith("| ")]
    assert len(table) == 3 and "| 1.4 (1.3 to 1.6) **missed** |" in table[2]
    (tmp_path / "RESULTS.md").write_text(written.replace(table[2], table[2].removesuffix(" |") + "faster kernels |"))
    plots.main(file, tmp_path)
    assert "faster kernels |" in (tmp_path / "RESULTS.md").read_text()


def test_the_published_code_is_imported_without_what_it_does_not_call(tmp_path: Path) -> None:
    """Both halves have a package ``models``; packages that are missing are stood in for, and switches put back."""
    files = {
        "SiT/models/sit.py": "from timm.models.vision_transformer import Attention, Mlp, PatchEmbed\n",
        "SiT/loss.py": "",
        "SiT/samplers.py": "",
        "SiT/train.py": "import torch, models.sit\nfrom accelerate.utils import set_seed\n"
        "torch.backends.cuda.matmul.allow_tf32 = True\n",
        "LightningDiT/models/__init__.py": "",
        "LightningDiT/models/lightningdit.py": "import torch\nimport fairscale.nn as nn\n"
        "@torch.compile\ndef double(x):\n    return 2 * x\n",
        "LightningDiT/transport/__init__.py": "",
        "LightningDiT/muon_new.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before, allowed = list(sys.path), torch.get_float32_matmul_precision()
    published = Published(tmp_path, compiled=False)
    assert {"accelerate", "fairscale"} <= set(published.stood_in)
    assert published.lightningdit.double(3) == 6 and not hasattr(
        published.lightningdit.double, "_torchdynamo_orig_callable"
    )
    assert sys.path == before and torch.get_float32_matmul_precision() == allowed
    assert not {"models.sit", "loss", "samplers", "train", "accelerate", "fairscale"} & set(sys.modules)
    patches = published.sit.PatchEmbed(8, 2, 3, 16)
    tokens = patches(torch.randn(2, 3, 8, 8))
    assert tokens.shape == (2, patches.num_patches, 16)
    assert published.sit.Attention(16, num_heads=2, qkv_bias=True, qk_norm=False)(tokens).shape == tokens.shape
