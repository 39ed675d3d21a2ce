"""The report of tiny made-up runs: what is in it, what is left out; that it is whole, escaped and self-contained."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ig_dist.config_file import config_from_tree, load_run, to_yaml
from ig_dist.data.classes import imagenet_classes
from ig_dist.errors import ConfigError
from ig_dist.models.dit import DiT
from ig_dist.report.page import write_report
from ig_dist.report.plots import _thinned, best_row, better, curve_chart, heat_map, scale_chart, smooth
from ig_dist.report.scores import evaluation_section, is_imagenet, training_charts
from ig_dist.report.text import compact, duration, folded, guidance_name, number, score
from tests.conftest import TINY, run_command

HOSTILE = """x"><script>alert('1')</script>&amp;<img src="http://evil.example/x.png">"""
PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)
PROTOCOL = {"num": 1797, "solver": "heun", "reference_sha256": "ab" * 32, "step": 400, "ema": None}


def make_run(
    run: Path, *, steps: int = 400, sweep: dict[str, Any] | None = None, data: str = "nowhere", **metric: Any
) -> Path:
    """A run directory with 40 lines of metrics; the counter of non-finite steps starts anew in the middle."""
    run.mkdir(parents=True)
    tree = {**TINY, "data": {**TINY["data"], "index": data}, "train": {**TINY["train"], "steps": 800}}
    tree["model"] = {**TINY["model"], "input_size": 8, "in_channels": 1, "num_classes": 10}
    (run / "config.yaml").write_text(to_yaml(config_from_tree(tree, "test")))
    with (run / "metrics.jsonl").open("w") as file:
        for i in range(1, 41):
            line = {
                "step": steps * i // 40, "images_seen": 32 * steps * i // 40, "loss": 1.5 / i + 0.5,
                "loss_final": 1.0 / i + 0.3, "loss_aux": 1.0 / i + 0.4, "grad_norm": 1.0, "images_per_s": 800.0,
                "mfu": None, "data_wait_s": 0.002, "nonfinite_steps": i % 21, "quarantined": 0, "lr": 1e-4,
            }  # fmt: skip
            file.write(json.dumps({**line, **metric}) + "\n")
    if sweep is not None:
        (run / "sweep.json").write_text(json.dumps(sweep))
    return run


def sweep_of(ig_scales: list[float], cfg_scales: list[float], **fields: Any) -> dict[str, Any]:
    rows = [
        {
            "ig_scale": ig,
            "cfg_scale": cfg,
            "auto_scale": 1.0,
            "scores": {"fd_pixel": 0.3 + (ig - 1.5) ** 2 + (cfg - 1) ** 2},
            **fields,
        }
        for cfg in cfg_scales
        for ig in ig_scales
    ]
    return {"rows": [{**row, "plans": [f"plan{i}"]} for i, row in enumerate(rows)], "protocol": PROTOCOL}


def add_results(run: Path) -> None:
    """A grid, samples, and evaluations: two of the sweep's plans and two of others."""
    (run / "grid.png").write_bytes(PNG)
    for i, (name, scale) in enumerate({"plan0": 1.5, "other": 2.5, "third": 3.5}.items()):
        (run / "samples" / name).mkdir(parents=True)
        (run / "samples" / f"{name}.png").write_bytes(PNG + bytes([i]))
        plan = {"solver": "heun", "steps": 16, "guidance": [{"kind": "ig", "scale": scale, "interval": [0.2, 1.0]}]}
        (run / "samples" / name / "plan.json").write_text(json.dumps({"plan": plan}))
        (run / "evaluations").mkdir(exist_ok=True)
        result = {"scores": {"fd_pixel": 7.25 + i}, "protocol": {**PROTOCOL, **plan, "seed": i}}
        (run / "evaluations" / f"{name}.json").write_text(json.dumps(result))


