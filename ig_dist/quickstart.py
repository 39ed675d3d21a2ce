"""The quickstart: the commands of a real run, one after the other, on real digits. Each is shown before it runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ig_dist.errors import IgDistError
from ig_dist.terminal import console

CONFIG = "digits"
IG_SCALES = "1.0,1.2,1.4,1.7,2.0,2.5"
STEPS = 900
PREEMPTED = 75


def run_quickstart(out: Path, *, short: bool) -> None:
    """Encode, train, preempt, resume, export, sweep, report, and show."""
    began = time.monotonic()
    data, run = out / "data", out / "run"
    steps = STEPS // 5 if short else STEPS
    sampling = [f"sample.precision={_sampling_precision()}", *(["sample.num=600"] if short else [])]
    train = ["ig-dist", "train", CONFIG, f"run.dir={run}", f"data.index={data}", f"train.steps={steps}"]
    if short:  # the average must forget the initial weights within the run
        train.append("ema.decays=[0.97]")

    _say(
        "1. Encode",
        "1,797 real 8 x 8 digits become latents in WebDataset shards, with an index. Larger images would pass through"
        " a VAE here; these are their own latents.",
    )
    _run(["ig-dist", "encode", "--source", "digits", "--dest", str(data), "--tokenizer", "pixel"])

    _say(
        "2. Train with Internal Guidance, and interrupt it",
        "A small SiT with an auxiliary head after block 2 of 6; both heads learn the velocity. After a third of the"
        " steps we send SIGTERM, as a cluster does when it wants the machine back.",
    )
    interrupted = _run_until(train, run / "metrics.jsonl", stop_at=steps // 3)

    if interrupted:
        _say(
            "3. Resume",
            "The same command again. It goes on from the saved step, with the same data order, and ends with bitwise"
            " the weights of a run that was never stopped.",
        )
        _run(train)

    _say("4. Export", "The moving average of the weights as safetensors, with all that sampling needs.")
    _run(["ig-dist", "export", str(run)])

    _say(
        "5. Sample and score at six guidance scales",
        "Every scale starts from the same noise. Scale 1 is unguided; above, each step moves away from what the weak"
        " auxiliary head predicts. FD is the Frechet distance to the real digits on raw pixels: lower is better.",
    )
    _run(["ig-dist", "sweep", str(run), *sampling, "--ig-scale", IG_SCALES])

    real = _real_features(run, short=short)

    _say("6. Report", "What ran, the curves, the pictures and the scores with their protocol, in one HTML file.")
    _run(["ig-dist", "report", str(run)])
    _conclude(run, data, time.monotonic() - began, real)


def _real_features(run: Path, *, short: bool) -> str:
    """Score the unguided and the best scale with a network's features, where the weights of one are at hand.

    Returns:
        What the user may add.
    """
    from ig_dist.evaluation.extractors.weights import PUBLISHED, at_hand

    metrics = {"inception": "fid,precision,recall", "efficientnet_lite0": "fd_efficientnet,precision_efficientnet"}
    known = next((name for name in metrics if at_hand(PUBLISHED[name])), None)
    if known is not None:
        _say(
            f"5b. Score with the features of {known}",
            "The unguided samples and the best ones once more, now as a network trained on ImageNet sees them. The"
            " network has never seen digits of 8 x 8 pixels, so these numbers say less than they do for photographs.",
        )
        rows = json.loads((run / "sweep.json").read_text(encoding="utf-8"))["rows"]
        best = min(rows, key=lambda row: float(row["scores"]["fd_pixel"]))
        num = ["--num", "300"] if short else []
        for row in (rows[0], best):
            _run(["ig-dist", "evaluate", str(run / "samples" / row["plans"][0]), "--metrics", metrics[known], *num])
    if known == "inception":
        return ""
    return """
FID, sFID, IS, precision, recall and KID need the weights of Inception, once (95 MB):
  ig-dist evaluate {run}/samples/PLAN --metrics fid,precision,recall    downloads them, or says where to put them
"""


def _conclude(run: Path, data: Path, seconds: float, more: str) -> None:
    sweep = json.loads((run / "sweep.json").read_text(encoding="utf-8"))
    rows = sorted(sweep["rows"], key=lambda row: float(row["ig_scale"]))
    best = min(rows, key=lambda row: float(row["scores"]["fd_pixel"]))
    ratio = float(best["scores"]["fd_pixel"]) / float(rows[0]["scores"]["fd_pixel"])
    _say("Done", f"IG scale {best['ig_scale']:g} has {ratio:.2f} of the unguided distance. {seconds / 60:.1f} minutes.")
    console.print(
        f"""
Look at
  {run}/report.html    all of it on one page: open it in a browser
  {run}/grid.png       digits at every scale, the same noise in every column
  {run}/sweep.png      distance against scale
  {run}/sweep.json     the scores and their protocol
  tensorboard --logdir {run}/tensorboard

Try next (after `source .venv/bin/activate`)
  ig-dist sample {run} --ig-scale 1.4 --num 100
  ig-dist sweep {run} --cfg-scale 1.0,1.5 --ig-scale 1.0,1.4
  ig-dist train {CONFIG} data.index={data} run.dir=runs/deeper model.aux_depth=4
  ig-dist launch --processes 2 {CONFIG} data.index={data} run.dir=runs/two
{more.format(run=run)}The README says more about each."""
    )


def _sampling_precision() -> str:
    """bf16 where the hardware has it: a third faster on such a CPU (training at this size is not)."""
    import torch

    return "bf16" if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() else "fp32"


def _say(title: str, text: str) -> None:
    console.print()
    console.rule(f"[bold]{title}", align="left")
    console.print(text)


def _command(command: list[str]) -> list[str]:
    """The command as typed, run by this interpreter."""
    console.print(f"[dim]$ {' '.join(command)}[/dim]")
    return [sys.executable, "-m", "ig_dist.cli", *command[1:]]


def _run(command: list[str]) -> None:
    _check(command, subprocess.run(_command(command), check=False).returncode)


def _check(command: list[str], code: int) -> None:
    if code:
        error = IgDistError(f"`{' '.join(command)}` ended with exit code {code}; its message is above")
        error.exit_code = code
        raise error


def _run_until(command: list[str], metrics: Path, stop_at: int) -> bool:
    """Run training and send SIGTERM once it has logged step ``stop_at``; whether that ended it.

    A run that an earlier quickstart took beyond that step is only finished.
    """
    if _last_step(metrics) >= stop_at:
        _run(command)
        return False
    process = subprocess.Popen(_command(command))
    try:
        while process.poll() is None and _last_step(metrics) < stop_at:
            time.sleep(0.1)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
    except BaseException:
        process.kill()
        raise
    if code != PREEMPTED:
        _check(command, code)
    return code == PREEMPTED


def _last_step(metrics: Path) -> int:
    if not metrics.exists():
        return 0
    lines = metrics.read_text(encoding="utf-8").splitlines()
    try:
        last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    except ValueError:  # being written
        return 0
    return int(last.get("step", 0))
