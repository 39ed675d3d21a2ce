"""The report of tiny made-up runs: what is in it, what is left out; that it is whole, escaped and self-contained."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ig_dist.config.file import config_from_tree, load_run, to_yaml
from ig_dist.errors import ConfigError
from ig_dist.models.dit import DiT
from ig_dist.report.page import write_report
from ig_dist.report.pictures import embedded
from ig_dist.training.metrics import RunLog
from tests.conftest import TINY, run_command

HOSTILE = """x"><script>alert('1')</script>&amp;<img src="http://evil.example/x.png">"""
PLAN = {"labels": "balanced", "solver": "heun", "steps": 16}
PROTOCOL = {"num": 1797, "solver": "heun", "reference_sha256": "ab" * 32, "step": 400, "ema": None}


def make_run(
    run: Path, *, steps: int = 400, sweep: dict[str, Any] | None = None, data: str = "nowhere", **metric: Any
) -> Path:
    """A run directory with 40 lines of metrics; the counter of non-finite steps starts anew in the middle."""
    run.mkdir(parents=True)
    tree = {**TINY, "data": {**TINY["data"], "index": data}, "train": {**TINY["train"], "steps": 800}}
    tree["model"] = {**TINY["model"], "input_size": 8, "in_channels": 1, "num_classes": 10}
    (run / "config.yaml").write_text(to_yaml(config_from_tree(tree, "test")))
    for i in range(1, 41):
        line = {
            "step": steps * i // 40, "images_seen": 32 * steps * i // 40, "loss": 1.5 / i + 0.5,
            "loss_final": 1.0 / i + 0.3, "loss_aux": 1.0 / i + 0.4, "grad_norm": 1.0, "images_per_s": 800.0,
            "mfu": None, "data_wait_s": 0.002, "nonfinite_steps": i % 21, "quarantined": 0, "lr": 1e-4,
        }  # fmt: skip
        add_lines(run / "metrics.jsonl", {**line, **metric})
    if sweep is not None:
        add_sweep(run, sweep)
    return run


def add_lines(file: Path, *lines: dict[str, Any]) -> None:
    with file.open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def add_sweep(run: Path, sweep: dict[str, Any], name: str = "ig_scale-01234567") -> Path:
    folder = run / "sweeps" / name
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"name": name, "written": "2026-11-26T04:00:00+00:00", **sweep}))
    return folder


def draw(file: Path, side: int = 8) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (side, side), 128).save(file)


def sweep_of(ig_scales: list[float], cfg_scales: list[float], **fields: Any) -> dict[str, Any]:
    points = [(ig, cfg) for cfg in cfg_scales for ig in ig_scales]
    rows = [
        {
            "ig_scale": ig,
            "cfg_scale": cfg,
            "scores": {"fd_pixel": 0.3 + (ig - 1.5) ** 2 + (cfg - 1) ** 2},
            "plans": [f"plan{i}"],
            **fields,
        }
        for i, (ig, cfg) in enumerate(points)
    ]
    return {"rows": rows, "protocol": PROTOCOL}


def add_results(run: Path) -> None:
    """Samples and evaluations: one of the sweep's plans, two of others, one with dopri5 and autoguidance."""
    for i, (name, scale) in enumerate({"plan0": 1.5, "other": 2.5, "third": 3.5}.items()):
        draw(run / "samples" / f"{name}.png", side=8 + i)
        guidance = [{"kind": "ig", "scale": scale, "interval": [0.2, 1.0]}]
        plan = {**PLAN, "guidance": guidance, "seed": i}
        if name == "third":
            plan |= {"solver": "dopri5", "steps": 2, "guidance": [*guidance, {"kind": "auto", "scale": 2.0}]}
        (run / "samples" / name).mkdir()
        (run / "samples" / name / "plan.json").write_text(json.dumps({"plan": plan, "export": {"step": 300}}))
        (run / "evaluations").mkdir(exist_ok=True)
        told = {key: plan[key] for key in ("solver", "steps", "guidance", "labels", "seed")}
        result = {"scores": {"fd_pixel": 7.25 + i}, "protocol": {**PROTOCOL, **told, "plan": name}}
        (run / "evaluations" / f"{name}.json").write_text(json.dumps(result))


