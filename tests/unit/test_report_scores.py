"""Charts and tables of the report: drawn to scale, the best marked, what cannot be compared kept apart."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ig_dist.config.catalogue import Row, best_row, better
from ig_dist.config.describe import guidance_name, plan_name
from ig_dist.data.classes import imagenet_classes
from ig_dist.report.evaluations import evaluation_section, evaluation_sections, step_charts
from ig_dist.report.pictures import columns_of
from ig_dist.report.plots import Chart, curve_chart, smooth
from ig_dist.report.results import Sweep, read_results
from ig_dist.report.sweeps import save_sweep, sweep_chart, sweep_section, tiles
from ig_dist.report.text import compact, folded, number, protocol_parts, score
from ig_dist.report.training import read_index
from ig_dist.training.goodput import duration
from tests.unit.test_report import make_run, read, sweep_of


def swept(sweep: dict[str, Any]) -> dict[str, Any]:
    """As the report reads it from its file."""
    return {**Sweep.model_validate(sweep).model_dump(), "written": datetime.now(UTC)}


def section_of(sweep: dict[str, Any], step: int | None = None) -> dict[str, Any]:
    return sweep_section(swept(sweep), step, [])


def words(chart: Chart) -> str:
    """All that is written in a drawing, and its tooltips."""
    return " ".join(re.findall(r"<(?:text|title)[^>]*>([^<]*)<", chart.svg))


def x_axis(chart: Chart) -> tuple[str, list[str]]:
    axes = chart.figure.axes[0]
    return axes.get_xlabel(), [label.get_text() for label in axes.get_xticklabels()]


def test_neither_the_first_fall_of_a_loss_nor_a_spike_flattens_the_rest() -> None:
    assert curve_chart("t", "", {"a": [], "b": [(1, 1e300)], "c": [(1, math.nan)]}) is None
    steps = list(range(1, 1001))
    values = [100.0 / i + 0.5 + 0.01 * math.sin(i) for i in steps]
    values[700] = 99.0
    fallen = curve_chart("t", "", {"a": zip(steps, values, strict=True)}, smoothed=True)
    assert fallen is not None and fallen.note and fallen.figure.axes[0].get_ylim()[1] < 20
    plain = curve_chart("t", "", {"a": [(0, 0.0), (50, 1.0), (100, 2.0)]}, from_zero=True)
    assert plain is not None and plain.figure.axes[0].get_ylim() == pytest.approx((0, 2.2)) and not plain.note
    assert plain.described == "t against step; at the end: a 2"
    assert smooth(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    noisy = np.random.default_rng(0).normal(size=3000)
    assert smooth(noisy)[0] == noisy[0] and smooth(noisy).std() < 0.15


def test_two_scales_become_a_heat_map_with_the_best_cell_marked(tmp_path: Path) -> None:
    sweep = sweep_of([1.0, 1.4, 2.0], [1.0, 1.5], std={"fd_pixel": 0.0123})
    page = make_run(tmp_path / "run", sweep=sweep)
    assert "0.3100 ± 0.0123" in read(page).text
    chart = sweep_chart(swept(sweep)["rows"], "fd_pixel")
    texts = chart.figure.axes[0].texts
    assert [text.get_text() for text in texts if text.get_weight() == "bold"] == ["0.3100\n± 0.0123"]
    assert len(texts) == 6 and x_axis(chart)[1] == ["IG off", "IG 1.4", "IG 2"]
    heat = [patch.get_alpha() for patch in chart.figure.axes[0].patches if patch.get_fill()]
    assert max(heat) == heat[1] == pytest.approx(0.46) and min(heat) == 0.04


def test_what_varies_is_on_the_axis_and_bars_span_one_std() -> None:
    rows = swept(sweep_of([1.0], [1.0, 1.5, 2.0], std={"fd_pixel": 0.1}))["rows"]
    chart = sweep_chart(rows, "fd_pixel")
    assert x_axis(chart) == ("classifier-free guidance scale (1: off)", ["1", "1.5", "2"])
    assert words(chart).count("best") == 1 and "CFG 1.5: 0.8 ± 0.1" in words(chart) and "unguided" in words(chart)
    ((bars,), *_) = (c.get_segments() for c in chart.figure.axes[0].collections[:1]), None  # type: ignore[attr-defined]
    assert [bar[1][1] - bar[0][1] for bar in bars] == pytest.approx([0.2] * 3)
    checkpoints = [row for step in (100, 200) for row in sweep_of([1.4], [1.0], step=step)["rows"]]
    assert x_axis(sweep_chart(swept({"rows": checkpoints})["rows"], "fd_pixel")) == ("step", ["100", "200"])
    narrow = [row for low in (0.0, 0.3) for row in sweep_of([1.4], [1.0], ig_interval=[low, 1.0])["rows"]]
    chart = sweep_chart(swept({"rows": narrow})["rows"], "fd_pixel")
    assert x_axis(chart) == ("IG for t in", ["[0, 1]", "[0.3, 1]"])


def test_the_pictures_of_a_sweep_are_those_of_the_report(tmp_path: Path) -> None:
    sweep = {**halved(), "target": "fd_pixel"}
    save_sweep(sweep, tmp_path)
    for name in ("sweep.png", "sweep_tradeoff.png"):  # no word leaves them
        drawn = np.asarray(Image.open(tmp_path / name).convert("L"))
        assert drawn.min() < 50 and all(
            (edge == 255).all() for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1])
        )


def test_autoguidance_is_on_the_axis_in_the_table_and_in_names() -> None:
    sweep = sweep_of([1.0, 1.5], [1.0])
    sweep["rows"] += [{**row, "auto_scale": 2.0, "plans": ["o"]} for row in sweep_of([1.0], [1.0])["rows"]]
    chart = sweep_chart(swept({"rows": [sweep["rows"][0], sweep["rows"][2]]})["rows"], "fd_pixel")
    assert x_axis(chart) == ("autoguidance scale (1: off)", ["1", "2"])
    sweep["rows"][2] |= {"scores": {"fd_pixel": 0.1}, "auto_interval": [0.2, 0.8]}
    assert tiles(swept(sweep))[0][2].startswith("at autoguidance 2 for t in [0.2, 0.8]")
    assert section_of(sweep)["heads"][:2] == ["IG scale", "autoguidance scale"]


def test_intervals_tell_lines_apart_or_stand_below_the_table() -> None:
    wide, narrow = sweep_of([1.0, 1.5], [1.0]), sweep_of([1.0, 1.5], [1.0], ig_interval=[0.3, 1.0])
    names = [
        line.name for line in sweep_chart(swept({"rows": wide["rows"] + narrow["rows"]})["rows"], "fd_pixel").lines
    ]
    assert names == ["IG for t in [0, 1]", "IG for t in [0.3, 1]"]
    assert "IG is on for t in [0.3, 1] in all rows." in section_of(narrow)["notes"]


def test_any_metric_and_its_direction(tmp_path: Path) -> None:
    sweep = sweep_of([1.0, 2.0], [1.0])
    for row, agreement in zip(sweep["rows"], (0.9, 0.8), strict=True):
        row["scores"] = {"label_agreement": agreement, "blueness": 3.0}
    assert tiles(swept(sweep)) == [("Best label_agreement", "0.9000", "unguided, N = 1,797")]
    assert [c.unit for c in section_of(sweep)["charts"]] == ["higher is better, N = 1,797", "N = 1,797"]
    lower = ["fid", "sfid", "kid", "fd_dinov2", "fd_efficientnet", "fd_pixel", "fid@inception-0123abcd"]
    higher = ["inception_score", "precision", "recall", "precision_efficientnet", "label_agreement"]
    assert [better(name) for name in lower] == [-1] * len(lower)
    assert [better(name) for name in higher] == [1] * len(higher)
    for row in sweep["rows"]:
        row["scores"]["fd_pixel"] = math.nan
    text = read(make_run(tmp_path / "run", sweep=sweep)).text
    assert "nan" not in text and "3.000 not finite" in text


def halved() -> dict[str, Any]:
    sweep = sweep_of([1.0, 1.4, 1.7, 2.0], [1.0])
    for row, num, value in zip(sweep["rows"], (300, 600, 600, 300), (0.1, 0.5, 0.4, 0.2), strict=True):
        row |= {"num": num, "scores": {"fd_pixel": value, "label_agreement": value}}
    return {**sweep, "target": "fd_pixel", "flat": None, "protocol": {"seeds": 1}}


def test_only_points_with_the_most_images_compete() -> None:
    sweep = swept(halved())
    assert best_row(sweep["rows"], "fd_pixel") is sweep["rows"][2]
    assert tiles(sweep)[0] == ("Best fd_pixel", "0.4000", "at IG 1.7, N = 600")
    section = section_of(halved())
    notes = " ".join(section["notes"])
    for told in (
        "only those with N = 600 compete for the best",
        "One seed",
        "--seeds 3",
        "300 to 600 images is biased",
    ):
        assert told in notes, told
    assert sorted(line.name for line in section["charts"][0].lines) == ["N = 300", "N = 600"]
    against = section["charts"][-1]
    assert against.title == "fd_pixel against label_agreement"
    names = [text.get_text() for text in against.figure.axes[0].texts]
    assert names == ["IG 1.7", "unguided", "IG 1.4", "IG 2"]
    assert len(section_of(sweep_of([1.0, 1.4], [1.0]))["charts"]) == 1


def test_where_a_sweep_is_flat_and_of_which_seeds() -> None:
    sweep = sweep_of([1.0, 1.4, 1.7], [1.0], std={"fd_pixel": 0.1})
    sweep |= {"target": "fd_pixel", "flat": [1, 2], "protocol": {"seeds": 2}}
    section = sweep_section(swept(sweep), None, [5, 6])
    assert "fd_pixel is flat within its noise over 2 rows (IG 1.4; IG 1.7)" in section["notes"][0]
    assert [cell.small for line in section["table"] for cell in line if cell.small] == ["as good as the best"]
    assert ("seeds", "2: 5, 6") in section["protocol"]["shown"]
    assert "better than all others by more than the noise" in section_of({**sweep, "flat": [1]})["notes"][0]


def test_models_of_a_sweep_are_lines_of_their_own_and_compared_with_their_own_unguided() -> None:
    sweep = sweep_of([1.0, 1.5], [1.0], ema=0.99, step=100)
    sweep["rows"] += sweep_of([1.0, 1.5], [1.0], ema=0.999, step=100)["rows"]
    for row, value in zip(sweep["rows"], (4.0, 2.0, 10.0, 1.0), strict=True):
        row["scores"] = {"fd_pixel": value}
    assert tiles(swept(sweep))[0][2].startswith("at IG 1.5, × 0.10 of unguided")
    section = section_of(sweep)
    assert [cell.text for cell in section["table"][1]] == ["1.5", "0.99", "1,797", "2.000", "× 0.50"]
    assert [line.name for line in section["charts"][0].lines] == ["EMA 0.99", "EMA 0.999"]


def result_of(score_: float, **protocol: Any) -> dict[str, Any]:
    told = {"num": 1000, "labels": "balanced", "seed": 0, "guidance": [], "reference": "r"}
    told |= {"evaluations": 16.0, **protocol}
    told.setdefault("plan", f"{abs(hash(json.dumps(told))):016x}"[:16])
    return {"scores": {"fd_pixel": score_}, "std": {}, "spread": {}, "protocol": told}


def cells(section: Row | None) -> list[dict[str, tuple[str, str]]]:
    assert section is not None
    return [
        {head: (cell.text, cell.small) for head, cell in zip(section["heads"], line, strict=True)}
        for line in section["table"]
    ]


def test_seeds_of_a_plan_are_one_row_with_their_mean_and_deviation_never_the_lowest() -> None:
    results = [result_of(value, seed=seed, evaluations=float(seed)) for seed, value in enumerate([1.0, 2.0, 6.0])]
    results.append(dict(results[0]))  # the same plan scored twice counts once
    (row,) = cells(evaluation_section(results))
    assert row["fd_pixel"] == ("3.000 ± 2.65", "over 3 seeds")  # N - 1
    assert row["seed"] == ("0, 1, 2", "mean of 3") and "steps" not in row and row["N"] == ("1,000", "")
    assert row["guidance"] == ("unguided", "")
    spread = {**result_of(1.0), "scores": {"kid": 0.01}, "spread": {"kid": 0.002}}
    assert cells(evaluation_section([spread]))[0]["kid"] == ("0.01000 ± 0.002", "over subsets")


def test_what_differs_in_more_than_the_seed_is_not_averaged() -> None:
    others: list[dict[str, Any]] = [
        {"steps": 8},
        {"num": 500},
        {"guidance": [{"kind": "ig", "scale": 1.4}]},
        {"reference_sha256": "ab" * 32, "weak_step": 40},
    ]
    section = evaluation_section([result_of(1.0), *(result_of(5.0, seed=1, **other) for other in others)])
    assert section is not None and len(section["table"]) == 5 and "over" not in str(cells(section))
    assert ("reference_sha256", "ab" * 32) in [item for row in section["rows"] for item in row]
    assert not {"reference_sha256", "plan", "weak_step"} & set(section["heads"])


def test_balanced_stands_above_random_with_the_difference() -> None:
    guided = [{"kind": "ig", "scale": 1.4, "interval": [0, 1]}]
    results = [
        result_of(3.5, labels="random", seed=7),
        result_of(9.0, guidance=guided),
        result_of(3.0),
        result_of(8.0, guidance=guided, labels="random"),
        result_of(4.0, labels="random", seed=8),
    ]
    rows = cells(evaluation_section(results))
    assert [row["labels"][0] for row in rows] == ["balanced", "random"] * 2
    assert not any({"evaluations", "plan"} & row.keys() for row in rows)  # the one is the same, the other long
    small = [row["fd_pixel"][1] for row in rows]
    assert small == ["", "over 2 seeds, +0.75 against balanced", "", "−1 against balanced"]


def test_what_a_sweep_shows_is_shown_beside_other_seeds_and_labels_only(tmp_path: Path) -> None:
    guided = [{"kind": "ig", "scale": 1.4, "interval": [0, 1]}]
    shown = [{**result_of(1.0), "swept": True}, {**result_of(5.0, guidance=guided), "swept": True}]
    assert evaluation_section(shown) is None
    assert [row["fd_pixel"] for row in cells(evaluation_section([*shown, result_of(2.0, seed=1)]))] == [
        ("1.500 ± 0.707", "over 2 seeds")
    ]
    rows = cells(evaluation_section([*shown, result_of(6.0, guidance=guided, labels="random")]))
    assert [row["fd_pixel"] for row in rows] == [("5.000", ""), ("6.000", "+1 against balanced")]
    (tmp_path / "evaluations").mkdir()
    for name in ("plan0_300", "plan0_0123abcd"):  # a round of a halved sweep, and scores that were asked for
        (tmp_path / "evaluations" / f"{name}.json").write_text(json.dumps(result_of(7.25, num=300)))
    assert len(read_results(tmp_path, {"plan0"}, "")) == 1 and len(read_results(tmp_path, set(), "")) == 2


def test_other_images_and_other_extractors_have_tables_of_their_own() -> None:
    npz = {"num": 50, "images": "run/samples/a.npz", "images_sha256": "ab" * 32, "extractor": "pixel"}
    other = {"scores": {"fd_pixel": 2.0}, "std": {}, "spread": {}, "protocol": npz}
    found = evaluation_sections([result_of(1.0, extractor="pixel"), other, result_of(3.0, extractor="inception")])
    assert [(s["title"], s["extractor"]) for s in found] == [
        ("Samples", "inception"),
        ("Samples", "pixel"),
        ("Other images", "pixel"),
    ]
    assert cells(found[2])[0]["images"] == ("run/samples/a.npz", "")
    terms = [{"kind": kind, "scale": 1.35, "interval": [0, 0.7]} for kind in ("ig", "cfg")]
    rows = cells(evaluation_section([result_of(1.0), result_of(2.0, guidance=terms)]))
    assert rows[1]["guidance"][0] == "IG 1.35 for t in [0, 0.7], CFG 1.35 for t in [0, 0.7]"  # long, but it is the name


def test_a_score_over_steps_is_a_line_for_each_guidance_and_number_of_images() -> None:
    guided = [{"kind": "ig", "scale": 1.4, "interval": [0, 1]}]
    lines = [{"step": step, "score_fd_pixel": 100.0 / step, "score_num": 5000} for step in (10, 20, 30)]
    results = [
        result_of(9.0, step=10), result_of(7.0, step=20, seed=0), result_of(9.0, step=20, seed=1),
        result_of(5.0, step=10, guidance=guided), result_of(4.0, step=20, guidance=guided),
        result_of(1.0, step=20, num=1500, solver="euler"),  # of one step alone
    ]  # fmt: skip
    (chart,) = step_charts([*lines, {"step": 40, "loss": 1.0}], results)
    assert (chart.title, chart.unit) == ("fd_pixel over steps", "lower is better, N = 1,000 to 5,000")
    assert {line.name: line.last for line in chart.lines} == {
        "while training, N = 5,000": "3.33",
        "unguided, N = 1,000": "8",  # the mean of two seeds
        "IG 1.4, N = 1,000": "4",
    }


def test_the_floor_and_the_warning_of_few_images(digits_index: Path, tmp_path: Path) -> None:
    def notes(name: str, **protocol: Any) -> str:
        section = evaluation_section([{**result_of(2.0, **protocol), "scores": {name: 2.0}}])
        assert section is not None
        return " ".join(section["notes"])

    adm = "some/where/VIRTUAL_imagenet256_labeled.npz"
    assert "1.68" in notes("fid", reference=adm, num=50_000) and "biased" not in notes("fid", reference=adm, num=50_000)
    assert "fid of 1,000 images is biased upwards: compare equal N only" in notes("fid", reference=adm)
    for other in ("fid@inception-0123abcd", "sfid", "fd_dinov2"):
        assert "1.68" not in notes(other, reference=adm)
    assert "biased" in notes("fd_dinov2") and "biased" not in notes("recall")
    assert "1.68" not in notes("fid", reference="mine.npz") and "1.68" not in notes("fid", reference=str(tmp_path))
    section = evaluation_section(
        [{**result_of(2.0, num=50_000), "scores": {"fid": 2.0}}, {**result_of(2.0), "scores": {"fd_dinov2": 2.0}}]
    )
    assert section is not None and section["notes"][0].startswith("fd_dinov2 of 1,000 images")
    index = json.loads((digits_index / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "classes": list(imagenet_classes())}))
    assert columns_of(read_index(str(tmp_path)), 2) == "Columns: tench, goldfish."
    assert columns_of(read_index(str(digits_index)), 10) == ""  # numbers tell nothing


def test_numbers() -> None:
    values = [0, 1.0, 0.001, 1e-4, 2.5e-5, 0.37787, 1.2, 12345.6, 128000, 0.99999, -0.5, math.nan]
    expected = ["0", "1", "0.001", "1e-4", "2.5e-5", "0.3779", "1.2", "12,346", "128,000", "1", "-0.5", "nan"]
    assert [number(value) for value in values] == expected
    assert [score(value) for value in (0.3, 12.0, 0.61234)] == ["0.3000", "12.00", "0.6123"]
    assert [compact(value) for value in (1234, 102_400_000, 2.5e10)] == ["1,234", "102.4 M", "25.0 B"]
    assert [duration(s) for s in (5, 200, 7500, 200000)] == ["5 s", "3 min 20 s", "2 h 5 min", "2 d 7 h"]
    assert guidance_name([]) == "unguided"
    chosen = {"solver": "heun", "steps": 8, "guidance": [], "classes": [*range(8)], "labels": "balanced", "seed": 7}
    assert (
        plan_name("0123abcd" * 2, chosen)
        == "unguided, heun 8, classes 0, 1, 2, 3, 4, 5 and 2 more, seed 7; plan 0123abcd"
    )
    assert guidance_name([{"kind": "cfg", "scale": 1.5, "interval": [0, 1]}]) == "CFG 1.5"


def test_long_values_are_folded_and_hashes_stand_apart() -> None:
    assert folded("ab" * 32) == "abababababab…" and folded(f"{'a' * 64}, {'b' * 64}") == f"{'a' * 12}…, {'b' * 12}…"
    assert folded("short") == folded("c92bc6a110da7cf9") == "" and folded("many words " * 20).endswith(" …")
    assert folded("/a/path" * 20).startswith("/a/path/a")
    parts = protocol_parts({"num": 5, "plan": "c92bc6a110da7cf9", "frechet_rule": "x", "reference": "a" * 60})
    assert parts == {
        "shown": [("reference", "a" * 60), ("num", "5")],
        "more": [("plan", "c92bc6a110da7cf9"), ("frechet_rule", "x")],
    }
