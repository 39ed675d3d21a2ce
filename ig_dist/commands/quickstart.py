"""The quickstart: the commands of a real run, one after the other, on real digits. Each is shown before it runs."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from rich.text import Text

from ig_dist.commands.options import flag, option
from ig_dist.errors import ConfigError, IgDistError
from ig_dist.storage.json_lines import read_lines
from ig_dist.terminal import console

CONFIG = "digits"
IG_SCALES = "1.0,1.2,1.4,1.7,2.0,2.5"
STEPS = 900
PREEMPTED = 75
SAVING_S = 30.0


def quickstart(
    out: Annotated[Path, option("FOLDER", "For all that it makes.")] = Path("quickstart"),
    short: Annotated[bool, flag("--short", "A fifth of the training, a third of the images.")] = False,
) -> None:
    """Run the whole system on real digits, in about six minutes."""
    from ig_dist.config.file import load_run

    began = time.monotonic()
    data, run = out / "data", out / "run"
    steps = STEPS // 5 if short else STEPS
    if (run / "config.yaml").exists() and (other := load_run(run).train.steps) != steps:
        raise ConfigError(f"{out} holds a quickstart of {other} steps, this one has {steps}: give another --out")
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

    model = "A small SiT with an auxiliary head after block 2 of 6; both heads learn the velocity."
    done, stop_at = _last_step(run / "metrics.jsonl"), steps // 3
    if done >= stop_at:
        _say(
            "2, 3. Train with Internal Guidance",
            f"{model} An earlier quickstart took it to step {done} of {steps}: the same command "
            + ("finds nothing to do." if done >= steps else "goes on from the newest checkpoint."),
        )
        _run(train)
    else:
        _say(
            "2. Train with Internal Guidance, and interrupt it",
            f"{model} After a third of the steps we send SIGTERM, as a cluster does when it wants the machine back.",
        )
        if _run(train, lambda: _last_step(run / "metrics.jsonl") >= stop_at) == PREEMPTED:
            _say(
                "3. Resume",
                "The same command again. It goes on from the saved step, with the same data order, and ends with"
                " bitwise the weights of a run that was never stopped.",
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
    from ig_dist.features.extractors.weights import PUBLISHED, at_hand

    metrics = {"inception": "fid,precision,recall", "efficientnet_lite0": "fd_efficientnet,precision_efficientnet"}
    known = next((name for name in metrics if at_hand(PUBLISHED[name])), None)
    if known is not None:
        _say(
            f"5b. Score with the features of {known}",
            "The unguided samples and the best ones once more, now as a network trained on ImageNet sees them. The"
            " network has never seen digits of 8 x 8 pixels, so these numbers say less than they do for photographs.",
        )
        _, rows, best = _newest_sweep(run)
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
    folder, rows, best = _newest_sweep(run)
    ratio = float(best["scores"]["fd_pixel"]) / float(rows[0]["scores"]["fd_pixel"])
    _say("Done", f"IG scale {best['ig_scale']:g} has {ratio:.2f} of the unguided distance. {seconds / 60:.1f} minutes.")
    typed, index = shlex.quote(str(run)), shlex.quote(f"data.index={data}")
    here = Path(sys.prefix) / "bin/activate"
    activate = "" if shutil.which("ig-dist") else f" (after `source {shlex.quote(str(here))}`)"
    console.print(
        f"""
Look at
  {run}/report.html: all of it on one page, open it in a browser
  {folder}/grid.png: digits at every scale, the same noise in every column
  {folder}/sweep.png: distance against scale
  {folder}/sweep.json: the scores and their protocol
  tensorboard --logdir {typed}/tensorboard

Try next{activate}
  ig-dist sample {typed} --ig-scale 1.4 --num 100
  ig-dist sweep {typed} --cfg-scale 1.0,1.5 --ig-scale 1.0,1.4
  ig-dist train {CONFIG} {index} run.dir=runs/deeper model.aux_depth=4
  ig-dist launch --processes 2 {CONFIG} {index} run.dir=runs/two
{more.format(run=typed)}The README says more about each."""
    )


def _newest_sweep(run: Path) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    """The folder of the sweep that was written last, this quickstart's, its points by scale, and the best one."""
    file = max(run.glob("sweeps/*/sweep.json"), key=lambda file: file.stat().st_mtime)
    rows = sorted(json.loads(file.read_text(encoding="utf-8"))["rows"], key=lambda row: float(row["ig_scale"]))
    return file.parent, rows, min(rows, key=lambda row: float(row["scores"]["fd_pixel"]))


def _sampling_precision() -> str:
    """bf16 where the hardware has it: a third faster on such a CPU (training at this size is not)."""
    import torch

    return "bf16" if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() else "fp32"


def _say(title: str, text: str) -> None:
    console.print()
    console.rule(Text(title, "bold"), align="left")
    console.print(text)


def _command(command: list[str]) -> list[str]:
    """The command as typed, run by this interpreter."""
    console.print(f"$ {shlex.join(command)}", style="dim")
    # -m would put the working directory first, and a file of the user's called random.py with it
    safe = [] if {"", str(Path.cwd())} & set(sys.path) else ["-P"]
    return [sys.executable, *safe, "-m", "ig_dist.cli", *command[1:]]


def _run(command: list[str], enough: Callable[[], bool] | None = None) -> int:
    """Run a command to its end; its exit code, which is 0 unless it got a SIGTERM, once there was ``enough``.

    Raises:
        IgDistError: it failed, with its exit code.
    """
    process = subprocess.Popen(_command(command))
    try:
        while enough and process.poll() is None:
            if enough():
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.1)
        code = process.wait()
    except KeyboardInterrupt:  # a terminal sends it to the command too, which says what it has saved
        with suppress(subprocess.TimeoutExpired):
            process.wait(SAVING_S)
        raise
    finally:
        process.kill()
    if code and not (enough and code == PREEMPTED):
        error = IgDistError(f"`{' '.join(command)}` ended with exit code {code}; its message is above")
        error.exit_code = code
        raise error
    return code


def _last_step(metrics: Path) -> int:
    return max((int(line.get("step") or 0) for line in read_lines(metrics)), default=0)