class Page(HTMLParser):
    """Checks that tags close in order; collects text, ids and references."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.alts: list[str] = []
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
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "xlink:href", "data", "action", "poster"):
                self.references.append(value or "")
            if name == "style":
                self.styles += value or ""
            if name == "alt":
                self.alts.append(value or "")

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
    for reference in page.references:
        assert reference.startswith("data:image/") or reference.removeprefix("#") in page.ids, reference
    assert "url(" not in page.styles and "@import" not in page.styles
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "base", "form"}
    assert page.ids and len(set(page.ids)) == len(page.ids)
    assert page.headings[0] == 1 and all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    assert all(page.alts) and len(page.alts) == page.tags["img"]
    return page


def test_a_complete_run(tmp_path: Path, digits_index: Path) -> None:
    sweep = sweep_of([1.0, 1.4, 2.0], [1.0])
    sweep["protocol"] = {**PROTOCOL, "step": 411}  # saved between two lines of metrics, on a signal
    run = make_run(tmp_path / "run", sweep=sweep, data=str(digits_index))
    add_results(run)
    draw(run / "sweeps" / "ig_scale-01234567" / "grid.png")
    draw(run / "samples" / "other_nearest.png")
    (run / "checkpoints" / "step_0000000411").mkdir(parents=True)
    (run / "checkpoints" / "step_0000000411" / "manifest.json").write_text('{"step": 411, "world_size": 2}')
    add_lines(run / "provenance.jsonl", {"command": "ig-dist train a.yaml", "commit": "c0ffee"}, {"commit": "c0ffee"})
    page = read(run)
    weights = DiT(load_run(run).model.to_dit()).state_dict()
    for expected in (
        "Steps 411 of 800",
        "Images seen 13,152",
        "Throughput 800 images/s",
        "Best fd_pixel 0.3100 at IG 1.4, × 0.56 of unguided",
        "Processes 2, ddp",
        f"Parameters {sum(tensor.numel() for tensor in weights.values()):,}",
        "Blocks 3, width 32, 2 heads",
        "Source scikit-learn digits",
        "Images 1,797 of 10 classes",
        "Optimizer adamw, 0.002, constant after 5 steps up",
        "Passed over 39 non-finite steps",  # 20 before the restart, 19 after
        "Waiting for data % of the time now 5",
        "1.4 1,797 0.3100 × 0.56",
        "Hashes and rules reference_sha256 abababababab… " + "ab" * 32,
        "IG 2.5 for t in [0.2, 1], heun 16, seed 1, step 300 of the run; plan other",
        "IG 3.5 for t in [0.2, 1], autoguidance 2, dopri5, seed 2, step 300 of the run; plan third",
        "Nearest training pictures a check against memorisation IG 2.5 for t in [0.2, 1]",
        "8.250",
        "Provenance: command, versions and machines of 2 starts Start 2 commit c0ffee",
        "Start 1 what differs from the next one command ig-dist train a.yaml",
        "global_batch_size: 32",
    ):
        assert expected in page.text, expected
    assert "Model FLOPs utilisation" not in page.text and "not of the newest" not in page.text
    assert page.tags["img"] == 5  # the sweep's grid, three plans, the nearest ones
    order = [
        page.text.index(f" {name} ") for name in ("Over the guidance scale", "Samples", "Learning rate", "Config:")
    ]
    assert order == sorted(order)  # what a reader wants first stands first


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run")
    page = read(run)
    for command in (
        f"ig-dist train '{run}'/config.yaml run.dir='{run}' log.sample_every_steps=80",
        f"ig-dist sample '{run}'",
        f"ig-dist sweep '{run}'",
    ):
        assert command in page.text, command
    assert not page.tags["img"] and "Protocol" not in page.text and "Best" not in page.text
    assert "no index can be read there" in page.text and "Processes" not in page.text
    add_sweep(run, {**sweep_of([1.0, 2.0], [1.0]), "protocol": {**PROTOCOL, "step": 300}})
    assert "scores are of step 300, not of the newest" in read(run).text
    assert "The newest sweep is of step 300, the newest checkpoint of step 400" in read(run).text


def test_sweeps_are_shown_each_the_newest_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name, scale, written in (("new", 1.5, "2026-11-26T04:00:00+00:00"), ("old", 3.0, "2026-11-25T04:00:00+00:00")):
        draw(add_sweep(run, {**sweep_of([1.0, scale], [1.0]), "written": written}, name) / "grid.png")
    (run / "sweep.json").write_text((run / "sweeps" / "new" / "sweep.json").read_text())  # a copy counts once
    page = read(run)
    assert page.tags["img"] == 2 and page.text.count("Protocol of every score above") == 2
    assert page.text.index("Over the guidance scale new,") < page.text.index("Earlier: old,")
    assert "Best fd_pixel 0.3000 at IG 1.5" in page.text
    earlier = make_run(tmp_path / "earlier version")
    (earlier / "sweep.json").write_text(json.dumps(sweep_of([1.0, 1.4], [1.0])))
    draw(earlier / "grid.png")
    page = read(earlier)
    assert "Best fd_pixel 0.3100" in page.text and page.tags["img"] == 1


def test_pictures_of_a_run_in_progress_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with closing(RunLog(run, start=400, total=800, name="train")) as log:
        for step in range(410, 530, 10):
            log.add_picture(step, np.full((8, 80, 1), 99, np.uint8))
    page = read(run)
    assert page.tags["img"] == 8 and {"samples at step 410", "samples at step 520"} <= set(page.alts)
    assert "While training Unguided. The same noise in each column." in page.text
    assert page.tags["input"] == 8  # each is enlarged by a click


def test_a_large_picture_is_embedded_as_jpeg_and_a_damaged_one_left_out(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    large = embedded(tmp_path / "large.png", "", "")
    assert large and large.uri.startswith("data:image/jpeg") and not large.small
    (tmp_path / "cut.png").write_bytes((tmp_path / "large.png").read_bytes()[:20])
    assert embedded(tmp_path / "cut.png", "", "") is None


def test_hostile_names_are_text(tmp_path: Path) -> None:
    sweep = sweep_of([1.0, 2.0], [1.0])
    sweep["protocol"] = {HOSTILE: HOSTILE, "tokenizer_sha256": HOSTILE}
    for row in sweep["rows"]:
        row["scores"] = {HOSTILE: row["ig_scale"], f"fd {HOSTILE}": row["ig_scale"]}
    run = make_run(tmp_path / HOSTILE.replace("/", "|"), sweep=sweep, data=HOSTILE.replace("http:", ""))
    add_results(run)
    add_lines(run / "provenance.jsonl", {HOSTILE: HOSTILE})
    draw(run / "samples" / f"{HOSTILE.replace('/', '|')}.png")
    page = read(run)
    assert page.tags["img"] == 4
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
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no metrics" in done.stderr
    assert "ig-dist train" in done.stderr
    for damaged in ("{", '{"rows": []}', '{"rows": [{"ig_scale": 1}]}', "[]"):
        run = make_run(tmp_path / f"run{len(damaged)}", sweep={})
        (run / "sweeps" / "ig_scale-01234567" / "sweep.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"sweep.json is damaged.*ig-dist sweep"):
            write_report(run)
    with pytest.raises(ConfigError, match="--out"):
        write_report(make_run(tmp_path / "good"), tmp_path)


def test_the_verb(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "new" / "page.html"
    done = run_command(["ig-dist", "report", run, "--out", out])
    assert done.returncode == 0 and str(out) in done.stdout, done.stderr
    assert out.read_text().startswith("<!DOCTYPE html>") and not (run / "report.html").exists()


def test_where_the_time_went_and_what_each_save_took(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", peak_memory_bytes=3 * 2**30)
    assert "goodput" not in read(run).ids
    spent = {"start-up": 60.0, "step": 400.0}
    again = {"start-up": 60.0, "step": 600.0, "data": 78.0}
    add_lines(
        run / "goodput.jsonl",
        {"began": 0.0, "from_step": 0, "step": 0, "seconds": {"start-up": 60.0}},
        {"began": 0.0, "from_step": 0, "step": 200, "seconds": spent},
        {"began": 600.0, "from_step": 100, "step": 100, "seconds": {"start-up": 60.0}},
        {"began": 600.0, "from_step": 100, "step": 300, "seconds": {**again, "checkpoint": 0.5}},
        {"began": 600.0, "from_step": 100, "step": 310, "seconds": {**again, "checkpoint": 0.5004}},
        {"began": 600.0, "from_step": 100, "step": 400, "seconds": {**again, "checkpoint": 2.0}},
    )
    add_lines(
        run / "metrics.jsonl", {"step": 390, "images_seen": 1, "loss": 1, "images_per_s": 1, "checkpoint_write_s": 7}
    )
    html = write_report(run).read_text()
    assert "the loop stands still, step 300: 0.5 s" in html and "the loop stands still, step 400: 1.5 s" in html
    assert "written meanwhile, step 300: 7 s" in html and "step 310" not in html
    page = read(run)
    assert "Where the time went 20 min 0 s in 2 starts" in page.text
    assert "training 66.7% 13 min 20 s lost work 16.7% 3 min 20 s start-up 10.0% 2 min 0 s" in page.text
    assert "waiting for data 6.5% 1 min 18 s" in page.text and "compilation" not in page.text
    assert "100 steps were done again; 2 min 20 s lie between the starts" in page.text
    assert "width:66.7%" in page.styles
    assert "Peak memory GiB, of the rank that took most" in page.text


def test_validation_and_scores_while_training_are_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_lines(run / "metrics.jsonl", *({"step": s, "val_loss": 1 / s, "val_loss_final": 0.5 / s} for s in (10, 20)))
    add_lines(run / "metrics.jsonl", *({"step": s, "score_fid": 100 / s, "score_num": 5000} for s in (10, 20)))
    (run / "evaluations" / "training").mkdir(parents=True)
    told = json.dumps({"scores": {"fid": 5.0}, "protocol": {**PROTOCOL, "step": 20}})
    (run / "evaluations" / "training" / "step_0000000020.json").write_text(told)
    page = read(run)
    assert "Protocol of the scores while training" in page.text
    assert "Validation loss" in page.text and "fid over steps lower is better, N = 5,000" in page.text
    assert "fid 5.000 at step 20, N = 5,000" in page.text  # no sweep has better to say
    assert "Steps 400" in page.text  # lines of scores are not lines of steps