class Page(HTMLParser):
    """Checks that tags close in order; collects text, ids and references."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.styles = ""
        self.feed(html)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "xlink:href", "data", "action", "poster"):
                self.references.append(value or "")
            if name == "style":
                self.styles += value or ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.styles += data
        else:
            self.text += f" {data}"


def read(run: Path) -> Page:
    """The report, written and parsed; it is self-contained whatever the run holds."""
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references), page.references
    assert "url(" not in page.styles and "@import" not in page.styles
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "base", "form"}
    assert page.ids and len(set(page.ids)) == len(page.ids)
    return page


def test_a_complete_run(tmp_path: Path, digits_index: Path) -> None:
    run = make_run(tmp_path / "run", sweep=sweep_of([1.0, 1.4, 2.0], [1.0]), data=str(digits_index))
    add_results(run)
    (run / "checkpoints" / "step_0000000400").mkdir(parents=True)
    (run / "checkpoints" / "step_0000000400" / "manifest.json").write_text('{"step": 400, "world_size": 2}')
    page = read(run)
    weights = DiT(load_run(run).model.to_dit()).state_dict()
    for expected in (
        "Steps 400 of 800",
        "Images seen 12,800",
        "Throughput 800 images/s",
        "Best fd_pixel 0.3100 at IG 1.4, × 0.56 of unguided",
        "Processes 2, ddp",
        "Time in steps about 16 s",
        f"Parameters {sum(tensor.numel() for tensor in weights.values()):,}",
        "Blocks 3, width 32, 2 heads",
        "Source scikit-learn digits",
        "Images 1,797 of 10 classes",
        "Optimizer adamw, 0.002, constant after 5 steps up",
        "Passed over 39 non-finite steps",  # 20 before the restart, 19 after
        "Waiting for data % of the time now 5",
        "1.4 off 1,797 0.3100 × 0.56",
        "reference_sha256 abababababab… " + "ab" * 32,
        "Other scores",
        "1,797 IG 2.5 on t 0.2 to 1 1 8.250",
        "global_batch_size: 32",
    ):
        assert expected in page.text, expected
    assert "Not here yet" not in page.text and "Model FLOPs utilisation" not in page.text
    assert len(page.references) == 4
    assert base64.b64decode(page.references[0].split(",")[1]) == PNG


def test_what_is_missing_is_left_out_with_the_command_that_makes_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run")
    page = read(run)
    assert page.text.count("Not here yet") == 3
    assert page.text.count(f"ig-dist sweep '{run}'") == 2 and f"ig-dist sample '{run}'" in page.text
    assert not page.references and "Protocol" not in page.text and "Best" not in page.text
    assert "the index is not there any more" in page.text and "Processes" not in page.text


def test_two_axes_become_a_heat_map_with_the_best_cell_marked(tmp_path: Path) -> None:
    sweep = sweep_of([1.0, 1.4, 2.0], [1.0, 1.5], std={"fd_pixel": 0.0123})
    html = write_report(make_run(tmp_path / "run", sweep=sweep)).read_text()
    heat = re.search(r'<table class="heat">.*?</table>', html, re.DOTALL)
    assert heat is not None
    assert re.findall(r"<td class=best[^>]*>([\d.]+)<small>± ([\d.]+)", heat[0]) == [("0.3100", "0.0123")]
    assert re.findall(r"--heat:([\d.]+)", heat[0])[1] == "1.0" and heat[0].count("<td") == 6
    assert "0.3100 ± 0.0123" in html
    read(tmp_path / "run")


def test_any_metric_and_its_direction(tmp_path: Path) -> None:
    sweep = sweep_of([1.0, 2.0], [1.0])
    for row, agreement in zip(sweep["rows"], (0.9, 0.8), strict=True):
        row["scores"] = {"label_agreement": agreement, "blueness": 3.0, "fd_pixel": math.nan}
    page = read(make_run(tmp_path / "run", sweep=sweep))
    assert (
        "label_agreement higher is better, N = 1,797" in page.text
        and "Best label_agreement 0.9000 unguided" in page.text
    )
    assert "Best blueness" not in page.text and "Best fd_pixel" not in page.text and "nan" in page.text


def test_scores_of_an_earlier_step_say_so(tmp_path: Path) -> None:
    sweep = sweep_of([1.0, 2.0], [1.0])
    assert "not of the newest" not in read(make_run(tmp_path / "same", sweep=sweep)).text
    assert "scores are of step 400, not of the newest" in read(make_run(tmp_path / "on", steps=800, sweep=sweep)).text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    sweep = sweep_of([1.0, 2.0], [1.0])
    sweep["protocol"] = {HOSTILE: HOSTILE, "tokenizer_sha256": HOSTILE}
    for row in sweep["rows"]:
        row["scores"] = {HOSTILE: row["ig_scale"], f"fd {HOSTILE}": row["ig_scale"]}
    run = make_run(tmp_path / HOSTILE.replace("/", "|"), sweep=sweep, data=HOSTILE.replace("http:", ""))
    add_results(run)
    (run / "samples" / "other" / "plan.json").write_text(
        json.dumps({"plan": {"solver": HOSTILE, "steps": 1, "guidance": []}})
    )
    (run / "samples" / f"{HOSTILE.replace('/', '|')}.png").write_bytes(PNG)
    page = read(run)
    assert page.tags["img"] == 5
    assert page.text.count("<script>alert('1')</script>") >= 8


def test_values_that_are_not_finite_do_no_harm(tmp_path: Path) -> None:
    page = read(make_run(tmp_path / "nan", loss=math.nan, grad_norm=math.inf, mfu=0.4))
    assert "Gradient norm" not in page.text and "Model FLOPs utilisation % of the peak now 40" in page.text
    run = make_run(tmp_path / "cut")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 410, "images_')  # a run that is being trained
    assert "Steps 400" in read(run).text


def test_mistakes_are_one_line_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    done = run_command(["ig-dist", "report", run])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no metrics" in done.stderr and "ig-dist train" in done.stderr
    for damaged in ("{", '{"rows": []}', '{"rows": [{"ig_scale": 1}]}', "[]"):
        run = make_run(tmp_path / f"run{len(damaged)}")
        (run / "sweep.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"sweep.json is damaged.*ig-dist sweep"):
            write_report(run)
    with pytest.raises(ConfigError, match="--out"):
        write_report(make_run(tmp_path / "good"), tmp_path)


def test_the_verb(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "new" / "page.html"
    done = run_command(["ig-dist", "report", run, "--out", out])
    assert done.returncode == 0 and str(out) in done.stdout, done.stderr
    assert out.read_text().startswith("<!DOCTYPE html>") and not (run / "report.html").exists()


def points(text: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, pair.split(","))) for pair in text.split()]


def test_a_curve_is_drawn_to_scale() -> None:
    chart = curve_chart("t", "", [0, 50, 100], {"a": [0.0, 1.0, 2.0]}, from_zero=True)
    assert chart is not None
    raw = points(chart.lines[0].raw)
    assert [x for x, _ in raw] == [0, 500, 1000] and raw[0][1] == 1000
    assert raw[0][1] - raw[1][1] == pytest.approx(raw[1][1] - raw[2][1], abs=0.2)
    at = {tick.label: tick.at * 10 for tick in chart.y_ticks}
    assert at["0"] == 1000 and at["1.0"] == pytest.approx(raw[1][1], abs=0.1)
    assert [tick.label for tick in chart.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert curve_chart("t", "", [1], {"a": [None]}, from_zero=True) is None


def test_the_first_fall_of_a_loss_does_not_flatten_the_rest() -> None:
    steps = list(range(1, 1001))
    losses = [100.0 / i + 0.5 + 0.01 * math.sin(i) for i in steps]
    chart = curve_chart("t", "", steps, {"a": losses}, from_zero=False)
    assert chart is not None
    heights = [y for _, y in points(chart.lines[0].points)]
    assert chart.note and min(heights) < 0 and 100 < heights[len(heights) // 10] < 800


def test_smoothing_keeps_the_start_and_a_constant_and_thinning_keeps_spikes() -> None:
    assert smooth(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    noisy = np.random.default_rng(0).normal(size=3000)
    assert smooth(noisy)[0] == noisy[0] and smooth(noisy).std() < 0.15
    noisy[1234] = 99.0
    chosen = _thinned(noisy)
    assert 1234 in chosen and len(chosen) <= 502 and chosen == sorted(set(chosen))


def test_a_sweep_over_cfg_alone_has_it_on_the_axis_and_bars_span_one_std() -> None:
    rows = sweep_of([1.0], [1.0, 1.5, 2.0], std={"fd_pixel": 0.1})["rows"]
    chart = scale_chart(rows, "fd_pixel")
    assert chart.x_label.startswith("classifier-free") and [t.label for t in chart.x_ticks] == ["1", "1.5", "2"]
    assert [dot.best for dot in chart.dots] == [True, False, False]
    for dot in chart.dots:
        assert dot.bar is not None and dot.bar[0] + dot.bar[1] == pytest.approx(2 * dot.y, abs=0.2)
    rows[1]["std"] = {}
    assert scale_chart(rows, "fd_pixel").dots[1].bar is None
    assert heat_map(rows, "fd_pixel").ig_scales == ["1"]


def test_a_sweep_over_autoguidance_has_it_on_the_axis_and_in_the_table(tmp_path: Path) -> None:
    sweep = sweep_of([1.0, 1.5], [1.0], std={})
    sweep["rows"] += [{**row, "auto_scale": 2.0, "plans": ["other"]} for row in sweep_of([1.0], [1.0], std={})["rows"]]
    chart = scale_chart([row for row in sweep["rows"] if row["ig_scale"] == 1], "fd_pixel")
    assert chart.x_label.startswith("autoguidance") and [tick.label for tick in chart.x_ticks] == ["1", "2"]
    page = write_report(make_run(tmp_path / "run", sweep=sweep)).read_text()
    assert "autoguidance scale" in page and "autoguidance 2" in page


def test_numbers() -> None:
    values = [0, 1.0, 0.001, 1e-4, 2.5e-5, 0.37787, 1.2, 12345.6, 128000, 0.99999, -0.5, math.nan]
    expected = ["0", "1", "0.001", "1e-4", "2.5e-5", "0.3779", "1.2", "12,346", "128,000", "1", "-0.5", "nan"]
    assert [number(value) for value in values] == expected
    assert [score(value) for value in (0.3, 12.0, 0.61234)] == ["0.3000", "12.00", "0.6123"]
    assert [compact(value) for value in (1234, 102_400_000, 2.5e10)] == ["1,234", "102.4 M", "25.0 B"]
    assert [duration(s) for s in (5, 200, 7500, 200000)] == ["5 s", "3 min 20 s", "2 h 5 min", "2 d 7 h"]
    assert guidance_name([]) == "unguided"
    assert guidance_name([{"kind": "cfg", "scale": 1.5, "interval": [0, 1]}]) == "CFG 1.5"


def test_intervals_and_validation_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        for step in (10, 20):
            file.write(json.dumps({"step": step, "val_loss": 1 / step, "val_loss_final": 0.5 / step}) + "\n")
    narrow = sweep_of([1.0, 1.5], [1.0], ig_interval=[0.3, 1.0])["rows"]
    wide = sweep_of([1.0, 1.5], [1.0])["rows"]
    (run / "sweep.json").write_text(json.dumps({"rows": wide + narrow, "protocol": {}}))
    html = write_report(run).read_text()
    assert "Validation loss" in html
    assert "IG for t in 0 to 1" in html and "IG for t in 0.3 to 1" in html


def test_where_the_time_went(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", peak_memory_bytes=3 * 2**30)
    assert "goodput" not in read(run).ids
    lines = [
        {"began": 0.0, "from_step": 0, "step": 0, "seconds": {"start-up": 60.0}},
        {"began": 0.0, "from_step": 0, "step": 200, "seconds": {"start-up": 60.0, "step": 400.0}},
        {"began": 600.0, "from_step": 100, "step": 100, "seconds": {"start-up": 60.0}},
        {"began": 600.0, "from_step": 100, "step": 400, "seconds": {"start-up": 60.0, "step": 600.0, "data": 80.0}},
    ]
    (run / "goodput.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read(run)
    assert "goodput" in page.ids
    assert "Where the time went 20 min 0 s in 2 starts" in page.text
    assert "training 66.7% 13 min 20 s lost work 16.7% 3 min 20 s start-up 10.0% 2 min 0 s" in page.text
    assert "waiting for data 6.7% 1 min 20 s" in page.text and "compilation" not in page.text
    assert "100 steps were done again; 2 min 20 s lie between the starts" in page.text
    assert "width:66.7%" in page.styles
    assert "Peak memory GiB, of the rank that took most" in page.text


def test_every_score_has_its_direction_also_with_other_weights() -> None:
    lower = ["fid", "sfid", "kid", "fd_dinov2", "fd_efficientnet", "fd_pixel", "fid@inception-0123abcd"]
    higher = ["inception_score", "precision", "recall", "precision_efficientnet", "label_agreement"]
    assert [better(name) for name in lower] == [-1] * len(lower)
    assert [better(name) for name in higher] == [1] * len(higher)
    assert better("blueness") == 0


def result_of(score_: float, **protocol: Any) -> dict[str, Any]:
    told = {"num": 1000, "labels": "balanced", "seed": 0, "guidance": [], "reference": "r"}
    told |= {"evaluations": 16.0, **protocol}
    told.setdefault("plan", f"{abs(hash(json.dumps(told))):016x}"[:16])
    return {"scores": {"fd_pixel": score_}, "std": {}, "spread": {}, "protocol": told}


def cells(section: dict[str, Any] | None) -> list[dict[str, tuple[str, str]]]:
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


def test_what_differs_in_more_than_the_seed_is_not_averaged() -> None:
    others: list[dict[str, Any]] = [
        {"steps": 8},
        {"num": 500},
        {"guidance": [{"kind": "ig", "scale": 1.4}]},
        {"reference_sha256": "ab" * 32},
    ]
    section = evaluation_section([result_of(1.0), *(result_of(5.0, seed=1, **other) for other in others)])
    assert section is not None and len(section["table"]) == 5 and "over" not in str(cells(section))
    assert ("reference_sha256", "ab" * 32) in [item for row in section["rows"] for item in row]
    assert "reference_sha256" not in section["heads"] and "plan" not in section["heads"]


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


def test_what_the_sweep_shows_is_shown_beside_other_seeds_and_labels_only() -> None:
    guided = [{"kind": "ig", "scale": 1.4, "interval": [0, 1]}]
    swept = [{**result_of(1.0), "swept": True}, {**result_of(5.0, guidance=guided), "swept": True}]
    assert evaluation_section(swept) is None
    assert [row["fd_pixel"] for row in cells(evaluation_section([*swept, result_of(2.0, seed=1)]))] == [
        ("1.500 ± 0.707", "over 2 seeds")
    ]
    rows = cells(evaluation_section([*swept, result_of(6.0, guidance=guided, labels="random")]))
    assert [row["fd_pixel"] for row in rows] == [("5.000", ""), ("6.000", "+1 against balanced")]


def test_a_spread_over_subsets_is_shown_as_such() -> None:
    result = {**result_of(1.0), "scores": {"kid": 0.01}, "spread": {"kid": 0.002}}
    assert cells(evaluation_section([result]))[0]["kid"] == ("0.01000 ± 0.002", "over subsets")


def test_the_floor_and_the_warning_of_few_images(tmp_path: Path) -> None:
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
    assert "1.68" not in notes("fid", reference="mine.npz") and not is_imagenet(str(tmp_path))


def test_the_warning_names_the_scores_of_few_images_only() -> None:
    many = {**result_of(2.0, num=50_000), "scores": {"fid": 2.0}}
    section = evaluation_section([many, {**result_of(2.0), "scores": {"fd_dinov2": 2.0}}])
    assert section is not None
    assert section["notes"] == ["fd_dinov2 of 1,000 images is biased upwards: compare equal N only (papers: 50,000)."]


def test_an_index_with_the_thousand_synsets_is_imagenet(digits_index: Path, tmp_path: Path) -> None:
    index = json.loads((digits_index / "index.json").read_text())
    assert not is_imagenet(str(digits_index))
    (tmp_path / "index.json").write_text(json.dumps({**index, "classes": list(imagenet_classes())}))
    assert is_imagenet(str(tmp_path)) and is_imagenet(f"{tmp_path}/index.json")


def test_scores_while_training_are_curves_apart_for_each_number_of_images(tmp_path: Path) -> None:
    lines = [{"step": step, "score_fid": 100.0 / step, "score_num": 5000} for step in (10, 20, 30)]
    lines.append({"step": 40, "score_fid": 1.5, "score_recall": 0.5, "score_num": 10_000})
    fid, recall = training_charts(lines)
    assert (fid.title, fid.unit) == ("fid while training", "lower is better, N = 5,000 to 10,000")
    assert [line.name for line in fid.lines] == ["N = 5,000", "N = 10,000"] and len(fid.dots) == 4
    assert recall.unit == "higher is better, N = 10,000"
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    page = read(run)
    assert "fid while training lower is better, N = 5,000 to 10,000" in page.text
    assert "Steps 400" in page.text  # lines of scores are not lines of steps


def halved() -> dict[str, Any]:
    sweep = sweep_of([1.0, 1.4, 1.7, 2.0], [1.0])
    for row, num, value in zip(sweep["rows"], (300, 600, 600, 300), (0.1, 0.5, 0.4, 0.2), strict=True):
        row |= {"num": num, "scores": {"fd_pixel": value, "label_agreement": value}}
    return {**sweep, "target": "fd_pixel", "flat": None, "protocol": {"seeds": 1}}


def test_only_points_with_the_most_images_compete(tmp_path: Path) -> None:
    sweep = halved()
    assert best_row(sweep["rows"], "fd_pixel") is sweep["rows"][2]
    page = read(make_run(tmp_path / "run", sweep=sweep))
    assert "Best fd_pixel 0.4000 at IG 1.7, N = 600" in page.text
    assert "1.7 off 600 0.4000" in page.text and "off off 300 0.1000" in page.text
    assert "only those with N = 600 compete for the best" in page.text
    assert "One seed" in page.text and "--seeds 3" in page.text
    assert "fd_pixel of 300 to 600 images is biased upwards" in page.text
    lines = scale_chart(sweep["rows"], "fd_pixel").lines
    assert sorted(line.name for line in lines) == ["no CFG, N = 300", "no CFG, N = 600"]


def test_where_a_sweep_is_flat(tmp_path: Path) -> None:
    sweep = sweep_of([1.0, 1.4, 1.7], [1.0], std={"fd_pixel": 0.1})
    sweep |= {"target": "fd_pixel", "flat": [1, 2]}
    page = read(make_run(tmp_path / "flat", sweep=sweep))
    assert "fd_pixel is flat within its noise over 2 rows (IG 1.4; IG 1.7)" in page.text
    assert page.text.count("as good as the best") == 2  # the sentence, and the row that is not the best itself
    sweep["flat"] = [1]
    assert "better than all others by more than the noise" in read(make_run(tmp_path / "one", sweep=sweep)).text


def test_models_of_a_sweep_are_lines_of_their_own_and_compared_with_their_own_unguided(tmp_path: Path) -> None:
    sweep = sweep_of([1.0, 1.5], [1.0], ema=0.99, step=100)
    sweep["rows"] += sweep_of([1.0, 1.5], [1.0], ema=0.999, step=100)["rows"]
    for row, value in zip(sweep["rows"], (4.0, 2.0, 10.0, 1.0), strict=True):
        row["scores"] = {"fd_pixel": value}
    page = read(make_run(tmp_path / "run", sweep=sweep))
    assert "at IG 1.5, × 0.10 of unguided" in page.text and "1.5 off 0.99 1,797 2.000 × 0.50" in page.text
    names = [line.name for line in scale_chart(sweep["rows"], "fd_pixel").lines]
    assert names == ["no CFG, EMA 0.99", "no CFG, EMA 0.999"]


def test_the_tradeoff_and_the_nearest_pictures_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sweep=halved())
    add_results(run)
    (run / "sweep_tradeoff.png").write_bytes(PNG)
    assert "Nearest training pictures" not in read(run).text
    (run / "samples" / "other_nearest.png").write_bytes(PNG)
    page = read(run)
    assert "Nearest training pictures a check against memorisation IG 2.5" in page.text
    assert "One score against another" in page.text and page.tags["img"] == 6  # no grid among the samples
    (run / "sweep.json").write_text(json.dumps(sweep_of([1.0, 1.4], [1.0])))
    assert "One score against another" not in read(run).text  # it is of an older sweep


def test_rounds_of_a_halved_sweep_are_not_other_scores(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sweep=halved())
    (run / "evaluations").mkdir()
    result = result_of(7.25, num=300)
    (run / "evaluations" / "plan0_300.json").write_text(json.dumps(result))
    assert "Other scores" not in read(run).text
    (run / "evaluations" / "plan0_0123abcd.json").write_text(json.dumps(result))
    assert "Other scores" in read(run).text and "7.250" in read(run).text


def test_long_values_are_folded() -> None:
    assert folded("ab" * 32) == "abababababab…" and folded(f"{'a' * 64}, {'b' * 64}") == f"{'a' * 12}…, {'b' * 12}…"
    assert folded("short") == folded("c92bc6a110da7cf9") == "" and folded("many words " * 20).endswith(" …")
